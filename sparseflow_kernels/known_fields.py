"""What `accelerate` has made of modules, kept for as long as these live, from one context to the next.

A field refers to the module that it is made from, so whoever holds the field keeps the module alive. Here the module
itself does, among its attributes: both go together, when the garbage collector finds them. Copies and pickles of a
module know nothing of it.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

from torch import nn

from .callables import FunctionModule
from .compiled_field import CompiledField
from .counting import KEPT
from .live import Watch

MOST_FIELDS = 64  # of a module; beyond, those that were compiled first are forgotten
MOST_FAMILIES = 256
lock = threading.RLock()


@dataclass
class Family:
    """Modules of one class over the same parameters: a wrapper that is made anew for every solve, say. compiled: how
    often one of them was.  solves: that they had.  told: that no more of them are compiled.  of: one of the
    parameters."""

    of: weakref.ref
    compiled: int = 0
    solves: int = 0
    told: bool = False


@dataclass(eq=False)
class Entry:
    """What became of one module for states of one kind. field: None where its solves are handed on to torchdiffeq, for
    this `reason`.  solves: how many there were.  compiled: how often it was compiled anew.  refused: the module as it
    was when it was found that it cannot be compiled."""

    module: weakref.ref
    family: Family
    field: CompiledField | None = None
    reason: str = ""
    solves: int = 0
    compiled: int = 0
    refused: Watch | None = None


class Known:
    """entries: what became of the module, by engine and kind of state.  functions: modules made of functions that read
    the module, by their code."""

    __slots__ = ("entries", "functions")  # and no __dict__, so that nobody takes it for something that forward reads

    def __init__(self) -> None:
        self.entries: dict[tuple, Entry] = {}
        self.functions: dict[tuple, FunctionModule] = {}

    def __deepcopy__(self, memo: dict) -> "Known":
        return Known()

    def __reduce__(self) -> tuple:
        return dict, ()  # a pickle that is read where this package is not installed

    def keep(self, key: tuple, entry: Entry) -> None:
        while len(self.entries) >= MOST_FIELDS:
            del self.entries[next(iter(self.entries))]
        self.entries[key] = entry


def known(module: nn.Module) -> Known:
    found = module.__dict__.get(KEPT)
    if type(found) is not Known:
        found = module.__dict__[KEPT] = Known()
    return found


_families: dict[tuple, Family] = {}


def family_of(module: nn.Module) -> Family:
    parameters = list(module.parameters())
    kind = id(module) if isinstance(module, FunctionModule) or not parameters else type(module)
    key = kind, module.training, *map(id, parameters)
    found = _families.get(key)
    if found is None or found.of() is None:  # another one's parameters had these addresses
        while len(_families) >= MOST_FAMILIES:
            del _families[next(iter(_families))]
        found = _families[key] = Family(weakref.ref(parameters[0] if parameters else module))
    return found
