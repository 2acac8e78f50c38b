"""Rules that take several elements to one: sums, means, norms, maxima, softmax, and the normalisations made of them."""

from __future__ import annotations

import math
from typing import Any, Callable

import torch
from torch import Tensor

from ..field import Node
from .algebra import apply
from .elements import ANY, Elements, samples_of
from .functions import choose, complement, maximum, minimum, product, root
from .graph_rules import grouped
from .operations import aten, base_name
from .refusal import refuse
from .registry import GRAPH, argument
from .values import Opaque, StateValue

rule = GRAPH.rule


def groups_of(ids: Tensor, dims: set[int]) -> tuple[Tensor, list[int]]:
    """Elements as groups [groups, terms], the terms being those along the axes that are reduced, and the axes that stay."""
    keep = [d for d in range(ids.dim()) if d not in dims]
    terms = math.prod(ids.shape[d] for d in dims)
    return ids.permute(*keep, *sorted(dims)).reshape(-1, terms), keep


def mixed(groups: Tensor) -> bool:
    samples = samples_of(groups)
    one = samples.amin(1, keepdim=True)
    return not bool(((samples == one) | (samples == ANY)).all())


def _dims(dims: Any, axes: int) -> set[int]:
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return set(range(axes))
    return {d % max(axes, 1) for d in ([dims] if isinstance(dims, int) else dims)}


def reduced(e: Elements, func, value: Any, dims: Any, out: Tensor, reduce: Callable[[Tensor], Tensor]) -> Any:
    ids = e.ids(value)
    if not ids.dim():
        ids = ids.reshape(1)
    groups, _ = groups_of(ids, _dims(dims, ids.dim()))
    if groups.shape[1] == 0:
        return StateValue(e.zero.expand(out.shape).clone())
    if mixed(groups):
        energy = " (an energy, to be differentiated with torch.autograd.grad?)" if torch.is_grad_enabled() else ""
        return Opaque(out.shape, f"{base_name(func)} over the samples of the batch{energy}")
    return StateValue(reduce(groups).reshape(out.shape))


def mapped(e: Elements, make: Callable[..., Node], *ids: Any) -> Tensor:
    return e.pointwise(make, *(StateValue(i) if isinstance(i, Tensor) else i for i in ids)).ids


def mean_of(e: Elements, groups: Tensor) -> Tensor:
    return mapped(e, lambda g, a: g.scaled(a, 1.0 / groups.shape[1]), e.sums(groups))


def squares_of(e: Elements, groups: Tensor) -> Tensor:
    return e.sums(mapped(e, lambda g, a: product(g, a, a), groups))


@rule("sum")
def sum_rule(e: Elements, func, args, kwargs, out) -> Any:
    return reduced(e, func, args[0], argument(args, kwargs, 1, "dim"), out, e.sums)


@rule("mean")
def mean_rule(e: Elements, func, args, kwargs, out) -> Any:
    return reduced(e, func, args[0], argument(args, kwargs, 1, "dim"), out, lambda groups: mean_of(e, groups))


@rule("prod")
def prod_rule(e: Elements, func, args, kwargs, out) -> Any:
    return reduced(e, func, args[0], argument(args, kwargs, 1, "dim"), out, lambda groups: e.tree(product, groups))


@rule("any", "all", "_is_any_true", "_is_all_true")
def truth(e: Elements, func, args, kwargs, out) -> Any:
    make = maximum if "any" in base_name(func) else minimum
    value = e.pointwise(lambda g, a: complement(g, g.apply("eq", a, g.number(0.0))), args[0])
    return reduced(e, func, value, argument(args, kwargs, 1, "dim"), out, lambda groups: e.tree(make, groups))


def variance(e: Elements, groups: Tensor, correction: float) -> Tensor:
    centred = mapped(e, lambda g, a, m: g.sub(a, m), groups, mean_of(e, groups)[:, None])
    factor = 1.0 / max(groups.shape[1] - correction, 0) if groups.shape[1] > correction else math.inf
    return mapped(e, lambda g, a: g.scaled(a, factor), squares_of(e, centred))


def _correction(args: tuple, kwargs: dict) -> float:
    correction = kwargs.get("correction")
    if correction is None and len(args) > 2 and isinstance(args[2], bool):
        correction = float(args[2])
    if correction is None and "unbiased" in kwargs:
        correction = float(kwargs["unbiased"])
    return 1.0 if correction is None else float(correction)


@rule("var", "std")
def var_rule(e: Elements, func, args, kwargs, out) -> Any:
    dims = argument(args, kwargs, 1, "dim")
    if isinstance(dims, bool):
        dims, args = None, (args[0], None, dims)
    is_std = base_name(func) == "std"

    def reduce(groups: Tensor) -> Tensor:
        found = variance(e, groups, _correction(args, kwargs))
        return mapped(e, root, found) if is_std else found

    return reduced(e, func, args[0], dims, out, reduce)


@rule("var_mean", "std_mean")
def var_mean(e: Elements, func, args, kwargs, out) -> Any:
    dims, is_std = argument(args, kwargs, 1, "dim"), base_name(func) == "std_mean"

    def reduce(groups: Tensor) -> Tensor:
        found = variance(e, groups, _correction(args, kwargs))
        return mapped(e, root, found) if is_std else found

    return [
        reduced(e, func, args[0], dims, out[0], reduce),
        reduced(e, func, args[0], dims, out[1], lambda groups: mean_of(e, groups)),
    ]


def shared(e: Elements, make: Callable[..., Node], groups: Tensor) -> Tensor:
    """The largest or smallest of groups [n, terms]: elements [n]. Equal ones share the gradient, as torch has it; so do two by
    two, but not three."""
    found = e.tree(make, groups)
    if groups.shape[1] < 3:
        return found
    found = mapped(e, lambda g, a: g.apply("detached", a), found)
    met = mapped(e, lambda g, a, b: g.apply("eq", a, b), groups, found[:, None])
    share = mapped(e, lambda g, a: g.apply("reciprocal", a), e.sums(met))
    nothing = lambda g, m, a: choose(g, m, g.sub(a, g.apply("detached", a)), g.number(0.0))  # but for its gradient
    rest = e.sums(mapped(e, nothing, met, groups))
    return mapped(e, lambda g, a, b, c: g.add(a, g.mul(b, c)), found, rest, share)


@rule("linalg_vector_norm", "norm", "linalg_matrix_norm")
def norm(e: Elements, func, args, kwargs, out) -> Any:
    order = argument(args, kwargs, 1, "p" if base_name(func) == "norm" else "ord", 2)
    dims = argument(args, kwargs, 2, "dim")
    order = 2.0 if order is None or order == "fro" else float(order)

    return reduced(e, func, args[0], dims, out, lambda groups: length_of(e, groups, order))


def length_of(e: Elements, groups: Tensor, order: float) -> Tensor:
    """The norms of this order of groups of elements [n, terms]: elements [n]."""
    if order == 2:
        return mapped(e, root, squares_of(e, groups))
    size = mapped(e, lambda g, a: g.apply("abs", a), groups)
    if order == 1:
        return e.sums(size)
    if math.isinf(order):
        return shared(e, maximum if order > 0 else minimum, size)
    powers = e.sums(mapped(e, lambda g, a: g.apply("pow", a, g.number(order)), size))
    return mapped(e, lambda g, a: root(g, a, lambda g, a: g.apply("pow", a, g.number(1.0 / order))), powers)


# ------------------------------------------------------------------------------------------------------- softmax


def rows_along(ids: Tensor, axis: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(elements as lines [lines, n] along an axis, the function that gives lines their old shape again)."""
    moved = ids.movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1]), lambda rows: rows.view(moved.shape).movedim(-1, axis)


def _shifted(e: Elements, lines: Tensor) -> tuple[Tensor, Tensor]:
    """(lines minus the largest element of each, that element [lines])."""
    top = e.tree(maximum, lines)
    return mapped(e, lambda g, a, m: g.sub(a, m), lines, top[:, None]), top


def same_sample(lines: Tensor, func) -> None:
    if mixed(lines):
        refuse(f"{base_name(func)} over the samples of the batch")


@rule("_softmax", "softmax", "_safe_softmax")
def softmax(e: Elements, func, args, kwargs, out) -> Any:
    lines, back = rows_along(e.ids(args[0]), args[1])
    same_sample(lines, func)
    if bool((lines == e.lowest).any()):
        return StateValue(back(_softmax_of_some(e, lines, func)))
    powers = mapped(e, lambda g, a: g.apply("exp", a), _shifted(e, lines)[0])
    total = mapped(e, lambda g, a: g.apply("reciprocal", a), e.sums(powers))
    return StateValue(back(mapped(e, product, powers, total[:, None])))


def _softmax_of_some(e: Elements, lines: Tensor, func) -> Tensor:
    """That of lines of which some elements are masked, and so have no part in it."""
    kept = lines != e.lowest
    if not bool(kept.any(1).all()):
        refuse(f"{base_name(func)} of a line of which every element is masked", "Leave such lines out of the mask")
    line, count = kept.nonzero()[:, 0], len(lines)
    top = grouped(e, lines[kept], line, count, lambda groups: e.tree(maximum, groups), None)
    powers = mapped(e, lambda g, a, m: g.apply("exp", g.sub(a, m)), lines[kept], top[line])
    total = grouped(e, powers, line, count, e.sums, e.zero)
    made = e.zero.expand(lines.shape).clone()
    made[kept] = mapped(e, lambda g, a, s: g.mul(a, g.apply("reciprocal", s)), powers, total[line])
    return made


@rule("_log_softmax", "log_softmax")
def log_softmax(e: Elements, func, args, kwargs, out) -> Any:
    lines, back = rows_along(e.ids(args[0]), args[1])
    same_sample(lines, func)
    centred, _ = _shifted(e, lines)
    total = mapped(e, lambda g, a: g.apply("log", a), e.sums(mapped(e, lambda g, a: g.apply("exp", a), centred)))
    return StateValue(back(mapped(e, lambda g, a, s: g.sub(a, s), centred, total[:, None])))


@rule("logsumexp")
def logsumexp(e: Elements, func, args, kwargs, out) -> Any:
    def reduce(groups: Tensor) -> Tensor:
        centred, top = _shifted(e, groups)
        total = e.sums(mapped(e, lambda g, a: g.apply("exp", a), centred))
        return mapped(e, lambda g, a, m: g.add(g.apply("log", a), m), total, top)

    return reduced(e, func, args[0], args[1], out, reduce)


@rule("_softmax_backward_data")
def softmax_backward(e: Elements, func, args, kwargs, out) -> Any:
    grad, result, axis = args[:3]
    shape = torch.broadcast_shapes(grad.shape, result.shape)
    both = mapped(e, product, e.ids(result), grad)
    lines, _ = rows_along(both.expand(shape), axis)
    total = e.sums(lines)
    held, back = rows_along(e.ids(result), axis)
    weighted = mapped(e, product, held, total[:, None])
    return StateValue(mapped(e, lambda g, a, b: g.sub(a, b), both, back(weighted)))


@rule("_log_softmax_backward_data")
def log_softmax_backward(e: Elements, func, args, kwargs, out) -> Any:
    grad, result, axis = args[:3]
    samples = samples_of(e.ids(result))
    grads, back = rows_along(e.ids(grad, samples).expand(out.shape), axis)
    total = e.sums(grads)
    held, _ = rows_along(e.ids(result), axis)
    weighted = mapped(e, lambda g, a, s: g.mul(g.apply("exp", a), s), held, total[:, None])
    return StateValue(back(mapped(e, lambda g, a, b: g.sub(a, b), grads, weighted)))


# ------------------------------------------------------------------------------------------------- normalisations


def normalised(e: Elements, groups: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of groups of elements, ((x - mean) * rstd, mean, rstd)."""
    mean = mean_of(e, groups)
    centred = mapped(e, lambda g, a, m: g.sub(a, m), groups, mean[:, None])
    power = mean_of(e, mapped(e, lambda g, a: product(g, a, a), centred))
    rstd = mapped(e, lambda g, a: g.apply("rsqrt", g.add(a, g.number(eps))), power)
    return mapped(e, product, centred, rstd[:, None]), mean, rstd


def _scaled(e: Elements, value: StateValue, weight: Any, bias: Any) -> StateValue:
    value = value if weight is None else e.pointwise(product, value, weight)
    return value if bias is None else e.pointwise(lambda g, a, b: g.add(a, b), value, bias)


@rule("native_layer_norm", "layer_norm")
def layer_norm(e: Elements, func, args, kwargs, out) -> Any:
    x, shape, weight, bias, eps = args[:5]
    ids = e.ids(x)
    groups = ids.reshape(-1, math.prod(shape))
    same_sample(groups, func)
    found, mean, rstd = normalised(e, groups, eps)
    values = _scaled(e, StateValue(found.view(ids.shape)), weight, bias)
    if not isinstance(out, (tuple, list)):
        return values
    return [values, StateValue(mean.reshape(out[1].shape)), StateValue(rstd.reshape(out[2].shape))]


@rule("native_layer_norm_backward")
def layer_norm_backward(e: Elements, func, args, kwargs, out) -> Any:
    grad, x, shape, mean, rstd, weight = args[:6]
    n, ids = math.prod(shape), e.ids(x)
    samples = samples_of(ids)
    scaled = StateValue(e.ids(grad, samples).expand(ids.shape))
    scaled = scaled if weight is None else e.pointwise(product, scaled, weight)
    d, lines = scaled.ids.reshape(-1, n), ids.reshape(-1, n)
    centre, root = e.ids(mean).reshape(-1, 1), e.ids(rstd).reshape(-1, 1)
    unit = mapped(e, lambda g, a, m, r: g.mul(g.sub(a, m), r), lines, centre, root)
    first = mean_of(e, d)
    second = mean_of(e, mapped(e, product, d, unit))
    make = lambda g, a, u, m, s, r: g.mul(g.sub(g.sub(a, m), g.mul(u, s)), r)
    result = mapped(e, make, d, unit, first[:, None], second[:, None], root)
    rest = [None if v is None else Opaque(v.shape, "the gradient of a layer norm's weight") for v in out[1:]]
    return [StateValue(result.view(ids.shape)), *rest]


@rule("native_group_norm")
def group_norm(e: Elements, func, args, kwargs, out) -> Any:
    x, weight, bias, _, channels, _, count, eps = args[:8]
    ids = e.ids(x)
    groups = ids.reshape(ids.shape[0], count, -1).reshape(ids.shape[0] * count, -1)
    same_sample(groups, func)
    found, mean, rstd = normalised(e, groups, eps)
    shape = [1, channels] + [1] * (ids.dim() - 2)
    per_channel = [None if v is None else apply(aten.reshape.default, v, shape) for v in (weight, bias)]
    values = _scaled(e, StateValue(found.view(ids.shape)), *per_channel)
    return [values, StateValue(mean.reshape(out[1].shape)), StateValue(rstd.reshape(out[2].shape))]


@rule("_fused_rms_norm", "rms_norm")
def rms_norm(e: Elements, func, args, kwargs, out) -> Any:
    x, shape, weight = args[:3]
    eps = argument(args, kwargs, 3, "eps")
    ids = e.ids(x)
    groups = ids.reshape(-1, math.prod(shape))
    same_sample(groups, func)
    power = mean_of(e, mapped(e, lambda g, a: product(g, a, a), groups))
    eps = torch.finfo(e.table.dtype).eps if eps is None else eps
    rstd = mapped(e, lambda g, a: g.apply("rsqrt", g.add(a, g.number(eps))), power)
    values = _scaled(e, StateValue(mapped(e, product, groups, rstd[:, None]).view(ids.shape)), weight, None)
    return [values, StateValue(rstd.reshape(out[1].shape))] if isinstance(out, (tuple, list)) else values


@rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_native_batch_norm_legit_functional",
)  # fmt: skip
def batch_norm(e: Elements, func, args, kwargs, out) -> Any:
    name = base_name(func)
    x, weight, bias = args[:3]
    ids = e.ids(x)
    shape = [1, -1] + [1] * (ids.dim() - 2)
    channel = lambda v: None if v is None else apply(aten.reshape.default, v, shape)
    if name == "_native_batch_norm_legit_no_training":
        mean, var, eps, training = args[3], args[4], args[6], False
    elif func._overloadname == "no_stats":
        mean, var, training, eps = None, None, True, args[5]
    else:
        mean, var, training, eps = args[3], args[4], args[5], args[7]
    if training:
        if mean is not None:
            refuse("batch normalisation over the batch", "Call .eval() on the module first")
        groups, keep = groups_of(ids, set(range(ids.dim())) - {1})
        if mixed(groups):
            refuse("batch normalisation over the batch", "Call .eval() on the module first")
        found, _, _ = normalised(e, groups, eps)
        rest = [ids.shape[d] for d in range(ids.dim()) if d != 1]
        value = StateValue(found.view(ids.shape[1], *rest).movedim(0, 1))
    else:
        value = e.pointwise(lambda g, a, m: g.sub(a, m), StateValue(ids), channel(mean))
        scale = apply(aten.rsqrt.default, apply(aten.add.Scalar, var, eps))
        value = e.pointwise(product, value, channel(scale))
    value = _scaled(e, value, channel(weight), channel(bias))
    return [value, *(Opaque(v.shape, "statistics of a batch norm") for v in out[1:])]


@rule("native_batch_norm_backward")
def batch_norm_backward(e: Elements, func, args, kwargs, out) -> Any:
    grad, x, weight, _, var, _, _, training, eps = args[:9]
    if training:
        refuse("the gradient of a batch normalisation over the batch", "Call .eval() on the module first")
    shape = [1, -1] + [1] * (len(x.shape) - 2)
    scale = apply(aten.rsqrt.default, apply(aten.add.Scalar, var, eps))
    scale = scale if weight is None else apply(aten.mul.Tensor, scale, weight)
    value = e.pointwise(product, grad, apply(aten.reshape.default, scale, shape))
    return [value, *(None if v is None else Opaque(v.shape, "a gradient of weights") for v in out[1:])]

