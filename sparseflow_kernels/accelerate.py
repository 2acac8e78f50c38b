"""`with accelerate():` around code that was written for torchdiffeq: what can be compiled runs here.

torchdiffeq's `odeint` and `odeint_adjoint` are called by many names: `torchdiffeq.odeint`, a name that a script
imported earlier, one that a library did. All names of a function are one function object, so the code of that object is
exchanged while the context lasts, and put back after it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import types
import weakref
from dataclasses import dataclass, field as dataclass_field
from typing import Any, Callable, Iterator

import torch
import torchdiffeq
from torch import Tensor, nn

from .callables import PYTHONS, FunctionModule, Kept, key_of, original, parts_of
from .capture.context import attribute
from .capture.python_times import OtherOperations
from .capture.untouched import untouched
from .compiled_field import CompiledField, compile_moving as compile_field
from .divergence_field import DivergenceField
from .engines import choose
from .field import UnsupportedFieldError
from .gradients import only_torch
from .hooks import ADJOINT_CALLBACKS, CALLBACKS, is_hooked
from .known_fields import Entry, Family, family_of, give_back, known, lock, stand_in
from .live import Watch
from .odeint import odeint, odeint_adjoint
from .trial import is_over_at_once, slower_than_torch
from .warn import warn
from .written import made_where_missing

MOST_TOLD = 64  # entries of a report; beyond, those that were met first are left out
MOST_FUNCTIONS = 64  # of those that read a module, or none
MOST_ALONE = 3  # the same, after which one stands for all wrappers of a class round the same modules
MOST_COMPILED = 8  # times that a module is compiled for one solve each, after which it is handed on
MOST_SHORT = 16  # solves of a step or two that an engine makes for a module; further ones are left to torchdiffeq
CALLS = {"odeint": odeint, "odeint_adjoint": odeint_adjoint}


def _trampoline_odeint(func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None):
    return _sparseflow_kernels_call(  # noqa: F821 - put into torchdiffeq's namespace
        "odeint", func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
    )


def _trampoline_odeint_adjoint(
    func, y0, t, *, rtol=1e-7, atol=1e-9, method=None, options=None, event_fn=None, adjoint_rtol=None,
    adjoint_atol=None, adjoint_method=None, adjoint_options=None, adjoint_params=None,
):  # fmt: skip
    return _sparseflow_kernels_call(  # noqa: F821
        "odeint_adjoint", func, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn,
        adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, adjoint_method=adjoint_method,
        adjoint_options=adjoint_options, adjoint_params=adjoint_params,
    )  # fmt: skip


_TRAMPOLINES = {"odeint": _trampoline_odeint, "odeint_adjoint": _trampoline_odeint_adjoint}


@dataclass(eq=False)
class Line:
    """Of a report: what became of one entry. number: its own.  module: of which it is an entry, as that refers to it.
    solves: here."""

    number: int
    module: weakref.ref  # kept, so that no other has its id
    name: str
    stands: bool
    engine: str | None = None
    reason: str = ""
    solves: int = 0


_numbers = itertools.count()


@dataclass(eq=False)
class accelerate(contextlib.ContextDecorator):  # noqa: N801 - it is called like a function, in a with statement
    """Inside the `with`, what torchdiffeq is asked to solve is solved by compiled fields, where that is possible.

    A module is compiled when it is first met (`compile(module, like=y0, live=True)`: its parameters stay its own), and
    again where its masks change. What was compiled is kept as long as the module, so that a context may be entered for
    every solve. A function (a lambda over networks, a method of a model, a partial) is compiled as a module that holds
    the modules which it reads. What cannot be compiled, events and callbacks are handed on to torchdiffeq; of a module
    a warning says so once, with the reason. `odeint_adjoint` gives the exact gradient of the steps taken, unless it was
    given an adjoint_* argument of its own (`sparseflow_kernels.odeint_adjoint`). Calls of `sparseflow_kernels.odeint`
    and `solve` with a module take part.

    The context may be entered again while it lasts, and from several threads, which share it: torchdiffeq's functions
    are the process's. It is a decorator too: `@accelerate()` over a function. engine: as in `compile`.
    """

    engine: str = "auto"
    # Entries belong to their modules, and go with them; what became of them is told for longer.
    _met: weakref.WeakKeyDictionary = dataclass_field(default_factory=weakref.WeakKeyDictionary, repr=False)
    _lines: dict[int, Line] = dataclass_field(default_factory=dict, repr=False)
    _functions: dict[tuple, FunctionModule] = dataclass_field(default_factory=dict, repr=False)  # that read no modules
    _hooked: weakref.WeakSet = dataclass_field(default_factory=weakref.WeakSet, repr=False)
    _short: weakref.WeakKeyDictionary = dataclass_field(default_factory=weakref.WeakKeyDictionary, repr=False)  # solves

    def __enter__(self) -> "accelerate":
        with _state_lock:
            _active.append(self)
            if len(_active) == 1:
                _exchange()
        return self

    def __exit__(self, *_: Any) -> None:
        with _state_lock:
            _active.remove(self)
            if not _active:
                _put_back()

    def report(self) -> str:
        """For people: a line for every module, which says by which engine it ran, or why it did not."""
        lines: dict[tuple, list] = {}  # name and end of a line, and the solves
        for line in list(self._lines.values()):
            if line.engine is not None:
                told = lines.setdefault((id(line.module), line.engine), [f"{line.name}: {line.engine} engine", 0])
                told[1] += line.solves
            elif not line.stands:
                lines[id(line.module), line.reason] = [f"{line.name}: handed on to torchdiffeq ({line.reason})", None]
        told = [line if count is None else f"{line}, {count} solves" for line, count in lines.values()]
        why = "left to torchdiffeq, which is through before an engine begins"
        told += [f"{_name(module)}: {count} solves of a step or two {why}" for module, count in self._short.items()]
        return "\n".join(told) or "no module was solved for"

    def field_for(self, module: nn.Module, y0: Any) -> CompiledField | None:
        """The compiled field of a module for states like y0, a tensor or a tuple of tensors; None where there is
        none."""
        parts = y0 if isinstance(y0, tuple) else (y0,)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            return None
        if is_hooked(module):
            if module not in self._hooked:
                self._hooked.add(module)
                self._warn(module, "it has hooks, which would not be called")
            return None
        with lock:
            return self._find(module, y0, parts)

    def _find(
        self, module: nn.Module, y0: Any, parts: tuple[Tensor, ...], stands: bool = False
    ) -> CompiledField | None:
        """stands: the module stands for others."""
        kinds = tuple((tuple(part.shape[1:]), part.dtype, part.device) for part in parts)
        key = self.engine, id(module), module.training, isinstance(y0, tuple), kinds
        exact = (*key, tuple(part.shape[:1] for part in parts))
        held = known(module)
        for one in (key, exact):
            for entry in held.entries.get(one, ()):
                if entry.module() is module and self._holds(entry, y0):
                    return self._solving(entry)
        if only_torch():  # tensors without numbers of their own, by which nothing can be read or compared
            return None
        family = family_of(module)
        new = not held.entries and not stands
        if new and (family.stood_for or family.owes(MOST_ALONE)):
            family.stood_for = True
            if (other := stand_in(module)) is not None and (field := self._find(other, y0, parts, True)) is not None:
                return field
        if family.owes(MOST_COMPILED) and not stands:
            family.wait()
        if family.owes(MOST_COMPILED):
            if not family.told and not stands:
                family.told = True
                self._refuse_family(module, family)
            return None
        family.has_compiled()
        before = [entry.field for one in (key, exact) for entry in held.entries.get(one, ()) if entry.field is not None]
        moving = frozenset().union(*(field.moving | field.moved() for field in before))
        entry = self._compiled(module, y0, Entry(weakref.ref(module), family, stands=stands), moving)
        layout = None if entry.field is None else entry.field.layout
        batched = layout is None or layout.batched
        held.keep(key if batched and entry.field is not None and not entry.field.has_context else exact, entry)
        return self._solving(entry)

    def _holds(self, entry: Entry, y0: Any) -> bool:
        """Whether this is still what becomes of the module. What was refused in an earlier context is tried again where
        the module is another now."""
        if entry.field is not None:
            trains = torch.is_grad_enabled() and entry.field.bare_zeros
            return not trains and _fits(entry.field, y0) and not entry.field.changed()
        return entry.settled or entry in self._met or (entry.refused is not None and not entry.refused.changed())

    def _solving(self, entry: Entry) -> CompiledField | None:
        """Counts a solve of this entry."""
        entry.family.has_solved()
        self._tell(entry, 1)
        return entry.field

    def _tell(self, entry: Entry, solves: int) -> None:
        line = self._met.get(entry)
        if line is None or line.number not in self._lines:
            while len(self._lines) >= MOST_TOLD:
                del self._lines[next(iter(self._lines))]
            line = Line(next(_numbers), entry.module, _name(entry.module()), entry.stands)
            self._met[entry] = self._lines[line.number] = line
        line.engine, line.reason = None if entry.field is None else entry.engine, entry.reason
        line.solves += solves

    def _refuse_family(self, module: nn.Module, family: Family) -> None:
        reason = (
            f"it, or modules of its class over the same parameters, were compiled {family.compiled} times for "
            f"{family.solves} solves: keep one, and give it what changes as an attribute, a tensor with a row per "
            "sample, or as a parameter, and states of one shape"
        )
        self._tell(Entry(weakref.ref(module), family, None, reason), 0)
        self._warn(module, reason)

    def _hand_on(self, entry: Entry, error: Exception) -> None:
        # Whose refusal it is stands in front of it already; of a function capture knows the module alone.
        entry.field, entry.reason = None, str(error).removeprefix(f"module {FunctionModule.__name__}: ")
        module = entry.module()
        with contextlib.suppress(Exception):  # parameters that are not made yet: they will be, so it is asked again
            entry.refused = Watch(module)
        if not entry.stands:  # else those that it stood for are compiled by themselves
            self._warn(module, entry.reason)

    @staticmethod
    def _warn(module: nn.Module, reason: str) -> None:
        warn(f"accelerate: {_name(module)} is handed on to torchdiffeq: {reason}")

    def _compiled(self, module: nn.Module, y0: Any, entry: Entry, moving: frozenset[str]) -> Entry:
        like = tuple(part.detach() for part in y0) if isinstance(y0, tuple) else y0.detach()
        zeros = torch.is_grad_enabled()  # torch trains zeros that no mask keeps
        kept = Kept(module.function) if isinstance(module, FunctionModule) else None
        try:
            with torch.no_grad(), _handing_on():  # a solve that forward makes is a part of it
                field = compile_field(module, self.engine, None, like, True, moving, zeros)
            if (name := field._watch.records) is not None:
                entry.settled = True  # what it notes is something else at every look
                raise UnsupportedFieldError(f"forward notes what it sees in {name!r}, which a compiled field would not")
            if field._watch.by_number:
                raise UnsupportedFieldError("what forward computes depends on how often it was called")
            if kept is not None and kept.restore():
                entry.settled = True
                raise UnsupportedFieldError(
                    "it writes what it reads (a counter, a list), which a compiled field would not"
                )
            with _handing_on():
                reason = self._in_plain_torch(field) or slower_than_torch(field, module, y0)
            if reason is None:
                with torch.no_grad():
                    entry.field, entry.engine = field, field.engine_name
            else:
                entry.reason, entry.settled = reason, True
                self._warn(module, reason)
        except (UnsupportedFieldError, TypeError, ValueError) as error:
            self._hand_on(entry, error)
        finally:
            if kept is not None:
                kept.restore()
        return entry

    def _in_plain_torch(self, field: CompiledField) -> str | None:
        """The reason where no engine takes the field but the one that is plain torch, which nobody asked for."""
        with torch.no_grad():
            engine, why = choose(field.vector_field, self.engine)
        return why if engine.name == "reference" and self.engine == "auto" else None

    def module_of(self, function: Callable) -> FunctionModule | None:
        """A function as a module, the same one for functions of the same code over the same modules."""
        function = original(function)
        key = key_of(function)
        if key is None:
            return None
        if not isinstance(function, PYTHONS):
            function = function.__call__  # type: ignore[operator]  # of an object
        parts = parts_of(function)
        # Each thread has its own: it reads what the function reads that is solved for.
        key += (threading.get_ident(), *((id(part), part.training) for part in parts))
        with lock:
            functions = known(parts[0]).functions if parts else self._functions
            found = functions.pop(key, None)
            if found is None:
                found = FunctionModule(function, parts)
                while len(functions) >= MOST_FUNCTIONS:  # the one that was not asked for for longest
                    del functions[next(iter(functions))]
            functions[key] = found
            found.function = function
            return found


def _name(module: nn.Module) -> str:
    return module.name if isinstance(module, FunctionModule) else type(module).__name__


def _fits(field: CompiledField, y0: Any) -> bool:
    if field.has_context:
        first = y0[0] if isinstance(y0, tuple) else y0
        try:
            held = [attribute(field.module, name) for name in field.skeleton.read_context.tensors]
        except (ValueError, AttributeError):  # None now
            return False
        if any(tensor.shape[:1] != first.shape[:1] for tensor in held):
            return False  # of one sample for all now, say
    if field.layout is not None:
        return field.layout.fits(y0) is None
    return isinstance(y0, Tensor) and y0.shape[-1] == field.dim and field.skeleton.refused(y0.dim()) is None


# ------------------------------------------------------------------------------------------- torchdiffeq's functions

_state_lock = threading.RLock()
_active: list[accelerate] = []
_originals: dict[str, tuple[types.CodeType, Callable]] = {}
_inside = threading.local()


def _function(name: str) -> types.FunctionType:
    return getattr(torchdiffeq, name)


def _exchange() -> None:
    for name in CALLS:
        function, trampoline = _function(name), _TRAMPOLINES[name]
        if function.__code__.co_freevars or not isinstance(function, types.FunctionType):
            continue  # somebody else has wrapped it
        original = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        original.__kwdefaults__ = function.__kwdefaults__
        _originals[name] = function.__code__, original
        function.__globals__["_sparseflow_kernels_call"] = _call
        function.__code__ = trampoline.__code__


def _put_back() -> None:
    for name, (code, _) in _originals.items():
        function = _function(name)
        function.__code__ = code
        function.__globals__.pop("_sparseflow_kernels_call", None)
    _originals.clear()


def _call(name: str, func: Any, y0: Any, t: Any, **arguments: Any) -> Any:
    """What torchdiffeq's functions do while a context lasts. A model compiled round a solve breaks off there."""
    return (_call_eagerly if torch.compiler.is_compiling() else _call_here)(name, func, y0, t, arguments)


def _call_here(name: str, func: Any, y0: Any, t: Any, arguments: dict) -> Any:
    original = _originals[name][1]
    field = None
    if not getattr(_inside, "call", False):
        field = _field(name, func, y0, t, arguments)
    if field is None:
        return original(func, y0, t, **arguments)
    field.mark_looked_at(True)
    try:
        with _handing_on():
            return CALLS[name](field, y0, t, **arguments)
    except OtherOperations as error:
        with lock:
            _settle(field, str(error))
    finally:
        field.mark_looked_at(False)
        give_back(field, func)
    return original(func, y0, t, **arguments)


def _settle(field: CompiledField, reason: str) -> None:
    """Hands the module of a field on from now on."""
    for entries in known(field.module).entries.values():
        for entry in entries:
            if entry.field is field:
                entry.field, entry.reason, entry.settled = None, reason, True
                accelerate._warn(field.module, reason)


_call_eagerly = torch._disable_dynamo(_call_here)


@contextlib.contextmanager
def _handing_on() -> Iterator[None]:
    """What torchdiffeq is asked for meanwhile, in this thread, is torchdiffeq's."""
    before, _inside.call = getattr(_inside, "call", False), True
    try:
        yield
    finally:
        _inside.call = before


def _field(name: str, func: Any, y0: Any, t: Any, arguments: dict) -> CompiledField | None:
    if isinstance(func, (CompiledField, DivergenceField)) or not callable(func):
        return None
    callbacks = ADJOINT_CALLBACKS if name == "odeint_adjoint" else CALLBACKS
    if arguments.get("event_fn") is not None or any(getattr(func, one, None) is not None for one in callbacks):
        return None
    with _state_lock:
        here = _active[-1] if _active else None
    if here is None or isinstance(y0, list):
        return None
    module = func if isinstance(func, nn.Module) else here.module_of(func)
    if module is None:
        return None
    freely = name == "odeint" and here.engine == "auto"
    if freely and is_over_at_once(module, y0, t, arguments["method"], arguments["options"]):
        held = known(module)
        held.short += 1
        if held.short > MOST_SHORT:
            here._short[module] = here._short.get(module, 0) + 1
            return None
    with lock:
        return _field_of_what_is_made(here, module, y0, t)


def _field_of_what_is_made(here: accelerate, module: nn.Module, y0: Any, t: Any) -> CompiledField | None:
    """`field_for`, once the module has what it makes in the first evaluation of a solve: its noise, say."""
    missing = [(part, name) for part in module.modules() for name in made_where_missing(part)]
    kind = module.training, tuple((id(part), name) for part, name in missing)
    if not missing or is_hooked(module) or known(module).never_made == kind:
        return here.field_for(module, y0)
    before = _random_state()
    made, after = _made(module, t, y0, missing)
    if made is None:
        return None
    if all(value is None for value in made):
        known(module).never_made = kind
    _set_random_state(after)
    for (part, name), value in zip(missing, made):
        part.__dict__[name] = value
    field = here.field_for(module, y0)
    if field is None:
        _set_random_state(before)
        for part, name in missing:
            part.__dict__[name] = None
    return field


def _random_state() -> tuple[Tensor, list[Tensor]]:
    """Of the CPU, and of the GPUs that are in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _made(
    module: nn.Module, t: Any, y0: Any, missing: list[tuple[nn.Module, str]]
) -> tuple[list[Any] | None, tuple[Tensor, list[Tensor]]]:
    """(What the module makes for what it lacks, and the random state after that.) The module is left as it was. None
    where this is no constant of the solve, or has a gradient."""
    found, before_all = [], _random_state()
    with contextlib.suppress(Exception), untouched(module):  # what it raises is raised by the solve
        for _ in range(2):
            module(t[0], y0)
            made = [part.__dict__.get(name) for part, name in missing]
            kept = [one.detach().clone() if isinstance(one, Tensor) else one for one in made]
            found.append((made, kept, _random_state()))
    if len(found) < 2:
        return [None] * len(missing), before_all
    (first, numbers, state), (second, again, _) = found
    for one, other, before, after in zip(first, second, numbers, again):
        if one is not other or (isinstance(one, Tensor) and (one.requires_grad or not torch.equal(before, after))):
            return None, before_all
    return first, state
