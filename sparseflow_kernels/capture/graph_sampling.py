"""Rules of graphs for images that are looked at between their pixels, at places that depend on the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..field import Graph, Node
from .algebra import apply
from .elements import Elements, samples_of
from .functions import choose, complement, product, rounded
from .graph_lookups import MOST_PLACES, varies
from .operations import aten
from .refusal import refuse
from .registry import GRAPH
from .values import Constant, StateValue

rule = GRAPH.rule
BILINEAR, NEAREST = 0, 1
ZEROS, BORDER, REFLECTION = 0, 1, 2


@rule("grid_sampler_2d", "grid_sampler", "grid_sampler_3d", "cudnn_grid_sampler", "_grid_sampler_2d_cpu_fallback")
def grid_sample(e: Elements, func, args, kwargs, out) -> Any:
    """The sum over all pixels of their values times weights, of which at most 2 along every axis are not zero."""
    image, grid, mode, padding, aligned = args[:5]
    if mode not in (BILINEAR, NEAREST):
        refuse("grid_sample by cubic interpolation", "Use mode='bilinear'")
    places = e.ids(grid)
    space, axes = image.shape[2:], places.shape[-1]
    if max(space) > MOST_PLACES:
        refuse(f"grid_sample of an image of {list(space)}")
    weights = None
    for axis in range(axes):  # the grid's last axis counts the image's axes from the last one
        size = space[axes - 1 - axis]
        at = _in_pixels(e, StateValue(places[..., axis]), size, padding, bool(aligned))
        own = _weights(e, at, size, mode)
        if weights is None:
            weights = own
        else:
            weights = e.pointwise(product, StateValue(own.unsqueeze(-1)), StateValue(weights.unsqueeze(-2))).ids.flatten(-2)
    lines = weights.reshape(weights.shape[0], 1, -1, weights.shape[-1])  # [batch, 1, places, pixels]
    shape = [image.shape[0], image.shape[1], weights.shape[-1]]
    if isinstance(image, Constant) and _one(image, lines):
        table = apply(aten.select.int, apply(aten.reshape.default, image, shape), 0, 0)
        made = e.contract(lines.reshape(-1, lines.shape[-1]), e.typed(table), e.matrix_name(image))
        made = made.view(lines.shape[0], lines.shape[2], -1).transpose(1, 2)
    else:
        samples = samples_of(lines).amin(-1).amin(-1)[:, :, None].expand(shape) if not varies(image) else None
        pixels = e.ids(apply(aten.reshape.default, image, shape), samples) if not varies(image) else e.ids(image).reshape(shape)
        made = e.products(pixels.unsqueeze(2), lines)
    return StateValue(made.reshape(out.shape))


def _one(image: Constant, lines: Tensor) -> bool:
    """All samples look at the same image."""
    first = apply(aten.slice.Tensor, image, 0, 0, 1)
    same = torch.equal(first.value.expand_as(image.value), image.value) and not image.from_attributes
    return same and (image.source is None or torch.equal(first.sources.expand(image.shape), image.sources))


def _in_pixels(e: Elements, at: StateValue, size: int, padding: int, aligned: bool) -> StateValue:
    """Of a coordinate from -1 to 1, where pixels have whole numbers."""

    def make(g: Graph, a: Node) -> Node:
        if aligned:
            x = g.scaled(g.add(a, g.number(1.0)), 0.5 * (size - 1))
        else:
            x = g.scaled(g.sub(g.scaled(g.add(a, g.number(1.0)), float(size)), g.number(1.0)), 0.5)
        if padding == REFLECTION:
            low, span = (0.0, float(size - 1)) if aligned else (-0.5, float(size))
            x = _reflected(g, x, low, span)
        return x if padding == ZEROS else _clipped(g, x, float(size - 1))

    return e.pointwise(make, at)


def _clipped(g: Graph, x: Node, last: float) -> Node:
    """torch gives the borders themselves no gradient."""
    zero, end = g.number(0.0), g.number(last)
    x = choose(g, g.apply("ge", zero, x), zero, x)
    return choose(g, g.apply("ge", x, end), end, x)


def _reflected(g: Graph, x: Node, low: float, span: float) -> Node:
    if span == 0.0:
        return g.number(0.0)
    away = g.apply("abs", g.sub(x, g.number(low)))
    turns = g.apply("floor", g.scaled(away, 1.0 / span))
    rest = g.sub(away, g.scaled(turns, span))
    odd = g.sub(turns, g.scaled(g.apply("floor", g.scaled(turns, 0.5)), 2.0))
    return g.add(choose(g, odd, g.sub(g.number(span), rest), rest), g.number(low))


def _weights(e: Elements, at: StateValue, size: int, mode: int) -> Tensor:
    """Of every pixel of an axis, elements [..., size]."""
    pixels = Constant(torch.arange(size, dtype=e.table.dtype, device=e.table.device))
    wide = StateValue(at.ids.unsqueeze(-1))
    if mode == NEAREST:
        return e.pointwise(lambda g, a, p: g.apply("eq", rounded(g, a), p), wide, pixels).ids

    def make(g: Graph, a: Node, p: Node) -> Node:
        low = g.apply("floor", a)
        part = g.sub(a, low)
        upper = choose(g, g.apply("eq", g.add(low, g.number(1.0)), p), part, g.number(0.0))
        return choose(g, g.apply("eq", low, p), complement(g, part), upper)

    return e.pointwise(make, wide, pixels).ids
