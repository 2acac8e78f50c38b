"""aten operations on constants and functions of t: `apply` computes the abstract value of the result."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .operations import ADDITIVE, BILINEAR, JOINTLY_LINEAR, STRUCTURAL, SUMMAND_FIRST, aten, base_name, call
from .provenance import trace
from .replay import Node
from .trees import tree_leaves, tree_map
from .values import Constant, TimeValue


def apply(func, *args, **kwargs) -> Any:
    """An aten operation on Constant and TimeValue (and plain) arguments."""
    return evaluate(func, args, kwargs)


def typed(value: Any, dtype: torch.dtype, device: torch.device) -> Constant | TimeValue:
    """A number, constant or function of t in this dtype, on this device."""
    if not isinstance(value, (Constant, TimeValue)):
        return Constant(torch.tensor(value, dtype=dtype, device=device))
    if value.value.dtype == dtype and value.value.device == device:
        return value
    return apply(aten._to_copy.default, value, dtype=dtype, device=device)


def sparse_weight(values: Constant, row_ptr: Constant, col: Constant, inputs: int) -> Constant:
    """The dense [out, in] weight of sparseflow::linear, which has values at the entries of a pattern only."""
    row_ptr, col, device = row_ptr.value.cpu(), col.value.cpu(), values.value.device
    outputs = row_ptr.numel() - 1
    where = torch.repeat_interleave(torch.arange(outputs), row_ptr.diff()) * inputs + col
    zeros = Constant(torch.zeros(outputs * inputs, dtype=values.value.dtype, device=device))
    flat = apply(aten.index_put.default, zeros, [Constant(where.to(device))], values)
    return apply(aten.view.default, flat, [outputs, inputs])


def sparse_linear(args: tuple, out: Tensor) -> Any:
    """sparseflow::linear of an x [..., in] that does not depend on the state."""
    x, values, bias, row_ptr, col, inputs, _ = args
    weight = apply(aten.t.default, sparse_weight(values, row_ptr, col, inputs))
    product = apply(aten.mm.default, apply(aten.reshape.default, x, [-1, inputs]), weight)
    product = product if bias is None else apply(aten.add.Tensor, product, bias)
    return apply(aten.reshape.default, product, list(out.shape))


def evaluate(func, args, kwargs, value=None) -> Any:
    """`apply`, for arguments in a tuple and a dict; value: the result on the tensors, if it was computed already."""
    if value is None:
        bare = lambda a: a.value if isinstance(a, (TimeValue, Constant)) else a
        value = call(func, tree_map(bare, args), tree_map(bare, kwargs))
    timed = any(isinstance(a, TimeValue) for a in tree_leaves((args, kwargs)))
    make = _of_time if timed else _of_constants
    if isinstance(value, Tensor):
        return make(func, args, kwargs, [value])[0]
    leaves, spec = tree_flatten(value)
    results = make(func, args, kwargs, leaves)
    return tree_unflatten([r if isinstance(v, Tensor) else v for v, r in zip(leaves, results)], spec)


def _of_constants(func, args, kwargs, values: list) -> list[Constant]:
    sparse = [isinstance(v, Tensor) and v.layout != torch.strided for v in values]
    values = [v.to_dense() if s else v for v, s in zip(values, sparse)]
    origins = trace(func, args, kwargs, values)
    nodes = [None] * len(values) if all(source is None for source, _ in origins) else _nodes(func, args, kwargs, values)
    nodes = [Node(operator.methodcaller("to_dense"), (node,)) if s and node else node for node, s in zip(nodes, sparse)]
    return [Constant(v, *origin, None if origin[0] is None else node) for v, origin, node in zip(values, origins, nodes)]


def _nodes(func, args, kwargs, values: list) -> list[Node]:
    """The operation's results as nodes of a graph over t and the parameters."""

    def to_node(a):
        if isinstance(a, Constant):
            assert (a.node is None) == (a.source is None), "a constant computed from parameters has lost how"
            return a.value if a.node is None else a.node
        return a.node if isinstance(a, TimeValue) else a

    node = Node(func, tree_map(to_node, tuple(_numbers_again(func, args))), tree_map(to_node, kwargs))
    if len(values) == 1 and isinstance(values[0], Tensor) and _single(func):
        return [node]
    return [Node(operator.getitem, (node, i)) for i in range(len(values))]


def _of_time(func, args, kwargs, values: list) -> list[TimeValue]:
    nodes = _nodes(func, args, kwargs, values)
    timed = [a for a in tree_leaves((args, kwargs)) if isinstance(a, TimeValue)]
    # Rounded to whole numbers, or used as an index, nothing is affine any more.
    smooth = all(v.is_floating_point() for v in [a.value for a in timed] + [v for v in values if isinstance(v, Tensor)])
    pairs = (_affine(func, args, kwargs), _sigmoid(func, args, kwargs)) if smooth else (None, None)
    affine, sigmoid = ([None] * len(values) if pair is None else list(zip(*map(tree_leaves, pair))) for pair in pairs)
    return [TimeValue(*parts) for parts in zip(values, nodes, affine, sigmoid)]


def _numbers_again(func, args: tuple) -> tuple:
    """The arguments, with numbers that were read out of t where func takes a number."""
    if not isinstance(func, torch._ops.OpOverload):
        return args
    takes = [isinstance(a.type, (torch.NumberType, torch.FloatType)) for a in func._schema.arguments]
    return tuple(
        Node(operator.methodcaller("item"), (a.node,)) if number and isinstance(a, TimeValue) else a
        for a, number in zip(args, takes)
    )


def _single(func) -> bool:
    """func returns one tensor, not a list or tuple."""
    return len(func._schema.returns) == 1 and isinstance(func._schema.returns[0].type, torch.TensorType)


def _with(func, args, kwargs, form: str, index: int) -> Any:
    """The operation on slopes (index 0) or offsets (1) in place of the functions of t."""
    swap = lambda a: getattr(a, form)[index] if isinstance(a, TimeValue) else a
    return evaluate(func, tree_map(swap, args), tree_map(swap, kwargs))


def _affine(func, args, kwargs) -> tuple | None:
    """(slope, offset) of the result, if it is an affine function of t."""
    base = base_name(func)
    jointly = base in JOINTLY_LINEAR
    if not jointly:
        factors = args[1:3] if base in SUMMAND_FIRST else args[:2]
        several = sum(isinstance(a, TimeValue) for a in factors) > 1
        if base not in BILINEAR or several or (base == "div" and isinstance(args[1], TimeValue)):
            return None
    if any(isinstance(a, TimeValue) and a.affine is None for a in tree_leaves((args, kwargs))):
        return None

    def without(a):
        """A constant summand has no slope."""
        if isinstance(a, Constant) and a.value.is_floating_point():
            return Constant(torch.zeros_like(a.value))
        return a

    summands = range(len(args)) if jointly else range(1) if base in SUMMAND_FIRST else ()
    slope_args = [tree_map(without, a) if i in summands else a for i, a in enumerate(args)]
    if base in ADDITIVE and isinstance(slope_args[1], (int, float)):
        slope_args[1] = 0.0
    return _with(func, tuple(slope_args), kwargs, "affine", 0), _with(func, args, kwargs, "affine", 1)


def _sigmoid(func, args, kwargs) -> tuple | None:
    """(slope, offset) if the result is the sigmoid of an affine function of t."""
    base, leaves = base_name(func), tree_leaves((args, kwargs))
    if base == "sigmoid":
        return args[0].affine
    mixed = any(
        isinstance(a, Constant) and a.value.is_floating_point() or isinstance(a, TimeValue) and a.sigmoid is None
        for a in leaves
    )
    if base not in STRUCTURAL or mixed:
        return None
    return _with(func, args, kwargs, "sigmoid", 0), _with(func, args, kwargs, "sigmoid", 1)


# ------------------------------------------------------------------------- what the rows of a field are computed with


def add(a, b):
    """a + b; None is 0."""
    if a is None or b is None:
        return b if a is None else a
    return apply(aten.add.Tensor, a, b)


def mul(a, b):
    """a * b; None is 1."""
    if a is None or b is None:
        return b if a is None else a
    return apply(aten.mul.Tensor, a, b)


def take(a, index: Tensor):
    """a[index] along the first axis."""
    return None if a is None else apply(aten.index_select.default, a, 0, Constant(index.to(a.value.device)))


def as_time(a: Constant) -> TimeValue:
    node = Node(aten.clone.default, (a.value if a.node is None else a.node,))
    return TimeValue(a.value, node, (Constant(torch.zeros_like(a.value)), a))
