"""What a module holds beside parameters and buffers, and forward may read: plain attributes, and what its functions
close over."""

from __future__ import annotations

import types
from typing import Any, Mapping

import torch
from torch import Tensor, nn

from .capture.context import PREFIX, inside
from .counting import TORCHS, Counters
from .packing import Snapshot, strided
from .written import function_of, is_torchs, methods_of, only_written, plain_of

DEEPEST = 4  # containers in containers
_SETTINGS = (bool, int, float, str, tuple, type(None))
LONGEST = 64  # items of one: longer ones are records of what happened


class Attributes:
    """The attributes of a module's own parts as they were. What forward itself writes (it counts its calls, say) is
    left out, and so are tensors whose numbers the field reads at every call, but for their shape. parts: those that are
    watched, with their paths.  followed: names of such tensors (`live.Watch`).  unread: names of tensors that forward
    never reads.  counters: what the module counts."""

    def __init__(
        self, parts: list[tuple[str, nn.Module]], followed: Mapping[str, int], unread: frozenset[str],
        counters: Counters | None,
    ) -> None:  # fmt: skip
        self._followed, self._unread = followed, unread
        self._written = [
            frozenset() if is_torchs(type(part)) else only_written(part).union(counters.of(part) if counters else ())
            for _, part in parts
        ]
        self._classes = []  # what classes hold in the place of their modules
        for kind, methods in methods_of(type(part) for _, part in parts).items():
            others = [(name, one) for name, one in methods if name != "forward" or one is not kind]
            if (plain := plain_of(kind)) or others:
                self._classes.append((kind.__qualname__, others, plain))
        self.look_at(parts)
        # An `eps`, a `negative_slope`.
        self._settings = [
            {key: value for key, value in part.__dict__.items() if key not in TORCHS and isinstance(value, _SETTINGS)}
            | {"forward": part.__dict__.get("forward")}
            for part in self._torchs
        ]
        self._stamps, tensors = self._present()
        self._tensors = Snapshot(tensors) if tensors else None

    def look_at(self, parts: list[tuple[str, nn.Module]]) -> None:
        """Watches these parts in the place of those under the same paths."""
        self._torchs = [part for _, part in parts if is_torchs(type(part))]
        self._parts = [
            (path, part, written) for (path, part), written in zip(parts, self._written) if not is_torchs(type(part))
        ]
        # Each of them is watched for itself, so that another one in its place is none.
        self._numbers = {
            part: number for number, (_, part) in enumerate(parts)
            if all(parameter is None for parameter in part._parameters.values())
        }  # fmt: skip

    def same(self) -> bool:
        for part, settings in zip(self._torchs, self._settings):
            held = part.__dict__
            for key, value in settings.items():
                if held.get(key) is not value and held.get(key) != value:
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
        for kind, methods, plain in self._classes:
            for name, holder in methods:
                self._stamp(f"{kind}.{name}()", function_of(holder, name), 2, stamps, tensors)
            for holder, name in plain:
                self._stamp(f"{kind}.{name}", vars(holder).get(name), 2, stamps, tensors)
        return stamps, tensors

    def _stamp(self, name: str, value: Any, depth: int, stamps: list, tensors: list[Tensor]) -> None:
        if isinstance(value, Tensor):
            if (free := self._followed.get(name)) is not None:
                stamps += (name, *kind_of(value, free))
            elif not value.is_meta and name not in self._unread:
                stamps += (name, value.requires_grad)
                tensors += strided(value.detach())
        elif value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device)):
            stamps += (name, type(value), value if value == value else None)
        elif type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
            stamps += (name, value.tobytes() if value.nbytes < 1 << 16 else value.shape)
        else:
            stamps += (name, self._which(value))
            if not depth or isinstance(value, (nn.Module, type, types.ModuleType)):
                return
            items = list(inside(value))
            stamps.append(len(items))
            for key, item in items if len(items) <= LONGEST else ():
                self._stamp(f"{name}/{key}", item, depth - 1, stamps, tensors)

    def _which(self, value: Any) -> Any:
        """What tells an object from another one that holds the same: a function's code, the place of a module that is
        watched, what has no parts itself, else the type."""
        if isinstance(value, (types.FunctionType, types.MethodType)):
            return getattr(value, "__code__", value)  # a method may be of a function that is not Python's
        if isinstance(value, nn.Module):
            return self._numbers.get(value, value)
        whole = isinstance(value, (type, types.ModuleType))
        return value if whole or (callable(value) and not hasattr(value, "__dict__")) else type(value)


def kind_of(value: Tensor | None, free: int) -> tuple:
    """What has to stay as it is of a tensor whose numbers are read at every call. free: first axes that may have
    another size; then the numbers are converted, too."""
    return () if value is None else (None if free else value.dtype, *value.shape[free:])
