"""The elementwise primitives of a graph: the one table of names, native numbers, values and derivatives.

`number` is the instruction of csrc/expression.h. `value` defines the meaning, on tensors that broadcast. `partials` builds
the derivative by each operand as nodes. It is given the graph, the node itself (tanh' is written with tanh) and the node's
operands, and gives None for zero. Where a derivative jumps, it has the value that torch's own backward uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Protocol, Sequence

import torch
from torch import Tensor

from .nodes import Node


class Builder(Protocol):
    """What derivatives are built with: of the graph (`graph.Graph`), the part that works row by row."""

    def number(self, value: float) -> Node: ...

    def apply(self, name: str, *operands: Node) -> Node: ...

    def add(self, a: Node | None, b: Node | None) -> Node: ...

    def sub(self, a: Node, b: Node) -> Node: ...

    def mul(self, a: Node, b: Node) -> Node: ...

    def scaled(self, a: Node, factor: float) -> Node: ...

    def neg(self, a: Node) -> Node: ...

    def square(self, a: Node) -> Node: ...


Partials = Callable[[Builder, Node, Sequence[Node]], Sequence[Node | None]]


@dataclass(frozen=True)
class Primitive:
    """One row of the table. cheap: it takes no longer than a load, so that computing it again beats keeping it."""

    number: int
    arity: int
    value: Callable[..., Tensor]
    partials: Partials
    cheap: bool = True


def _one_minus(g: Builder, a: Node) -> Node:
    return g.sub(g.number(1.0), a)


def _flat(g: Builder, node: Node, operands: Sequence[Node]) -> list[None]:
    return [None] * len(operands)


def _reciprocal_root(g: Builder, node: Node, operands: Sequence[Node]) -> list[Node]:
    return [g.scaled(g.mul(node, g.mul(node, node)), -0.5)]


def _division(g: Builder, node: Node, operands: Sequence[Node]) -> list[Node]:
    inverse = g.apply("reciprocal", operands[1])
    return [inverse, g.neg(g.mul(node, inverse))]


def _larger(of_first: bool) -> Partials:
    """Of maximum or minimum. torch halves the gradient between equal operands, and so does this."""

    def partials(g: Builder, node: Node, operands: Sequence[Node]) -> list[Node]:
        a, b = operands
        above = g.apply("gt", a, b) if of_first else g.apply("gt", b, a)
        first = g.add(above, g.scaled(g.apply("eq", a, b), 0.5))
        return [first, _one_minus(g, first)]

    return partials


def _power(g: Builder, node: Node, operands: Sequence[Node]) -> list[Node]:
    a, b = operands
    of_base = g.mul(b, g.apply("pow", a, g.sub(b, g.number(1.0))))
    positive = g.apply("where", g.apply("gt", a, g.number(0.0)), a, g.number(1.0))  # 0 ** b has a flat exponent
    return [of_base, g.mul(node, g.apply("log", positive))]


def _angle(g: Builder, node: Node, operands: Sequence[Node]) -> list[Node]:
    """Zero at the origin, as torch has it."""
    y, x = operands
    square = g.add(g.square(x), g.square(y))
    inverse = g.apply("reciprocal", g.add(square, g.apply("eq", square, g.number(0.0))))
    return [g.mul(x, inverse), g.neg(g.mul(y, inverse))]


def _arc(sign: float) -> Partials:
    return lambda g, node, o: [g.scaled(g.apply("rsqrt", _one_minus(g, g.square(o[0]))), sign)]


def _where(g: Builder, node: Node, operands: Sequence[Node]) -> list[Node | None]:
    one, zero = g.number(1.0), g.number(0.0)
    return [None, g.apply("where", operands[0], one, zero), g.apply("where", operands[0], zero, one)]


def _compared(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: function(a, b).to(a.dtype)


PRIMITIVES: dict[str, Primitive] = {
    "detached": Primitive(0, 1, torch.detach, _flat),  # the number itself, through which nothing is differentiated
    "add": Primitive(3, 2, torch.add, lambda g, v, o: [g.number(1.0), g.number(1.0)]),
    "sub": Primitive(4, 2, torch.sub, lambda g, v, o: [g.number(1.0), g.number(-1.0)]),
    "mul": Primitive(5, 2, torch.mul, lambda g, v, o: [o[1], o[0]]),
    "div": Primitive(6, 2, torch.div, _division, cheap=False),
    "neg": Primitive(7, 1, torch.neg, lambda g, v, o: [g.number(-1.0)]),
    "abs": Primitive(10, 1, torch.abs, lambda g, v, o: [g.apply("sign", o[0])]),
    "sign": Primitive(11, 1, torch.sign, _flat),
    "maximum": Primitive(12, 2, torch.maximum, _larger(True)),
    "minimum": Primitive(13, 2, torch.minimum, _larger(False)),
    "sqrt": Primitive(14, 1, torch.sqrt, lambda g, v, o: [g.scaled(g.apply("reciprocal", v), 0.5)], cheap=False),
    "rsqrt": Primitive(15, 1, torch.rsqrt, _reciprocal_root, cheap=False),
    "reciprocal": Primitive(16, 1, torch.reciprocal, lambda g, v, o: [g.neg(g.mul(v, v))], cheap=False),
    "exp": Primitive(17, 1, torch.exp, lambda g, v, o: [v], cheap=False),
    "expm1": Primitive(18, 1, torch.expm1, lambda g, v, o: [g.add(v, g.number(1.0))], cheap=False),
    "log": Primitive(19, 1, torch.log, lambda g, v, o: [g.apply("reciprocal", o[0])], cheap=False),
    "log1p": Primitive(
        20, 1, torch.log1p, lambda g, v, o: [g.apply("reciprocal", g.add(o[0], g.number(1.0)))], cheap=False
    ),
    "sin": Primitive(21, 1, torch.sin, lambda g, v, o: [g.apply("cos", o[0])], cheap=False),
    "cos": Primitive(22, 1, torch.cos, lambda g, v, o: [g.neg(g.apply("sin", o[0]))], cheap=False),
    "tan": Primitive(23, 1, torch.tan, lambda g, v, o: [g.add(g.square(v), g.number(1.0))], cheap=False),
    "tanh": Primitive(24, 1, torch.tanh, lambda g, v, o: [_one_minus(g, g.square(v))], cheap=False),
    "sigmoid": Primitive(25, 1, torch.sigmoid, lambda g, v, o: [g.mul(v, _one_minus(g, v))], cheap=False),
    "softplus": Primitive(
        26, 1, lambda a: torch.nn.functional.softplus(a, 1.0, math.inf), lambda g, v, o: [g.apply("sigmoid", o[0])],
        cheap=False,
    ),
    "erf": Primitive(
        27, 1, torch.erf,
        lambda g, v, o: [g.scaled(g.apply("exp", g.neg(g.square(o[0]))), 2.0 / math.sqrt(math.pi))], cheap=False,
    ),
    "pow": Primitive(29, 2, torch.pow, _power, cheap=False),
    "gt": Primitive(30, 2, _compared(torch.gt), _flat),
    "ge": Primitive(31, 2, _compared(torch.ge), _flat),
    "eq": Primitive(32, 2, _compared(torch.eq), _flat),
    "where": Primitive(33, 3, lambda c, a, b: torch.where(c != 0, a, b), _where),
    "atan": Primitive(
        34, 1, torch.atan, lambda g, v, o: [g.apply("reciprocal", g.add(g.square(o[0]), g.number(1.0)))], cheap=False
    ),
    "asin": Primitive(35, 1, torch.asin, _arc(1.0), cheap=False),
    "acos": Primitive(36, 1, torch.acos, _arc(-1.0), cheap=False),
    "sinh": Primitive(37, 1, torch.sinh, lambda g, v, o: [g.apply("cosh", o[0])], cheap=False),
    "cosh": Primitive(38, 1, torch.cosh, lambda g, v, o: [g.apply("sinh", o[0])], cheap=False),
    "atan2": Primitive(39, 2, torch.atan2, _angle, cheap=False),
    "floor": Primitive(40, 1, torch.floor, _flat),
    "square": Primitive(44, 1, torch.square, lambda g, v, o: [g.scaled(o[0], 2.0)]),
}
