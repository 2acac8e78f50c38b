"""Checkpoints: a safetensors file with the state, masks included, and JSON facts in its header; whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..data.cache import atomic_write
from ..pruning.masks import set_mask_

_FORMAT = "sparseflow-checkpoint-1"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or is not of this module."""


def save_checkpoint(path: str | Path, module: nn.Module, facts: dict[str, Any] | None = None) -> None:
    """Write the module's state (parameters, masks, buffers) and JSON-able `facts` to `path`, atomically."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    with atomic_write(Path(path)) as temporary:
        save_file(state, temporary, metadata={"format": _FORMAT, "facts": json.dumps(facts or {})})


def load_checkpoint(path: str | Path, module: nn.Module) -> dict[str, Any]:
    """Load `path` into `module` in place and return the facts. A dense module is given the masks the checkpoint has.

    Raises FileNotFoundError, or CheckpointError for a file that is no checkpoint, has other tensors than the module, or
    lacks masks the module has (a pruned module cannot become dense again: build a new one). The module is unchanged
    then.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of this package")

    masked = {name.removesuffix("_mask") for name in state if name.endswith("_mask") and f"{name[:-5]}_orig" in state}
    own = {}
    for name, tensor in module.state_dict().items():
        own[f"{name}_orig" if name in masked else name] = tensor.shape
    own |= {f"{name}_mask": own[f"{name}_orig"] for name in masked if f"{name}_orig" in own}
    given = {name: tensor.shape for name, tensor in state.items()}
    if own != given:
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise CheckpointError(
            f"{path} is not of this module; {len(wrong)} tensors are missing or of another shape on one side: "
            f"{', '.join(wrong[:6])}{', ...' if len(wrong) > 6 else ''}"
        )
    for name in sorted(masked):
        owner, _, parameter = name.rpartition(".")
        part = module.get_submodule(owner)
        mask = part._buffers.get(f"{parameter}_mask")
        if mask is None:
            set_mask_(part, parameter, torch.zeros_like(part._parameters[parameter], dtype=torch.bool))
    module.load_state_dict(state)
    for name in masked:  # the plain attributes are products of what was just loaded
        owner, _, parameter = name.rpartition(".")
        part = module.get_submodule(owner)
        set_mask_(part, parameter, part._buffers[f"{parameter}_mask"] != 0)
    return json.loads(metadata["facts"])
