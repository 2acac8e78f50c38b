"""What a module holds beside parameters and buffers, and forward may read: plain attributes, and what its functions
close over."""

from __future__ import annotations

import dis
import types
from typing import Any

import torch
from torch import Tensor, nn

from .capture.context import PREFIX, items_of
from .counting import TORCHS, Counters
from .packing import Snapshot, strided

DEEPEST = 4  # containers in containers
_SETTINGS = (bool, int, float, str, tuple, type(None))
LONGEST = 64  # items of one: longer ones are records of what happened


class Attributes:
    """The attributes of a module's own parts as they were. What forward itself writes (it counts its calls, say) is
    left out, and so is the field's context, which it reads at every call. parts: the modules that are watched.
    context: names of its tensors.  counters: what the module counts."""

    def __init__(
        self, module: nn.Module, parts: list[nn.Module], context: frozenset[str], counters: Counters | None
    ) -> None:  # fmt: skip
        self._context = context
        paths = {part: path for path, part in module.named_modules()}
        torchs = [part for part in parts if type(part).__module__.startswith("torch.")]
        self._parts = [
            (paths[part], part, _written_by(type(part).forward) | (counters.of(part) if counters else frozenset()))
            for part in parts if part not in torchs
        ]  # fmt: skip
        self._settings = [
            (part.__dict__, key, value) for part in torchs
            for key, value in part.__dict__.items() if key not in TORCHS and isinstance(value, _SETTINGS)
        ]  # an `eps`, a `negative_slope`
        self._settings += [(part.__dict__, "forward", part.__dict__.get("forward")) for part in torchs]
        self._stamps, tensors = self._present()
        self._tensors = Snapshot(tensors) if tensors else None

    def same(self) -> bool:
        if any(held.get(key) is not value and held.get(key) != value for held, key, value in self._settings):
            return False
        stamps, tensors = self._present()
        return stamps == self._stamps and (self._tensors is None or self._tensors.same(tensors))

    def _present(self) -> tuple[list, list[Tensor]]:
        stamps: list[Any] = []
        tensors: list[Tensor] = []
        for path, part, written in self._parts:
            for key, value in part.__dict__.items():
                if key not in TORCHS and key not in written:
                    self._stamp(f"{PREFIX}{path}/{key}", value, DEEPEST, stamps, tensors)
            self._stamp(f"{PREFIX}{path}/forward", part.forward, 2, stamps, tensors)
        return stamps, tensors

    def _stamp(self, name: str, value: Any, depth: int, stamps: list, tensors: list[Tensor]) -> None:
        if isinstance(value, Tensor):
            if name not in self._context and not value.is_meta:
                stamps.append(name)
                tensors += strided(value.detach())
        elif value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
            stamps += (name, type(value), value if value == value else None)
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            stamps += (name, value.tobytes() if value.nbytes < 1 << 16 else value.shape)
        else:
            stamps += (name, _which(value))
            if not depth or isinstance(value, (nn.Module, type, types.ModuleType)):
                return
            items = list(items_of(value)) or list(getattr(value, "__dict__", {}).items())
            stamps.append(len(items))
            for key, item in items if len(items) <= LONGEST else ():
                self._stamp(f"{name}/{key}", item, depth - 1, stamps, tensors)


def _which(value: Any) -> Any:
    """What tells an object from another one that holds the same: a function's code, what has no parts itself, else the
    type."""
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return getattr(value, "__code__", value)  # a method may be of a function that is not Python's
    whole = isinstance(value, (nn.Module, type, types.ModuleType))
    return value if whole or (callable(value) and not hasattr(value, "__dict__")) else type(value)


def _written_by(function: Any) -> frozenset[str]:
    """Names of attributes that a function assigns to."""
    code = getattr(function, "__code__", None)
    if code is None:
        return frozenset()
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")
