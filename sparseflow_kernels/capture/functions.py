"""Elementwise functions as functions of nodes, and the table of those whose arguments are operands all of them."""

from __future__ import annotations

import math
from typing import Callable

from ..field import Activation, Graph, Node
from ..field.transforms import slope


def product(g: Graph, a: Node, b: Node) -> Node:
    """a * b, recognising the activations that are written so."""
    for x, y in ((a, b), (b, a)):
        if y.kind == "sigmoid" and y.operands[0] is x:
            return g.activation(Activation("silu"), x)
        if y.kind == "square" and y.operands[0] is x:
            return g.activation(Activation("cube"), x)
    return g.activation(Activation("square"), a) if a is b else g.mul(a, b)


def complement(g: Graph, a: Node) -> Node:
    return g.sub(g.number(1.0), a)


def maximum(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("maximum", a, b)


def minimum(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("minimum", a, b)


def activation(name: str, *params: float) -> Callable[[Graph, Node], Node]:
    return lambda g, z: g.activation(Activation(name, params), z)


def primitive(name: str) -> Callable[..., Node]:
    return lambda g, *operands: g.apply(name, *operands)


def scaled(name: str, inside: float = 1.0, outside: float = 1.0) -> Callable[[Graph, Node], Node]:
    return lambda g, a: g.scaled(g.apply(name, g.scaled(a, inside)), outside)


def choose(g: Graph, condition: Node, a: Node, b: Node) -> Node:
    return g.apply("where", condition, a, b)


def above(g: Graph, a: Node, number: float = 0.0) -> Node:
    return g.apply("gt", a, g.number(number))


def clamped(g: Graph, a: Node, low: Node | None, high: Node | None) -> Node:
    """torch lets the gradient through at the bounds."""
    if low is not None:
        a = choose(g, g.apply("gt", low, a), low, a)
    return a if high is None else choose(g, g.apply("gt", a, high), high, a)


def between(g: Graph, a: Node, low: float, high: float) -> Node:
    """Its gradient is zero at the bounds."""
    a = choose(g, g.apply("ge", g.number(low), a), g.number(low), a)
    return choose(g, g.apply("ge", a, g.number(high)), g.number(high), a)


def softplus(g: Graph, a: Node) -> Node:
    return g.apply("softplus", a)


def gelu_tanh(g: Graph, a: Node) -> Node:
    inner = g.scaled(g.add(a, g.scaled(g.mul(a, g.square(a)), 0.044715)), math.sqrt(2.0 / math.pi))
    return g.mul(g.scaled(a, 0.5), g.add(g.apply("tanh", inner), g.number(1.0)))


def root(g: Graph, a: Node, make: Callable[[Graph, Node], Node] = lambda g, a: g.apply("sqrt", a)) -> Node:
    """The root of a sum of powers, whose gradient is zero where all of them are, as torch's norms have it. make: another
    power, which is one at one."""
    none = g.apply("eq", a, g.number(0.0))
    return g.sub(make(g, g.add(a, none)), none)


def rounded(g: Graph, a: Node) -> Node:
    """To the nearest whole number, and half way to the even one."""
    up = g.apply("floor", g.add(a, g.number(0.5)))
    tie = g.apply("eq", g.sub(up, a), g.number(0.5))
    odd = g.sub(up, g.scaled(g.apply("floor", g.scaled(up, 0.5)), 2.0))
    return g.sub(up, g.mul(tie, odd))


def truncated(g: Graph, a: Node) -> Node:
    return g.mul(g.apply("sign", a), g.apply("floor", g.apply("abs", a)))


def remainder(g: Graph, a: Node, b: Node) -> Node:
    return g.sub(a, g.mul(b, g.apply("floor", g.apply("div", a, b))))


def fmod(g: Graph, a: Node, b: Node) -> Node:
    return g.sub(a, g.mul(b, truncated(g, g.apply("div", a, b))))


def relu6(g: Graph, a: Node) -> Node:
    return between(g, a, 0.0, 6.0)


def hard_sigmoid(g: Graph, a: Node) -> Node:
    return g.scaled(between(g, g.add(a, g.number(3.0)), 0.0, 6.0), 1.0 / 6.0)


def power(g: Graph, a: Node, b: Node) -> Node:
    """a ** b, by what is quick and exact where b is a usual number."""
    if b.kind == "number":
        match b.value:
            case 0.0:
                return g.number(1.0)
            case 1.0:
                return a
            case 2.0:
                return g.activation(Activation("square"), a)
            case 3.0:
                return g.activation(Activation("cube"), a)
            case 4.0:
                return g.square(g.square(a))
            case 0.5:
                return g.apply("sqrt", a)
            case -1.0:
                return g.apply("reciprocal", a)
            case -2.0:
                return g.apply("reciprocal", g.square(a))
            case -0.5:
                return g.apply("rsqrt", a)
    return g.apply("pow", a, b)


def quotient(g: Graph, a: Node, b: Node) -> Node:
    if b.kind == "number" and b.value not in (0.0,) and math.frexp(b.value)[0] in (0.5, -0.5):
        return g.scaled(a, 1.0 / b.value)  # exact
    return g.apply("div", a, b)


def hypot(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("sqrt", g.add(g.square(a), g.square(b)))


def not_a_number(g: Graph, a: Node) -> Node:
    return complement(g, g.apply("eq", a, a))


def truth(g: Graph, a: Node) -> Node:
    return complement(g, g.apply("eq", a, g.number(0.0)))


def log_sigmoid(g: Graph, a: Node) -> Node:
    return g.neg(softplus(g, g.neg(a)))


def inverse_tanh(g: Graph, a: Node) -> Node:
    return g.scaled(g.sub(g.apply("log1p", a), g.apply("log1p", g.neg(a))), 0.5)


def inverse_sinh(g: Graph, a: Node) -> Node:
    """Of the magnitude, so that nothing cancels; near zero by its series, which has the derivative there."""
    whole, one, limit = g.apply("abs", a), g.number(1.0), g.number(1e9)
    size = clamped(g, whole, None, limit)  # beyond, the square might be infinite
    over = g.apply("div", g.square(size), g.add(one, g.apply("sqrt", g.add(g.square(size), one))))
    magnitude = choose(
        g, g.apply("gt", whole, limit), g.add(g.apply("log", clamped(g, whole, limit, None)), g.number(math.log(2.0))),
        g.apply("log1p", g.add(size, over)),
    )
    far = g.mul(g.apply("sign", a), magnitude)
    small = clamped(g, clamped(g, a, g.number(-1.0), None), None, one)
    near = g.mul(small, g.sub(one, g.scaled(g.square(small), 1.0 / 6.0)))
    return choose(g, g.apply("gt", size, g.number(1e-4)), far, near)


def cardinal_sine(g: Graph, a: Node) -> Node:
    """sin(pi a) / (pi a): at zero another number is divided by, as a gradient goes through what is not chosen, too."""
    at_zero = g.apply("eq", a, g.number(0.0))
    angle = g.scaled(choose(g, at_zero, g.number(1.0), a), math.pi)
    return choose(g, at_zero, g.number(1.0), g.apply("div", g.apply("sin", angle), angle))


def inverse_cosh(g: Graph, a: Node) -> Node:
    """By the distance from one, so that nothing cancels there."""
    over = g.sub(a, g.number(1.0))
    root = g.apply("sqrt", g.mul(over, g.add(a, g.number(1.0))))
    return g.apply("log1p", g.add(over, root))


def logit(g: Graph, a: Node) -> Node:
    return g.sub(g.apply("log", a), g.apply("log1p", g.neg(a)))


def copy_sign(g: Graph, a: Node, b: Node) -> Node:
    """|a|, with the sign of b. Of zeros torch tells two signs apart; here both are positive."""
    size = g.apply("abs", a)
    return choose(g, g.apply("gt", g.number(0.0), b), g.neg(size), size)


# All arguments are operands, numbers too. A new function is a line here.
ELEMENTWISE: dict[str, Callable[..., Node]] = {
    "mul": product,
    "neg": lambda g, a: g.neg(a),
    "_neg_view": lambda g, a: g.neg(a),
    "positive": lambda g, a: a,
    "abs": primitive("abs"),
    "sign": primitive("sign"),
    "sgn": primitive("sign"),
    "maximum": maximum,
    "minimum": minimum,
    "fmax": maximum,
    "fmin": minimum,
    "sqrt": primitive("sqrt"),
    "rsqrt": primitive("rsqrt"),
    "reciprocal": primitive("reciprocal"),
    "exp": primitive("exp"),
    "exp2": scaled("exp", inside=math.log(2.0)),
    "expm1": primitive("expm1"),
    "log": primitive("log"),
    "log2": scaled("log", outside=1.0 / math.log(2.0)),
    "log10": scaled("log", outside=1.0 / math.log(10.0)),
    "log1p": primitive("log1p"),
    "sin": activation("sin"),
    "cos": primitive("cos"),
    "tan": primitive("tan"),
    "asin": primitive("asin"),
    "acos": primitive("acos"),
    "atan": primitive("atan"),
    "atan2": primitive("atan2"),
    "arctan2": primitive("atan2"),
    "sinh": primitive("sinh"),
    "cosh": primitive("cosh"),
    "asinh": inverse_sinh,
    "acosh": inverse_cosh,
    "atanh": inverse_tanh,
    "tanh": activation("tanh"),
    "sigmoid": activation("sigmoid"),
    "relu": activation("relu"),
    "silu": activation("silu"),
    "erf": primitive("erf"),
    "special_ndtr": lambda g, a: g.scaled(g.add(g.apply("erf", g.scaled(a, math.sqrt(0.5))), g.number(1.0)), 0.5),
    "erfc": lambda g, a: complement(g, g.apply("erf", a)),
    "square": activation("square"),
    "mish": lambda g, a: g.mul(a, g.apply("tanh", softplus(g, a))),
    "relu6": relu6,
    "hardsigmoid": hard_sigmoid,
    "hardswish": lambda g, a: g.mul(a, hard_sigmoid(g, a)),
    "log_sigmoid": log_sigmoid,
    "floor": primitive("floor"),
    "ceil": lambda g, a: g.neg(g.apply("floor", g.neg(a))),
    "round": rounded,
    "trunc": truncated,
    "fix": truncated,
    "frac": lambda g, a: g.sub(a, truncated(g, a)),
    "remainder": remainder,
    "fmod": fmod,
    "pow": power,
    "hypot": hypot,
    "where": choose,
    "gt": primitive("gt"),
    "ge": primitive("ge"),
    "lt": lambda g, a, b: g.apply("gt", b, a),
    "le": lambda g, a, b: g.apply("ge", b, a),
    "eq": primitive("eq"),
    "ne": lambda g, a, b: complement(g, g.apply("eq", a, b)),
    "isnan": not_a_number,
    "isposinf": lambda g, a: g.apply("eq", a, g.number(math.inf)),
    "isneginf": lambda g, a: g.apply("eq", a, g.number(-math.inf)),
    "signbit": lambda g, a: g.apply("gt", g.number(0.0), a),
    "isinf": lambda g, a: g.apply("eq", g.apply("abs", a), g.number(math.inf)),
    "logical_not": lambda g, a: g.apply("eq", a, g.number(0.0)),
    "bitwise_not": lambda g, a: g.apply("eq", a, g.number(0.0)),
    "logical_and": lambda g, a, b: g.mul(truth(g, a), truth(g, b)),
    "bitwise_and": lambda g, a, b: g.mul(a, b),
    "logical_or": lambda g, a, b: maximum(g, truth(g, a), truth(g, b)),
    "bitwise_or": maximum,
    "logical_xor": lambda g, a, b: g.apply("abs", g.sub(truth(g, a), truth(g, b))),
    "lerp": lambda g, a, b, w: g.add(a, g.mul(w, g.sub(b, a))),
    "prelu": lambda g, a, w: choose(g, above(g, a), a, g.mul(w, a)),
    "_prelu_kernel": lambda g, a, w: choose(g, above(g, a), a, g.mul(w, a)),
    "threshold": lambda g, a, bound, value: choose(g, g.apply("ge", bound, a), value, a),
    "hardtanh": lambda g, a, low=None, high=None: between(
        g, a, -1.0 if low is None else low.value, 1.0 if high is None else high.value
    ),
    "clamp_min": lambda g, a, low: clamped(g, a, low, None),
    "clamp_max": lambda g, a, high: clamped(g, a, None, high),
    "masked_fill": lambda g, a, mask, value: choose(g, mask, value, a),
    "xlogy": lambda g, a, b: choose(g, g.apply("eq", a, g.number(0.0)), g.number(0.0), g.mul(a, g.apply("log", b))),
    "logaddexp": lambda g, a, b: g.add(maximum(g, a, b), softplus(g, g.neg(g.apply("abs", g.sub(a, b))))),
    "logaddexp2": lambda g, a, b: g.add(
        maximum(g, a, b), g.scaled(softplus(g, g.scaled(g.apply("abs", g.sub(a, b)), -math.log(2.0))), 1.0 / math.log(2.0))
    ),
    "logit": lambda g, a, eps=None: logit(g, a if eps is None else clamped(g, a, eps, g.number(1.0 - eps.value))),
    "copysign": copy_sign,
    "deg2rad": lambda g, a: g.scaled(a, math.pi / 180.0),
    "rad2deg": lambda g, a: g.scaled(a, 180.0 / math.pi),
    "special_entr": lambda g, a: choose(
        g, g.apply("eq", a, g.number(0.0)), g.number(0.0), g.neg(g.mul(a, g.apply("log", a)))
    ),
    "special_xlog1py": lambda g, a, b: choose(
        g, g.apply("eq", a, g.number(0.0)), g.number(0.0), g.mul(a, g.apply("log1p", b))
    ),
    "heaviside": lambda g, a, b: choose(g, g.apply("eq", a, g.number(0.0)), b, above(g, a)),
    "sinc": cardinal_sine,
    # gradients that torch computes inside forward: grad, then what the function keeps
    "tanh_backward": lambda g, d, y: g.mul(d, complement(g, g.square(y))),
    "sigmoid_backward": lambda g, d, y: g.mul(d, g.mul(y, complement(g, y))),
    "threshold_backward": lambda g, d, a, bound: choose(g, g.apply("gt", a, bound), d, g.number(0.0)),
    "silu_backward": lambda g, d, a: g.mul(d, slope(g, g.activation(Activation("silu"), a))),
    "hardtanh_backward": lambda g, d, a, low, high: choose(
        g, g.mul(g.apply("gt", a, low), g.apply("gt", high, a)), d, g.number(0.0)
    ),
    "mish_backward": lambda g, d, a: g.mul(d, _mish_slope(g, a)),
    "log_sigmoid_backward": lambda g, d, a, buffer=None: g.mul(d, g.apply("sigmoid", g.neg(a))),
    "hardsigmoid_backward": lambda g, d, a: choose(
        g, g.mul(above(g, a, -3.0), g.apply("gt", g.number(3.0), a)), g.scaled(d, 1.0 / 6.0), g.number(0.0)
    ),
}  # fmt: skip


def _mish_slope(g: Graph, a: Node) -> Node:
    inner = g.apply("tanh", softplus(g, a))
    return g.add(inner, g.mul(g.mul(a, g.apply("sigmoid", a)), complement(g, g.square(inner))))
