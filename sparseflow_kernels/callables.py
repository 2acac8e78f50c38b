"""Functions as modules: a lambda over a network, a method of a model, a partial.

What a function reads beside its arguments is found where Python keeps it: in its closure, its defaults, the globals
that its code names, the object that it is a method of. The modules among it become submodules, so that their parameters
are known.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections import OrderedDict
from typing import Any, Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from .capture.context import PREFIX, inside, part_named

DEEPEST = 4  # of what is looked into: functions that functions call, containers, attributes of objects
LONGEST = 64  # items of a container that are looked at
PYTHONS = (types.FunctionType, types.MethodType, functools.partial)
_PLAIN = (
    Tensor,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    str,
    bytes,
    int,
    float,
    complex,
)


class FunctionModule(nn.Module):
    """f(t, y) of a function. parts: the modules that it reads."""

    def __init__(self, function: Callable[..., Any], parts: list[nn.Module]) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            name = type(part).__name__  # what a refusal says of a module inside it is then understood
            self.add_module(f"{name}{number}" if hasattr(self, name) else name, part)
        self.function = function

    def forward(self, t: Tensor, y: Any) -> Any:
        return self.function(t, y)

    def used(
        self, called: Iterable[nn.Module], reached: Iterable[nn.Module], names: Iterable[str]
    ) -> list[nn.Module]:
        """This module and those below it that were called, with all that they consist of, or reached, or hold a
        parameter of these names: a method may belong to a model of which it needs a part."""
        own = {id(inner) for part in called if part is not self for inner in part.modules()}
        own |= set(map(id, reached))
        own |= {id(part_named(self, name.rpartition(".")[0])) for name in names if not name.startswith(PREFIX)}
        paths = [path for path, part in self.named_modules() if id(part) in own]
        holders = {path[:end] for path in paths for end in range(len(path)) if path[end] == "."} | {""}
        return [part for path, part in self.named_modules() if id(part) in own or path in holders]

    @property
    def name(self) -> str:
        """What the function is called, and where it is written: "Model.rhs (script.py:12)"."""
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        code = getattr(inspect.unwrap(function), "__code__", None)
        where = "" if code is None else f" ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
        return getattr(function, "__qualname__", type(function).__name__) + where


def original(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside torch.compile's wrapper."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def key_of(function: Callable[..., Any]) -> tuple | None:
    """What two functions have in common that are the same but for what they read: a script that writes a lambda in a
    loop makes another one every time. None for what is not written in Python, or belongs to a solver."""
    home = getattr(function, "__module__", None) or type(function).__module__
    if home.startswith(("sparseflow_kernels.", "torchdiffeq.")):
        return None
    if isinstance(function, types.FunctionType):
        return (function.__code__,)
    if isinstance(function, types.MethodType):
        inner = key_of(function.__func__)
        return None if inner is None else (*inner, id(function.__self__))
    if isinstance(function, functools.partial):
        inner = key_of(function.func)
        return None if inner is None else ("partial", *inner)
    call = getattr(type(function), "__call__", None)  # noqa: B004 - the function itself is wanted
    return (call.__code__, id(function)) if isinstance(call, types.FunctionType) else None


def parts_of(function: Callable[..., Any]) -> list[nn.Module]:
    """The modules that it reads, none twice."""
    found = {id(value): value for value in _read_by(function) if isinstance(value, nn.Module)}
    return list(found.values())


def _read_by(function: Any) -> Iterator[Any]:
    """Everything that a function reads; of modules not what they hold."""
    seen: set[int] = set()
    waiting = [(function, DEEPEST)]
    while waiting:
        value, depth = waiting.pop()
        if id(value) in seen or value is None:
            continue
        seen.add(id(value))
        yield value
        if not depth or isinstance(value, (nn.Module, *_PLAIN)):
            continue
        items = [item for _, item in inside(value)]
        if isinstance(value, types.MethodType):
            items.append(value.__self__)
        waiting += [(item, depth - 1) for item in (items if len(items) <= LONGEST else ())]


class Kept:
    """What a function reads and may write, as it was: `restore` puts it back and says whether anything was another."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._held: list[tuple[Any, Any]] = []
        for value in _read_by(function):
            if type(value) in (list, dict, OrderedDict):
                self._held.append((value, type(value)(value)))
            elif isinstance(value, Tensor):
                if value.layout == torch.strided and not value.is_meta:
                    self._held.append((value, value.detach().clone()))
            elif isinstance(value, types.FunctionType):
                for cell in value.__closure__ or ():
                    if cell != types.CellType():
                        self._held.append((cell, cell.cell_contents))
            elif not isinstance(value, (nn.Module, types.MethodType, functools.partial, *_PLAIN)) and hasattr(
                value, "__dict__"
            ):
                self._held.append((value.__dict__, dict(value.__dict__)))

    def restore(self) -> bool:
        changed = False
        for value, before in self._held:
            if isinstance(value, types.CellType):
                if value.cell_contents is not before:
                    changed, value.cell_contents = True, before
            elif isinstance(value, Tensor):
                with torch.no_grad():
                    if not torch.equal(value.detach(), before):
                        changed = True
                        value.copy_(before)
            elif len(value) != len(before) or any(a is not b for a, b in zip(_flat(value), _flat(before))):
                changed = True
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)
        return changed


def _flat(container: Any) -> list[Any]:
    return container if isinstance(container, list) else [x for pair in container.items() for x in pair]
