"""Checkpoints: one safetensors file with tensors, and JSON facts in its header; written whole or not at all.

A sha256 over tensors and facts is kept with them, so a file that was damaged is refused and not read as numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import atomic_write
from ..masks import refresh_, set_mask_
from ..pruning.chain import vector_fields

_FORMAT = "sparseflow-checkpoint-2"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or is not of this module or run."""


def write_state(path: str | Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able `facts` to `path`. Raises OSError if that fails; what was at `path` is then still
    there, unchanged."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(facts)
    with atomic_write(Path(path)) as temporary:
        try:
            save_file(state, temporary, metadata={"format": _FORMAT, "facts": text, "sha256": _digest(state, text)})
            with open(temporary, "rb+") as file:  # or a power cut could leave the new name on an empty file
                os.fsync(file.fileno())
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}; what was there before is unchanged") from error


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of `path`. Raises FileNotFoundError, or CheckpointError for a file that is no checkpoint or
    does not hold what was written."""
    if Path(path).is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {error}; delete it to go on without it"
        ) from error
    if metadata.get("format") != _FORMAT:
        found = metadata.get("format", "")
        what = "of another version of this package" if found.startswith("sparseflow-checkpoint") else "not a checkpoint"
        raise CheckpointError(f"{path} is a safetensors file, but {what}")
    if metadata.get("sha256") != _digest(state, metadata.get("facts", "")):
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one it was written with; delete it")
    return state, json.loads(metadata["facts"])


def _digest(state: dict[str, Tensor], facts: str) -> str:
    found = hashlib.sha256(facts.encode())
    for name in sorted(state):
        tensor = state[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_checkpoint(path: str | Path, module: nn.Module, facts: dict[str, Any] | None = None) -> None:
    """Write the module's state (parameters, masks, buffers) and JSON-able `facts` to `path`, atomically.

    Raises OSError (a full disk, no permission); what was at `path` is then unchanged.
    """
    write_state(path, module.state_dict(), facts or {})


def load_checkpoint(path: str | Path, module: nn.Module) -> dict[str, Any]:
    """Load `path` into `module` in place and return the facts. A dense module is given the masks the checkpoint has.

    Raises FileNotFoundError, or CheckpointError for a file that is no checkpoint or is damaged, has other tensors than
    the module, or lacks masks the module has (a pruned module cannot become dense again: build a new one). The module
    is unchanged then.
    """
    state, facts = read_state(path)
    load_module_state(module, state, str(path))
    return facts


def load_module_state(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict that may hold masks the module does not have yet; `source` names it in errors."""
    masked = {name.removesuffix("_mask") for name in state if name.endswith("_mask") and f"{name[:-5]}_orig" in state}
    own = {}
    for name, tensor in module.state_dict().items():
        own[f"{name}_orig" if name in masked else name] = (tensor.shape, tensor.dtype)
    own |= {f"{name}_mask": own[f"{name}_orig"] for name in masked if f"{name}_orig" in own}
    given = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    if own != given:
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise CheckpointError(
            f"{source} is not of this module; {len(wrong)} tensors are missing or of another shape or dtype on one "
            f"side: {', '.join(wrong[:6])}{', ...' if len(wrong) > 6 else ''}"
        )
    for name in sorted(masked):
        owner, _, parameter = name.rpartition(".")
        part = module.get_submodule(owner)
        mask = part._buffers.get(f"{parameter}_mask")
        if mask is None:
            set_mask_(part, parameter, torch.zeros_like(part._parameters[parameter], dtype=torch.bool))
    module.load_state_dict(state)
    for field in vector_fields(module) if masked else ():  # which of its parts are never called is not in a file
        for part in field.modules():
            refresh_(field, part)
    for name in masked:  # the plain attributes are products of what was just loaded
        owner, _, parameter = name.rpartition(".")
        part = module.get_submodule(owner)
        set_mask_(part, parameter, part._buffers[f"{parameter}_mask"] != 0)
