"""The tensors of one layer of a compiled field (of one part of a graph) as a module: what optimizers and state dicts
see."""

from __future__ import annotations

import hashlib
from typing import Any, Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .engines.reference import layer_output
from .field import Layer, Part
from .warn import warn


def zeroing(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that zeroes the gradient under the mask, which goes to the gradient's device once, not every time."""

    def hook(grad: Tensor) -> Tensor:
        nonlocal mask
        here = mask.to(grad.device)
        if not torch.compiler.is_compiling():  # what is copied there has no values
            mask = here
        return grad.masked_fill(here, 0)

    return hook


def lost(name: str) -> RuntimeError:
    return RuntimeError(
        f"the compiled field has lost its parameter {name!r} (torch.nn.utils.prune, weight_norm and parametrizations "
        "put others in its place); prune or parametrize the module, then compile it"
    )


class LayerParameters(nn.Module):
    """One layer's tensors, as parameters if they are trained and else as buffers: values, bias, gate.slope,
    gate.offset, shift.slope, shift.offset, without those that are made from `entries`; and the modules of its functions
    of time.

    Its state holds a digest of the layer's pattern: values in CSR order are another matrix under another pattern.
    """

    def __init__(
        self, layer: Layer | Part, parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor],
        functions: dict[str, nn.Module],
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer_name = layer.name
        self._pattern = layer.pattern
        self._made = {name for name, _ in layer.tensors()} - parameters.keys() - buffers.keys()
        for name, tensor in (parameters | buffers).items():
            owner, _, leaf = name.rpartition(".")
            if owner and owner not in self._modules:
                self.add_module(owner, nn.Module())
            target = self.get_submodule(owner)
            if isinstance(tensor, nn.Parameter):
                target.register_parameter(leaf, tensor)
            else:
                target.register_buffer(leaf, tensor)
        for name, function in functions.items():
            self.add_module(name, function)
        self._complete = True

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:
        if self.__dict__.get("_complete") and name not in self._parameters:  # torch.nn.utils.prune, parametrizations
            raise TypeError(
                f"{name!r} cannot be added to a layer of a compiled field: its engine would not see it. Prune or "
                "parametrize the module, then compile it"
            )
        super().register_parameter(name, parameter)

    def tensor(self, name: str) -> Tensor | None:
        """The tensor of this name; None if it is made from `entries`. Raises RuntimeError if it was taken out."""
        if name in self._made:
            return None
        owner, _, leaf = name.rpartition(".")
        module = self._modules[owner] if owner else self
        found = module._parameters.get(leaf, module._buffers.get(leaf))
        if found is None:
            raise lost(name)
        return found

    def _digest(self) -> Tensor:
        pattern = self._pattern
        found = hashlib.sha256(repr(None if pattern is None else pattern.shape).encode())
        for part in () if pattern is None else (pattern.row_ptr, pattern.col):
            found.update(part.numpy().tobytes())
        # Small whole numbers in floating point: states are averaged, scaled and cast, by code that knows no other
        # tensors.
        return torch.tensor(list(found.digest()), dtype=torch.float32)

    def get_extra_state(self) -> Tensor:
        return self._digest()

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: what does not fit was refused before."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        key = prefix + nn_module._EXTRA_STATE_KEY_SUFFIX
        if key not in state_dict:
            warn(
                f"{prefix}: this state does not say for which pattern of weights it is (it was saved by version 0.1.0, "
                "or parts of it are missing); it is right only if the field was compiled from the same masks"
            )
            state_dict = {**state_dict, key: self._digest()}
        elif not torch.equal(torch.as_tensor(state_dict[key]).detach().cpu().float().round(), self._digest()):
            errors.append(
                f"layer {self.layer_name!r} ({prefix.rstrip('.')}) has other masks: its weights stand elsewhere than "
                "those of the field that this state was saved from. Compile a module with those masks, then load"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors
        )  # fmt: skip

    def forward(self, t: Tensor, h: Tensor, layer: Layer) -> Tensor:
        """The layer's output, for those who hook it; engines do not come here."""
        return layer_output(layer, layer.weight, t, h)[0]
