"""What every aten operation does to a state of a chain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

from ..field import Activation
from .algebra import apply, mul, sparse_weight, typed
from .operations import STRUCTURAL, aten, base_name
from .refusal import refuse
from .registry import CHAIN, argument, number
from .rows import RowTable
from .samples import Samples
from .trees import tree_leaves, tree_map
from .values import Constant, StateValue, TimeValue


@dataclass
class Reading:
    """What rules work on. layer_name: a name for the layer of the given matrix at this point of the forward."""

    table: RowTable
    samples: Samples
    layer_name: Callable[[Constant], str]

    def typed(self, value: Any) -> Constant | TimeValue:
        """A number, constant or function of t in the field's dtype and device."""
        return typed(value, self.table.dtype, self.table.device)

    def as_state(self, value: Constant | TimeValue, axis: int) -> StateValue:
        """A constant or function of t with a sample axis."""
        if axis >= len(value.shape) or value.shape[axis] != self.samples.size:
            refuse("joining the state with a tensor of another batch size")
        one = self.samples.one(self.typed(value), axis)
        rows = self.table.add(self.table.free(apply(aten.reshape.default, one, [-1])))
        return self.samples.spread(rows.view(one.shape), axis)


rule = CHAIN.rule


def apply_to_state(reading: Reading, func, args: tuple, kwargs: dict, out: Any) -> Any:
    """The result's rows. Raises UnsupportedFieldError for what no rule expresses."""
    if base_name(func).startswith(("_scaled_dot_product", "_native_multi_head", "_transformer_encoder")):
        refuse("attention (a product of states, and a softmax)")
    return CHAIN.apply(reading, func, args, kwargs, out)


# ------------------------------------------------------------------------------------------------- moving elements


@rule(*STRUCTURAL)
def structural(reading: Reading, func, args, kwargs, out) -> Any:
    leaves = tree_leaves((args, kwargs))
    if any(isinstance(a, TimeValue) for a in leaves):
        refuse(f"{base_name(func)} with an index that depends on t")
    ids = lambda a: a.ids if isinstance(a, StateValue) else a.value.cpu() if isinstance(a, Constant) else a
    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return tree_map(StateValue, func(*tree_map(ids, args), **tree_map(ids, kwargs)))


@rule("view", "_unsafe_view")
def view(reading: Reading, func, args, kwargs, out) -> Any:
    return StateValue(args[0].ids.reshape(out.shape))  # row numbers may lie in another order than the state did


@rule("cat", "stack")
def join(reading: Reading, func, args, kwargs, out) -> Any:
    axis = next(reading.samples.axis_of(a.ids) for a in args[0] if isinstance(a, StateValue))
    states = [a if isinstance(a, StateValue) else reading.as_state(a, axis) for a in args[0]]
    return structural(reading, func, (states, *args[1:]), kwargs, out)


@rule("_to_copy")
def to_copy(reading: Reading, func, args, kwargs, out) -> Any:
    if out.dtype != reading.table.dtype:
        refuse(f"a change of the state's dtype to {out.dtype}")
    return args[0]


@rule("copy")
def copy(reading: Reading, func, args, kwargs, out) -> Any:
    if isinstance(args[1], StateValue):
        return StateValue(args[1].ids.expand(out.shape).clone())
    return apply(aten.expand.default, args[1], list(out.shape))


# ------------------------------------------------------------------------------------------------------ arithmetic


def _operands(reading: Reading, left, right, out: Tensor) -> tuple[list[Any], Callable[[Tensor], StateValue]]:
    """Both operands for one sample, broadcast and flat (states: row numbers; others: [n]), and what makes a state of
    the rows of the result."""
    axes = {reading.samples.axis_of(a.ids.expand(out.shape)) for a in (left, right) if isinstance(a, StateValue)}
    if len(axes) > 1:
        refuse("an operation across the samples of the batch")
    axis = axes.pop()

    def flat(a):
        if isinstance(a, StateValue):
            return a.ids.expand(out.shape).select(axis, 0).reshape(-1)
        wide = apply(aten.expand.default, reading.typed(a), list(out.shape))
        return apply(aten.reshape.default, reading.samples.one(wide, axis), [-1])

    shape = out.select(axis, 0).shape
    return [flat(left), flat(right)], lambda rows: reading.samples.spread(rows.view(shape), axis)


def add(reading: Reading, left, right, out: Tensor, signs: tuple[float, float] = (1, 1)) -> StateValue:
    operands, state = _operands(reading, left, right, out)
    table, terms = reading.table, []
    for operand, sign in zip(operands, signs):
        term = table.gather(operand) if isinstance(operand, Tensor) else table.free(operand)
        terms.append(term if sign == 1 else term.scaled(Constant(table.ones(term.rows).value * sign)))
    return state(table.add(table.sum_of(*terms)))


def multiply(reading: Reading, left, right, out: Tensor) -> StateValue:
    (a, b), state = _operands(reading, left, right, out)
    if not isinstance(a, Tensor):
        a, b = b, a
    return state(reading.table.product(a, b) if isinstance(b, Tensor) else reading.table.multiple(a, b))


@rule("add", "sub", "rsub")
def sum_rule(reading: Reading, func, args, kwargs, out) -> Any:
    base = base_name(func)
    alpha = argument(args, kwargs, 2, "alpha", 1)
    if isinstance(alpha, TimeValue):
        refuse("a sum whose alpha depends on t", "Multiply by it and add the product instead")
    signs = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[base]
    return add(reading, args[0], args[1], out, signs)


@rule("mul")
def mul_rule(reading: Reading, func, args, kwargs, out) -> Any:
    return multiply(reading, args[0], args[1], out)


@rule("neg")
def neg(reading: Reading, func, args, kwargs, out) -> Any:
    return multiply(reading, args[0], -1.0, out)


@rule("div")
def div(reading: Reading, func, args, kwargs, out) -> Any:
    if isinstance(args[1], StateValue):
        refuse("division by the state")
    if kwargs.get("rounding_mode") is not None:
        refuse("division with rounding")
    return multiply(reading, args[0], apply(aten.reciprocal.default, reading.typed(args[1])), out)


@rule("addcmul")  # a + value * b * c
def addcmul(reading: Reading, func, args, kwargs, out) -> Any:
    summand, b, c = args
    states = isinstance(b, StateValue) or isinstance(c, StateValue)
    product = multiply(reading, b, c, out) if states else mul(b, c)
    return add(reading, summand, product, out, (1, kwargs.get("value", 1)))


@rule("sum", "mean")
def reduce(reading: Reading, func, args, kwargs, out) -> Any:
    """Over axes other than the samples'."""
    base, ids = base_name(func), args[0].ids
    axis = reading.samples.axis_of(ids)
    dims = args[1] if len(args) > 1 else None
    dims = {d % ids.dim() for d in ([dims] if isinstance(dims, int) else dims or range(ids.dim()))}
    if axis in dims:
        energy = " (an energy, to be differentiated with torch.autograd.grad?)" if torch.is_grad_enabled() else ""
        refuse(f"{base} over the samples of the batch{energy}")
    keep = [d for d in range(ids.dim()) if d not in dims and d != axis]
    terms = math.prod(ids.shape[d] for d in dims)
    groups = ids.permute(axis, *keep, *sorted(dims))[0].reshape(-1, terms)
    rows = reading.table.group_sums(groups, 1.0 / terms if base == "mean" else 1.0)
    state = reading.samples.spread(rows.view([ids.shape[d] for d in keep]), axis - sum(d < axis for d in dims))
    return StateValue(state.ids.reshape(out.shape))


# -------------------------------------------------------------------------------------------------------- matrices


def _matrix_product(reading: Reading, left, right) -> StateValue:
    if isinstance(left, StateValue) and isinstance(right, StateValue):
        refuse("the matrix product of two states")
    if isinstance(right, StateValue):
        left = left if isinstance(left, TimeValue) else apply(aten.transpose.int, left, -2, -1)
        return StateValue(_matrix_product(reading, StateValue(right.ids.mT), left).ids.mT.contiguous())
    if isinstance(right, TimeValue):
        refuse("a matrix that depends on t")
    axis = reading.samples.axis_of(left.ids)
    if axis == left.ids.dim() - 1:
        refuse("a sum over the samples of the batch")
    one = left.ids.select(axis, 0)  # [k], or [p, k] against one matrix [k, q] for all samples or against [p, k, q]
    if axis == 0 and len(right.shape) == 3:
        right = reading.samples.one(right, 0)

    def contract(group: int, rows: Tensor) -> Tensor:
        matrix = apply(aten.select.int, right, 0, group) if len(right.shape) == 3 else right
        return reading.table.contract(rows, apply(aten.t.default, matrix), reading.layer_name(matrix))

    rows = torch.stack([contract(g, part) for g, part in enumerate(one.reshape(-1, one.shape[-1]))])
    return reading.samples.spread(rows.reshape(*one.shape[:-1], -1), axis)


@rule("mm", "bmm")
def matrix_product(reading: Reading, func, args, kwargs, out) -> Any:
    return _matrix_product(reading, *args)


@rule("addmm", "baddbmm")
def add_matrix_product(reading: Reading, func, args, kwargs, out) -> Any:
    if any(isinstance(a, StateValue) for a in args[1:]):
        product = _matrix_product(reading, args[1], args[2])
    else:
        product = apply(aten.mm.default if len(out.shape) == 2 else aten.bmm.default, args[1], args[2])
    return add(reading, args[0], product, out, (kwargs.get("beta", 1), kwargs.get("alpha", 1)))


@rule("linear")  # sparseflow::linear, of a state
def sparse_linear(reading: Reading, func, args, kwargs, out) -> Any:
    x, values, bias, row_ptr, col, inputs, _ = args
    product = _matrix_product(reading, x, apply(aten.t.default, sparse_weight(values, row_ptr, col, inputs)))
    return product if bias is None else add(reading, product, bias, out)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(reading: Reading, func, args, kwargs, out) -> Any:
    """With stored statistics."""
    x, weight, bias, mean, variance, *rest = args
    if base_name(func) != "_native_batch_norm_legit_no_training" and rest.pop(0):
        refuse("batch normalisation over the batch", "Call .eval() on the module first")
    if len(x.shape) != 2:
        refuse("batch normalisation of images")
    scale = apply(aten.rsqrt.default, apply(aten.add.Scalar, variance, rest[1]))
    y = add(reading, x, mean, out[0], (1, -1))
    y = multiply(reading, y, mul(scale, weight), out[0])
    y = y if bias is None else add(reading, y, bias, out[0])
    return [y, *(Constant(v) for v in out[1:])]


# ----------------------------------------------------------------------------------------------------- activations


def _activate(reading: Reading, state: StateValue, activation: Activation) -> StateValue:
    axis = reading.samples.axis_of(state.ids)
    one = state.ids.select(axis, 0)
    return reading.samples.spread(reading.table.activate(one.reshape(-1), activation).view(one.shape), axis)


@rule("tanh", "sigmoid", "relu", "silu", "sin", "square")
def activation(reading: Reading, func, args, kwargs, out) -> Any:
    return _activate(reading, args[0], Activation(base_name(func)))


@rule("gelu")
def gelu(reading: Reading, func, args, kwargs, out) -> Any:
    if kwargs.get("approximate", "none") != "none":
        refuse("gelu by its approximation")
    return _activate(reading, args[0], Activation("gelu"))


@rule("softplus")
def softplus(reading: Reading, func, args, kwargs, out) -> Any:
    params = (number(args, kwargs, 1, "beta", 1.0), number(args, kwargs, 2, "threshold", 20.0))
    return _activate(reading, args[0], Activation("softplus", params))


def _elu(reading: Reading, x: StateValue, alpha: float, scale: float, input_scale: float, out: Tensor) -> StateValue:
    """scale * x above 0, scale * alpha * (exp(input_scale * x) - 1) below."""
    if input_scale != 1:
        x, scale, alpha = multiply(reading, x, input_scale, out), scale / input_scale, alpha * input_scale
    state = _activate(reading, x, Activation("elu", (alpha,)))
    return state if scale == 1 else multiply(reading, state, scale, out)


@rule("elu")  # also selu
def elu(reading: Reading, func, args, kwargs, out) -> Any:
    numbers = (number(args, kwargs, i, name, 1.0) for i, name in enumerate(("alpha", "scale", "input_scale"), 1))
    return _elu(reading, args[0], *numbers, out)


@rule("celu")
def celu(reading: Reading, func, args, kwargs, out) -> Any:
    alpha = number(args, kwargs, 1, "alpha", 1.0)
    return _elu(reading, args[0], alpha, 1.0, 1.0 / alpha, out)


@rule("pow")
def power(reading: Reading, func, args, kwargs, out) -> Any:
    name = {1.0: "identity", 2.0: "square", 3.0: "cube"}.get(args[1] if isinstance(args[1], (int, float)) else None)
    if name is None:
        refuse("a power of the state other than 2 and 3")
    return args[0] if name == "identity" else _activate(reading, args[0], Activation(name))
