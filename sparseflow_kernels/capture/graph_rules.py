"""Rules that move elements: views, joins, copies, padding, and writing at places."""

from __future__ import annotations

import math
from typing import Any, Callable

import torch
from torch import Tensor

from ..field import Graph
from .algebra import apply
from .elements import Elements, rows_of, samples_of
from .functions import choose, complement, maximum, minimum, product, truncated
from .graph_lookups import at_positions, refuse_position, varies, written
from .operations import STRUCTURAL, aten, base_name
from .refusal import refuse
from .registry import GRAPH, argument
from .trees import tree_leaves, tree_map
from .values import Constant, Opaque, StateValue, TimeValue

rule = GRAPH.rule
FOUND = ("index", "_unsafe_index", "gather", "index_select", "take", "embedding")
WHOLE = (torch.int64, torch.int32)
COPIES = ("_to_copy", "to", "to_copy")  # that may change the dtype


@rule(*STRUCTURAL, "embedding")
def structural(e: Elements, func, args, kwargs, out) -> Any:
    if any(map(varies, tree_leaves((args[1:], kwargs)))):
        if base_name(func) not in FOUND:
            refuse_position(func)
        return at_positions(e, func, args, kwargs, out)
    if not varies(args[0]):
        refuse(f"the operation {base_name(func)} on the state")

    def ids(a: Any) -> Any:
        if isinstance(a, (StateValue, TimeValue)):
            return e.ids(a)
        return a.value.cpu() if isinstance(a, Constant) else a

    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return tree_map(StateValue, func(*tree_map(ids, args), **tree_map(ids, kwargs)))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_as")
def view(e: Elements, func, args, kwargs, out) -> Any:
    return StateValue(e.ids(args[0]).reshape(out.shape))


@rule("cat", "stack")
def join(e: Elements, func, args, kwargs, out) -> Any:
    axis = argument(args, kwargs, 1, "dim", 0)
    parts = list(args[0])
    if base_name(func) == "stack":
        axis = axis % out.dim()
        parts = [StateValue(e.ids(a)) if isinstance(a, TimeValue) else a for a in parts]
        parts = [
            StateValue(a.ids.unsqueeze(axis)) if isinstance(a, StateValue) else apply(aten.unsqueeze.default, a, axis)
            for a in parts
        ]
    else:
        axis = axis % out.dim()
        parts = [a for a in parts if a.shape != torch.Size([0])]
    return StateValue(torch.cat([i for i in e.together(parts, axis)], axis))


@rule(*COPIES)
def to_copy(e: Elements, func, args, kwargs, out) -> Any:
    if out.dtype in WHOLE:
        return StateValue(e.ids(args[0])) if e.copies_whole else e.pointwise(truncated, args[0])
    exact = e.copies_whole and out.dtype.is_floating_point
    if out.dtype not in (e.table.dtype, torch.bool) and not exact:  # forward derivatives make some that nobody reads
        return Opaque(out.shape, f"a change of the state's dtype to {out.dtype} (by the operation {base_name(func)})")
    if out.dtype == torch.bool:
        return e.pointwise(lambda g, a: complement(g, g.apply("eq", a, g.number(0.0))), args[0])
    return StateValue(e.ids(args[0]))


@rule("copy")
def copy(e: Elements, func, args, kwargs, out) -> Any:
    if isinstance(args[1], (Constant, int, float)):
        samples = samples_of(args[0].ids) if isinstance(args[0], StateValue) else None
        return StateValue(e.ids(args[1], samples).expand(out.shape).clone())
    return StateValue(e.ids(args[1]).expand(out.shape).clone())


@rule("lift_fresh", "detach", "alias", "clone", "contiguous", "_fw_primal", "view_copy")
def same(e: Elements, func, args, kwargs, out) -> Any:
    return StateValue(e.ids(args[0]))


def moved(e: Elements, func, value: Any, args: tuple, kwargs: dict) -> StateValue:
    """An operation that copies elements to other places, or puts zeros there: done on their numbers, from 1."""
    ids = e.ids(value)
    places = torch.arange(1.0, ids.numel() + 1, dtype=torch.float64).view(ids.shape)
    places = func(places, *args, **kwargs).round().to(torch.int64)
    flat = torch.cat([e.zero.reshape(1), ids.reshape(-1)])
    return StateValue(flat[places])


@rule(
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "im2col", "unfold", "pixel_shuffle", "pixel_unshuffle", "tril", "triu", "diag_embed",
    "diagonal_copy", "channel_shuffle", "slice_backward", "select_backward", "diagonal_backward", "unfold_copy",
    "rot90",
)  # fmt: skip
def moving(e: Elements, func, args, kwargs, out) -> Any:
    return moved(e, func, args[0], args[1:], kwargs)


@rule("constant_pad_nd")
def pad(e: Elements, func, args, kwargs, out) -> Any:
    value = argument(args, kwargs, 2, "value", 0)
    result = moved(e, func, args[0], (args[1], 0.0), {})
    if value:
        filler = e.ids(value)
        result = StateValue(torch.where(result.ids == e.zero, filler, result.ids))
    return result


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(e: Elements, func, args, kwargs, out) -> Any:
    base, indices, values = args[:3]
    if any(isinstance(i, (StateValue, TimeValue)) for i in indices):
        if len(indices) == 1 and isinstance(indices[0], StateValue) and math.prod(getattr(values, "shape", ())) == 1:
            mask = indices[0].ids  # one number wherever a condition holds
            mask = StateValue(mask.view(*mask.shape, *[1] * (out.dim() - mask.dim())))
            return e.pointwise(choose, mask, StateValue(e.ids(values).reshape(())), base, shape=out.shape)
        refuse_position(func)
    accumulate = argument(args, kwargs, 3, "accumulate", False)
    index = [None if i is None else i.value.cpu() for i in indices]
    places = torch.arange(out.numel()).view(out.shape)[tuple(slice(None) if i is None else i for i in index)]
    samples = samples_of(base.ids) if isinstance(base, StateValue) else None
    target = e.ids(base).expand(out.shape)
    source = e.ids(values, None if samples is None or not isinstance(values, Constant) else samples.reshape(-1)[places])
    source = source.expand(places.shape)
    if accumulate:
        return StateValue(added(e, target.reshape(-1), places.reshape(-1), source.reshape(-1)).view(out.shape))
    return StateValue(target.reshape(-1).clone().index_put((places.reshape(-1),), source.reshape(-1)).view(out.shape))


def added(e: Elements, target: Tensor, places: Tensor, source: Tensor) -> Tensor:
    """target [n], with source [m] added at places [m]."""
    everything = torch.cat([target, source])
    where = torch.cat([torch.arange(target.numel()), places])
    keep = rows_of(everything) != e.table.zero_row
    return grouped(e, everything[keep], where[keep], target.numel(), lambda g: e.sums(g), e.zero)


def grouped(
    e: Elements, ids: Tensor, group: Tensor, count: int, reduce: Callable[[Tensor], Tensor], filler: Tensor | None
) -> Tensor:
    """reduce(elements [groups, terms]) of the elements of each group; short groups are filled, or repeat a term."""
    order = torch.argsort(group, stable=True)
    ids, group = ids[order], group[order]
    sizes = torch.bincount(group, minlength=count)
    starts = sizes.cumsum(0) - sizes
    most = int(sizes.max()) if sizes.numel() else 0
    if most == 0:
        return e.zero.expand(count).clone()
    place = torch.arange(ids.numel()) - starts[group]
    first = ids[starts.clamp(max=ids.numel() - 1)] if filler is None else filler.expand(count)
    table = first[:, None].expand(count, most).clone()
    table[group, place] = ids
    return reduce(table)


@rule("index_add", "scatter_add", "scatter_reduce", "scatter")
def scatter(e: Elements, func, args, kwargs, out) -> Any:
    name, (base, axis, index, source) = base_name(func), args[:4]
    if varies(index):
        return written(e, func, args, kwargs, out) if name in ("scatter", "scatter_add") else refuse_position(func)
    axis, index = axis % max(out.dim(), 1), index.value.cpu()
    places = torch.arange(out.numel()).view(out.shape)
    places = places.index_select(axis, index.reshape(-1)) if name == "index_add" else places.gather(axis, index)
    target = e.ids(base).expand(out.shape).reshape(-1)
    source = e.ids(source)
    source = source[tuple(slice(0, n) for n in places.shape)] if source.dim() else source.expand(places.shape)
    source, places = source.reshape(-1), places.reshape(-1)
    if name == "index_add":
        alpha = kwargs.get("alpha", 1)
        source = source if alpha == 1 else e.pointwise(product, StateValue(source), alpha).ids
    reduction = kwargs.get("reduce", args[4] if len(args) > 4 else None)
    if name == "scatter" and reduction is None:
        return StateValue(target.clone().index_put((places,), source).view(out.shape))
    itself = kwargs.get("include_self", True)
    if name in ("index_add", "scatter_add") or reduction in ("sum", "add"):
        target = target if itself else target.clone().index_fill(0, places, int(e.zero))
        return StateValue(added(e, target, places, source).view(out.shape))
    makers = {"amax": maximum, "amin": minimum, "prod": product, "multiply": product, "mean": Graph.add}
    if reduction not in makers:
        refuse(f"{name} with reduce={reduction!r}")
    if itself:
        source, places = torch.cat([target, source]), torch.cat([torch.arange(target.numel()), places])
    reduce, filler = (e.sums, e.zero) if reduction == "mean" else (lambda g: e.tree(makers[reduction], g), None)
    filler = e.ids(1.0) if makers[reduction] is product else filler
    found = grouped(e, source, places, target.numel(), reduce, filler)
    met = torch.bincount(places, minlength=target.numel())
    if reduction == "mean":
        share = Constant(1.0 / met.clamp(min=1).to(e.table.dtype).to(e.table.device))
        found = e.pointwise(product, StateValue(found), share).ids
    return StateValue(torch.where(met > 0, found, target).view(out.shape))


@rule("index_copy", "index_fill")
def index_copy(e: Elements, func, args, kwargs, out) -> Any:
    base, axis, index, source = args[:4]
    if varies(index):
        refuse_position(func)
    places = torch.arange(out.numel()).view(out.shape).index_select(axis, index.value.cpu().reshape(-1))
    samples = samples_of(base.ids).reshape(-1)[places] if isinstance(base, StateValue) else None
    target, source = e.ids(base).expand(out.shape), e.ids(source, samples).expand(places.shape)
    return StateValue(target.reshape(-1).clone().index_put((places.reshape(-1),), source.reshape(-1)).view(out.shape))


@rule("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter")
def put(e: Elements, func, args, kwargs, out) -> Any:
    places = torch.arange(out.numel(), dtype=torch.float64).view(out.shape)
    source = e.ids(args[1])
    numbers = torch.arange(source.numel(), dtype=torch.float64).view(source.shape)
    index = func(torch.full_like(places, -1.0), numbers, *args[2:], **kwargs).to(torch.int64)
    return StateValue(torch.where(index >= 0, source.reshape(-1)[index.clamp(min=0)], e.ids(args[0])))


@rule("zero", "fill")
def fill(e: Elements, func, args, kwargs, out) -> Any:
    value = args[1] if len(args) > 1 else 0.0
    return StateValue(e.ids(value).expand(out.shape).clone())
