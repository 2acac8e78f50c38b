"""Reading the program out of a user's `nn.Module`: `forward(t, y)` -> VectorField, by meaning, not by class names.

The module runs once, on a small random batch, under a dispatch mode that sees every aten operation. Beside each tensor
stands an abstract value:

- `Const`: independent of t and y. Parameters, and whatever is computed from them (prune masks, parametrizations).
- `Time`: a function of t alone; affine functions and sigmoids of them are kept as such, others as a replayable graph.
- `State`: depends on y. Every element carries the number of a *row* (one scalar of the program, the same for every
  sample) and of its sample. Views, slices, joins and permutations are then done by applying the very same operation to
  the numbers. Arithmetic makes new rows: each is one row of a pending layer s(t) * (W h + b) + c(t) over the last
  closed layer h. An activation, or a second matrix, closes a layer.

What does not fit raises UnsupportedFieldError with the module path and the operation. Control flow on values cannot be
seen; the result is therefore always compared with the module at other points and times.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, field as dataclass_field, replace
from typing import Any, Iterator, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from . import activations
from .field import (
    IDENTITY, Activation, Gate, Layer, LinearShift, Pattern, Shift, SigmoidGate, TimeFunction, UnsupportedFieldError,
    VectorField,
)

aten = torch.ops.aten

REMEDY = "Use the module uncompiled with sfk.odeint, which hands it to torchdiffeq"

# Operations that only move elements about: applied to the numbers of a State, or to slope and offset of a Time, as is.
STRUCTURAL = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "unsqueeze", "squeeze", "permute", "transpose", "t",
    "slice", "select", "split", "split_with_sizes", "unbind", "cat", "stack", "index", "index_select", "gather", "take",
    "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "repeat", "flip", "roll", "_to_copy", "diagonal",
    "copy",
}
# Results that only take shape, dtype and device from their tensor argument.
FACTORIES = {
    "ones_like", "zeros_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "new_empty_strided",
}
FULL = {"full", "full_like", "new_full", "fill"}
JOINTLY_LINEAR = STRUCTURAL | {"add", "sub", "rsub", "neg", "sum", "mean", "fill"}
BILINEAR = {"mul", "div", "mm", "bmm", "mv", "addmm", "baddbmm"}
BINARY = {"add", "sub", "rsub", "mul", "div"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}

SAMPLE = 1 << 40  # element number = sample * SAMPLE + row
NOT_A_PARAMETER, NOT_PLAIN = -1, -2


# ---------------------------------------------------------------------------------------------------- abstract values


@dataclass(eq=False)
class Const:
    """A tensor independent of t and y. source: int64 of its shape, an index into all parameters laid end to end, or
    NOT_A_PARAMETER, or NOT_PLAIN (computed from parameters); value = factor * parameter where source >= 0. None: no
    entry has anything to do with a parameter."""

    value: Tensor
    source: Tensor | None = None
    factor: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.value.shape


@dataclass(eq=False)
class Node:
    """One replayable operation of t; `item` picks one of several outputs. operation None: t itself, shaped args[0]."""

    operation: Any
    args: tuple = ()
    kwargs: dict = dataclass_field(default_factory=dict)
    item: int | None = None

    def __getstate__(self) -> dict:
        # An operator pickles by name.
        state, operation = dict(self.__dict__), self.operation
        if isinstance(operation, torch._ops.OpOverload):
            state["operation"] = (*operation._schema.name.split("::"), operation._overloadname)
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if isinstance(self.operation, tuple):
            namespace, name, overload = self.operation
            self.operation = getattr(getattr(getattr(torch.ops, namespace), name), overload)


@dataclass(eq=False)
class Time:
    """A function of t alone: its value at the probe time, its graph and, if it is one, slope * t + offset, or
    sigmoid(slope * t + offset)."""

    value: Tensor
    node: Node
    affine: tuple[Const, Const] | None = None
    sigmoid: tuple[Const, Const] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.value.shape


@dataclass(eq=False)
class State:
    """A tensor that depends on y: element numbers, int64 of its shape."""

    ids: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.ids.shape


class Stale:
    """A tensor that was changed in place through another view of its memory."""


@dataclass(eq=False)
class Hidden:
    """The output h of a closed layer (or the state itself: pre None). rows: the row numbers of its pre-activations.
    When two closed layers turn out to be one, `merged` leads to it: (layer, int64 [width] new neuron numbers)."""

    width: int
    activation: Activation = IDENTITY
    pre: "Affine | None" = None
    rows: Tensor | None = None
    merged: "tuple[Hidden, Tensor] | None" = None


@dataclass(eq=False)
class Affine:
    """n pending rows gate(t) * (W h + bias) + shift(t) over h = parent. W is either `weight` [n, parent.width], or has
    at most one entry per row: scale[i] (None: 1) in column select[i] (-1: none)."""

    parent: Hidden | None
    bias: Const
    select: Tensor | None = None
    scale: Const | None = None
    weight: Const | None = None
    gate: Time | None = None
    shift: Time | None = None
    name: str = ""

    @property
    def rows(self) -> int:
        return self.bias.value.shape[0]

    @property
    def depends(self) -> bool:
        return self.parent is not None

    @property
    def plain(self) -> bool:
        """Nothing but elements of the parent."""
        return (
            self.select is not None and self.scale is None and self.gate is None and self.shift is None
            and bool((self.select >= 0).all()) and not bool(self.bias.value.any())
        )


# ---------------------------------------------------------------------------------------- constants and functions of t


def _writes(func) -> list[int]:
    return [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _base_name(func) -> str:
    name = func._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.startswith("__") and _writes(func) else name


def _call(func, args, kwargs):
    """func without effect on its arguments."""
    if isinstance(func, torch._ops.OpOverload):
        for index in _writes(func):
            if index < len(args) and isinstance(args[index], Tensor):
                args = (*args[:index], args[index].clone(), *args[index + 1:])
    return func(*args, **kwargs)


def _sources(value: Const) -> Tensor:
    return torch.full(value.shape, NOT_A_PARAMETER) if value.source is None else value.source


def _factors(value: Const) -> Tensor:
    return torch.ones(value.shape, dtype=torch.float64) if value.factor is None else value.factor


def _as_const(value) -> Const:
    return value if isinstance(value, Const) else Const(torch.as_tensor(value))


def _trace_add(a: Const, b: Const, sign: float, shape) -> tuple[Tensor, Tensor]:
    zero_a = ((_sources(a) == NOT_A_PARAMETER) & (a.value.cpu() == 0)).expand(shape)
    zero_b = ((_sources(b) == NOT_A_PARAMETER) & (b.value.cpu() == 0)).expand(shape)
    sa, sb = _sources(a).expand(shape), _sources(b).expand(shape)
    constant = (sa == NOT_A_PARAMETER) & (sb == NOT_A_PARAMETER)
    mixed = torch.where(constant, NOT_A_PARAMETER, NOT_PLAIN)
    source = torch.where(zero_b, sa, torch.where(zero_a, sb, mixed))
    return source, torch.where(zero_b, _factors(a).expand(shape), sign * _factors(b).expand(shape))


def _trace_mul(a: Const, b: Const, invert: bool, shape) -> tuple[Tensor, Tensor]:
    if a.source is None and not invert:
        a, b = b, a
    sa, sb = _sources(a).expand(shape), _sources(b).expand(shape)
    other = b.value.detach().cpu().double()
    other = (1.0 / other if invert else other).expand(shape)
    source = torch.where(sb == NOT_A_PARAMETER, sa, NOT_PLAIN)
    # A zero that no parameter can change (a mask) has no source.
    source = torch.where((sb == NOT_A_PARAMETER) & (other == 0), NOT_A_PARAMETER, source)
    return source, _factors(a).expand(shape) * other


def _trace_mm(a: Const, b: Const) -> tuple[Tensor, Tensor]:
    """Plain where exactly one entry of the parameter-free factor is not zero."""
    if a.source is None:
        source, factor = _trace_mm(Const(b.value.mT, b.source.mT, _factors(b).mT), Const(a.value.mT))
        return source.mT, factor.mT
    if b.source is not None or a.value.dim() != 2:
        shape = torch.matmul(a.value, b.value).shape
        return torch.full(shape, NOT_PLAIN), torch.ones(shape, dtype=torch.float64)
    other = b.value.detach().cpu().double()
    count, k = (other != 0).sum(0), (other != 0).long().argmax(0)
    source = torch.where(count == 1, a.source[:, k], torch.where(count == 0, NOT_A_PARAMETER, NOT_PLAIN))
    return source, _factors(a)[:, k] * other.gather(0, k[None])


def _trace(base: str, func, args, kwargs, value) -> tuple[Any, Any] | None:
    """(source, factor) of a constant result, shaped like `value` (a tensor or a list of tensors)."""
    consts = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Const)]
    if all(a.source is None for a in consts):
        return None
    if base in STRUCTURAL and base != "copy":
        if base == "_to_copy":
            return consts[0].source, _factors(consts[0])

        def through(part):
            def swap(a):
                if not isinstance(a, Const):
                    return a
                return part(a) if a.value.is_floating_point() else a.value.cpu()
            return func(*tree_map(swap, args), **tree_map(swap, kwargs))

        return through(_sources), through(_factors)
    if isinstance(value, Tensor):
        if base == "neg":
            return consts[0].source, -_factors(consts[0])
        if base in ("add", "sub") and kwargs.get("alpha", 1) == 1 and len(args) == 2:
            return _trace_add(_as_const(args[0]), _as_const(args[1]), 1.0 if base == "add" else -1.0, value.shape)
        if base in ("mul", "div") and not kwargs and len(args) == 2:
            return _trace_mul(_as_const(args[0]), _as_const(args[1]), base == "div", value.shape)
        if base == "mm":
            return _trace_mm(*args)
        if base == "addmm" and not kwargs and len(args) == 3:
            product = Const(torch.mm(args[1].value, args[2].value), *_trace_mm(args[1], args[2]))
            return _trace_add(args[0], product, 1.0, value.shape)
    return tree_map(lambda v: torch.full(v.shape, NOT_PLAIN), value), None


def _const_apply(base: str, func, args, kwargs, value=None) -> Any:
    """The abstract result of an operation on constants; `value` if it was computed already."""
    if value is None:
        bare = lambda a: a.value if isinstance(a, Const) else a
        value = _call(func, tree_map(bare, args), tree_map(bare, kwargs))
    traced = _trace(base, func, args, kwargs, value)
    if isinstance(value, Tensor):
        return Const(value) if traced is None else Const(value, *traced)
    if traced is None:
        return tree_map(lambda v: Const(v) if isinstance(v, Tensor) else v, value)
    source, factor = traced
    return [Const(v, source[i], None if factor is None else factor[i]) for i, v in enumerate(value)]


def _time_apply(base: str, func, args, kwargs, value=None) -> Any:
    """The abstract result of an operation on functions of t (and constants)."""
    leaves = [a for a in tree_leaves((args, kwargs)) if isinstance(a, (Time, Const))]
    times = [a for a in leaves if isinstance(a, Time)]
    if value is None:
        bare = lambda a: a.value if isinstance(a, (Time, Const)) else a
        value = _call(func, tree_map(bare, args), tree_map(bare, kwargs))
    node_of = lambda a: a.node if isinstance(a, Time) else a.value if isinstance(a, Const) else a
    node = Node(func, tree_map(node_of, args), tree_map(node_of, kwargs))

    def part(index: int, name: str, constants_to_zero: bool):
        def swap(a):
            if isinstance(a, Time):
                return getattr(a, name)[index]
            if isinstance(a, Const) and constants_to_zero and a.value.is_floating_point():
                return Const(torch.zeros_like(a.value))
            return a
        new_args = tuple(tree_map(swap, args))
        if constants_to_zero and base in ("add", "sub", "rsub", "fill") and isinstance(new_args[1], (int, float)):
            new_args = (new_args[0], 0.0, *new_args[2:])
        return _const_apply(base, func, new_args, tree_map(swap, kwargs))

    affine = sigmoid = None
    if base in JOINTLY_LINEAR or (base in BILINEAR and _one_time_factor(base, args)):
        if all(a.affine is not None for a in times):
            if base in ("addmm", "baddbmm"):
                # Only the summand is zeroed in the slope; the constant factor stays.
                first = Const(torch.zeros_like(args[0].value)) if isinstance(args[0], Const) else args[0].affine[0]
                rest = tuple(a.affine[0] if isinstance(a, Time) else a for a in args[1:])
                affine = (_const_apply(base, func, (first, *rest), kwargs), part(1, "affine", False))
            else:
                affine = (part(0, "affine", base in JOINTLY_LINEAR), part(1, "affine", False))
    if base == "sigmoid" and times[0].affine is not None:
        sigmoid = times[0].affine
    elif base in STRUCTURAL and all(a.sigmoid is not None for a in times) and not any(
        isinstance(a, Const) and a.value.is_floating_point() for a in leaves
    ):
        sigmoid = (part(0, "sigmoid", False), part(1, "sigmoid", False))
    if isinstance(value, Tensor):
        return Time(value, node, affine, sigmoid)
    pick = lambda pair, i: None if pair is None else (pair[0][i], pair[1][i])
    return [
        Time(v, Node("item", (node,), item=i), pick(affine, i), pick(sigmoid, i)) if isinstance(v, Tensor) else v
        for i, v in enumerate(value)
    ]


def _one_time_factor(base: str, args) -> bool:
    if base == "div":
        return len(args) == 2 and not isinstance(args[1], Time)
    factors = args[1:3] if base in ("addmm", "baddbmm") else args[:2]
    return sum(isinstance(a, Time) for a in factors) <= 1


def _apply(func, *args, **kwargs) -> Any:
    """An aten operation on Const and Time values (and plain arguments)."""
    run = _time_apply if any(isinstance(a, Time) for a in tree_leaves((args, kwargs))) else _const_apply
    return run(_base_name(func), func, args, kwargs)


def _add(a, b):
    if a is None or b is None:
        return b if a is None else a
    return _apply(aten.add.Tensor, a, b)


def _mul(a, b):
    if a is None or b is None:
        return b if a is None else a
    return _apply(aten.mul.Tensor, a, b)


def _take(a, index: Tensor):
    return None if a is None else _apply(aten.index_select.default, a, 0, Const(index.to(a.value.device)))


class TimeProgram:
    """Replays a graph of operations of t: `program(t) -> [n]` for a 0-d t, in t's dtype and device."""

    def __init__(self, node: Node, dtype: torch.dtype, device: torch.device) -> None:
        self._node, self._dtype, self._device = node, dtype, device
        self._moved: dict[int, Tensor] = {}
        self._place = (dtype, device)

    def __getstate__(self) -> dict:
        # The cache is keyed by identity, which a copy does not keep.
        return {**self.__dict__, "_moved": {}}

    def __call__(self, t: Tensor) -> Tensor:
        if (t.dtype, t.device) != self._place:
            self._moved, self._place = {}, (t.dtype, t.device)
        return self._evaluate(self._node, t, {})

    def _evaluate(self, node: Node, t: Tensor, done: dict[int, Any]) -> Any:
        if id(node) in done:
            return done[id(node)]
        if node.operation is None:
            result = t.reshape(node.args[0])
        elif node.operation == "item":
            result = self._evaluate(node.args[0], t, done)[node.item]
        else:
            swap = lambda a: self._swap(a, t, done)
            is_leaf = lambda a: isinstance(a, Node)
            args, kwargs = (tree_map(swap, part, is_leaf=is_leaf) for part in (node.args, node.kwargs))
            result = _call(node.operation, args, kwargs)
        done[id(node)] = result
        return result

    def _swap(self, a: Any, t: Tensor, done: dict[int, Any]) -> Any:
        if isinstance(a, Node):
            return self._evaluate(a, t, done)
        if isinstance(a, Tensor):
            if id(a) not in self._moved:
                self._moved[id(a)] = a.to(t.device, t.dtype if a.is_floating_point() else None)
            return self._moved[id(a)]
        if isinstance(a, torch.dtype):
            return t.dtype if a == self._dtype else a
        return t.device if isinstance(a, torch.device) else a


# --------------------------------------------------------------------------------------------------------- the tracer


class _Tracer(TorchDispatchMode):
    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device, batch: int) -> None:
        super().__init__()
        self.module, self.dtype, self.device, self.batch = module, dtype, device, batch
        self.paths = {id(m): name for name, m in module.named_modules()}
        self.stack: list[nn.Module] = []
        self.values: dict[int, Any] = {}
        self.alive: list[Tensor] = []  # ids stay unique while the tensors live
        self.aliases: dict[int, list[Tensor]] = {}
        self.time_numbers: dict[float, Time] = {}  # numbers read out of t by .item()
        self.blocks: list[Affine] = []
        self.starts: list[int] = []
        self.row_count = 0
        self.closed: dict[tuple[Activation, bytes], Tensor] = {}
        self.scalings: dict[int, tuple[Tensor, Const]] = {}  # first row of a block -> (rows, factor) it came from
        self.parameters: dict[int, tuple[str, int]] = {}
        self.parameter_names: list[str] = []
        self.parameter_starts: list[int] = []
        start = 0
        for name, parameter in module.named_parameters():
            self.parameters[id(parameter)] = (name, start)
            self.parameter_names.append(name)
            self.parameter_starts.append(start)
            start += parameter.numel()

    # ------------------------------------------------------------------------------------------------- errors, names

    def where(self) -> str:
        if not self.stack:
            return f"module {type(self.module).__name__}"
        module = self.stack[-1]
        path = self.paths.get(id(module), "")
        return f"module {path!r} ({type(module).__name__})" if path else f"module {type(module).__name__}"

    def fail(self, what: str, remedy: str = REMEDY, cause: Exception | None = None) -> NoReturn:
        raise UnsupportedFieldError(
            f"{self.where()}: {what} cannot be expressed as a layer of a vector field. {remedy}."
        ) from cause

    def layer_name(self, weight: Const) -> str:
        path = self.paths.get(id(self.stack[-1]), "") if self.stack else ""
        if weight.source is not None:
            plain = weight.source[weight.source >= 0]
            if plain.numel():
                parameter = self.parameter_names[bisect.bisect_right(self.parameter_starts, int(plain[0])) - 1]
                owner = parameter.rpartition(".")[0]
                # A bare parameter names its layer itself: its owner holds several.
                return path if path and path == owner else parameter
        return path

    # ------------------------------------------------------------------------------------------------- value registry

    def value_of(self, tensor: Tensor) -> Any:
        value = self.values.get(id(tensor))
        if value is None:
            value = Const(tensor.detach())
            if id(tensor) in self.parameters:
                start = self.parameters[id(tensor)][1]
                value.source = torch.arange(start, start + tensor.numel()).view(tensor.shape)
            elif tensor.requires_grad:
                value.source = torch.full(tensor.shape, NOT_PLAIN)
            self.bind(tensor, value)
        elif isinstance(value, Stale):
            self.fail("writing into a slice of a tensor", "Join the parts with torch.cat or torch.stack instead")
        return value

    def bind(self, tensor: Tensor, value: Any) -> None:
        if id(tensor) not in self.values:
            self.alive.append(tensor)
            self.aliases.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        self.values[id(tensor)] = value

    def rebind(self, tensor: Tensor, value: Any) -> None:
        """After an in-place operation: other views of the same memory follow, or become unreadable."""
        self.bind(tensor, value)
        geometry = lambda x: (x.shape, x.stride(), x.storage_offset())
        for other in self.aliases[tensor.untyped_storage()._cdata]:
            if other is not tensor:
                self.values[id(other)] = value if geometry(other) == geometry(tensor) else Stale()

    # ------------------------------------------------------------------------------------------------------- dispatch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        base = _base_name(func)
        if torch.Tag.nondeterministic_seeded in func.tags and not self._harmless_dropout(base, args, kwargs):
            if self.module.training:
                self.fail(f"randomness ({base})", "Call .eval() on the module first (dropout is active in training)")
            self.fail(f"randomness ({base})")

        def lift(a):
            if isinstance(a, Tensor):
                return self.value_of(a)
            return self.time_numbers.get(a, a) if isinstance(a, float) else a

        a_args, a_kwargs = tree_map(lift, tuple(args)), tree_map(lift, kwargs)
        leaves = tree_leaves((a_args, a_kwargs))
        has_time, has_state = (any(isinstance(a, kind) for a in leaves) for kind in (Time, State))
        writes = [args[i] for i in _writes(func) if i < len(args) and isinstance(args[i], Tensor)]
        if func._schema.name.startswith("aten::") and any(k in ("out",) for k in kwargs) and (has_state or has_time):
            self.fail(f"out= of {base}", "Use the result instead")
        out = func(*args, **kwargs)

        if base == "_local_scalar_dense":
            if has_state:
                self.fail("reading a number out of the state (.item(), an if on its values)")
            if has_time and isinstance(out, float):
                self.time_numbers[out] = _apply(aten.reshape.default, a_args[0], [])
            return out
        number = next((a for a in (*a_args[1:], *a_kwargs.values()) if isinstance(a, Time)), None)
        if base in FULL and number is not None:
            result = _apply(aten.expand.default, number, list(out.shape))
        elif base in FACTORIES:
            result = tree_map(lambda v: Const(v), out)
        elif has_state:
            try:
                result = self.state_op(base, func, a_args, a_kwargs, out)
            except UnsupportedFieldError:
                raise
            except Exception as error:  # an overload or a shape that no rule here thought of
                self.fail(f"the operation {func} on the state ({type(error).__name__}: {error})", REMEDY, error)
        elif has_time:
            if not isinstance(func, torch._ops.OpOverload):
                self.fail(f"the operation {func}")
            if func._overloadname == "Scalar" and base in BINARY and isinstance(a_args[1], Time):
                func = getattr(aten, base).Tensor
            result = _time_apply(base, func, a_args, a_kwargs, out)
        else:
            if writes and isinstance(out, Tensor):
                result = Const(out.clone())
            else:
                result = _const_apply(base, func, a_args, a_kwargs, out)

        if writes:
            self.rebind(writes[0], result)
        else:
            flat_out, flat_result = tree_leaves(out), tree_leaves(result)
            for tensor, value in zip(flat_out, flat_result):
                if isinstance(tensor, Tensor):
                    self.bind(tensor, value)
        return out

    @staticmethod
    def _harmless_dropout(base: str, args, kwargs) -> bool:
        """Operations that only draw when asked to; train=False is a copy."""
        return base == "native_dropout" and len(args) > 2 and args[2] is False

    # ----------------------------------------------------------------------------------------------------------- rows

    def new_block(self, affine: Affine) -> Tensor:
        """Registers the rows; returns their numbers, int64 [n]."""
        self.blocks.append(affine)
        self.starts.append(self.row_count)
        rows = torch.arange(self.row_count, self.row_count + affine.rows)
        self.row_count += affine.rows
        return rows

    def to_state(self, rows: Tensor, shape, axis: int) -> State:
        """Rows of one sample, laid out in `shape` (without the sample axis), for every sample."""
        rows = rows.reshape(shape).unsqueeze(axis)
        sizes = [1] * rows.dim()
        sizes[axis] = self.batch
        return State(rows + SAMPLE * torch.arange(self.batch).view(sizes))

    def sample_axis(self, ids: Tensor) -> int:
        for axis, size in enumerate(ids.shape):
            if size == self.batch and ids.numel():
                first = ids.select(axis, 0)
                sizes = [1] * ids.dim()
                sizes[axis] = self.batch
                expected = first.unsqueeze(axis) + SAMPLE * torch.arange(self.batch).view(sizes)
                if bool((first < SAMPLE).all()) and torch.equal(expected, ids):
                    return axis
        self.fail("an operation that mixes the samples of the batch, or empties the state,")

    def one_sample(self, value: Const | Time, axis: int) -> Const | Time:
        """value without its sample axis; it must be the same for every sample."""
        first = value.value.select(axis, 0)
        if not torch.equal(first.unsqueeze(axis).expand_as(value.value), value.value):
            self.fail("a constant that differs from sample to sample of the batch")
        return _apply(aten.select.int, value, axis, 0)

    def zeros(self, *shape: int) -> Const:
        return Const(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def ones(self, *shape: int) -> Const:
        return Const(torch.ones(shape, dtype=self.dtype, device=self.device))

    def free_block(self, value: Const | Time) -> Affine:
        """Rows [n] without any input."""
        n = value.shape[0]
        none = torch.full((n,), -1)
        if isinstance(value, Const):
            return Affine(None, value, select=none)
        return Affine(None, self.zeros(n), select=none, shift=value)

    def lift(self, value: Const | Time, axis: int) -> State:
        """A sample-shaped constant or function of t as a state."""
        if axis >= len(value.shape) or value.shape[axis] != self.batch:
            self.fail("joining the state with a tensor of another batch size")
        if isinstance(value, Const):
            value = Const(value.value.to(self.device, self.dtype), value.source, value.factor)
        one = self.one_sample(value, axis)
        shape = one.shape
        return self.to_state(self.new_block(self.free_block(_apply(aten.reshape.default, one, [-1]))), shape, axis)

    def take_rows(self, a: Affine, index: Tensor) -> Affine:
        select = None if a.select is None else a.select[index]
        return replace(
            a, bias=_take(a.bias, index), select=select, scale=_take(a.scale, index), weight=_take(a.weight, index),
            gate=_take(a.gate, index), shift=_take(a.shift, index),
        )

    def gather(self, rows: Tensor) -> Affine:
        """The pending rows of the given numbers, over one common parent."""
        blocks = torch.searchsorted(torch.tensor(self.starts), rows, right=True) - 1
        pieces, order = [], []
        for block in blocks.unique().tolist():
            where = (blocks == block).nonzero()[:, 0]
            index = rows[where] - self.starts[block]
            affine = self.blocks[block]
            full = index.numel() == affine.rows and torch.equal(index, torch.arange(affine.rows))
            pieces.append(affine if full else self.take_rows(affine, index))
            order.append(where)
        if len(pieces) == 1:
            return pieces[0]
        return self.take_rows(self.join(pieces), torch.argsort(torch.cat(order)))

    @staticmethod
    def resolve(hidden: Hidden) -> tuple[Hidden, Tensor]:
        columns = torch.arange(hidden.width)
        while hidden.merged is not None:
            hidden, numbers = hidden.merged
            columns = numbers[columns]
        return hidden, columns

    def onto(self, a: Affine, parent: Hidden) -> Affine:
        """The same rows over `parent`, into which a.parent was merged."""
        if a.parent is None:
            return replace(a, parent=parent)
        _, columns = self.resolve(a.parent)
        if a.parent is parent:
            return a
        if a.select is not None:
            return replace(a, parent=parent, select=torch.where(a.select >= 0, columns[a.select.clamp(min=0)], -1))
        return replace(a, parent=parent, weight=self.scatter_columns(a.weight, columns, parent.width))

    def scatter_columns(self, weight: Const, columns: Tensor, width: int) -> Const:
        """[n, k] -> [n, width], column j to columns[j] (-1: dropped); columns that meet are added."""
        keep = (columns >= 0).nonzero()[:, 0]
        target = columns[keep]
        if target.unique().numel() == target.numel():
            origin = torch.full((width,), weight.shape[1])
            origin[target] = keep
            padded = _apply(aten.cat.default, [weight, self.zeros(weight.shape[0], 1)], 1)
            return _apply(aten.index_select.default, padded, 1, Const(origin.to(self.device)))
        table = torch.zeros(weight.shape[1], width, dtype=self.dtype, device=self.device)
        table[keep, target] = 1.0
        return _apply(aten.mm.default, weight, Const(table))

    def join(self, pieces: list[Affine]) -> Affine:
        parent = None
        for piece in pieces:
            if piece.parent is not None:
                other = self.resolve(piece.parent)[0]
                parent = other if parent is None else self.merge(self.resolve(parent)[0], other)
        if parent is not None:
            pieces = [self.onto(p, parent) for p in pieces]
        cat = lambda parts: _apply(aten.cat.default, parts)
        result = Affine(
            parent, cat([p.bias for p in pieces]), name=next((p.name for p in pieces if p.name), ""),
        )
        if all(p.select is not None for p in pieces):
            result.select = torch.cat([p.select for p in pieces])
            if any(p.scale is not None for p in pieces):
                result.scale = cat([p.scale or self.ones(p.rows) for p in pieces])
        else:
            result.weight = cat([self.dense(p) for p in pieces])
        if any(p.gate is not None for p in pieces):
            result.gate = cat([p.gate or self.ones(p.rows) for p in pieces])
        if any(p.shift is not None for p in pieces):
            result.shift = cat([p.shift or self.zeros(p.rows) for p in pieces])
        return result

    def merge(self, a: Hidden, b: Hidden) -> Hidden:
        """One layer for the outputs of two."""
        if a is b:
            return a
        if a.pre is None or b.pre is None:
            self.fail("combining the state with an output of a later layer (a residual or skip connection)")
        if a.activation != b.activation:
            self.fail(
                f"combining outputs of different layers or activations ({a.activation.name}, {b.activation.name}; a "
                "residual or skip connection?)"
            )
        rows, number = torch.cat([a.rows, b.rows]).unique(return_inverse=True)
        merged = Hidden(rows.numel(), a.activation, self.gather(rows), rows)
        a.merged, b.merged = (merged, number[: a.width]), (merged, number[a.width:])
        return merged

    def dense(self, a: Affine) -> Const:
        """W [n, parent.width]."""
        if a.weight is not None:
            return a.weight
        width = 0 if a.parent is None else a.parent.width
        if a.parent is None:
            return self.zeros(a.rows, 0)
        one = torch.zeros(a.rows, width, dtype=self.dtype, device=self.device)
        keep = (a.select >= 0).nonzero()[:, 0]
        one[keep, a.select[keep]] = 1.0
        if a.scale is None:
            return Const(one)
        return _apply(aten.mul.Tensor, Const(one), _apply(aten.unsqueeze.default, a.scale, 1))

    # ------------------------------------------------------------------------------------------- operations on states

    def activate(self, rows: Tensor, activation: Activation) -> Tensor:
        """Closes a layer over the pending rows; returns the rows of its output."""
        key = (activation, rows.numpy().tobytes())
        if key not in self.closed:
            hidden = Hidden(rows.numel(), activation, self.gather(rows), rows.clone())
            block = Affine(hidden, self.zeros(rows.numel()), select=torch.arange(rows.numel()))
            self.closed[key] = self.new_block(block)
        return self.closed[key]

    def elementwise(self, state: State, activation: Activation) -> State:
        axis = self.sample_axis(state.ids)
        one = state.ids.select(axis, 0)
        return self.to_state(self.activate(one.reshape(-1), activation), one.shape, axis)

    def scaled(self, a: Affine, factor: Const | Time) -> Affine:
        """factor [n] times the rows."""
        if isinstance(factor, Time):
            # The constant of rows without input belongs to the time, outside the gate.
            if a.parent is None:
                value = _add(a.bias, a.shift)
                return replace(a, bias=self.zeros(a.rows), shift=_mul(value, factor))
            shift = None if a.shift is None else _mul(a.shift, factor)
            return replace(a, gate=_mul(a.gate, factor), shift=shift)
        shift = None if a.shift is None else _mul(a.shift, factor)
        changes: dict[str, Any] = {"bias": _mul(a.bias, factor), "shift": shift}
        if a.weight is not None:
            changes["weight"] = _mul(a.weight, _apply(aten.unsqueeze.default, factor, 1))
        else:
            changes["scale"] = _mul(a.scale, factor)
        return replace(a, **changes)

    def shifted(self, a: Affine, summand: Const | Time) -> Affine:
        """The rows plus summand [n]."""
        if isinstance(summand, Const) and a.gate is None:
            return replace(a, bias=_add(a.bias, summand))
        if isinstance(summand, Const):
            zero = summand.value * 0
            root = Time(zero, Node(torch.zeros_like, (zero,)), (Const(zero), Const(zero)))
            summand = _add(root, summand)
        return replace(a, shift=_add(a.shift, summand))

    def sum_of(self, a: Affine, b: Affine) -> Affine:
        for x, y in ((a, b), (b, a)):
            if not x.depends:
                result = self.shifted(y, x.bias)
                return result if x.shift is None else self.shifted(result, x.shift)
        n = a.rows
        both = self.join([a, b])
        if both.gate is not None and a.gate is not b.gate:
            self.fail("the sum of two differently gated layers")
        half = lambda v, i: None if v is None else _take(v, torch.arange(i * n, (i + 1) * n))
        weight = self.dense(both)
        return Affine(
            both.parent, _add(half(both.bias, 0), half(both.bias, 1)), weight=_add(half(weight, 0), half(weight, 1)),
            gate=a.gate, shift=_add(half(both.shift, 0), half(both.shift, 1)), name=both.name,
        )

    def binary(self, base: str, left, right, out: Tensor, kwargs: dict) -> State:
        if base == "rsub":
            base, left, right = "sub", right, left
        alpha = kwargs.get("alpha", 1)
        if set(kwargs) - {"alpha"} and any(v is not None for k, v in kwargs.items() if k != "alpha"):
            self.fail(f"{base} with {', '.join(kwargs)}")
        state = left if isinstance(left, State) else right
        ids = state.ids.expand(out.shape)
        axis = self.sample_axis(ids)
        rows = ids.select(axis, 0).reshape(-1)
        one_shape = ids.select(axis, 0).shape
        finish = lambda affine: self.to_state(self.new_block(affine), one_shape, axis)

        def vector(value) -> Const | Time:
            if not isinstance(value, (Const, Time)):
                value = Const(torch.tensor(value, dtype=self.dtype, device=self.device))
            elif isinstance(value, Const):
                value = Const(value.value.to(self.device, self.dtype), value.source, value.factor)
            value = _apply(aten.expand.default, value, list(out.shape))
            return _apply(aten.reshape.default, self.one_sample(value, axis), [-1])

        minus = Const(torch.tensor(-1.0 * alpha, dtype=self.dtype, device=self.device))
        if isinstance(left, State) and isinstance(right, State):
            other_ids = right.ids.expand(out.shape)
            if self.sample_axis(other_ids) != axis:
                self.fail(f"{base} across the samples of the batch")
            other = other_ids.select(axis, 0).reshape(-1)
            if base == "mul":
                return self.product(rows, other, one_shape, axis)
            if base == "div":
                self.fail("the quotient of two states")
            a, b = self.gather(rows), self.gather(other)
            if base == "sub" or alpha != 1:
                sign = minus if base == "sub" else Const(-minus.value)
                b = self.scaled(b, _apply(aten.expand.default, sign, [b.rows]))
            return finish(self.sum_of(a, b))

        affine = self.gather(rows)
        if base == "mul":
            factor = vector(right if isinstance(left, State) else left)
            if isinstance(factor, Const):
                self.scalings[self.row_count] = (rows, factor)
            return finish(self.scaled(affine, factor))
        if base == "div":
            if isinstance(right, State):
                self.fail("division by the state")
            return finish(self.scaled(affine, _apply(aten.reciprocal.default, vector(right))))
        if isinstance(left, State):
            summand = vector(right)
            if base == "sub" or alpha != 1:
                summand = _mul(summand, minus if base == "sub" else Const(-minus.value))
            return finish(self.shifted(affine, summand))
        if base == "sub" or alpha != 1:
            sign = minus if base == "sub" else Const(-minus.value)
            affine = self.scaled(affine, _apply(aten.expand.default, sign, [affine.rows]))
        return finish(self.shifted(affine, vector(left)))

    def product(self, rows: Tensor, other: Tensor, shape, axis: int) -> State:
        """state * state: squares, cubes, x * sigmoid(x), or one factor that is a function of t after all."""
        if torch.equal(rows, other):
            return self.to_state(self.activate(rows, Activation("square")), shape, axis)
        for x, y in ((rows, other), (other, rows)):
            b = self.gather(y)
            if not b.depends:
                value = _add(b.bias, b.shift)
                return self.to_state(self.new_block(self.scaled(self.gather(x), value)), shape, axis)
            if b.plain and b.parent.rows is not None and torch.equal(b.parent.rows[b.select], x):
                name = {"sigmoid": "silu", "square": "cube"}.get(b.parent.activation.name)
                if name:
                    return self.to_state(self.activate(x, Activation(name)), shape, axis)
            if b.plain and b.parent.activation.name == "sigmoid":
                # x * sigmoid(v x) = silu(v x) / v
                inner = b.parent.rows[b.select]
                scaled_rows, v = self.scalings.get(int(inner[0]), (None, None))
                whole = torch.equal(inner, inner[0] + torch.arange(inner.numel()))
                if whole and scaled_rows is not None and torch.equal(scaled_rows, x) and bool((v.value != 0).all()):
                    silu = self.gather(self.activate(inner, Activation("silu")))
                    rows = self.new_block(self.scaled(silu, _apply(aten.reciprocal.default, v)))
                    return self.to_state(rows, shape, axis)
        self.fail("the product of two states (other than x*x, x*x*x and x*sigmoid(x))")

    def contract(self, rows: Tensor, matrix: Const) -> Tensor:
        """matrix [o, n] times pending rows [n]; returns the numbers of o new rows."""
        a = self.gather(rows)
        if a.weight is not None or a.gate is not None:
            # A second matrix: multiplied out it would lose its sparsity (and rounding), so the first becomes a layer.
            # Rows that are functions of t by construction (a time column) need no neuron.
            block = torch.searchsorted(torch.tensor(self.starts), rows, right=True) - 1
            index = torch.tensor([i for i, k in enumerate(block.tolist()) if self.blocks[k].depends])
            rows = rows.clone()
            rows[index] = self.activate(rows[index], IDENTITY)
            a = self.gather(rows)
        weight = matrix if a.scale is None else _mul(matrix, _apply(aten.unsqueeze.default, a.scale, 0))
        wide = lambda m, v: Const(
            (m.value.double() @ v.value.double()).to(self.dtype),
            *[s[:, 0] if s is not None else None for s in (_trace_vector(m, v) or (None, None))],
        )
        shift = None
        if a.shift is not None:
            if a.shift.affine is not None:
                slope, offset = (wide(matrix, part) for part in a.shift.affine)
                node = _apply(aten.mv.default, matrix, a.shift).node
                shift = Time(slope.value * 0, node, (slope, offset))
                shift.value = (matrix.value @ a.shift.value)
            else:
                shift = _apply(aten.mv.default, matrix, a.shift)
        new = Affine(a.parent, wide(matrix, a.bias), shift=shift, name=self.layer_name(matrix))
        if a.parent is None:
            new.select = torch.full((matrix.shape[0],), -1)
        else:
            new.weight = self.scatter_columns(weight, a.select, a.parent.width)
        return self.new_block(new)

    def matrix_product(self, left, right) -> State:
        """mm and bmm with a state on one side and a constant on the other."""
        if isinstance(right, State):
            if isinstance(left, State):
                self.fail("the matrix product of two states")
            swapped = self.matrix_product(
                State(right.ids.mT), _apply(aten.transpose.int, left, -2, -1)
            )
            return State(swapped.ids.mT.contiguous())
        if isinstance(right, Time):
            self.fail("a matrix that depends on t")
        ids = left.ids
        axis = self.sample_axis(ids)
        if axis == ids.dim() - 1:
            self.fail("a sum over the samples of the batch")
        one = ids.select(axis, 0)
        if ids.dim() == 3 and axis == 0:  # [p, k] against [k, q], one matrix for all samples
            matrix = _apply(aten.t.default, self.one_sample(right, 0))
            rows = torch.stack([self.contract(one[p], matrix) for p in range(one.shape[0])])
        elif ids.dim() == 3:  # [g, k] against [g, k, q]
            parts = [_apply(aten.t.default, _apply(aten.select.int, right, 0, g)) for g in range(one.shape[0])]
            rows = torch.stack([self.contract(one[g], matrix) for g, matrix in enumerate(parts)])
        else:
            rows = self.contract(one, _apply(aten.t.default, right))
        return self.to_state(rows, rows.shape, axis)

    def reduce(self, base: str, args, out: Tensor) -> State:
        """sum and mean over axes other than the samples'."""
        ids = args[0].ids
        axis = self.sample_axis(ids)
        dims = args[1] if len(args) > 1 and args[1] is not None else list(range(ids.dim()))
        dims = sorted(d % ids.dim() for d in ([dims] if isinstance(dims, int) else dims)) or list(range(ids.dim()))
        if axis in dims:
            self.fail(f"{base} over the samples of the batch")
        keep = [d for d in range(ids.dim()) if d not in dims and d != axis]
        one = ids.permute(axis, *keep, *dims)[0]
        terms = math.prod(ids.shape[d] for d in dims)
        positions = one.reshape(-1, terms)
        factor = 1.0 / terms if base == "mean" else 1.0
        a = self.gather(positions.reshape(-1))
        width = 0 if a.parent is None else a.parent.width
        if positions.numel() * width > 1 << 27:
            self.fail(f"{base} over so many products ({positions.numel()} x {width})", "Use torch.nn.functional.linear")
        if a.gate is not None:
            self.fail(f"{base} of gated values")

        def add_up(v):
            if v is None:
                return None
            total = _apply(aten.sum.dim_IntList, _apply(aten.reshape.default, v, [-1, terms, *v.shape[1:]]), [1])
            return _apply(aten.mul.Tensor, total, factor)

        new = Affine(a.parent, add_up(a.bias), shift=add_up(a.shift), name=a.name)
        if a.parent is None:
            new.select = torch.full((positions.shape[0],), -1)
        else:
            new.weight = add_up(self.dense(a))
        rows = self.new_block(new)
        out_axis = axis - sum(d < axis for d in dims)
        state = self.to_state(rows, [ids.shape[d] for d in keep], out_axis)
        return State(state.ids.reshape(out.shape))

    def state_op(self, base: str, func, args, kwargs, out) -> Any:
        if base in STRUCTURAL:
            return self.structural(base, func, args, kwargs, out)
        if base in BINARY:
            if len(args) > 2:
                kwargs = {**kwargs, "alpha": args[2]}
            return self.binary(base, args[0], args[1], out, kwargs)
        if base == "neg":
            return self.binary("mul", args[0], -1.0, out, {})
        if base in PRODUCTS:
            if base in ("mm", "bmm"):
                return self.matrix_product(*args)
            state = self.matrix_product(args[1], args[2])
            if kwargs.get("alpha", 1) != 1:
                state = self.binary("mul", state, kwargs["alpha"], out, {})
            summand = args[0]
            if kwargs.get("beta", 1) != 1:
                self.fail(f"{base} with beta")
            return self.binary("add", state, summand, out, {})
        if base in ("sum", "mean"):
            return self.reduce(base, args, out)
        if base == "addcmul":  # a + value * b * c
            factor = [a for a in args[1:3] if not isinstance(a, State)]
            if len(factor) == 2:
                product = _mul(*factor)
            else:
                state, other = args[1:3] if isinstance(args[1], State) else args[2:0:-1]
                product = self.binary("mul", state, other, out, {})
            return self.binary("add", args[0], product, out, {"alpha": kwargs.get("value", 1)})
        if base == "native_batch_norm" or base == "_native_batch_norm_legit_no_training" or base == "native_dropout":
            return self.inactive_layer(base, args, out)
        if base in ("zero", "fill") and not isinstance(args[-1], State):
            return Const(out.clone())
        activation = self.activation_of(base, args, kwargs)
        if activation is not None:
            state = self.elementwise(args[0], activation) if activation != IDENTITY else args[0]
            if base == "elu" and len(args) > 2 and args[2] != 1:
                state = self.binary("mul", state, float(args[2]), out, {})
            return state
        what = "a negative slope (LeakyReLU)" if base == "leaky_relu" else f"the operation {base}"
        if base in ("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"):
            self.fail("batch normalisation over the batch", "Call .eval() on the module first")
        self.fail(f"{what} on the state")

    def inactive_layer(self, base: str, args, out) -> Any:
        """Batch normalisation with stored statistics, dropout switched off."""
        if base == "native_dropout":
            return [args[0], Const(out[1])]
        x, weight, bias, mean, variance = args[:5]
        legit = base == "_native_batch_norm_legit_no_training"
        if not legit and args[5]:
            self.fail("batch normalisation over the batch", "Call .eval() on the module first")
        eps = args[6] if legit else args[7]
        if len(x.shape) != 2:
            self.fail("batch normalisation of images")
        scale = _apply(aten.rsqrt.default, _apply(aten.add.Scalar, variance, eps))
        y = self.binary("sub", x, mean, out[0], {})
        y = self.binary("mul", y, scale if weight is None else _mul(scale, weight), out[0], {})
        if bias is not None:
            y = self.binary("add", y, bias, out[0], {})
        return [y, *(Const(v) for v in out[1:])]

    @staticmethod
    def activation_of(base: str, args, kwargs) -> Activation | None:
        rest = [float(a) if isinstance(a, (int, float)) else a for a in args[1:]]
        if base in ("tanh", "sigmoid", "relu", "silu", "sin", "square"):
            return Activation(base)
        if base == "softplus":
            beta, threshold = (*rest, *(1.0, 20.0)[len(rest):])
            return Activation("softplus", (kwargs.get("beta", beta), kwargs.get("threshold", threshold)))
        if base == "elu" and (len(rest) < 3 or rest[2] == 1.0) and not kwargs:
            return Activation("elu", (rest[0] if rest else 1.0,))
        if base == "pow":
            return {1.0: IDENTITY, 2.0: Activation("square"), 3.0: Activation("cube")}.get(rest[0] if rest else None)
        if (base == "clamp_min" and rest == [0.0]) or (base == "threshold" and rest == [0.0, 0.0]):
            return Activation("relu")
        if base == "clamp" and (kwargs.get("min", rest[0] if rest else None) == 0.0) and (
            kwargs.get("max", rest[1] if len(rest) > 1 else None) is None
        ):
            return Activation("relu")
        return None

    def structural(self, base: str, func, args, kwargs, out) -> Any:
        if base == "_to_copy":
            if out.dtype != self.dtype:
                self.fail(f"a change of the state's dtype to {out.dtype}")
            return State(args[0].ids.clone())
        if base == "copy":
            source = args[1]
            if not isinstance(source, State):
                return _apply(aten.expand.default, source, list(out.shape))
            return State(source.ids.expand(out.shape).clone())
        states = [a for a in tree_leaves((args, kwargs)) if isinstance(a, State)]
        if base in ("cat", "stack"):
            axis = self.sample_axis(states[0].ids)
            args = (
                [self.lift(a, axis) if isinstance(a, (Const, Time)) else a for a in args[0]],
                *args[1:],
            )
        elif any(isinstance(a, Time) for a in tree_leaves((args, kwargs))):
            self.fail(f"{base} with an index that depends on t")
        if base in ("view", "_unsafe_view"):
            return State(args[0].ids.reshape(args[1]))

        def swap(a):
            if isinstance(a, State):
                return a.ids
            return a.value.cpu() if isinstance(a, Const) else a

        kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
        return tree_map(State, func(*tree_map(swap, args), **tree_map(swap, kwargs)))


def _trace_vector(matrix: Const, vector: Const) -> tuple[Tensor, Tensor] | None:
    """Source and factor of matrix @ vector, as columns."""
    if matrix.source is None and vector.source is None:
        return None
    column = lambda v: None if v is None else v[:, None]
    source, factor = _trace_mm(matrix, Const(vector.value[:, None], column(vector.source), column(vector.factor)))
    return source, factor


# ------------------------------------------------------------------------------------------------------ provenance


@dataclass(eq=False)
class Provenance:
    """Where the entries of one tensor of a captured field came from: entry i is scale[i] times element index[i] of the
    flattened parameter parameters[parameter[i]]. parameter[i] = -1: a constant of the module's code, or computed from
    parameters in a way that cannot be written back."""

    parameters: tuple[str, ...]
    parameter: Tensor
    index: Tensor
    scale: Tensor

    @property
    def complete(self) -> bool:
        """Every entry can be written back."""
        return bool((self.parameter >= 0).all())


# (layer number, tensor name as in Layer.tensors()) -> where it came from; None: no entry can be written back.
Sources = dict[tuple[int, str], Provenance | None]


def _provenance(tracer: _Tracer, value: Const) -> Provenance | None:
    source, scale = _sources(value).reshape(-1), _factors(value).reshape(-1)
    plain = (source >= 0) & (scale != 0)
    if not bool(plain.any()):
        return None
    starts = torch.tensor(tracer.parameter_starts)
    which = torch.where(plain, torch.searchsorted(starts, source, right=True) - 1, -1)
    index = torch.where(plain, source - starts[which.clamp(min=0)], -1)
    used = which[plain].unique()
    compact = torch.full((len(starts) + 1,), -1)
    compact[used] = torch.arange(used.numel())
    return Provenance(tuple(tracer.parameter_names[i] for i in used.tolist()), compact[which], index, scale)


def write_back(module: nn.Module, field: VectorField, sources: Sources) -> None:
    """Copies the field's tensors into the parameters they were captured from; masked entries keep what they hold.

    field: in the layout that capture gave (not simplified). Raises ValueError if a changed entry cannot be expressed by
    the module (a constant of its code), or if one parameter entry would need two values; nothing is written then.
    """
    parameters = dict(module.named_parameters())
    before = dict(capture(module, field.dim).tensors())
    after = {name: p.detach().clone() for name, p in parameters.items()}
    written = {name: torch.zeros(p.numel(), dtype=torch.bool) for name, p in parameters.items()}
    for index, layer in enumerate(field.layers):
        for name, tensor in layer.tensors():
            source = sources.get((index, name))
            old, new = before[f"{index}.{name}"].detach(), tensor.detach()
            free = torch.ones(new.numel(), dtype=torch.bool) if source is None else source.parameter < 0
            if old.shape != new.shape:
                raise ValueError(f"field: {index}.{name} is {list(new.shape)}, the module gives {list(old.shape)}")
            if bool((old != new).cpu()[free].any()):
                raise ValueError(
                    f"field: layer {index} ({layer.name!r}), {name}: an entry changed that is no plain entry of a "
                    "parameter of the module, so it cannot be written back"
                )
            if source is None:
                continue
            value = new.cpu().double() / source.scale
            for number, parameter in enumerate(source.parameters):
                own = source.parameter == number
                at, flat = source.index[own], after[parameter].view(-1)
                wanted = value[own].to(flat)
                clash = written[parameter][at] & ~torch.isclose(flat[at], wanted, rtol=1e-6).cpu()
                if bool(clash.any()):
                    raise ValueError(
                        f"parameter {parameter!r}: an entry is used in several places of the field, which disagree now"
                    )
                flat[at] = wanted
                written[parameter][at] = True
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(after[name])


# ---------------------------------------------------------------------------------------------------------- the door


def capture(module: nn.Module, dim: int | None = None) -> VectorField:
    """The program of `module.forward(t, y)`, y [batch, dim], t 0-d (or [1], [1, 1] if only those work).

    dim: size of the state; inferred from the module's weights if None.
    The module is left as it was: parameters, buffers, attributes, hooks and random state. All tensors of the field are
    detached copies in the module's dtype (float32 or float64) and device. A pruned entry (exact zero) is not in the
    pattern.

    Raises UnsupportedFieldError where the module cannot be expressed (naming the module path, the operation and the
    remedy), or where it differs from what was read; ValueError for NaN or infinite weights and for a `dim` that does
    not fit or cannot be inferred; TypeError for something that is no nn.Module.
    """
    return capture_with_sources(module, dim)[0]


def capture_with_sources(module: nn.Module, dim: int | None = None) -> tuple[VectorField, Sources]:
    """capture(), and for every tensor of the field the parameter entries it was read from (see `write_back`)."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module with forward(t, y), not {type(module).__name__}")
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    dtype, device = _dtype_and_device(module)
    with _untouched(module, device), torch.no_grad():
        dim, t_shape, batch = _probe(module, dim, dtype, device)
        tracer, result = _run(module, dim, t_shape, batch, dtype, device)
        field, sources = _assemble(tracer, result, dim)
        _verify(module, field, t_shape)
    return field, sources


def _dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameters = list(module.parameters())
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"parameter {name!r} is on the meta device; materialise the module first")
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(f"parameter {name!r} holds NaN or infinite values; a vector field needs finite weights")
    for what, kinds in (("dtype", {p.dtype for p in parameters}), ("device", {p.device for p in parameters})):
        if len(kinds) > 1:
            raise UnsupportedFieldError(
                f"the module's parameters have more than one {what} ({', '.join(sorted(map(str, kinds)))}); move them "
                "to one with module.to(...)"
            )
    like = next(iter([*parameters, *(b for b in module.buffers() if b.is_floating_point()), torch.empty(0)]))
    dtype, device = like.dtype, like.device
    if dtype not in (torch.float32, torch.float64):
        raise UnsupportedFieldError(f"the module's dtype is {dtype}; use module.float() or module.double()")
    return dtype, device


@contextlib.contextmanager
def _untouched(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Leaves parameters, buffers, attributes and random state as they were."""
    submodules = list(module.modules())
    attributes = [
        {k: type(v)(v) if type(v) in (dict, list, OrderedDict) else v for k, v in m.__dict__.items() if k != "_modules"}
        for m in submodules
    ]
    tensors = [(x, x.detach().clone()) for x in [*module.parameters(), *module.buffers()]]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode(False):
        try:
            yield
        finally:
            for m, saved in zip(submodules, attributes):
                for key in list(m.__dict__):
                    if key not in saved and key != "_modules":
                        del m.__dict__[key]
                for key, value in saved.items():
                    if m.__dict__.get(key) is value:
                        continue
                    if type(value) in (dict, OrderedDict) and type(m.__dict__.get(key)) is type(value):
                        m.__dict__[key].clear()  # in place: others (hook handles) may hold the dictionary
                        m.__dict__[key].update(value)
                    elif type(value) is list and type(m.__dict__.get(key)) is list:
                        m.__dict__[key][:] = value
                    else:
                        m.__dict__[key] = value
            with torch.no_grad():
                for x, saved_value in tensors:
                    if not torch.equal(x, saved_value):
                        x.copy_(saved_value)


def _candidates(module: nn.Module) -> list[int]:
    found: list[int] = []
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    found += [m.out_features for m in reversed(linears)]
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.dim() == 2:
            found += tensor.shape
        elif tensor.dim() == 1:
            found += tensor.shape
    for m in linears:
        found += [m.in_features, m.in_features - 1]
    return [d for d in dict.fromkeys(found) if d > 0]


def _probe(
    module: nn.Module, dim: int | None, dtype: torch.dtype, device: torch.device
) -> tuple[int, tuple[int, ...], int]:
    """(dim, shape of t, batch size) with which the module runs and returns [batch, dim]."""
    candidates = _candidates(module) if dim is None else [dim]
    sizes = {s for x in [*module.parameters(), *module.buffers()] for s in x.shape}
    sizes |= {c + k for c in candidates for k in (-1, 0, 1, 2)}
    # A size that nothing else has, so that no broadcast or transpose of the module's works by accident.
    batch = next(n for n in itertools.count(7, 2) if n not in sizes)
    works: list[tuple[int, tuple[int, ...]]] = []
    first_error: Exception | None = None
    shape_seen = None
    for d in candidates:
        for t_shape in ((), (1, 1), (1,)):
            y, t = _point(d, batch, dtype, device, t_shape)
            try:
                out = module(t, y)
            except Exception as error:  # whatever the user's code raises says that this shape is not meant
                first_error = first_error or error
                continue
            if isinstance(out, Tensor) and out.shape == (batch, d):
                works.append((d, t_shape))
                break
            shape_seen = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if len(works) == 1:
        return (*works[0], batch)
    if dim is not None:
        if shape_seen is not None:
            raise ValueError(
                f"dim={dim}: forward(t, y) with y [{batch}, {dim}] returned {shape_seen}; a vector field returns one "
                "tensor shaped like y"
            )
        raise UnsupportedFieldError(
            f"module {type(module).__name__}: forward(t, y) failed for y [{batch}, {dim}] and t 0-d, [1, 1] or [1]: "
            f"{type(first_error).__name__}: {first_error}"
        ) from first_error
    found = "none" if not works else ", ".join(str(d) for d, _ in works)
    hint = f" (the first try said: {first_error})" if first_error is not None and not works else ""
    raise ValueError(
        f"the size of the state cannot be told from the module's weights (sizes that run: {found}); pass dim=...{hint}"
    )


def _point(
    dim: int, batch: int, dtype: torch.dtype, device: torch.device, t_shape: tuple[int, ...],
    t: float = 0.6180339887498949, scale: float = 1.0, seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A random y [batch, dim] and a t that no number in a user's code is likely to equal."""
    generator = torch.Generator().manual_seed(seed)
    y = scale * torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return y.to(device, dtype), torch.full(t_shape, t, dtype=dtype, device=device)


def _run(module: nn.Module, dim: int, t_shape, batch: int, dtype, device) -> tuple[_Tracer, Any]:
    tracer = _Tracer(module, dtype, device, batch)
    y, t = _point(dim, batch, dtype, device, t_shape)
    tracer.root = Hidden(dim)
    rows = tracer.new_block(Affine(tracer.root, tracer.zeros(dim), select=torch.arange(dim)))
    tracer.bind(y, tracer.to_state(rows, (dim,), 0))
    one, zero = Const(torch.ones_like(t)), Const(torch.zeros_like(t))
    tracer.bind(t, Time(t, Node(None, (t_shape,)), (one, zero)))
    enter = register_module_forward_pre_hook(lambda m, _: tracer.stack.append(m))
    leave = register_module_forward_hook(lambda m, _, __: _pop(tracer.stack, m), always_call=False)
    try:
        with tracer:
            out = module(t, y)
        value = tracer.value_of(out)
        tracer.stack.clear()
        if not isinstance(value, State):
            value = tracer.lift(value, 0)
        if tracer.sample_axis(value.ids) != 0:
            tracer.fail("a result whose first axis is not the batch")
        return tracer, tracer.gather(value.ids[0])
    finally:
        enter.remove()
        leave.remove()


def _pop(stack: list[nn.Module], module: nn.Module) -> None:
    while stack and stack.pop() is not module:
        pass


def _assemble(tracer: _Tracer, last: Affine, dim: int) -> tuple[VectorField, Sources]:
    chain: list[tuple[Affine, Activation]] = []
    current, activation = last, IDENTITY
    while True:
        parent = tracer.root if current.parent is None else tracer.resolve(current.parent)[0]
        chain.append((tracer.onto(current, parent), activation))
        if parent is tracer.root:
            break
        current, activation = parent.pre, parent.activation
    layers, notes, sources = [], [], {}
    for index, (affine, activation) in enumerate(reversed(chain)):
        layer, own = _layer(tracer, affine, activation)
        layer.name = layer.name or (f"layer {index}" if affine.weight is not None else f"layer {index} (diagonal)")
        layers.append(layer)
        sources.update({(index, name): _provenance(tracer, value) for name, value in own.items()})
        if layer.pattern.nnz == 0:
            notes.append(f"capture: layer {index} ({layer.name}) has no weights left")
        for kind in ("gate", "shift"):
            if isinstance(getattr(layer, kind), TimeFunction):
                notes.append(
                    f"capture: the {kind} of layer {index} ({layer.name}) is kept as a general function of t, with "
                    "fixed parameters"
                )
    return VectorField(layers, notes), sources


def _layer(tracer: _Tracer, a: Affine, activation: Activation) -> tuple[Layer, dict[str, Const]]:
    own = lambda value: value.detach().to(tracer.dtype).clone()
    weight = tracer.dense(a)
    mask = weight.value != 0
    pattern = Pattern.from_mask(mask)
    flat = mask.cpu()
    tensors = {
        "values": Const(weight.value[mask], None if weight.source is None else weight.source[flat],
                        None if weight.factor is None else weight.factor[flat]),
        "bias": a.bias,
    }
    gate: Gate = None
    shift: Shift = None
    parts = (("gate", a.gate, "sigmoid", SigmoidGate), ("shift", a.shift, "affine", LinearShift))
    for kind, part, exact, build in parts:
        if part is None:
            continue
        pair = getattr(part, exact)
        if pair is None:
            made = TimeFunction(TimeProgram(part.node, tracer.dtype, tracer.device))
        else:
            tensors[f"{kind}.slope"], tensors[f"{kind}.offset"] = pair
            made = build(own(pair[0].value), own(pair[1].value))
        gate, shift = (made, shift) if kind == "gate" else (gate, made)
    for name, value in tensors.items():
        if not bool(torch.isfinite(value.value).all()):
            raise ValueError(f"layer {a.name!r}: {name} computed from the weights holds NaN or infinite values")
    layer = Layer(pattern, own(tensors["values"].value), own(a.bias.value), gate, shift, activation, a.name)
    return layer, tensors


def evaluate(field: VectorField, t: Tensor, y: Tensor) -> Tensor:
    """f(t, y) by the definition, dense; y [batch, dim], t 0-d."""
    h = y
    for layer in field.layers:
        z = h @ layer.weight.T + layer.bias
        scale, shift = layer.modulation(t)
        z = z if scale is None else scale * z
        z = z if shift is None else z + shift
        h = activations.apply(layer.activation, z)
    return h


def _verify(module: nn.Module, field: VectorField, t_shape: tuple[int, ...]) -> None:
    tolerance = 4000 * torch.finfo(field.dtype).eps
    points = ((-1.0, 1.0), (-0.37, 0.2), (0.0, 1.0), (0.45, 3.0), (1.3, 1.0), (2.0, 0.5))  # (t, size of y)
    for seed, (time, scale) in enumerate(points, 1):
        y, t = _point(field.dim, 5, field.dtype, field.device, t_shape, time, scale, seed)
        try:
            expected = module(t, y.clone())
        except Exception as error:
            raise UnsupportedFieldError(
                f"module {type(module).__name__}: forward(t, y) fails for another batch size or time ({error}). "
                f"{REMEDY}."
            ) from error
        got = evaluate(field, t.reshape(()), y)
        finite = torch.isfinite(expected) & torch.isfinite(got)
        error = ((expected - got).abs() * finite).nan_to_num(0.0)
        worst = error.max() / (1.0 + (expected.abs() * finite).nan_to_num(0.0).max())
        one_sided = torch.isfinite(expected) != torch.isfinite(got)
        if float(worst) > tolerance or bool(one_sided.any()):
            raise UnsupportedFieldError(
                f"module {type(module).__name__}: the captured field differs from the module at t = {time} (relative "
                f"error {float(worst):.1e}): does forward branch on values of t or y, or keep state between calls? "
                f"{REMEDY}."
            )
