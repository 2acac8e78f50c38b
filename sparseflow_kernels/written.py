"""What a module writes into itself while forward runs, by its code."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from typing import Any

from torch import nn


def only_written(part: nn.Module) -> frozenset[str]:
    """Names of attributes that forward assigns to, and that no method of the module reads: no part of what it
    computes."""
    written, read = _attributes_of(type(part).forward)
    for kind in type(part).__mro__:
        if not kind.__module__.startswith("torch.") and written:
            for member in vars(kind).values():
                read |= _attributes_of(getattr(member, "fget", member))[1]
    return written - read


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
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    return _of_code(code) if isinstance(code, types.CodeType) else (frozenset(), frozenset())
