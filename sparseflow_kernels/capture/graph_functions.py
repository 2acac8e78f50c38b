"""Rules of graphs for elementwise functions. What a function is made of, in primitives, is written in functions.py."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..field import Activation, Graph, Node
from ..field.transforms import slope
from .elements import Elements
from .functions import (
    ELEMENTWISE,
    above,
    activation,
    choose,
    clamped,
    complement,
    gelu_tanh,
    log_sigmoid,
    not_a_number,
    product,
    quotient,
    truncated,
)
from .operations import base_name
from .refusal import refuse
from .registry import GRAPH, argument, number
from .special import digamma, log_gamma
from .values import Constant, Opaque, StateValue

rule = GRAPH.rule


@rule(*ELEMENTWISE)
def elementwise(e: Elements, func, args, kwargs, out) -> Any:
    base = base_name(func)
    if kwargs and any(v is not None for k, v in kwargs.items() if k not in ("dtype", "layout", "device", "out")):
        given = [kwargs[a.name] for a in func._schema.arguments[len(args):] if a.name in kwargs]
        args = (*args, *given)
    if base == "where" and len(args) == 1 or base == "round" and len(args) > 1:
        refuse(f"the operation {func} on the state")
    first = out[0] if isinstance(out, (tuple, list)) else out
    args = tuple(a for a in args if a is not None)
    if base in ("where", "masked_fill"):
        mask, a, b = args if base == "where" else (args[1], args[2], args[0])
        if isinstance(mask, Constant) and mask.source is None:
            return e.chosen(mask.value != 0, a, b, first.shape)
    if base in ("log_sigmoid_backward",):
        args = args[:2]
    result = e.pointwise(ELEMENTWISE[base], *args, shape=first.shape if base != "prelu" else None)
    return [result, *(Constant(v) for v in out[1:])] if isinstance(out, (tuple, list)) else result


@rule("lgamma", "special_gammaln", "digamma", "special_digamma", "special_psi")
def gamma(e: Elements, func, args, kwargs, out) -> Any:
    return e.pointwise(log_gamma if base_name(func) in ("lgamma", "special_gammaln") else digamma, args[0])


@rule("log_sigmoid_forward")
def log_sigmoid_forward(e: Elements, func, args, kwargs, out) -> Any:
    return [e.pointwise(log_sigmoid, args[0]), Constant(out[1])]


@rule("add", "sub", "rsub")
def sum_rule(e: Elements, func, args, kwargs, out) -> Any:
    base, alpha = base_name(func), argument(args, kwargs, 2, "alpha", 1)
    a, b = args[:2]
    if base == "rsub":
        a, b = b, a
    if alpha != 1:
        b = e.pointwise(product, b, alpha)
    if base == "add" and isinstance(b, Constant) and not isinstance(a, Constant) and b.source is None:
        left_out = b.value == -math.inf
        if bool(left_out.any()):  # a mask that is added
            kept = e.pointwise(Graph.add, a, Constant(b.value.masked_fill(left_out, 0.0)), shape=out.shape)
            return e.chosen(left_out, -math.inf, kept, out.shape)
    sign = Graph.add if base == "add" else Graph.sub
    return e.pointwise(lambda g, x, y: sign(g, x, y), a, b, shape=out.shape)


@rule("div", "true_divide", "floor_divide")
def div(e: Elements, func, args, kwargs, out) -> Any:
    mode = kwargs.get("rounding_mode") if base_name(func) == "div" else "floor"
    make = {
        None: quotient, "floor": lambda g, a, b: g.apply("floor", g.apply("div", a, b)),
        "trunc": lambda g, a, b: truncated(g, g.apply("div", a, b)),
    }[mode]  # fmt: skip
    return e.pointwise(make, args[0], args[1])


@rule("addcmul")  # a + value * b * c
def addcmul(e: Elements, func, args, kwargs, out) -> Any:
    value = kwargs.get("value", 1)
    return e.pointwise(lambda g, a, b, c, v: g.add(a, g.mul(g.mul(b, c), v)), *args[:3], value)


@rule("addcdiv")
def addcdiv(e: Elements, func, args, kwargs, out) -> Any:
    value = kwargs.get("value", 1)
    return e.pointwise(lambda g, a, b, c, v: g.add(a, g.mul(g.apply("div", b, c), v)), *args[:3], value)


@rule("clamp", "clip")
def clamp(e: Elements, func, args, kwargs, out) -> Any:
    low, high = argument(args, kwargs, 1, "min"), argument(args, kwargs, 2, "max")
    bounds = [b for b in (low, high) if b is not None]
    return e.pointwise(
        lambda g, a, *given: clamped(
            g, a, given[0] if low is not None else None, given[-1] if high is not None else None
        ), args[0], *bounds,
    )  # fmt: skip


@rule("softplus")
def softplus_rule(e: Elements, func, args, kwargs, out) -> Any:
    params = (number(args, kwargs, 1, "beta", 1.0), number(args, kwargs, 2, "threshold", 20.0))
    return e.pointwise(activation("softplus", *params), args[0])


@rule("softplus_backward")
def softplus_backward(e: Elements, func, args, kwargs, out) -> Any:
    beta, threshold = number(args, kwargs, 2, "beta", 1.0), number(args, kwargs, 3, "threshold", 20.0)

    return _pulled_back(e, Activation("softplus", (beta, threshold)), args)


def _pulled_back(e: Elements, of: Activation, args: tuple) -> Any:
    """The cotangent args[0] of an activation of args[1], times its slope: the node that kernels make along with it."""
    return e.pointwise(lambda g, d, a: g.mul(d, slope(g, g.activation(of, a))), args[0], args[1])


def _below(g: Graph, a: Node) -> Node:
    """min(a, 0): exp of it does not overflow, not even where the result is thrown away."""
    return choose(g, above(g, a), g.number(0.0), a)


@rule("elu", "celu", "selu")
def elu(e: Elements, func, args, kwargs, out) -> Any:
    if base_name(func) == "celu":
        alpha = number(args, kwargs, 1, "alpha", 1.0)
        scale, inner = 1.0, 1.0 / alpha
    elif base_name(func) == "selu":
        alpha, scale, inner = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0
    else:
        alpha, scale, inner = (
            number(args, kwargs, i, name, 1.0) for i, name in enumerate(("alpha", "scale", "input_scale"), 1)
        )

    def make(g: Graph, a: Node) -> Node:
        if inner == 1:
            return g.scaled(g.activation(Activation("elu", (alpha,)), a), scale)
        low = g.scaled(g.apply("expm1", g.scaled(_below(g, a), inner)), alpha)
        return g.scaled(choose(g, above(g, a), a, low), scale)

    return e.pointwise(make, args[0])


@rule("elu_backward")
def elu_backward(e: Elements, func, args, kwargs, out) -> Any:
    alpha, scale, inner, is_result = (float(a) for a in args[1:5])
    if (scale, inner, is_result) == (1.0, 1.0, 0.0):
        return _pulled_back(e, Activation("elu", (alpha,)), (args[0], args[5]))

    def make(g: Graph, d: Node, a: Node) -> Node:
        if is_result:
            slope = g.scaled(g.add(a, g.number(alpha * scale)), inner)
        else:
            slope = g.scaled(g.apply("exp", g.scaled(_below(g, a), inner)), alpha * scale * inner)
        return g.mul(d, choose(g, above(g, a), g.number(scale), slope))

    return e.pointwise(make, args[0], args[5])


@rule("leaky_relu")
def leaky_relu(e: Elements, func, args, kwargs, out) -> Any:
    slope = number(args, kwargs, 1, "negative_slope", 0.01)
    return e.pointwise(lambda g, a: choose(g, above(g, a), a, g.scaled(a, slope)), args[0])


@rule("rrelu_with_noise")  # in evaluation
def mean_relu(e: Elements, func, args, kwargs, out) -> Any:
    slope = 0.5 * (number(args, kwargs, 2, "lower", 0.125) + number(args, kwargs, 3, "upper", 1.0 / 3.0))
    return e.pointwise(lambda g, a: choose(g, above(g, a), a, g.scaled(a, slope)), args[0])


@rule("leaky_relu_backward")
def leaky_relu_backward(e: Elements, func, args, kwargs, out) -> Any:
    slope = float(args[2])
    return e.pointwise(lambda g, d, a: choose(g, above(g, a), d, g.scaled(d, slope)), args[0], args[1])


@rule("gelu")
def gelu_rule(e: Elements, func, args, kwargs, out) -> Any:
    return e.pointwise(gelu_tanh if kwargs.get("approximate", "none") == "tanh" else activation("gelu"), args[0])


@rule("gelu_backward")
def gelu_backward(e: Elements, func, args, kwargs, out) -> Any:
    if kwargs.get("approximate", "none") == "none":
        return _pulled_back(e, Activation("gelu"), args)

    def make(g: Graph, d: Node, a: Node) -> Node:
        c = math.sqrt(2.0 / math.pi)
        inner = g.apply("tanh", g.scaled(g.add(a, g.scaled(g.mul(a, g.square(a)), 0.044715)), c))
        inside = g.scaled(g.add(g.scaled(g.square(a), 3 * 0.044715), g.number(1.0)), c)
        bent = g.mul(g.mul(g.scaled(a, 0.5), complement(g, g.square(inner))), inside)
        return g.mul(d, g.add(g.scaled(g.add(inner, g.number(1.0)), 0.5), bent))

    return e.pointwise(make, args[0], args[1])


@rule("_prelu_kernel_backward")
def prelu_backward(e: Elements, func, args, kwargs, out) -> Any:
    slope = e.pointwise(lambda g, d, a, w: choose(g, above(g, a), d, g.mul(d, w)), *args[:3])
    return [slope, Opaque(out[1].shape, "the gradient of a slope")]


@rule("glu", "glu_backward")
def glu(e: Elements, func, args, kwargs, out) -> Any:
    backward = base_name(func) == "glu_backward"
    ids, axis = e.ids(args[1] if backward else args[0]), argument(args, kwargs, 2 if backward else 1, "dim", -1)
    a, b = (StateValue(half) for half in ids.chunk(2, axis))
    if not backward:
        return e.pointwise(lambda g, x, y: g.mul(x, g.apply("sigmoid", y)), a, b)
    left = e.pointwise(lambda g, d, y: g.mul(d, g.apply("sigmoid", y)), args[0], b)
    right = e.pointwise(
        lambda g, d, x, s: g.mul(g.mul(d, x), g.mul(s, complement(g, s))), args[0], a,
        e.pointwise(activation("sigmoid"), b),
    )  # fmt: skip
    return StateValue(torch.cat([left.ids, right.ids], axis))


@rule("softshrink", "hardshrink", "tanhshrink")
def shrink(e: Elements, func, args, kwargs, out) -> Any:
    bound = number(args, kwargs, 1, "lambd", 0.5)

    def make(g: Graph, a: Node) -> Node:
        if base_name(func) == "hardshrink":
            inner = g.mul(g.apply("ge", a, g.number(-bound)), g.apply("ge", g.number(bound), a))
            return choose(g, inner, g.number(0.0), a)
        low, high = above(g, g.neg(a), bound), above(g, a, bound)
        return choose(g, high, g.sub(a, g.number(bound)), choose(g, low, g.add(a, g.number(bound)), g.number(0.0)))

    return e.pointwise(make, args[0])


@rule("nan_to_num")
def nan_to_num(e: Elements, func, args, kwargs, out) -> Any:
    edge = torch.finfo(e.table.dtype)
    usual = (("nan", 0.0), ("posinf", edge.max), ("neginf", edge.min))
    given = [argument(args, kwargs, i, name) for i, (name, _) in enumerate(usual, 1)]
    nan, high, low = (default if value is None else float(value) for value, (_, default) in zip(given, usual))

    def make(g: Graph, a: Node) -> Node:
        finite = choose(g, g.apply("eq", a, g.number(-math.inf)), g.number(low), a)
        finite = choose(g, g.apply("eq", a, g.number(math.inf)), g.number(high), finite)
        return choose(g, not_a_number(g, a), g.number(nan), finite)

    return e.pointwise(make, args[0])
