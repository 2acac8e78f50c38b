"""`torch.nn.utils.prune` masks, read and written in one place, and which parameters can have one.

A masked parameter `name` lives in its module as the parameter `name_orig` and the buffer `name_mask`; the attribute
`name` is their product as of the last forward pass, so it is stale after an optimizer step. Everything here therefore
reads the product itself.
"""

from __future__ import annotations

import copy
from typing import Iterable, Iterator, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_Module = TypeVar("_Module", bound=nn.Module)


def check_has_numbers(which: str, parameter: Tensor | None) -> None:
    """Raises ValueError for a parameter of a lazy layer, or on the meta device. which: it, for people."""
    if parameter is None:
        return
    if nn.parameter.is_lazy(parameter):
        raise ValueError(f"{which} has no size yet; call the module once, for its lazy layers")
    if parameter.is_meta:
        raise ValueError(f"{which} is on the meta device; materialise the module first")


def effective(module: nn.Module, name: str) -> Tensor:
    """The parameter `name` of this very module as its forward uses it: masks and parametrizations applied, detached.
    Raises ValueError for one that has no numbers yet."""
    original = module._parameters.get(f"{name}_orig")
    held = module._parameters.get(name) if original is None else original
    check_has_numbers(f"the {name} of {type(module).__name__}", held)
    if original is not None and f"{name}_mask" in module._buffers:
        return original.detach() * module._buffers[f"{name}_mask"]
    for hook in module._forward_pre_hooks.values():  # their attribute is of the last forward pass, too
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == name:
            with torch.no_grad():
                if isinstance(hook, WeightNorm):
                    return hook.compute_weight(module)
                return hook.compute_weight(module, do_power_iteration=False)
    return getattr(module, name).detach()


def effective_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor as used) of every parameter in `module`, shared ones once, masked ones under their plain name."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        if isinstance(part, parametrize.ParametrizationList):
            continue  # its owner yields the parametrized tensor
        names = [
            name.removesuffix("_orig") if f"{name.removesuffix('_orig')}_mask" in part._buffers else name
            for name, parameter in part._parameters.items()
            if parameter is not None
        ]
        if parametrize.is_parametrized(part):
            names += list(part.parametrizations)
        for name in names:
            parameter = part._parameters.get(f"{name}_orig", part._parameters.get(name))
            if parameter is not None:
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
            yield (f"{prefix}.{name}" if prefix else name), effective(part, name)


def set_mask_(module: nn.Module, name: str, mask: Tensor) -> None:
    """Multiply the mask of parameter `name` by a bool `mask`. Masks compose: an entry once pruned stays pruned."""
    check_maskable(module, name)
    current = module._buffers.get(f"{name}_mask")
    if current is None:
        if bool(mask.all()):
            return
        prune.custom_from_mask(module, name, mask.to(getattr(module, name).device))
    else:  # one container of methods per call would grow without end over a long schedule; the product is the same
        current.mul_(mask.to(current))
    setattr(module, name, effective(module, name))  # a graph-free value, so that the module can be deep-copied


class _Refresh:
    """A forward pre-hook of a field: makes a masked parameter of one of its parts anew."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: tuple) -> None:
        mask = self.owner._buffers.get(f"{self.name}_mask")
        if mask is not None:
            original = self.owner._parameters[f"{self.name}_orig"]
            setattr(self.owner, self.name, mask.to(original) * original)


def refresh_(field: nn.Module, part: nn.Module) -> None:
    """Let calls of `field` make the masked parameters of `part` anew: torch's masks do so where `part` itself is
    called, and a parameter that is read past it (`F.linear(x, self.layer.weight)`, an nn.ParameterList) would stay as
    it was."""
    known = {(id(h.owner), h.name) for h in field._forward_pre_hooks.values() if isinstance(h, _Refresh)}
    for name in _masked(part):
        if (id(part), name) not in known:
            field.register_forward_pre_hook(_Refresh(part, name))


def _masked(part: nn.Module) -> list[str]:
    names = [name.removesuffix("_mask") for name in part._buffers if name.endswith("_mask")]
    return [name for name in names if f"{name}_orig" in part._parameters]


def check_maskable(module: nn.Module, name: str, path: str = "") -> None:
    """Raises ValueError where `name` is not a parameter, masked or not, that the module uses as it is; path: the
    module's."""
    where = f"{path or type(module).__name__}.{name}"
    if parametrize.is_parametrized(module, name):
        parts = module.get_submodule(f"parametrizations.{name}").children()
        kinds = ", ".join(type(part).__name__.lstrip("_") for part in parts)
        raise ValueError(
            f"cannot prune {where}: it has a parametrization ({kinds}), which would make the pruned entries anew; make "
            f'it plain first: torch.nn.utils.parametrize.remove_parametrizations(layer, "{name}")'
        )
    if isinstance(module, parametrize.ParametrizationList):
        raise ValueError(
            f"cannot prune {path or 'a parameter'}: a parametrization makes the parameter out of it; make that plain "
            "first with torch.nn.utils.parametrize.remove_parametrizations"
        )
    hooks = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
    for hook in module._forward_pre_hooks.values():
        kind, of = type(hook).__name__, getattr(hook, "name", None)
        if kind in hooks and name in (of, f"{of}_g", f"{of}_v", f"{of}_orig"):
            raise ValueError(
                f"cannot prune {where}: the {kind} of torch.nn.utils makes it anew at every call; make it plain first: "
                f'torch.nn.utils.{hooks[kind]}(layer, "{of}")'
            )
    masked = f"{name}_orig" in module._parameters and f"{name}_mask" in module._buffers
    if not masked and module._parameters.get(name) is None:
        raise ValueError(
            f"cannot prune {where}: it is no parameter of its module, but computed; prune before it is, or make it a "
            "torch.nn.Parameter"
        )


def copy_module(module: _Module) -> _Module:
    """copy.deepcopy of a module that has pruning masks (plain deepcopy refuses one after a forward pass)."""
    for part in module.modules():
        for name in _masked(part):
            setattr(part, name, effective(part, name))
    return copy.deepcopy(module)


def remove_masks_(module: _Module) -> _Module:
    """Make every mask permanent: the zeros are written into plain parameters and can be trained again."""
    for part in module.modules():
        for name in _masked(part):
            prune.remove(part, name)
        for key in [key for key, hook in part._forward_pre_hooks.items() if isinstance(hook, _Refresh)]:
            del part._forward_pre_hooks[key]
    return module


def live_mask(layer: nn.Module, name: str = "weight") -> Tensor:
    """bool, shaped like the parameter: its non-zero entries as the forward pass sees them."""
    return effective(layer, name) != 0


def count(masks: Iterable[Tensor]) -> int:
    return sum(int(torch.count_nonzero(mask)) for mask in masks)
