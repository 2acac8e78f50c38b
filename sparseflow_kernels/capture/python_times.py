"""What Python makes of t: `self.inputs[int(t)]`, `np.interp(float(t), ...)`, `math.sin(t)`.

Such numbers enter operations unseen. Where forward runs the same operations at all times, they are its *slots*: places of
operations at which something else stands at other times. Each is a function of time, which runs forward in Python and takes
down what stands there; all that the field computes beside it is read as ever.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import functools
import types
from dataclasses import dataclass
from typing import Any, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..field import UnsupportedFieldError
from .probe import Points, plain_operations
from .reads import run_at, unfollowed
from .refusal import REMEDY, refuse
from .replay import Node
from .trees import tree_leaves
from .untouched import untouched
from .values import TimeValue

MOST_KEPT = 32  # times at which what stands at the places is remembered
Place = tuple[int, int]  # an operation and one of its leaves, by their numbers


class OtherOperations(UnsupportedFieldError):
    """A solve has come to a time at which forward runs other operations than those that were read."""


class _Enough(BaseException):
    """The rest of forward need not run, as it is another. TorchScript makes another error of it."""


class _Others(Exception):
    """Forward runs other operations than those that it is known to run."""


class _Places(TorchDispatchMode):
    """Takes down what stands at the places of one run of known operations. others: it runs others."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `Following`

    def __init__(self, operations: list[Any], wanted: dict[int, list[int]]) -> None:
        super().__init__()
        self._operations, self._wanted, self._number = operations, wanted, -1
        self.found: dict[Place, Any] = {}
        self.others = False

    @property
    def complete(self) -> bool:
        return not self.others and self._number == len(self._operations) - 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._number = number = self._number + 1
        if number >= len(self._operations) or self._operations[number] is not func:
            self.others = True
            raise _Enough
        if number in self._wanted:
            leaves = tree_leaves((args, kwargs))
            for leaf in self._wanted[number]:
                value = leaves[leaf]
                self.found[number, leaf] = value.detach().clone() if isinstance(value, Tensor) else value
        return func(*args, **kwargs)


class PythonTimes:
    """The slots of a module. What the module is when this is made, it stays: it is copied, or left as it was after every
    run."""

    def __init__(self, module: nn.Module, probe: Points) -> None:
        """Raises UnsupportedFieldError where forward does not run the same operations at all times."""
        self.places: set[Place] = set()
        for func, place, value in unfollowed(module, probe):
            if isinstance(value, nn.Parameter) or type(value) not in (int, float) and not isinstance(value, Tensor):
                what = "a parameter" if isinstance(value, nn.Parameter) else f"a {type(value).__name__}"
                refuse(f"{what} that Python chooses by t for the operation {_name(func)}")
            self.places.add(place)
        start, rows = probe.point()
        entries = run_at(module, probe, start.item()).entries
        self.operations = [func for func, _ in entries]
        # A number that was the same at all times may be another at one that was not looked at: an event, a day of the week.
        self.places |= {(number, leaf) for number, (func, leaves) in enumerate(entries) for leaf in _suspicious(func, leaves)}
        self._wanted: dict[int, list[int]] = {}
        for number, leaf in sorted(self.places):
            self._wanted.setdefault(number, []).append(leaf)
        self._probe, self._rows = probe, rows
        self._module, self._own = module, False
        if not any(_reaches_out(value) for part in module.modules() for value in part.__dict__.values()):
            with contextlib.suppress(Exception):  # it may hold what cannot be copied
                self._module, self._own = copy.deepcopy(module), True
        self._kept: collections.OrderedDict[float, dict[Place, Any]] = collections.OrderedDict()
        self._as_read = False  # whether torch has to be told to run the operations that were read
        if self.places:
            try:
                self._found(start.item())
            except _Others:
                self._as_read = True

    def __getstate__(self) -> dict[str, Any]:
        operations = [(*func._schema.name.split("::"), func._overloadname) for func in self.operations]
        return {**self.__dict__, "operations": operations, "_kept": collections.OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        packets = ((getattr(getattr(torch.ops, space), name), overload) for space, name, overload in self.operations)
        self.operations = [getattr(packet, overload or "default") for packet, overload in packets]

    def at(self, time: float) -> dict[Place, Any]:
        """What stands at the places at this time."""
        if time not in self._kept:
            while len(self._kept) >= MOST_KEPT:
                self._kept.popitem(last=False)
            try:
                self._kept[time] = self._found(time)
            except _Others:
                raise OtherOperations(
                    f"module {type(self._module).__name__}: at t = {time:g}, by what Python makes of t, forward runs other "
                    f"operations than when it was compiled. {REMEDY}."
                ) from None
        return self._kept[time]

    def _found(self, time: float) -> dict[Place, Any]:
        if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality):
            # Within an operation torch takes others apart no further; another thread is within none.
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                return thread.submit(self._run, time).result()
        return self._run(time)

    def _run(self, time: float) -> dict[Place, Any]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_disable_current_modes())
            stack.enter_context(torch.no_grad())
            if not self._own:
                stack.enter_context(untouched(self._module))
            if self._as_read:
                return self._found_as_read(time)
            t, state = self._probe.time(time), self._probe.state(self._rows.clone())
            places = _Places(self.operations, self._wanted)
            try:
                with places:
                    self._probe.call(self._module, t, state)
            except BaseException:
                if not places.others:
                    raise
        if not places.complete:
            raise _Others
        return places.found

    def _found_as_read(self, time: float) -> dict[Place, Any]:
        with plain_operations():
            entries = run_at(self._module, self._probe, time, self._wanted).entries
        if [func for func, _ in entries] != self.operations:
            raise _Others
        found = {place: entries[place[0]][1][place[1]] for place in self.places}
        return {place: value[1] if isinstance(value, tuple) else value for place, value in found.items()}


@dataclass(eq=False)
class Slot:
    """What stands at one place, as a function of a 0-d t. whole: a whole number that is to stay one."""

    times: PythonTimes
    place: Place
    whole: bool

    def __call__(self, t: Tensor) -> Tensor:
        value = self.times.at(float(t.detach()))[self.place]
        if isinstance(value, Tensor):
            return value.to(t.device, t.dtype if value.is_floating_point() else None)
        return torch.tensor(value, dtype=torch.int64 if self.whole else t.dtype, device=t.device)


class SlotReader:
    """Gives the slots of the operations of one run, in turn."""

    def __init__(self, times: PythonTimes, dtype: torch.dtype, device: torch.device) -> None:
        self._times, self._dtype, self._device, self._number = times, dtype, device, -1

    def at(self, func: Any, leaves: Sequence[Any]) -> dict[int, TimeValue]:
        """Of the next operation, by the numbers of its leaves."""
        self._number += 1
        known = self._times.operations
        if self._number >= len(known) or known[self._number] is not func:
            refuse(f"numbers that Python makes of t, before the operation {_name(func)}, that is not always run,")
        slots = (leaf for leaf in range(len(leaves)) if (self._number, leaf) in self._times.places)
        return {leaf: self._slot(func, leaf, leaves[leaf]) for leaf in slots}

    def _slot(self, func: Any, leaf: int, value: Any) -> TimeValue:
        whole = isinstance(value, int) and func is torch.ops.aten.select.int
        if isinstance(value, int) and not whole and not _takes_numbers(func, leaf):
            refuse(f"a whole number that Python makes of t for the operation {_name(func)}")
        node = Node(Slot(self._times, (self._number, leaf), whole), (Node(),))
        if isinstance(value, Tensor):
            return TimeValue(value.detach(), node)
        return TimeValue(torch.tensor(value, dtype=torch.int64 if whole else self._dtype, device=self._device), node)


def _reaches_out(value: Any, depth: int = 3) -> bool:
    """A function over modules: a copy of it runs the same ones, and counts in them."""
    if isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        held = (value.__self__,)
    elif isinstance(value, types.FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType())
        held = (*cells, *(value.__defaults__ or ()), *(value.__globals__.get(name) for name in value.__code__.co_names))
    else:
        return False
    return any(isinstance(one, nn.Module) or (depth > 0 and _reaches_out(one, depth - 1)) for one in held)


def _suspicious(func: Any, leaves: Sequence[Any]) -> Iterator[int]:
    """The leaves of an operation at which Python may put something else at other times."""
    name = _name(func)
    if name in ("add", "sub", "rsub", "mul", "div") and len(leaves) > 1 and type(leaves[1]) in (int, float):
        yield 1
    elif name == "select" and isinstance(leaves[0], tuple):  # a row of a table
        yield 2
    elif name == "lift_fresh" and isinstance(leaves[0], tuple) and leaves[0][1].is_floating_point():
        yield 0  # torch.tensor([...])


def _takes_numbers(func: Any, leaf: int) -> bool:
    arguments = func._schema.arguments
    kind = arguments[leaf].type if leaf < len(arguments) else None
    return isinstance(kind, (torch.NumberType, torch.FloatType, torch.TensorType))


def _name(func: Any) -> str:
    return func._schema.name.split("::")[-1]
