"""Rules of graphs for losses: what a guided field differentiates, or an energy is made of."""

from __future__ import annotations

import math
from typing import Any, Callable

from torch import Tensor

from ..field import Graph, Node
from .algebra import apply
from .elements import Elements, samples_of
from .functions import choose, product, softplus
from .graph_reductions import mean_of, reduced
from .operations import aten, base_name
from .refusal import refuse
from .registry import GRAPH, argument
from .values import Constant, StateValue

rule = GRAPH.rule

MEAN, SUM = 1, 2  # reductions, as torch numbers them


def _squared(g: Graph, d: Node, bound: float) -> Node:
    return g.square(d)


def _huber(g: Graph, d: Node, bound: float) -> Node:
    """d^2 / 2 within the bound, beyond it straight lines of the slope there."""
    size = g.apply("abs", d)
    far = g.scaled(g.sub(size, g.number(0.5 * bound)), bound)
    return choose(g, g.apply("gt", g.number(bound), size), g.scaled(g.square(d), 0.5), far)


def _smooth(g: Graph, d: Node, bound: float) -> Node:
    return g.apply("abs", d) if bound == 0 else g.scaled(_huber(g, d, bound), 1.0 / bound)


def _clipped(g: Graph, d: Node, bound: float) -> Node:
    return choose(g, g.apply("gt", g.apply("abs", d), g.number(bound)), g.scaled(g.apply("sign", d), bound), d)


# Of the difference of a value and its target: the loss, and its slope.
LOSSES: dict[str, tuple[Callable[..., Node], Callable[..., Node]]] = {
    "mse_loss": (_squared, lambda g, d, bound: g.scaled(d, 2.0)),
    "huber_loss": (_huber, _clipped),
    "smooth_l1_loss": (
        _smooth, lambda g, d, bound: g.apply("sign", d) if bound == 0 else g.scaled(_clipped(g, d, bound), 1.0 / bound)
    ),
}  # fmt: skip


def _reduced(e: Elements, func, value: StateValue, reduction: int, out: Tensor) -> Any:
    if reduction == SUM:
        return reduced(e, func, value, None, out, e.sums)
    return reduced(e, func, value, None, out, lambda groups: mean_of(e, groups)) if reduction == MEAN else value


@rule(*LOSSES)
def loss(e: Elements, func, args, kwargs, out) -> Any:
    reduction, bound = argument(args, kwargs, 2, "reduction", MEAN), argument(args, kwargs, 3, "", 1.0)
    make = LOSSES[base_name(func)][0]
    value = e.pointwise(lambda g, a, b: make(g, g.sub(a, b), float(bound)), *args[:2])
    return _reduced(e, func, value, reduction, out)


@rule(*(f"{name}_backward" for name in LOSSES))
def loss_backward(e: Elements, func, args, kwargs, out) -> Any:
    grad, a, b, reduction = args[:4]
    bound = float(args[4]) if len(args) > 4 else 1.0
    make = LOSSES[base_name(func).removesuffix("_backward")][1]
    share = 1.0 / math.prod(out.shape) if reduction == MEAN else 1.0
    return e.pointwise(
        lambda g, d, x, y: g.scaled(g.mul(d, make(g, g.sub(x, y), bound)), share), grad, a, b, shape=out.shape
    )


@rule("binary_cross_entropy_with_logits")
def cross_entropy_of_logits(e: Elements, func, args, kwargs, out) -> Any:
    x, target, weight, positive = args[0], args[1], *(argument(args, kwargs, i, n) for i, n in ((2, "weight"), (3, "pos_weight")))
    # (1 - target) x + (1 + (positive - 1) target) log(1 + exp(-x))
    if positive is None:
        value = e.pointwise(lambda g, x, y: g.sub(softplus(g, x), g.mul(x, y)), x, target)
    else:
        value = e.pointwise(
            lambda g, x, y, p: g.add(
                g.sub(x, g.mul(x, y)),
                g.mul(g.add(g.number(1.0), g.mul(g.sub(p, g.number(1.0)), y)), softplus(g, g.neg(x))),
            ), x, target, positive,
        )  # fmt: skip
    value = value if weight is None else e.pointwise(product, value, weight)
    return _reduced(e, func, value, argument(args, kwargs, 4, "reduction", MEAN), out)


@rule("nll_loss_forward", "nll_loss2d_forward")
def negative_log_likelihood(e: Elements, func, args, kwargs, out) -> Any:
    """Minus the entries at constant labels."""
    x, target, weight, reduction, ignored = args[:5]
    picked, _, share = _labelled(e, x, target, weight, reduction, ignored)
    value = e.pointwise(lambda g, a, w: g.neg(g.mul(a, w)), picked, share)
    return [_reduced(e, func, value, SUM if reduction else 0, out[0]), Constant(out[1])]


def _labelled(
    e: Elements, x: Any, target: Any, weight: Any, reduction: int, ignored: int
) -> tuple[StateValue, Tensor, StateValue]:  # fmt: skip
    """(the elements at the labels, the labels with an axis of classes, their weights: zero where one is to be ignored)."""
    if not isinstance(target, Constant) or (weight is not None and not isinstance(weight, Constant)):
        refuse("labels or weights of classes that depend on t or on the state")
    label = target.value
    kept = Constant((label != ignored).to(e.table.dtype))
    label = label.clamp(min=0)
    if weight is None:
        share = kept
    else:
        chosen = apply(aten.index_select.default, weight, 0, Constant(label.reshape(-1)))
        share = apply(aten.mul.Tensor, apply(aten.reshape.default, chosen, list(label.shape)), kept)
    if reduction == MEAN:
        share = apply(aten.div.Tensor, share, apply(aten.sum.default, share))
    places = label.cpu().unsqueeze(_classes(x))
    picked = e.ids(x).gather(_classes(x), places).squeeze(_classes(x))
    return StateValue(picked), places, StateValue(e.ids(share, samples_of(picked)).expand(picked.shape))


def _classes(x: Any) -> int:
    """The axis of the classes."""
    return 1 if len(x.shape) > 1 else 0


@rule("nll_loss_backward", "nll_loss2d_backward")
def negative_log_likelihood_backward(e: Elements, func, args, kwargs, out) -> Any:
    grad, x, target, weight, reduction, ignored = args[:6]
    _, places, share = _labelled(e, x, target, weight, reduction, ignored)
    value = e.pointwise(lambda g, d, w: g.neg(g.mul(d, w)), grad, share)
    zeros = e.zero.expand(out.shape).clone()
    return StateValue(zeros.scatter(_classes(x), places, value.ids.unsqueeze(_classes(x))))
