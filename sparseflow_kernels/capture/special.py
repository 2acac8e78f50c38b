"""Gamma functions, by Stirling's series (Abramowitz and Stegun, 6.1.40 and 6.3.18), which is exact to rounding from 8 on:
smaller arguments go up to there by the recurrence, negative ones are reflected."""

from __future__ import annotations

import math

from ..field import Graph, Node
from .functions import above, choose

FROM = 8
# Bernoulli's numbers, of even order, by that order.
SERIES = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12, -3617 / 8160)


def _positive(g: Graph, a: Node) -> tuple[Node, Node]:
    """(whether it is negative, the argument that it is reflected to)."""
    negative = g.apply("gt", g.number(0.0), a)
    return negative, choose(g, negative, g.sub(g.number(1.0), a), a)


def _raised(g: Graph, a: Node) -> tuple[Node, list[Node], Node]:
    """(an argument of 8 or more, what it went up by, whether it was large already)."""
    large = above(g, a, float(FROM))
    low = choose(g, large, g.number(1.0), a)
    steps = [low if k == 0 else g.add(low, g.number(float(k))) for k in range(FROM)]
    return choose(g, large, a, g.add(low, g.number(float(FROM)))), steps, large


def log_gamma(g: Graph, a: Node) -> Node:
    negative, x = _positive(g, a)
    z, steps, large = _raised(g, x)
    product = steps[0]
    for step in steps[1:]:
        product = g.mul(product, step)
    inverse = g.apply("reciprocal", z)
    square, rest = g.square(inverse), g.number(0.0)
    for k in range(len(SERIES), 0, -1):
        rest = g.add(g.number(SERIES[k - 1] / (2 * k - 1)), g.mul(rest, square))
    made = g.sub(g.mul(g.sub(z, g.number(0.5)), g.apply("log", z)), z)
    made = g.add(g.add(made, g.number(0.5 * math.log(2.0 * math.pi))), g.mul(rest, inverse))
    made = g.sub(made, choose(g, large, g.number(0.0), g.apply("log", product)))
    turned = choose(g, negative, g.scaled(a, math.pi), g.number(0.5 * math.pi))
    wave = g.apply("log", g.scaled(g.apply("abs", g.apply("sin", turned)), 1.0 / math.pi))
    return choose(g, negative, g.sub(g.neg(wave), made), made)


def digamma(g: Graph, a: Node) -> Node:
    negative, x = _positive(g, a)
    z, steps, large = _raised(g, x)
    total = g.apply("reciprocal", steps[0])
    for step in steps[1:]:
        total = g.add(total, g.apply("reciprocal", step))
    inverse = g.apply("reciprocal", z)
    square, rest = g.square(inverse), g.number(0.0)
    for number in reversed(SERIES):
        rest = g.mul(g.add(g.number(number), rest), square)
    made = g.sub(g.sub(g.apply("log", z), g.scaled(inverse, 0.5)), rest)
    made = g.sub(made, choose(g, large, g.number(0.0), total))
    turned = choose(g, negative, g.scaled(a, math.pi), g.number(0.5 * math.pi))
    return choose(g, negative, g.sub(made, g.scaled(g.apply("reciprocal", g.apply("tan", turned)), math.pi)), made)
