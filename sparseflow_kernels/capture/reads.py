"""What Python sees of t and y: numbers and arrays that leave the tensors, where no operation can be followed.

Whole numbers, truth values and arrays are refused when they are read (`Reads`). A float is not: `float(t)` is often
only written down, or goes into an operation as it is, where the tracer follows it. What else was made of it is found by
running the module at other times and comparing every number that reaches an operation (`compare_runs`).
"""

from __future__ import annotations

import math
import os
import sys
import types
from typing import Any, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as every_leaf

from ..field import UnsupportedFieldError
from . import seen
from .branches import QUESTION
from .operations import written
from .probe import Points
from .refusal import refuse, refuse_python_value
from .trees import tree_leaves
from .values import Opaque, Overwritten, StateValue, TimeValue

WHOLE = {"__int__", "__index__"}
TRUTH = {"__bool__", "is_nonzero"}
ARRAYS = {"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "__reduce_ex__"}
ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
TORCH = os.path.dirname(torch.__file__) + os.sep
GRAD_MODE, DECORATORS = (sys.modules[name].__file__ for name in ("torch.autograd.grad_mode", "torch.utils._contextlib"))
SEEN = seen.__file__  # whose mode lies between the two
DATA, GRADIENT = Tensor.data.__get__, Tensor.grad.__get__
COPIES = {"tensor", "as_tensor", "asarray", "new_tensor"}  # read the tensors inside lists that they are given

TIMES = (-953.7, -31.3, -7.39, -0.73, 0.113, 1.71, 5.77, 17.9, 103.7, 1009.3)
MAX_RUNS = 96


class Reads(TorchFunctionMode):
    """Sees calls of torch from Python that no operation shows. tracer: knows what its tensors depend on."""

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in TRUTH and self._is_branch(args[0]):
            with self.tracer.stack.naming():
                return self.tracer.branches.answer(self._value(args[0]))
        if name in WHOLE or name in TRUTH or name in ARRAYS:
            self._read(name, args[0])
        elif name in ATTENTION and not self.tracer.attends:
            self._attention((args, kwargs))
        elif name in COPIES:
            data = args[1] if name == "new_tensor" else args[0] if args else kwargs.get("data")
            if isinstance(data, (list, tuple)):
                for leaf in every_leaf(data):
                    if isinstance(leaf, Tensor):
                        self._copied(leaf)
        elif name == "one_hot" and isinstance(self._value(args[0]), (TimeValue, StateValue)):
            classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
            if classes > 0:  # torch would read the indices, to check them
                return (args[0].unsqueeze(-1) == torch.arange(classes, device=args[0].device)).long()
        elif name == "__deepcopy__" and isinstance(self._value(args[0]), (TimeValue, StateValue)):
            return args[0].detach().clone()
        elif name == "__getitem__":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(map(self._is_position, parts)):
                return _select(args[0], parts, self._is_position)
        if name == "_set_grad_enabled":
            self._grad_mode(sys._getframe(1))
        out = func(*args, **kwargs)
        if name in ("detach", "detach_") or func == DATA:
            self.tracer.detached(out)
        elif func is torch.autograd.grad and not kwargs.get("create_graph"):
            for gradient in out:  # mere numbers to autograd
                self.tracer.detached(gradient)
        elif func == GRADIENT and out is not None and not out.requires_grad:
            self.tracer.detached(out)  # what .backward() has left
        return out

    def _value(self, tensor: Any) -> Any:
        value = self.tracer.values.get(id(tensor))
        return self.tracer.pairs.seen(tensor) if value is None else value

    def _grad_mode(self, frame: types.FrameType | None) -> None:
        """Notices where forward itself enters and leaves torch.no_grad, enable_grad and set_grad_enabled: what torch's own
        functions do inside (a checkpoint, say) they make good for."""
        while frame is not None and frame.f_code.co_filename in (GRAD_MODE, SEEN):
            manager, name = frame.f_locals.get("self"), frame.f_code.co_name
            if isinstance(manager, (torch.no_grad, torch.enable_grad, torch.set_grad_enabled)):
                caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
                if caller != GRAD_MODE:  # else one of them has called another
                    if not caller.startswith(TORCH) or caller == DECORATORS:
                        self._switch(manager, name in ("__init__", "__enter__"))
                    return
            frame = frame.f_back

    def _switch(self, manager: Any, on: bool) -> None:
        cut = self.tracer.without_grad
        entered = bool(cut) and cut[-1][0] is manager  # set_grad_enabled holds from when it is made
        if on and not entered:
            cut.append((manager, isinstance(manager, torch.no_grad) or getattr(manager, "mode", True) is False))
        elif not on and entered:
            cut.pop()

    def _is_branch(self, tensor: Tensor) -> bool:
        value = self._value(tensor)
        return self.tracer.branches is not None and isinstance(value, TimeValue) and not is_finiteness(value.node)

    def _read(self, name: str, tensor: Tensor) -> None:
        value = self._value(tensor)
        with self.tracer.stack.naming():
            self.tracer.seen.take(self.tracer.value_of(tensor) if value is None else value)
            if getattr(value, "checks", False) and name in TRUTH:
                return
            if isinstance(value, (StateValue, Overwritten)) and name in ARRAYS:
                refuse(f"reading the state outside torch (.{name}())")
            elif isinstance(value, (StateValue, Overwritten)):
                refuse("reading a number out of the state (an if on its values)")
            elif not isinstance(value, TimeValue) or self.tracer.slots is not None:
                return
            elif name in ARRAYS:
                refuse_python_value(f"t, or something computed from it, is taken out of its tensor by .{name}()")
            elif name in WHOLE:
                refuse_python_value("a whole number is made of t (int(t), or an index of a list)")
            elif not is_finiteness(value.node):
                refuse_python_value(QUESTION)

    def _attention(self, args: Any) -> None:
        if any(isinstance(self._value(a), StateValue) for a in tree_leaves(args)):
            with self.tracer.stack.naming():
                refuse("attention (a product of states, and a softmax)")

    def _copied(self, leaf: Tensor) -> None:
        value = self._value(leaf)
        with self.tracer.stack.naming():
            self.tracer.seen.take(self.tracer.value_of(leaf) if value is None else value)
            if isinstance(value, StateValue):
                refuse("copying numbers of the state (torch.tensor([...]); torch.stack keeps them)")
            if isinstance(value, TimeValue):
                if self.tracer.slots is None and (not leaf.is_floating_point() or leaf.numel() != 1):
                    refuse_python_value("whole numbers made of t are copied by torch.tensor([...])")
                self.tracer.follow(leaf.item(), value)

    def _is_position(self, part: Any) -> bool:
        return _is_whole_number(part) and isinstance(self._value(part), (TimeValue, StateValue))


def _is_whole_number(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dim() == 0 and part.dtype in (torch.int64, torch.int32)


def _select(x: Tensor, parts: tuple, chosen: Any) -> Tensor:
    """x[parts], the entries chosen by tensors that depend on t as operations: torch would read the numbers."""
    picked = {i: part for i, part in enumerate(parts) if chosen(part)}
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    axis, axes = 0, []
    for i, part in enumerate(parts):
        if i in picked:
            axes.append((axis, picked[i]))
        if part is Ellipsis:
            axis += x.dim() - taken
        elif i in picked or part is None or isinstance(part, slice):
            axis += 1
        elif isinstance(part, bool) or not isinstance(part, int):
            return x[parts]  # beside other index tensors: read, and refused
    rest = x[tuple(slice(None) if i in picked else part for i, part in enumerate(parts))]
    for axis, index in reversed(axes):
        index = torch.where(index < 0, index + rest.shape[axis], index)
        rest = rest.index_select(axis, index.reshape(1)).squeeze(axis)
    return rest


FINITENESS = {"isnan", "isinf", "isfinite"}
CONNECTIVES = {
    "any", "all", "_is_any_true", "_is_all_true", "logical_not", "bitwise_not", "logical_or", "bitwise_or", "logical_and",
    "bitwise_and", "mul", "view",
}


def is_finiteness(node: Any) -> bool:
    """Only whether t, or a function of it, is a number: checks that every solve passes."""
    name = "" if node.operation is None else getattr(node.operation, "_schema", node.operation)
    name = getattr(name, "name", "").split("::")[-1]
    nodes = [a for a in tree_leaves((node.args, node.kwargs)) if type(a) is type(node)]
    if name in FINITENESS:
        return True
    if name in ("eq", "ne"):  # torch.isfinite
        others = [a for a in node.args if type(a) is not type(node)]
        return len(nodes) == 2 and nodes[0] is nodes[1] or any(isinstance(a, float) and math.isinf(a) for a in others)
    return name in CONNECTIVES and bool(nodes) and all(map(is_finiteness, nodes))


def checks(base: str, args: Any) -> bool:
    """The same of an operation on states."""
    states = [a for a in tree_leaves(args) if isinstance(a, (StateValue, Opaque))]
    if base in FINITENESS:
        return True
    if base in ("eq", "ne"):
        return len(states) == 2 and states[0] is states[1] or any(isinstance(a, float) and math.isinf(a) for a in args)
    return base in CONNECTIVES and bool(states) and all(state.checks for state in states)


# -------------------------------------------------------------------------------------------- numbers made of float(t)


class Run(TorchDispatchMode):
    """What reaches the operations of one run besides tensors of the run itself: numbers, and tensors from elsewhere.

    entries: (operation, its leaves).  wanted: the operations whose leaves are taken down, by number; None: all.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `Following`

    def __init__(self, t: Tensor, state: list[Tensor], wanted: Collection[int] | None = None) -> None:
        super().__init__()
        self.entries: list[tuple[Any, list]] = []
        self._wanted = wanted
        self.known = {id(x): x for x in (t, *state)}
        self.timed = {id(t)}  # what depends on t
        self.read: list[float] = [t.item()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        every = tree_leaves((args, kwargs))
        leaves = [None if isinstance(a, Tensor) and id(a) in self.known else a for a in every]
        if func is torch.ops.aten._local_scalar_dense.default:
            out = func(*args, **kwargs)
            if isinstance(out, float):
                self.read.append(out)
            self.entries.append((func, [None]))
            return out
        taken = self._wanted is None or len(self.entries) in self._wanted
        self.entries.append((func, [(a, a.clone()) if isinstance(a, Tensor) else a for a in leaves] if taken else []))
        out = func(*args, **kwargs)
        made = {id(x): x for x in tree_leaves(out) if isinstance(x, Tensor)}
        if not written(func):
            self.known.update(made)
        if any(id(a) in self.timed or isinstance(a, float) and a in self.read for a in every):
            self.timed.update(made)
        return out


class _Calls(TorchFunctionMode):
    """Numbers that torch.tensor([...]) reads out of tensors; indices as `Reads` makes them."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(map(self._is_position, parts)):
                return _select(args[0], parts, self._is_position)
        if name in COPIES:
            for leaf in tree_leaves(args):
                if isinstance(leaf, Tensor) and leaf.numel() == 1 and id(leaf) in self.run.known:
                    with torch.utils._python_dispatch._disable_current_modes():
                        self.run.read.append(float(leaf))
        return func(*args, **(kwargs or {}))

    def _is_position(self, part: Any) -> bool:
        return _is_whole_number(part) and id(part) in self.run.timed


def compare_runs(module: nn.Module, probe: Points) -> None:
    """Raises UnsupportedFieldError if a number that depends on t reaches an operation and is not one that was read out
    of a tensor and left as it was."""
    for func, _, _ in unfollowed(module, probe):
        name = func._schema.name.split("::")[-1]
        refuse_python_value(
            f"module {type(module).__name__}: a number computed from t in Python (min, max, round, the "
            f"math module, numpy, a lookup or a branch by float(t)) goes into the operation {name}"
        )


def unfollowed(module: nn.Module, probe: Points) -> Iterator[tuple[Any, tuple[int, int], Any]]:
    """(operation, its number and that of a leaf, the leaf) of what stands there at some time and not at others, though it
    was not read out of a tensor and left as it was. Raises UnsupportedFieldError where forward runs other operations."""
    start = probe.point()[0].item()
    run_at(module, probe, start)  # what the first call keeps for later ones is there from now on
    base = run_at(module, probe, start)
    for time in _times(module):
        try:
            run = run_at(module, probe, time)
        except UnsupportedFieldError:
            raise
        except Exception:  # forward is not defined there
            continue
        same = len(run.entries) == len(base.entries) and len(run.read) == len(base.read) and all(
            one[0] is other[0] and len(one[1]) == len(other[1]) for one, other in zip(base.entries, run.entries)
        )
        if not same:
            refuse_python_value(
                f"module {type(module).__name__}: forward branches on values of t that Python read (it computes "
                f"something else at t = {time:g} than at t = {base.read[0]:.3g})"
            )
        for number, ((func, before), (_, after)) in enumerate(zip(base.entries, run.entries)):
            for leaf, (one, other) in enumerate(zip(before, after)):
                if not _follows(one, other, base.read, run.read):
                    yield func, (number, leaf), one[0] if isinstance(one, tuple) else one


def run_at(module: nn.Module, probe: Points, time: float, wanted: Collection[int] | None = None) -> Run:
    t, rows = probe.point(time)
    state = probe.state(rows)
    run = Run(t, list(state) if isinstance(state, tuple) else [state], wanted)
    with run, _Calls(run):
        probe.call(module, t, state)
    return run


def _follows(one: Any, other: Any, read: list[float], read_now: list[float]) -> bool:
    """Is `other` what `one` becomes in another run?"""
    if isinstance(one, tuple):
        if not isinstance(other, tuple) or one[0] is other[0] or one[0].layout != torch.strided:
            return isinstance(other, tuple)  # the same buffer may count calls
        one, other = one[1], other[1]
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point():
            return torch.equal(one, other)
        expected = one.clone()
        for before, now in reversed(list(zip(read, read_now))):
            expected[one == torch.tensor(before, dtype=one.dtype)] = now
        return bool(((expected == other) | (expected.isnan() & other.isnan())).all())
    if isinstance(one, float) and one in read:
        return other != other or any(other == now for before, now in zip(read, read_now) if before == one)
    return type(one) is type(other) and (one is other or one == other or one != one)


def _times(module: nn.Module) -> list[float]:
    """Times to compare at: far and near ones, and between and beside all numbers that the module holds or its code
    mentions, where a branch or a lookup would change."""
    marks = sorted({float(x) for x in _numbers(module) if math.isfinite(x) and abs(x) < 1e9})
    between = [0.5 * (a + b) + 1e-3 * (b - a) for a, b in zip(marks, marks[1:])]
    beside = [y for x in marks for y in (x, x + 1e-4 * max(1.0, abs(x)))]
    ends = [marks[0] * 1.37 - 1.0, marks[-1] * 1.37 + 1.0, -marks[-1] * 1.37 - 1.0] if marks else []
    thinned = between[:: 1 + len(between) // (MAX_RUNS // 2)] + beside[:: 1 + len(beside) // (MAX_RUNS // 2)]
    return [*TIMES, *ends, *thinned]


def _numbers(module: nn.Module) -> Iterator[float]:
    """Numbers in the attributes, buffers and code of the user's modules."""
    seen: set[int] = set()

    def walk(value: Any, depth: int) -> Iterator[float]:
        if isinstance(value, (int, float)):
            yield value
        elif depth == 0 or id(value) in seen:
            return
        elif isinstance(value, (Tensor, nn.Parameter)) or type(value).__module__ == "numpy":
            seen.add(id(value))
            size = getattr(value, "size", 0) if not isinstance(value, Tensor) else value.numel()
            strided = not isinstance(value, Tensor) or (value.layout == torch.strided and not value.is_complex())
            if isinstance(size, int) and 0 < size <= 256 and strided and hasattr(value, "tolist"):
                yield from walk(value.tolist(), 8)
        elif isinstance(value, (list, tuple, set, frozenset)):
            seen.add(id(value))
            for item in list(value)[:512]:
                yield from walk(item, depth - 1)
        elif isinstance(value, dict):
            seen.add(id(value))
            for key, item in list(value.items())[:512]:
                yield from walk(key, depth - 1)
                yield from walk(item, depth - 1)
        elif isinstance(value, types.MethodType):
            yield from walk(value.__func__, depth)
        elif isinstance(value, types.FunctionType) and not (value.__module__ or "").startswith("torch"):
            seen.add(id(value))
            yield from code(value.__code__, value.__globals__, depth - 1)
            cells = [c.cell_contents for c in value.__closure__ or () if c != types.CellType()]
            yield from walk([*cells, *(value.__defaults__ or ())], depth - 1)
        elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type, types.ModuleType)):
            seen.add(id(value))
            if not type(value).__module__.startswith(("torch", "numpy", "builtins")):
                yield from walk(vars(value), depth - 1)

    def code(body: types.CodeType, names: dict, depth: int) -> Iterator[float]:
        for constant in body.co_consts:
            if isinstance(constant, types.CodeType):
                yield from code(constant, names, depth)
            else:
                yield from walk(constant, 2)
        for name in body.co_names:
            if name in names:
                yield from walk(names[name], depth)

    for part in module.modules():
        own = {k: v for k, v in vars(part).items() if k not in ("_modules", "_parameters")}
        if not type(part).__module__.startswith("torch.nn"):
            yield from walk({k: v for k, v in own.items() if not k.startswith("_") or k == "_buffers"}, 6)
            for kind in type(part).__mro__:
                if not kind.__module__.startswith("torch"):
                    for attribute in vars(kind).values():
                        if isinstance(attribute, (types.FunctionType, int, float, list, tuple, dict)):
                            yield from walk(attribute, 4)
