"""What a module writes into itself while forward runs, by its code."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from typing import Any, Iterable

from torch import nn


def is_torchs(kind: type) -> bool:
    """Whether a module's class is one of torch's own."""
    return kind.__module__.startswith("torch.")


def only_written(part: nn.Module) -> frozenset[str]:
    """Names of attributes that forward, or what it calls, assigns to, and that nothing of it reads: no part of what it
    computes."""
    written, read = _of_forward(type(part))
    return written - read


def for_others(part: nn.Module) -> frozenset[str]:
    """Names of attributes that forward assigns to, and that the module's other methods read, or nobody in it does:
    results that are kept for others."""
    written, read = _of_forward(type(part))
    others: frozenset[str] = frozenset()
    reached = {name for name, _ in methods_of([type(part)])[type(part)]}
    for kind in type(part).__mro__:
        if not is_torchs(kind) and written:
            for name in vars(kind).keys() - reached - {"__init__"}:
                others |= _attributes_of(function_of(kind, name))[1]
    return written & others | written - read


def globals_of(part: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """The globals that forward, or what it calls of the module, assigns to: where they are, and their names."""
    kind = type(part)
    found = (function_of(holder, name) for name, holder in methods_of([kind])[kind])
    return [(one.__globals__, name) for one in found if one is not None for name in _stored(one.__code__)]


@functools.lru_cache(maxsize=4096)
def _stored(code: types.CodeType) -> tuple[str, ...]:
    return tuple({one.argval for one in dis.get_instructions(code) if one.opname == "STORE_GLOBAL"})


def _of_forward(kind: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]]:
    """(names of attributes that forward and the methods that it comes to assign to, of those that they read)."""
    written, read = _attributes_of(kind.forward)
    for name, holder in methods_of([kind])[kind]:
        inner = _attributes_of(function_of(holder, name))
        written, read = written | inner[0], read | inner[1]
    return written, read


def methods_of(kinds: Iterable[type]) -> dict[type, list[tuple[str, type]]]:
    """The methods and properties, not torch's own, of modules' classes that a forward among them may come to by the
    names in its code: their names, and the class that has each."""
    owners = {
        kind: [one for one in kind.__mro__ if not is_torchs(one)] for kind in dict.fromkeys(kinds)
    }
    found: dict[type, list[tuple[str, type]]] = {kind: [] for kind in owners}
    names, waiting = {"forward", "__call__"}, {"forward", "__call__"}
    while waiting:
        more: set[str] = set()
        for kind, classes in owners.items():
            for one in classes:
                for name in waiting & vars(one).keys():
                    code = getattr(function_of(one, name), "__code__", None)
                    if isinstance(code, types.CodeType):
                        found[kind].append((name, one))
                        more |= names_of(code)
        waiting = more - names
        names |= more
    return found


def function_of(kind: type, name: str) -> types.FunctionType | None:
    """A method that a class itself has, or what a property is read by; None for what is neither, or not Python's."""
    value = vars(kind).get(name)
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return value if isinstance(value, types.FunctionType) else None


def plain_of(kind: type) -> tuple[tuple[type, str], ...]:
    """The attributes that a module's class holds as numbers, tensors and the like, and the class that has each."""
    return tuple(
        (one, name) for one in kind.__mro__ if not is_torchs(one)
        for name, value in vars(one).items()
        if not name.startswith("__") and value is not None and not callable(value)
        and not isinstance(value, (property, staticmethod, classmethod, types.MemberDescriptorType))
    )  # fmt: skip


def names_of(code: types.CodeType) -> set[str]:
    """The names in code, and what it has for words: of a `match`, or a getattr."""
    inner = (names_of(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    words = {word for constant in code.co_consts for word in (constant if isinstance(constant, tuple) else (constant,))}
    return {*code.co_names, *(word for word in words if isinstance(word, str))}.union(*inner)


def made_where_missing(part: nn.Module) -> list[str]:
    """The names under which a module holds None, and that its forward writes and reads: what it makes in its next call,
    the noise of a solve, say."""
    if is_torchs(type(part)):
        return []
    written, read = _attributes_of(type(part).forward)
    return [name for name in written & read if part.__dict__.get(name, part) is None]


@functools.lru_cache(maxsize=4096)
def _of_code(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    written, read = set(), set()
    instructions = [one for one in dis.get_instructions(code) if one.opname != "CACHE"]
    itself = set(code.co_varnames[:1])
    for one, following in zip(instructions, instructions[1:]):
        if one.opname.startswith("LOAD_FAST") and one.argval in itself and following.opname == "STORE_FAST":
            itself.add(following.argval)
    for before, instruction in zip([None, *instructions], instructions):
        if instruction.opname == "STORE_ATTR":
            written.add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            # Another local variable is another object.
            another = before is not None and before.opname == "LOAD_FAST" and before.argval not in itself
            if not another:
                read.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a function within it
            inner = _of_code(constant)
            written, read = written | inner[0], read | inner[1]
    return frozenset(written), frozenset(read)


def _attributes_of(function: Any) -> tuple[frozenset[str], frozenset[str]]:
    """(names of attributes that a function assigns to, of those that it reads)."""
    code = getattr(inspect.unwrap(function) if isinstance(function, types.FunctionType) else function, "__code__", None)
    return _of_code(code) if isinstance(code, types.CodeType) else (frozenset(), frozenset())
