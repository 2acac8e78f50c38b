"""Rules of graphs for orders: largest and smallest values, sorting, and where they were.

Values are compared two by two, and each carries its place along. A comparison chooses, as torch does: the gradient goes to
the value that was chosen, of equal ones to the one that torch takes.
"""

from __future__ import annotations

import math
from typing import Any, Callable

import torch
from torch import Tensor

from ..field import Graph, Node
from .elements import Elements, samples_of
from .functions import ELEMENTWISE, choose, maximum, minimum, product
from .graph_linear import padded, wide, windows
from .graph_lookups import MOST_WRITTEN, ones_at
from .graph_reductions import mapped, reduced, rows_along, same_sample, shared
from .operations import base_name
from .refusal import refuse
from .registry import GRAPH, argument
from .values import Constant, StateValue

rule = GRAPH.rule
MOST_ORDERED = 64  # numbers that are put in order, which takes half as many exchanges as their square
Placed = tuple[Tensor, Tensor]  # (elements [lines, n], the places that they come from)
Compare = Callable[[Graph, Node, Node], Node]


def above(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("gt", a, b)


def below(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("gt", b, a)


def not_below(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("ge", a, b)


def not_above(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("ge", b, a)


def placed(e: Elements, lines: Tensor, places: Tensor | None = None) -> Placed:
    """With the numbers of the columns, or with other places."""
    places = torch.arange(lines.shape[1]).expand(lines.shape) if places is None else places
    return lines, e.ids(Constant(places.to(e.table.dtype).to(e.table.device)))


def chosen(e: Elements, condition: Tensor, a: Placed, b: Placed) -> Placed:
    one, other = (mapped(e, choose, condition, x, y) for x, y in zip(a, b))
    return one, other


def compared(e: Elements, better: Compare, a: Placed, b: Placed) -> Tensor:
    """Whether b goes before a."""
    return mapped(e, lambda g, x, y: better(g, y, x), a[0], b[0])


def best(e: Elements, better: Compare, of: Placed) -> Placed:
    """Of each line the first that no other is better than."""
    lines = of
    while lines[0].shape[1] > 1:
        even = lines[0].shape[1] // 2 * 2
        a, b = (tuple(x[:, first:even:2] for x in lines) for first in (0, 1))
        made = chosen(e, compared(e, better, a, b), b, a)
        lines = tuple(torch.cat([x, rest[:, even:]], 1) for x, rest in zip(made, lines))
    return lines[0][:, 0], lines[1][:, 0]


def in_order(e: Elements, better: Compare, of: Placed) -> Placed:
    """By exchanges of neighbours; equal ones stay as they are."""
    lines = tuple(x.clone() for x in of)
    n = lines[0].shape[1]
    for turn in range(n):
        low = torch.arange(turn % 2, n - 1, 2)
        if not low.numel():
            continue
        a, b = (tuple(x[:, low + k] for x in lines) for k in (0, 1))
        swap = compared(e, better, a, b)
        for x, first, second in zip(lines, chosen(e, swap, b, a), chosen(e, swap, a, b)):
            x[:, low], x[:, low + 1] = first, second
    return lines


def first_ones(e: Elements, better: Compare, of: Placed, count: int) -> Placed:
    """The best ones of each line in order: one after the other, where these are few."""
    n = of[0].shape[1]
    if 8 * count >= n:
        made = in_order(e, better, of)
        return made[0][:, :count], made[1][:, :count]
    worst = -_lowest(e) if better is below else _lowest(e)
    found = []
    for turn in range(count):
        found.append(best(e, better, of))
        if turn + 1 < count:
            taken = mapped(e, lambda g, a, b: g.apply("eq", a, b), of[1], found[-1][1][:, None])
            of = mapped(e, choose, taken, e.ids(worst).expand(of[0].shape), of[0]), of[1]
    return tuple(torch.stack([part[k] for part in found], 1) for k in (0, 1))


def _lowest(e: Elements) -> float:
    """Below all numbers, and finite: rows are selected by products with zeros and ones."""
    return torch.finfo(e.table.dtype).min


def _axis_of(args: tuple, kwargs: dict, position: int = 1) -> int | None:
    axis = argument(args, kwargs, position, "dim")
    return None if axis is None or isinstance(axis, bool) else axis


@rule("max", "min", "argmax", "argmin")
def extreme(e: Elements, func, args, kwargs, out) -> Any:
    base = base_name(func)
    largest = "max" in base
    if base in ("max", "min") and len(args) > 1 and not isinstance(args[1], int):
        return e.pointwise(maximum if largest else minimum, args[0], args[1])
    if base in ("max", "min") and not isinstance(out, (tuple, list)):
        return alike_extreme(e, func, args, kwargs, out)
    ids, axis = e.ids(args[0]), _axis_of(args, kwargs)
    ids = ids.reshape(-1) if axis is None else ids.reshape(1) if not ids.dim() else ids
    lines, _ = rows_along(ids, axis or 0)
    same_sample(lines, func)
    found = best(e, above if largest else below, placed(e, lines))
    if base.startswith("arg"):
        return StateValue(found[1].reshape(out.shape))
    return [StateValue(part.reshape(value.shape)) for part, value in zip(found, out)]


@rule("amax", "amin")
def alike_extreme(e: Elements, func, args, kwargs, out) -> Any:
    make = maximum if "max" in base_name(func) else minimum
    return reduced(e, func, args[0], argument(args, kwargs, 1, "dim"), out, lambda groups: shared(e, make, groups))


@rule("aminmax")
def both_extremes(e: Elements, func, args, kwargs, out) -> Any:
    axis = kwargs.get("dim")
    return [
        reduced(e, func, args[0], axis, value, lambda groups, make=make: shared(e, make, groups))
        for make, value in zip((minimum, maximum), out)
    ]


@rule("nonzero", "unique_dim", "_unique2", "mode", "masked_select", "unique_consecutive")
def order_of_values(e: Elements, func, args, kwargs, out) -> Any:
    refuse(f"the operation {base_name(func)} on the state, whose result has a size that its values say,")


@rule("sort", "topk", "median", "kthvalue", "nanmedian", "argsort")
def ordered(e: Elements, func, args, kwargs, out) -> Any:
    base, ids = base_name(func), e.ids(args[0])
    given = {a.name: argument(args, kwargs, i, a.name, a.default_value) for i, a in enumerate(func._schema.arguments)}
    outs = out if isinstance(out, (tuple, list)) else [out]
    if "dim" not in given:
        ids = ids.reshape(-1)
    axis = given.get("dim", 0) % max(ids.dim(), 1)
    lines, _ = rows_along(ids.reshape(1) if not ids.dim() else ids, axis)
    same_sample(lines, func)
    n, of = lines.shape[1], placed(e, lines)
    better = above if given.get("largest", given.get("descending")) and base != "kthvalue" else below
    count = {"topk": given.get("k"), "median": (n + 1) // 2, "nanmedian": (n + 1) // 2, "kthvalue": given.get("k")}.get(base, n)
    if n > MOST_ORDERED and 8 * count >= n:
        refuse(f"the operation {base} on {n} numbers of the state (an order of more than {MOST_ORDERED})")
    found = first_ones(e, better, of, count)
    if base in ("median", "nanmedian", "kthvalue"):
        found = tuple(part[:, count - 1: count] for part in found)
    shape = ids.movedim(axis, -1).shape[:-1] if ids.dim() else ()
    parts = [part.reshape(*shape, -1).movedim(-1, axis) if ids.dim() else part for part in found]
    parts = parts[1:] if base == "argsort" else parts
    return tuple(StateValue(part.reshape(value.shape)) for part, value in zip(parts, outs)) if (
        isinstance(out, (tuple, list))
    ) else StateValue(parts[0].reshape(out.shape))


@rule("cumprod", "logcumsumexp")
def scan(e: Elements, func, args, kwargs, out) -> Any:
    make = product if base_name(func) == "cumprod" else ELEMENTWISE["logaddexp"]
    lines, back = rows_along(e.ids(args[0]), args[1])
    same_sample(lines, func)
    columns = [lines[:, 0]]
    for i in range(1, lines.shape[1]):
        columns.append(mapped(e, make, columns[-1], lines[:, i]))
    return StateValue(back(torch.stack(columns, 1)))


@rule("cummax", "cummin", "_cummax_helper", "_cummin_helper")
def running_extreme(e: Elements, func, args, kwargs, out) -> Any:
    """Of equal ones the last."""
    lines, back = rows_along(e.ids(args[0]), args[1])
    same_sample(lines, func)
    of = placed(e, lines)
    better = not_below if "max" in base_name(func) else not_above
    columns = [tuple(x[:, 0] for x in of)]
    for i in range(1, lines.shape[1]):
        one = tuple(x[:, i] for x in of)
        columns.append(chosen(e, compared(e, better, columns[-1], one), one, columns[-1]))
    return [StateValue(back(torch.stack([column[k] for column in columns], 1))) for k in (0, 1)]


# ------------------------------------------------------------------------------------------------------------- pooling


@rule("max_pool1d", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool1d_with_indices")
def max_pool(e: Elements, func, args, kwargs, out) -> Any:
    ids, axes = e.ids(args[0]), len(args[1])
    kernel = list(args[1])
    stride = wide(argument(args, kwargs, 2, "stride") or kernel, axes)
    padding, dilation = (
        wide(argument(args, kwargs, i, name, default), axes)
        for i, name, default in ((3, "padding", 0), (4, "dilation", 1))
    )
    space = ids.shape[-axes:]
    found = windows(_padded(e, ids, axes, padding, e.ids(_lowest(e))), kernel, stride, dilation)
    places = torch.arange(math.prod(space)).view(1, 1, *space) + 1
    places = windows(padded(e, places, [(p, p) for p in padding], torch.zeros(())), kernel, stride, dilation) - 1
    return _pooled(e, found.reshape(-1, math.prod(kernel)), places.reshape(-1, math.prod(kernel)), out)


def _padded(e: Elements, ids: Tensor, axes: int, padding: list[int], filler: Tensor) -> Tensor:
    ids = ids.reshape(1 if ids.dim() == axes + 1 else ids.shape[0], -1, *ids.shape[-axes:])
    return padded(e, ids, [(p, p) for p in padding], filler)


def _pooled(e: Elements, lines: Tensor, places: Tensor, out: Any) -> Any:
    """The largest of each line. places [windows, n]: where its elements lie, for the windows of every plane."""
    repeated = places.repeat(lines.shape[0] // places.shape[0], 1)
    found = best(e, above, placed(e, lines, repeated))
    outs = out if isinstance(out, (tuple, list)) else [out]
    made = [StateValue(part.reshape(value.shape)) for part, value in zip(found, outs)]
    return made if isinstance(out, (tuple, list)) else made[0]


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(e: Elements, func, args, kwargs, out) -> Any:
    axes = 2 if base_name(func) == "max_unpool2d" else 3
    return _put(e, args[0], args[1], out, axes)


@rule("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "adaptive_max_pool2d_backward")
def max_pool_backward(e: Elements, func, args, kwargs, out) -> Any:
    return _put(e, args[0], args[-1] if len(args) > 2 else kwargs["indices"], out, 3 if "3d" in base_name(func) else 2)


def _put(e: Elements, values: Any, places: Any, out: Tensor, axes: int) -> StateValue:
    """Zeros with values added at their places in each plane."""
    where = e.ids(places).flatten(-axes)
    given = e.ids(values, samples_of(where).view(places.shape)).expand(places.shape).flatten(-axes)
    size = math.prod(out.shape[-axes:])
    if size * where.shape[-1] > MOST_WRITTEN:
        refuse(f"{where.shape[-1]} values at places of {size} that depend on the state")
    met = ones_at(e, StateValue(where), size).transpose(-1, -2)
    return StateValue(e.products(given.unsqueeze(-2), met).reshape(out.shape))


@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(e: Elements, func, args, kwargs, out) -> Any:
    first = out[0] if isinstance(out, (tuple, list)) else out
    ids, axes = e.ids(args[0]), len(args[1])
    space = ids.shape[-axes:]
    index = torch.arange(math.prod(space)).view(space)
    for axis, (size, count) in enumerate(zip(space, first.shape[-axes:])):  # [.., places of axis 0, .., its windows]
        spans = [range(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        most = max(map(len, spans))
        take = torch.tensor([[*span, *[span[-1]] * (most - len(span))] for span in spans])
        index = index.movedim(axis, -1)[..., take].movedim(-2, axis)
    places = index.reshape(math.prod(first.shape[-axes:]), -1)
    return _pooled(e, ids.reshape(-1, math.prod(space))[:, places].reshape(-1, places.shape[1]), places, out)

