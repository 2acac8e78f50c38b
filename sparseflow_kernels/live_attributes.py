"""What a module holds beside parameters and buffers, and forward may read: plain attributes, and what its functions
close over."""

from __future__ import annotations

import array
import contextlib
import contextvars
import copy
import ctypes
import functools
import logging
import marshal
import types
import weakref
from decimal import Decimal
from fractions import Fraction
from typing import Any, Mapping

import numpy
import torch
from torch import Tensor, nn

from .capture.context import PREFIX, functions_of_modules, inside, is_librarys
from .counting import KEPT, TORCHS, Counters
from .packing import Snapshot, strided
from .written import function_of, is_torchs, methods_of, names_of, only_written, plain_of

_WHOLE = frozenset(("getattr", "vars", "__dict__", "asdict", "astuple", "attrgetter", "fields"))  # read by other names
# Methods that no evaluation comes to by an operator.
_ASIDE = frozenset(f"__{name}__" for name in (
    "init", "new", "post_init", "del", "enter", "exit", "getstate", "setstate", "reduce", "setattr", "delattr",
    "init_subclass", "dir", "sizeof", "copy", "deepcopy",
))  # fmt: skip
DEEPEST = 8  # containers in containers
_WHOLE_VALUES = 2  # marshal's version that writes no references, which depend on who else holds a value
_OF_C = (ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
_SETTINGS = (bool, int, float, str, tuple, type(None))
_PLAIN = (
    bool, int, float, complex, str, bytes, range, slice, Fraction, Decimal, torch.dtype, torch.device, types.CodeType,
)  # fmt: skip
_COMMON = (list, tuple, dict, types.FunctionType, types.MethodType)
LONGEST = 1024  # items of one: longer ones are records of what happened


class Attributes:
    """The attributes of a module's own parts as they were. What forward itself writes (it counts its calls, say) is
    left out, and so are tensors whose numbers the field reads at every call, but for their shape. parts: those that are
    watched, with their paths.  followed: names of such tensors (`live.Watch`).  unread: names of tensors that forward
    never reads.  counters: what the module counts.  ties: numbers of the parameters that there are, by their ids."""

    def __init__(
        self, parts: list[tuple[str, nn.Module]], followed: Mapping[str, int], unread: frozenset[str],
        counters: Counters | None, ties: Mapping[int, int],
    ) -> None:  # fmt: skip
        self._followed, self._unread, self._ties = followed, unread, ties
        self._written = [
            frozenset() if is_torchs(type(part)) else only_written(part).union(counters.of(part) if counters else ())
            for _, part in parts
        ]
        counted = counters.of_classes() if counters else frozenset()
        self._classes = []  # what classes hold in the place of their modules
        for kind, methods in methods_of(type(part) for _, part in parts).items():
            others = [(name, one) for name, one in methods if name != "forward" or one is not kind]
            if (plain := [one for one in plain_of(kind) if one not in counted]) or others:
                self._classes.append((kind.__qualname__, others, plain))
        self.look_at(parts)
        # An `eps`, a `negative_slope`.
        self._settings = [
            {key: value for key, value in part.__dict__.items() if key not in TORCHS and isinstance(value, _SETTINGS)}
            | {"forward": part.__dict__.get("forward")}
            for part in self._torchs
        ]
        # The names in the code that forward runs: of an object that trains the module the rest is not read. They grow
        # as functions are met, so that the first look may not be the last one.
        self._read: set[str] = set()
        self._plain: dict[str, Any] = {}  # containers of numbers and words, by name, as they were
        self._whole: dict[type, bool] | None = None  # the classes whose objects are looked at as a whole, once learned
        known = -1
        while known < len(self._read):
            known = len(self._read)
            self._stamps, tensors = self._present()
        self._whole = {}
        self._tensors = Snapshot(tensors) if tensors else None

    def look_at(self, parts: list[tuple[str, nn.Module]]) -> None:
        """Watches these parts in the place of those under the same paths."""
        self._torchs = [part for _, part in parts if is_torchs(type(part))]
        self._extras = [(path, part, _extras(part)) for path, part in parts if is_torchs(type(part))]
        self._inside = {id(one) for _, part in parts for one in part.modules()}
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
        self._seen: dict[int, tuple[int, Any]] = {}  # numbers of what has been looked at, which is kept as long
        for path, part, written in self._parts:
            for key, value in part.__dict__.items():
                if key not in TORCHS and key not in written:
                    self._stamp(f"{PREFIX}{path}/{key}", value, DEEPEST, stamps, tensors)
            self._stamp(f"{PREFIX}{path}/forward", part.forward, DEEPEST, stamps, tensors)
        for path, part, names in self._extras:
            held = part.__dict__
            stamps.append(len(held) - (KEPT in held))  # another may come
            for key in names:
                self._stamp(f"{PREFIX}{path}/{key}", held.get(key), DEEPEST, stamps, tensors)
        for kind, methods, plain in self._classes:
            for name, holder in methods:
                self._stamp(f"{kind}.{name}()", function_of(holder, name), DEEPEST, stamps, tensors)
            for holder, name in plain:
                self._stamp(f"{kind}.{name}", vars(holder).get(name), 2, stamps, tensors)
        self._seen = {}
        return stamps, tensors

    def _stamp(self, name: str, value: Any, depth: int, stamps: list, tensors: list[Tensor]) -> None:
        if isinstance(value, Tensor):
            tied = self._ties.get(id(value))
            if (free := self._followed.get(name)) is not None:
                stamps += (name, tied, *kind_of(value, free))
            elif not value.is_meta and name not in self._unread:
                stamps += (name, tied, value.requires_grad)
                tensors += strided(value.detach())
        elif value is None or isinstance(value, _PLAIN):
            stamps += (name, type(value), value if value == value != 0 else str(value))  # NaN is NaN, -0.0 is not 0.0
        elif type(value) in _COMMON or not self._stamp_whole(name, value, depth, stamps, tensors):
            if type(value) in (list, tuple, dict) and self._same_plain(name, value, stamps):
                return
            stamps += (name, self._which(value))
            if not depth or isinstance(value, (nn.Module, type, types.ModuleType)):
                return
            if id(value) in self._seen:  # in another place, or within itself
                stamps.append(self._seen[id(value)][0])
                return
            if type(value) is not types.MethodType:  # made anew whenever it is asked for
                self._seen[id(value)] = len(self._seen), value
            kind: type = type(value)
            if kind is types.MethodType:
                if isinstance(value.__self__, nn.Module) and id(value.__self__) not in self._inside:
                    self._stamp_outside(f"{name}/self", value.__self__, depth - 1, stamps, tensors)
            elif kind not in _COMMON:
                for holder, key in _settings_of(kind):
                    self._stamp(f"{name}.{key}", vars(holder).get(key), 0, stamps, tensors)
            items = list(inside(dict(value) if isinstance(value, types.MappingProxyType) else value))
            if not self._read_whole(value):
                items = [(key, item) for key, item in items if key in self._read]
            stamps.append(len(items))
            for key, item in items if len(items) <= LONGEST else ():
                self._stamp(f"{name}/{key}", item, depth - 1, stamps, tensors)

    def _same_plain(self, name: str, value: Any, stamps: list) -> bool:
        """Of a container of nothing but numbers and words, however long: whether it is equal to what it was."""
        if self._whole is None:  # looked at for the first time
            if not _is_plain(value, DEEPEST):
                return False
            self._plain[name] = marshal.dumps(value, _WHOLE_VALUES), copy.deepcopy(value)
        elif name not in self._plain:
            return False
        written, before = self._plain[name]
        try:
            same = marshal.dumps(value, _WHOLE_VALUES) == written
        except ValueError:  # there is something else in it now
            same = False
        stamps += (name, same or _is_same(value, before))  # words may be written in two ways
        return True

    def _stamp_whole(self, name: str, value: Any, depth: int, stamps: list, tensors: list[Tensor]) -> bool:
        """Of what is compared as a whole, or is no part of the watched module; False for all others."""
        if isinstance(value, (set, frozenset)):
            stamps += (name, type(value), frozenset(value))
        elif isinstance(value, (array.array, bytearray, memoryview, *_OF_C)):
            with contextlib.suppress(ValueError):  # it was released
                stamps += (name, bytes(value))
        elif isinstance(value, (logging.Logger, logging.LoggerAdapter, logging.Handler)):
            stamps += (name, id(value))  # all loggers of the process hang on one, and none is computed with
        elif isinstance(value, contextvars.ContextVar):
            self._stamp(name, value.get(None), depth, stamps, tensors)
        elif isinstance(value, weakref.ref):  # of somebody who watches the module, too: what the code names of it
            for key, item in inside(value()) if name.rpartition("/")[2] in self._read else ():
                if key in self._read:
                    self._stamp(f"{name}/{key}", item, depth - 1, stamps, tensors)
        elif isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc" and value.flags.writeable:
            stamps += (name, value.shape, value.dtype)
            tensors.append(torch.from_numpy(numpy.ascontiguousarray(value).view(numpy.uint8).reshape(-1)))
        elif isinstance(value, (numpy.ndarray, numpy.generic)):
            stamps += (name, value.tolist() if value.dtype.kind == "O" else value.tobytes())
        elif isinstance(value, nn.Module) and id(value) not in self._inside:
            self._stamp_outside(name, value, depth, stamps, tensors)
        else:
            return False
        return True

    def _read_whole(self, value: Any) -> bool:
        """Whether all of a value may be read: of an object that trains a network (it holds one, or an optimizer, and
        counts what it does), only what the code names. Learns the names in the code of functions, and in the methods
        of such classes."""
        kind = type(value)
        if kind in (list, tuple, dict) or (self._whole is not None and kind in _COMMON):
            return True
        if kind not in _COMMON and not _trains(value):
            return True
        if self._whole is not None and (known := self._whole.get(kind)) is not None:
            return known
        whole = self._learn(kind, value)
        if self._whole is not None:
            self._whole[kind] = whole
        return whole

    def _learn(self, kind: type, value: Any) -> bool:
        if kind in (types.FunctionType, types.MethodType):
            self._read |= _names_in(value)
            return True
        for one in kind.__mro__[:-1]:
            for name in {name for name in vars(one) if name in self._read or (name[:2] == "__" and name not in _ASIDE)}:
                self._read |= _names_in(function_of(one, name))
        dynamic = hasattr(kind, "__getattr__") or kind.__getattribute__ is not object.__getattribute__
        return bool(self._read & _WHOLE) or dynamic

    def _stamp_outside(self, name: str, module: nn.Module, depth: int, stamps: list, tensors: list[Tensor]) -> None:
        """Of a module that is no part of the watched one (it stands in a list, say), whose numbers are constants."""
        if id(module) in self._seen:
            stamps.append(self._seen[id(module)][0])
            return
        self._seen[id(module)] = len(self._seen), module
        for path, part in module.named_modules():
            stamps += (name, path, type(part), part.training)
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None and not tensor.is_meta:
                    tensors += strided(tensor.detach())
            for key, value in part.__dict__.items() if depth else ():
                if key not in TORCHS and not (is_torchs(type(part)) and key.startswith("_")):
                    self._stamp(f"{name}/{path}/{key}", value, depth - 1, stamps, tensors)

    def _which(self, value: Any) -> Any:
        """What tells an object from another one that holds the same: a function's code, the place of a module that is
        watched, what has no parts itself, else the type."""
        if isinstance(value, (types.FunctionType, types.MethodType)):
            return getattr(value, "__code__", value)  # a method may be of a function that is not Python's
        if isinstance(value, nn.Module):
            return self._numbers.get(value, value)
        whole = isinstance(value, (type, types.ModuleType))
        return value if whole or (callable(value) and not hasattr(value, "__dict__")) else type(value)


@functools.lru_cache(maxsize=4096)
def _settings_of(kind: type) -> tuple[tuple[type, str], ...]:
    """What the class of an object holds in its place."""
    return () if kind.__module__ in ("builtins", "collections") or is_torchs(kind) else plain_of(kind)


def _is_same(value: Any, before: Any) -> bool:
    """Of a plain value, of which every part has to be of the same type, and items in the same order."""
    if type(value) is not type(before):
        return False
    if type(value) is dict:
        return _is_same(list(value.items()), list(before.items()))
    if type(value) in (list, tuple):
        return len(value) == len(before) and all(map(_is_same, value, before))
    return (value == before and str(value) == str(before)) or (value != value and before != before)


def _is_plain(value: Any, depth: int) -> bool:
    if type(value) is dict:
        return depth > 0 and all(map(_is_word, value)) and all(_is_plain(one, depth - 1) for one in value.values())
    if type(value) in (list, tuple):
        return depth > 0 and all(_is_plain(one, depth - 1) for one in value)
    return _is_word(value)


def _is_word(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, complex, str, bytes)


def _trains(value: Any) -> bool:
    held = getattr(value, "__dict__", None)
    return bool(held) and any(isinstance(one, (nn.Module, torch.optim.Optimizer)) for one in list(held.values()))


def _names_in(function: Any) -> set[str]:
    """The names in the code of a function, of what it wraps, and of the user's functions that it calls by the names of
    their modules."""
    found: set[str] = set()
    waiting, known = [function], set()
    while waiting:
        one = waiting.pop()
        code = getattr(one, "__code__", None)
        if code is None or code in known or is_librarys(one):
            continue
        known.add(code)
        found |= _names_of(code)
        if (wrapped := getattr(one, "__wrapped__", None)) is not None:
            waiting.append(wrapped)
        waiting += [cell.cell_contents for cell in getattr(one, "__closure__", None) or () if cell != types.CellType()]
        waiting += functions_of_modules(one)
    return found


@functools.lru_cache(maxsize=4096)
def _names_of(code: types.CodeType) -> frozenset[str]:
    return frozenset(names_of(code))


def kind_of(value: Tensor | None, free: int) -> tuple:
    """What has to stay as it is of a tensor whose numbers are read at every call. free: first axes that may have
    another size; then the numbers are converted, too."""
    return () if value is None else (None if free else value.dtype, *value.shape[free:])


def _extras(part: nn.Module) -> list[str]:
    """What somebody hung on a module of torch's. The weight that a pruning hook or a normalization makes is none."""
    ends = ("_orig", "_g", "_v")
    made = {name.removesuffix(end) for name in part._parameters.keys() for end in ends if name.endswith(end)}
    return [
        key for key, value in part.__dict__.items()
        if key not in TORCHS and key not in made and not key.startswith("_") and not isinstance(value, _SETTINGS)
    ]  # fmt: skip
