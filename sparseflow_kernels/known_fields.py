"""What `accelerate` has made of modules, kept for as long as these live, from one context to the next.

A field refers to the module that it is made from, so whoever holds the field keeps the module alive. Here the module
itself does, among its attributes: both go together, when the garbage collector finds them. Copies and pickles of a
module know nothing of it.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .callables import FunctionModule, key_of
from .compiled_field import CompiledField
from .counting import KEPT
from .live import Watch, has_own_parameters

MOST_FIELDS = 64  # of a module; beyond, those that were compiled first are forgotten
MOST_FAMILIES = 256
MOST_STAND_INS = 16  # round one module
MOST_VARIANTS = 16  # fields of a module for states of one kind: it may go back to numbers that it held before
SOLVES = 3  # by which a compilation pays
lock = threading.RLock()


@dataclass
class Family:
    """Modules of one class over the same parameters: a wrapper that is made anew for every solve, say; or a module that
    holds other numbers at every solve. compiled: how often one of them was.  solves: that they had.  debt: of
    compilations for which there have not been SOLVES solves.  told: that no more of them are compiled.  handed_on:
    solves since then, of which the next compilation waits for `patience`.  stood_for: that a `stand_in` solves for new
    ones, where it can.  of: a part that holds some of the parameters."""

    of: weakref.ref
    compiled: int = 0
    solves: int = 0
    debt: int = 0
    told: bool = False
    handed_on: int = 0
    patience: int = 64
    stood_for: bool = False

    def has_compiled(self) -> None:
        self.compiled += 1
        self.debt += SOLVES

    def has_solved(self) -> None:
        self.solves += 1
        self.debt = max(0, self.debt - 1)

    def owes(self, compilations: int) -> bool:
        """Whether so many were made, of late, for one solve each."""
        return self.debt >= compilations * (SOLVES - 1)

    def wait(self) -> None:
        """A solve that would be handed on: now and then one of them is compiled for, as things may have changed."""
        self.handed_on += 1
        if self.handed_on > self.patience:
            self.handed_on, self.patience = 0, 2 * self.patience
            self.debt -= SOLVES


@dataclass(eq=False)
class Entry:
    """What became of one module for states of one kind. field: None where its solves are handed on to torchdiffeq, for
    this `reason`.  refused: the module as it was when it was found that it cannot be compiled.  settled: it stays so,
    whatever the module becomes.  stands: the module is a `stand_in`.  engine: the name of the field's."""

    module: weakref.ref
    family: Family
    field: CompiledField | None = None
    reason: str = ""
    refused: Watch | None = None
    settled: bool = False
    stands: bool = False
    engine: str = ""


class Known:
    """entries: what became of the module, by engine and kind of state, the last first.  functions: modules made of
    functions that read the module, by their code.  stand_ins: `stand_in`'s, of wrappers of the module.  never_made:
    what it lacks, and has not made in an evaluation either.  short: how many solves were over at once."""

    # and no __dict__, so that nobody takes it for something that forward reads
    __slots__ = ("entries", "functions", "stand_ins", "never_made", "short")

    def __init__(self) -> None:
        self.entries: dict[tuple, list[Entry]] = {}
        self.functions: dict[tuple, FunctionModule] = {}
        self.stand_ins: dict[tuple, nn.Module] = {}
        self.never_made: tuple = ()
        self.short = 0

    def __deepcopy__(self, memo: dict) -> "Known":
        return Known()

    def __reduce__(self) -> tuple:
        return dict, ()  # a pickle that is read where this package is not installed

    def keep(self, key: tuple, entry: Entry) -> None:
        others = self.entries.pop(key, [])
        while len(self.entries) >= MOST_FIELDS:
            del self.entries[next(iter(self.entries))]
        self.entries[key] = [entry, *others][:MOST_VARIANTS]


def known(module: nn.Module) -> Known:
    found = module.__dict__.get(KEPT)
    if type(found) is not Known:
        found = module.__dict__[KEPT] = Known()
    return found


_families: dict[tuple, Family] = {}


def family_of(module: nn.Module) -> Family:
    parameters = list(module.parameters())
    kind: Any = id(module)
    if parameters:  # a class may be made anew for every solve, too
        kind = _code_of(module)
    key = kind, module.training, *map(id, parameters)
    found = _families.get(key)
    if found is None or found.of() is None:  # another one's parameters had these addresses
        while len(_families) >= MOST_FAMILIES:
            del _families[next(iter(_families))]
        # a part that holds parameters: swap_tensors refuses a parameter that has weak references
        owner = next(filter(has_own_parameters, module.modules()), module)
        found = _families[key] = Family(weakref.ref(owner))
    return found


def _code_of(module: nn.Module) -> Any:
    """What modules of one class have in common, or functions of the same code."""
    if isinstance(module, FunctionModule):
        return key_of(module.function)
    forward = getattr(type(module), "forward", None)  # TorchScript's has none
    return getattr(forward, "__code__", type(module))


def _form(module: nn.Module) -> tuple:
    """What is the same of modules that are made anew round the same trained ones: wrappers of wrappers, paths."""
    children = ((name, child) for name, child in module._modules.items() if child is not None)
    forms = ((name, id(child) if has_own_parameters(child) else _form(child)) for name, child in children)
    return type(module), module.training, *forms


def stand_in(module: nn.Module) -> nn.Module | None:
    """A module of the same class with the same attributes, which is the same one for all wrappers of this class round
    the same trained modules: what is compiled of it serves those that are made anew for every solve. None where there
    is none."""
    trained = next((part for part in module.modules() if has_own_parameters(part)), None)
    if trained is None or isinstance(module, torch.jit.ScriptModule):
        return None
    # Each thread has its own: it holds the numbers of the wrapper that is solved for.
    key = _code_of(module), threading.get_ident(), _form(module), *map(id, module._parameters.values())
    held = known(trained).stand_ins
    found = held.get(key)
    if found is None:
        while len(held) >= MOST_STAND_INS:
            del held[next(iter(held))]
        found = held[key] = object.__new__(type(module))
    kept = found.__dict__.get(KEPT)
    found.__dict__.clear()
    found.__dict__.update({name: value for name, value in module.__dict__.items() if name != KEPT})
    if kept is not None:
        found.__dict__[KEPT] = kept
    return found


def give_back(field: CompiledField, module: object) -> None:
    """Writes what a stand-in has counted into the module that it stood for."""
    stand = field.module
    if stand is not module and type(stand) is type(module):
        for name in field._watch.counted(stand) & stand.__dict__.keys():
            module.__dict__[name] = stand.__dict__[name]
