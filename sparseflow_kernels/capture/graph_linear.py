"""Rules of graphs for products with matrices (of constants, of functions of t, of states), convolutions and other linear
maps."""

from __future__ import annotations

import math
from typing import Any, Sequence

import torch
from torch import Tensor

from ..field import Window
from .algebra import apply, sparse_weight
from .elements import LARGEST, Elements, merged, rows_of, same_for_all, samples_of
from .functions import product
from .graph_reductions import length_of
from .graph_rules import grouped
from .graph_table import distinct_lines
from .operations import aten, base_name
from .refusal import refuse
from .registry import GRAPH, argument
from .samples import STRIDE
from .values import Constant, Opaque, StateValue

rule = GRAPH.rule

MOST_UNROLLED = 1 << 16  # entries of a convolution that is written out pixel by pixel


def matmul(e: Elements, left: Any, right: Any) -> StateValue:
    """The elements of left [..., p, k] times right [..., k, q], which have the same leading axes."""
    if isinstance(left, Constant):
        result = matmul(e, _swapped(right), _swapped(left))
        return StateValue(result.ids.transpose(-1, -2))
    ids = e.ids(left)
    if isinstance(right, Constant):
        single = right
        if len(right.shape) == 3:
            lines = _matrices(e, ids, right)
            if lines is None:  # a matrix of its own for every sample
                samples = samples_of(ids).amin(-1).amin(-1)[:, None, None].expand(right.shape)
                return StateValue(e.products(ids[:, :, None, :], e.ids(right, samples).transpose(1, 2)[:, None]))
            which, single = lines
        else:
            which = None
        swapped = apply(aten.transpose.int, single, -2, -1)
        which = None if which is None else which[:, None].expand(ids.shape[:-1]).reshape(-1)
        name = e.matrix_name(right)
        made = e.contract(ids.reshape(-1, ids.shape[-1]), swapped, name, which)
        return StateValue(made.view(*ids.shape[:-1], -1))
    return StateValue(e.products(ids.unsqueeze(-2), e.ids(right).transpose(-1, -2).unsqueeze(-3)))


def _swapped(value: Any) -> Any:
    if isinstance(value, StateValue):
        return StateValue(value.ids.transpose(-1, -2))
    return apply(aten.transpose.int, value, -2, -1)


def _matrices(e: Elements, ids: Tensor, matrices: Constant) -> tuple[Tensor, Constant] | None:
    """The distinct ones among matrices [b, k, q]: (for each b the number of its matrix, the distinct matrices). None where
    they differ from sample to sample."""
    count = matrices.shape[0]
    flat = apply(aten.reshape.default, matrices, [count, -1])
    content = flat.value.detach().cpu()
    if flat.source is not None and not matrices.from_attributes:
        source = flat.sources
        plain = torch.where(source >= 0, source, -1).to(torch.float64)
        content = torch.cat([content.to(torch.float64), plain], 1)
    used, number = content.unique(dim=0, return_inverse=True)
    first = torch.full((len(used),), count).scatter_reduce(0, number, torch.arange(count), "amin")
    samples = samples_of(ids).reshape(count, -1).amin(1)
    parts = e.by_sample(samples)
    if parts is not None and len(used) > 1 and not bool((number[parts] == number[parts[0]]).all()):
        return None
    if parts is not None and matrices.from_attributes and matrices.shape[0] == samples.numel():
        return None
    return number, apply(aten.index_select.default, matrices, 0, Constant(first.to(matrices.value.device)))


@rule("mm", "bmm", "matmul")
def matrix_product(e: Elements, func, args, kwargs, out) -> Any:
    return matmul(e, args[0], args[1])


@rule("mv")
def matrix_vector(e: Elements, func, args, kwargs, out) -> Any:
    column = unsqueezed(e, args[1], 1)
    return StateValue(matmul(e, args[0], column).ids[:, 0])


@rule("dot", "vdot")
def dot(e: Elements, func, args, kwargs, out) -> Any:
    row, column = unsqueezed(e, args[0], 0), unsqueezed(e, args[1], 1)
    return StateValue(matmul(e, row, column).ids[0, 0])


@rule("ger", "outer")
def outer(e: Elements, func, args, kwargs, out) -> Any:
    return e.pointwise(product, unsqueezed(e, args[0], 1), unsqueezed(e, args[1], 0))


def unsqueezed(e: Elements, value: Any, axis: int) -> Any:
    if isinstance(value, Constant):
        return apply(aten.unsqueeze.default, value, axis)
    return StateValue(e.ids(value).unsqueeze(axis))


@rule("addmm", "baddbmm", "addmv", "addbmm")
def add_matrix_product(e: Elements, func, args, kwargs, out) -> Any:
    summand, a, b = args[:3]
    if base_name(func) == "addmv":
        result = StateValue(matmul(e, a, unsqueezed(e, b, 1)).ids[:, 0])
    elif base_name(func) == "addbmm":
        refuse("the operation addbmm on the state")
    elif isinstance(a, Constant) and isinstance(b, Constant):
        result = apply(aten.mm.default if len(out.shape) == 2 else aten.bmm.default, a, b)
    else:
        result = matmul(e, a, b)
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    result = result if alpha == 1 else e.pointwise(product, result, alpha)
    summand = summand if beta == 1 else e.pointwise(product, summand, beta)
    return e.pointwise(lambda g, x, y: g.add(x, y), result, summand)


@rule("linalg_cross", "cross")
def cross(e: Elements, func, args, kwargs, out) -> Any:
    axis = argument(args, kwargs, 2, "dim", -1)
    shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
    samples = next(samples_of(a.ids.expand(shape)) for a in args[:2] if isinstance(a, StateValue))
    a, b = (e.ids(v, samples).expand(shape) for v in args[:2])
    turned = lambda ids, by: StateValue(ids.roll(by, axis))
    first = e.pointwise(product, turned(a, -1), turned(b, -2))
    second = e.pointwise(product, turned(a, -2), turned(b, -1))
    return e.pointwise(lambda g, x, y: g.sub(x, y), first, second)


@rule("_trilinear")  # nn.Bilinear
def trilinear(e: Elements, func, args, kwargs, out) -> Any:
    values, expanded, summed = args[:3], args[3:6], args[6]
    for axes, number in zip(expanded, range(3)):
        value = values[number]
        for axis in axes:
            value = unsqueezed(e, value, axis)
        values = (*values[:number], value, *values[number + 1:])
    result = e.pointwise(product, e.pointwise(product, values[0], values[2]), values[1])
    groups = result.ids.movedim([axis for axis in summed], list(range(-len(summed), 0)))
    groups = groups.reshape(*groups.shape[: groups.dim() - len(summed)], -1)
    return StateValue(e.sums(groups.reshape(-1, groups.shape[-1])).reshape(out.shape))


@rule("_cdist_forward", "_euclidean_dist")
def distances(e: Elements, func, args, kwargs, out) -> Any:
    p = 2.0 if base_name(func) == "_euclidean_dist" else float(args[2])
    a, b = unsqueezed(e, args[0], -2), unsqueezed(e, args[1], -3)
    gaps = e.pointwise(lambda g, x, y: g.sub(x, y), a, b).ids
    return StateValue(length_of(e, gaps.reshape(-1, gaps.shape[-1]), p).view(out.shape))


# ------------------------------------------------------------------------------------------------------ convolutions


def windows(ids: Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """[b, c, *space] -> [b, c, *positions, *kernel] of elements that are padded already."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation), 2):
        places = (ids.shape[axis] - d * (k - 1) - 1) // s + 1
        index = torch.arange(places)[:, None] * s + torch.arange(k)[None] * d
        ids = ids.movedim(axis, -1)[..., index].movedim(-2, axis)
    return ids


def padded(e: Elements, ids: Tensor, padding: list[tuple[int, int]], filler: Tensor | None = None) -> Tensor:
    for axis, (before, after) in enumerate(padding, 2):
        for size, where in ((before, 0), (after, 1)):
            if size > 0:
                shape = [size if d == axis else n for d, n in enumerate(ids.shape)]
                block = (e.zero if filler is None else filler).to(ids.dtype).expand(shape)
                ids = torch.cat([block, ids] if where == 0 else [ids, block], axis)
            elif size < 0:
                ids = ids.narrow(axis, -size if where == 0 else 0, ids.shape[axis] + size)
    return ids


def _convolved(e: Elements, ids: Tensor, weight: Constant, stride, dilation, groups: int, name: str) -> Tensor:
    """ids padded [b, c, *space], weight [o, c / groups, *kernel]: elements [b, o, *positions]."""
    batch, kernel = ids.shape[0], list(weight.shape[2:])
    inner, width = weight.shape[1], weight.shape[0] // groups
    found = windows(ids, kernel, stride, dilation)
    places = list(found.shape[2: 2 + len(kernel)])
    lines = found.reshape(batch, groups, inner, math.prod(places), -1).permute(0, 3, 1, 2, 4)
    lines = lines.reshape(-1, inner * math.prod(kernel))
    matrices = apply(aten.reshape.default, weight, [groups, width, inner * math.prod(kernel)])
    which = torch.arange(groups).repeat(batch * math.prod(places)) if groups > 1 else None
    if groups == 1:
        matrices = apply(aten.select.int, matrices, 0, 0)
    made = e.contract(lines, matrices, name, which)
    return made.view(batch, *places, groups * width).movedim(-1, 1)


def _is_shared(weight: Constant, grid: Sequence[int]) -> bool:
    """Whether a convolution of so many places is a matrix whose weights all pixels share. Few weights and pixels are written
    out as a matrix like any other, which every engine runs. Zeros count, so that pruning does not change what it is."""
    return len(grid) <= 2 and weight.value.numel() * math.prod(grid) > MOST_UNROLLED


def _shared(
    e: Elements, ids: Tensor, weight: Constant, geometry: tuple, groups: int, name: str, transposed: bool = False
) -> Tensor:  # fmt: skip
    """A convolution, or its transpose, of elements [b, channels, *space], as one matrix whose weights all pixels share: elements
    [b, channels, *space]. weight: [out, in / groups, *kernel] of the convolution.  geometry: its source, target, stride,
    padding and dilation."""
    source, target, stride, padding, dilation = geometry
    axes = len(source)
    pair = lambda values, usual: (usual,) * (2 - axes) + tuple(values)
    window = Window(
        pair(source, 1), pair(target, 1), pair(weight.shape[2:], 1), pair(stride, 1), pair(padding, 0), pair(dilation, 1)
    )  # fmt: skip
    batch, taps = ids.shape[0], window.taps
    out, inner = weight.shape[0], weight.shape[1]
    made_channels, area = (inner * groups, window.source_area) if transposed else (out, window.target_area)
    lines = ids.reshape(batch, -1)
    samples = merged(samples_of(lines), 1)
    rows, inverse = distinct_lines(rows_of(lines))
    rows = rows_of(lines)[rows]
    flat = apply(aten.reshape.default, weight, [-1])
    entry = torch.arange(out * inner * taps)
    o, i, tap = entry // (inner * taps), entry // taps % inner, entry % taps
    i = o // (out // groups) * inner + i
    read = o if transposed else i
    results = []
    for line in rows:
        planes = line.view(ids.shape[1], -1)
        total = None
        for part in e.planes_by_binding(planes):
            place = torch.full((len(planes),), -1)
            place[part] = torch.arange(len(part))
            own = (place[read] >= 0).nonzero()[:, 0]
            channel = place[read[own]]
            row, column = (channel, i[own]) if transposed else (o[own], channel)
            sizes = (len(part), inner * groups * taps) if transposed else (out, len(part) * taps)
            column = column * taps + tap[own]
            picked = flat if own.numel() == entry.numel() else apply(
                aten.index_select.default, flat, 0, Constant(own.to(e.table.device))
            )  # fmt: skip
            built = e.table.matrix(picked, row, column, sizes, name, window)
            if built is not None:
                read_rows = e.table.wide_node_of(planes[part].reshape(-1))
                total = e.graph.add(total, e.graph.linear(built, read_rows, transposed))
        count = made_channels * area
        results.append(e.table.add(e.graph.zeros(count) if total is None else total, count))
    made = samples[:, None] * STRIDE + torch.stack(results)[inverse]
    return made.view(batch, made_channels, *(source if transposed else target))


@rule("convolution", "_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(e: Elements, func, args, kwargs, out) -> Any:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args[:9]
    if not isinstance(weight, Constant):
        refuse("a convolution whose kernel depends on t or on the state")
    if isinstance(x, Constant):
        refuse("a convolution of a constant by the state")
    axes = len(weight.shape) - 2
    stride, padding, dilation, extra = (wide(v, axes) for v in (stride, padding, dilation, output_padding))
    ids = e.ids(x)
    single = ids.dim() == axes + 1
    ids = ids.unsqueeze(0) if single else ids
    name = e.matrix_name(weight)
    grid = ids.shape[2:] if transposed else out.shape[-axes:]
    if _is_shared(weight, grid):
        source, target = (out.shape[-axes:], grid) if transposed else (ids.shape[2:], grid)
        made = _shared(e, ids, weight, (source, target, stride, padding, dilation), groups, name, transposed)
    elif transposed:
        made = _transposed(e, ids, weight, stride, padding, dilation, extra, groups, name)
    else:
        made = _convolved(e, padded(e, ids, [(p, p) for p in padding]), weight, stride, dilation, groups, name)
    made = made.squeeze(0) if single else made
    result = StateValue(made.reshape(out.shape))
    if bias is None:
        return result
    return e.pointwise(lambda g, a, b: g.add(a, b), result, apply(aten.reshape.default, bias, [-1] + [1] * axes))


def wide(values: Any, axes: int) -> list[int]:
    values = [values] if isinstance(values, int) else list(values)
    return values * axes if len(values) == 1 else values


def _transposed(
    e: Elements, ids: Tensor, weight: Constant, stride, padding, dilation, extra, groups: int, name: str
) -> Tensor:  # fmt: skip
    """A transposed convolution: the convolution, by the turned kernel, of the state with zeros put between its elements."""
    for axis, s in enumerate(stride, 2):
        if s > 1:
            shape = list(ids.shape)
            shape[axis] = (shape[axis] - 1) * s + 1
            wide = e.zero.expand(shape).clone()
            wide.movedim(axis, 0)[::s] = ids.movedim(axis, 0)
            ids = wide
    kernel = list(weight.shape[2:])
    ids = padded(e, ids, [
        (d * (k - 1) - p, d * (k - 1) - p + x) for k, p, d, x in zip(kernel, padding, dilation, extra)
    ])  # fmt: skip
    inner, width = weight.shape[0] // groups, weight.shape[1]
    turned = apply(aten.flip.default, weight, list(range(2, len(weight.shape))))
    turned = apply(aten.reshape.default, turned, [groups, inner, width, *kernel])
    turned = apply(aten.reshape.default, apply(aten.transpose.int, turned, 1, 2), [groups * width, inner, *kernel])
    return _convolved(e, ids, turned, [1] * len(kernel), dilation, groups, name)


@rule("convolution_backward")
def convolution_backward(e: Elements, func, args, kwargs, out) -> Any:
    grad, x, weight, _, stride, padding, dilation, transposed, _, groups, mask = args[:11]
    rest = [None if v is None else Opaque(v.shape, "the gradient of a kernel") for v in out[1:]]
    if not mask[0]:
        return [None, *rest]
    if not isinstance(weight, Constant):
        refuse("the gradient of a convolution whose kernel depends on t or on the state")
    axes = len(weight.shape) - 2
    stride, padding, dilation = (wide(v, axes) for v in (stride, padding, dilation))
    ids, name = e.ids(grad), e.matrix_name(weight)
    inner, outer = out[0].shape[2:], ids.shape[2:]
    if _is_shared(weight, inner if transposed else outer):
        source, target = (outer, inner) if transposed else (inner, outer)
        made = _shared(e, ids, weight, (source, target, stride, padding, dilation), groups, name, not transposed)
    elif transposed:
        made = _convolved(e, padded(e, ids, [(p, p) for p in padding]), weight, stride, dilation, groups, name)
    else:
        size = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in zip(
            ids.shape[2:], stride, padding, dilation, weight.shape[2:]
        )]  # fmt: skip
        extra = [want - have for want, have in zip(out[0].shape[2:], size)]
        made = _transposed(e, ids, weight, stride, padding, dilation, extra, groups, name)
    return [StateValue(made.reshape(out[0].shape)), *rest]


# ---------------------------------------------------------------- any other linear map, by what it does to unit vectors


@rule(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "cumsum", "col2im",
    "trace", "diff", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "unfold_backward", "avg_pool2d_backward",
    "avg_pool3d_backward", "upsample_bilinear2d_backward", "upsample_nearest2d_backward", "reflection_pad1d_backward",
    "reflection_pad2d_backward", "replication_pad1d_backward", "replication_pad2d_backward",
    "_adaptive_avg_pool2d_backward",
)  # fmt: skip
def linear_map(e: Elements, func, args, kwargs, out) -> Any:
    ids = e.ids(args[0])
    other = [a.value if isinstance(a, Constant) else a for a in args[1:]]
    axis = 0 if ids.dim() > 1 else None
    lead = ids.shape[0] if axis == 0 else 1
    one = ids[:1] if axis == 0 else ids
    if base_name(func) in ("cumsum", "trace", "diff") and axis == 0:
        axis, lead, one = None, 1, ids  # it may run along the first axis
    size = one.numel()
    if size * (out.numel() // lead) > LARGEST:
        refuse(f"the operation {base_name(func)} on so large a state")
    basis = torch.eye(size, dtype=torch.float64)
    if axis == 0 and not any(isinstance(a, Tensor) or list(ids.shape) == a for a in map(_listed, other)):
        matrix = func(basis.view(size, *one.shape[1:]), *other, **kwargs).reshape(size, -1).T
    else:
        sized = [_of_one(a, ids.shape, lead) if axis == 0 else a for a in other]
        matrix = torch.stack([func(unit.view(one.shape), *sized, **kwargs).reshape(-1) for unit in basis], 1)
    matrix = matrix.to(e.table.dtype).to(e.table.device)
    if axis is None:  # elements of one sample meet only where the matrix is not zero
        return StateValue(_by_rows(e, ids.reshape(-1), matrix).view(out.shape))
    made = e.contract(ids.reshape(lead, -1), Constant(matrix), base_name(func))
    return StateValue(made.view(out.shape))


def _listed(a: Any) -> Any:
    return list(a) if isinstance(a, (list, tuple)) else a


def _of_one(a: Any, shape: torch.Size, lead: int) -> Any:
    """An argument for one sample: a tensor, or the size of one."""
    if isinstance(a, Tensor):
        a = a.to(torch.float64) if a.is_floating_point() else a
        return a[:1] if a.dim() and a.shape[0] == lead else a
    return [1, *a[1:]] if isinstance(a, (list, tuple)) and len(a) == len(shape) and a[0] == lead else a


def _by_rows(e: Elements, ids: Tensor, matrix: Tensor) -> Tensor:
    """A constant matrix [m, n] times elements [n] of any samples: elements [m]. Only elements that meet in a row of the
    matrix have to be of one sample."""
    target, source = (matrix.cpu() != 0).nonzero().unbind(1)
    factors = matrix.cpu()[target, source]
    terms = ids[source]
    if not bool((factors == 1).all()):
        terms = e.pointwise(product, StateValue(terms), StateValue(same_for_all(
            e.table.rows_of_entries(Constant(factors), "a constant")
        ))).ids  # fmt: skip
    return grouped(e, terms, target, matrix.shape[0], lambda g: e.sums(g), e.zero)


@rule("linear")  # sparseflow::linear, a matrix that has values at the entries of a pattern only
def sparse_linear(e: Elements, func, args, kwargs, out) -> Any:
    x, values, bias, row_ptr, col, inputs, _ = args
    matrix = sparse_weight(values, row_ptr, col, inputs)
    ids = e.ids(x)
    made = e.contract(ids.reshape(-1, inputs), matrix, e.matrix_name(values))
    result = StateValue(made.view(out.shape))
    return result if bias is None else e.pointwise(lambda g, a, b: g.add(a, b), result, bias)

