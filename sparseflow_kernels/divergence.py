"""The divergence tr(df/dx) of a sparse chain: which exact identity or estimator, chosen by counting on the real masks.

Notation (layers numbered from 1, L hidden layers, layer L+1 is the output): d_l = s_l(t) * act_l'(z_l) is the scaled
slope of hidden layer l, [batch, n_l]; g(t) = s_{L+1}(t) is the output gate (1 without one). Then

    tr df/dx = tr( D_L W_L ... W_2 D_1 A ),      A = W_1 diag(g) W_{L+1}.

Every form below is index arrays into the layers' canonical `values`, counted once per set of masks: a new weight
version needs re-packing, never a new plan. All the forms read per sample are the d_l. `evaluate` is their meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Iterator, Literal, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .divergence_graph import GraphForm, plan_graph
from .field import GraphField, Layer, Pattern, VectorField

Kind = Literal["exact", "hutchinson"]
KINDS: tuple[Kind, ...] = ("exact", "hutchinson")

PATH_LIMIT = 4_000_000  # longest path list a plan stores (a path is a few int64); above it values are multiplied out
BLOCK_ELEMENTS = 4_000_000  # largest dense intermediate while counting, listing and multiplying out
STACKED_ENTRIES = 1 << 20  # live weights of all columns together that a plan always lays out side by side
MOST_STACKED_ENTRIES = 1 << 23  # and where that saves at least half of the multiply-adds; above, columns go one by one
DENSE_PRODUCT = 0.01  # density of a mask above which its product is quicker by dense blocks than entry by entry


@dataclass(eq=False)
class GatedMatrix:
    """A sparse matrix whose entries are sums of products of weights, linear in the output gate:

        value[entry[p]] += (product over f in factors of layer[f].values[index[f][p]]) * g[gate[p]]

    over the paths p. `factors`: (layer number from 0, int64 [paths] indices into that layer's values) pairs.
    entry: int64 [paths], ascending, index into the pattern's CSR order.  gate: int64 [paths], state coordinate m.

    Where there are more than PATH_LIMIT paths they are not listed: entry, gate and factors are None, and
    `direct(field, gate)` computes the values [nnz] from the layers as a whole.
    """

    pattern: Pattern
    entry: Tensor | None = None
    gate: Tensor | None = None
    factors: tuple[tuple[int, Tensor], ...] | None = None
    direct: Callable[[VectorField, Tensor | None], Tensor] | None = None

    def path_constants(self, field: VectorField) -> Tensor:
        """[paths] products of weights, without the gate. Raises ValueError where the paths are not listed."""
        if self.factors is None:
            raise ValueError("GatedMatrix: this matrix has too many paths to list them; use values(field, gate)")
        product = None
        for layer, index in self.factors:
            values = field.layers[layer].values
            term = values[index.to(values.device)]
            product = term if product is None else product * term
        return product

    def values(self, field: VectorField, gate: Tensor | None) -> Tensor:
        """[nnz] at one time, differentiable in the layers' values; gate: [dim] or None for 1."""
        if self.direct is not None:
            return self.direct(field, gate)
        product = self.path_constants(field)
        if gate is not None:
            product = product * gate[self.gate.to(gate.device)]
        zero = torch.zeros(self.pattern.nnz, dtype=product.dtype, device=product.device)
        return zero.index_add(0, self.entry.to(product.device), product)


@dataclass(eq=False)
class DiagonalForm:
    """L = 1: tr = a . d_1 with a = `row` (a [1, n_1] matrix)."""

    row: GatedMatrix


@dataclass(eq=False)
class PairsForm:
    """L = 2: tr = d_2' M d_1 with M = `matrix` [n_2, n_1], M_ij = W2_ij sum_m W1_jm g_m W3_mi."""

    matrix: GatedMatrix


@dataclass(eq=False)
class PathsForm:
    """L = 3: tr = sum over pairs p = (i, k) of A_p * d3[i_p] * d1[k_p] * (Q d_2)_p, pairs where A_ki is structurally
    non-zero and Q's row is not empty.  products: pattern [pairs, n_2] of Q, Q_pj = W3_ij W2_jk;  factors as in
    GatedMatrix (two, each [products.nnz]).  coefficient: GatedMatrix [1, pairs], full, A_p = sum_m W1_km g_m W4_mi."""

    i: Tensor
    k: Tensor
    products: Pattern
    factors: tuple[tuple[int, Tensor], ...]
    coefficient: GatedMatrix

    def path_products(self, field: VectorField) -> Tensor:
        """Q's values, [products.nnz]."""
        (upper, upper_index), (lower, lower_index) = self.factors
        up, down = field.layers[upper].values, field.layers[lower].values
        return up[upper_index.to(up.device)] * down[lower_index.to(down.device)]


@dataclass(eq=False)
class Column:
    """One state coordinate m of the columns form: start on live rows of W_1[:, m], sub-matrices of W_2 .. W_L on live
    neurons, end on W_{L+1}[m, :]. A neuron is live when a path from input m to output m runs through it.

    start_row, start_index: int64, rows of layer 1 and indices into layer 1's values.
    end_col, end_index: int64, columns (neurons of layer L) and indices into the last layer's values; its gate is g[m].
    live: for l = 1..L: bool [n_l].  hidden: the patterns of W_2 .. W_L.
    """

    m: int
    start_row: Tensor
    start_index: Tensor
    end_col: Tensor
    end_index: Tensor
    live: tuple[Tensor, ...]
    hidden: tuple[Pattern, ...]

    @property
    def steps(self) -> tuple[tuple[Pattern, Tensor], ...]:
        """For l = 2..L: (pattern [n_l, n_{l-1}] of the live entries, int64 [nnz] indices into layer l's values).

        Made anew whenever asked for: all columns of a wide field together can outweigh the field a hundredfold.
        """
        return tuple(
            _subpattern(pattern, after[pattern.row] & before[pattern.col])
            for before, after, pattern in zip(self.live, self.live[1:], self.hidden)
        )


@dataclass(eq=False)
class ColumnsForm:
    """L >= 2: for each live coordinate m: p = d_1 * W_1[:,m]; p = d_l * (W_l p), l = 2..L; then
    tr += g_m W_{L+1}[m,:] . p.

    whole: the columns' live weights together would outweigh the field many times (a wide dense field's by its
    dimension). So they are not laid out: the columns go one by one through the layers' own W_l, in the same memory
        each.
    """

    columns: tuple[Column, ...]
    whole: bool = False


@dataclass(eq=False)
class HutchinsonForm:
    """e' J e: u = W_1 e once per solve; p = d_1 * u; p = d_l * (W_l p), l = 2..L; then r . p with r = W_{L+1}' e once
    per solve when there is no output gate, else sum_m e_m g_m (W_{L+1} p)_m. L = 0: u = W_1 e, sum_m e_m g_m u_m."""

    output_gate: bool


@dataclass(eq=False)
class NoHiddenForm:
    """L = 0 (a linear field): tr = sum_m g_m W_mm; `trace` is a [1, 1] GatedMatrix."""

    trace: GatedMatrix


Form = NoHiddenForm | DiagonalForm | PairsForm | PathsForm | ColumnsForm | HutchinsonForm | GraphForm


@dataclass(eq=False)
class DivergencePlan:
    """kind: "exact" or "hutchinson". costs: multiply-adds per sample of every form that was counted ("diagonal",
    "pairs", "paths", "columns", "hutchinson"; one product per neuron is not counted, except where a form repeats it per
    column or pair); `reason` says in a sentence what was chosen and why."""

    kind: str
    form: Form
    costs: dict[str, int]
    reason: str


# ------------------------------------------------------------------------------------------------------------ planning


def plan(field: VectorField | GraphField, kind: Kind = "exact") -> DivergencePlan:
    """Choose the divergence's form for these masks. Reads patterns only, never values; runs on the CPU; deterministic.

    Raises ValueError for an unknown kind. Source of the identities: tr is cyclic, so the two outer matrices can be
    multiplied first, and only their product's entries that close a path through the hidden layers count.
    """
    if kind not in ("exact", "hutchinson"):
        raise ValueError(f'plan: kind must be "exact" or "hutchinson", not {kind!r}')
    if isinstance(field, GraphField):
        form, costs, reason = plan_graph(field, kind)
        return DivergencePlan(kind, form, costs, reason)
    patterns = [layer.pattern for layer in field.layers]
    output_gate = field.layers[-1].gate is not None
    probe = sum(pattern.nnz for pattern in patterns[1:-1]) + (patterns[-1].nnz if output_gate else 0)
    costs = {"hutchinson": probe}
    if kind == "hutchinson":
        ends = "W_1 e is hoisted out of the solve" + ("" if output_gate else ", and so is W_out' e")
        return DivergencePlan(kind, HutchinsonForm(output_gate), costs, f"one tangent, {probe} multiply-adds; {ends}")

    depth = len(patterns) - 1
    if depth == 0:
        form, reason = _plan_linear(patterns), "linear field: the trace depends on t alone"
    elif depth == 1:
        form = _plan_diagonal(patterns)
        costs["diagonal"] = form.row.pattern.nnz
        reason = f"one hidden layer: an inner product of {costs['diagonal']} live neurons"
    elif depth == 2:
        form, paths = _plan_pairs(patterns)
        costs["pairs"] = form.matrix.pattern.nnz
        reason = (
            f"two hidden layers: {costs['pairs']} of the {patterns[1].nnz} weights of the middle matrix close a path "
            f"({paths} paths{', too many to list' if form.matrix.direct else ''}); a Hutchinson probe costs {probe}"
        )
    else:
        columns, costs["columns"] = _plan_columns(patterns)
        form, reason = columns, f"columns of live neurons cost {costs['columns']}"
        if columns.whole:
            reason = f"{reason} (one by one through the whole layers, {_whole_cost(patterns, columns.columns)})"
        if depth == 3:
            listed = _count_paths(patterns, most=costs["columns"])
            costs["paths"] = listed.paths + 3 * listed.pairs
            if listed.i is not None and costs["paths"] < costs["columns"]:
                form = _plan_paths(patterns, listed)
                reason = f"closed paths cost {costs['paths']}, {reason}"
            else:
                reason = f"{reason}, closed paths {'' if listed.complete else 'at least '}{costs['paths']}"
        reason = f"{'three' if depth == 3 else depth} hidden layers: {reason}, a Hutchinson probe {probe}"
    return DivergencePlan(kind, form, costs, reason)


def _mask(pattern: Pattern, rows: slice | None = None) -> Tensor:
    """float32 [rows, in] of 0 and 1, of some rows or all: products of masks count exactly up to 2**24."""
    rows = slice(0, pattern.shape[0]) if rows is None else rows
    mask = torch.zeros((rows.stop - rows.start) * pattern.shape[1], dtype=torch.float32)
    mask[_flat(pattern, rows)] = 1
    return mask.view(-1, pattern.shape[1])


def _mask_product(pattern: Pattern, x: Tensor, transposed: bool = False) -> Tensor:
    """The 0-1 matrix of a pattern, or its transpose, times x (float32 [in, n], transposed [out, n]), a block at a
    time."""
    out, width = pattern.shape
    product = torch.zeros(width if transposed else out, x.shape[1], dtype=torch.float32)
    if pattern.density > DENSE_PRODUCT:
        for rows in _blocks(out, width):
            mask = _mask(pattern, rows)
            if transposed:
                product += mask.T @ x[rows]
            else:
                product[rows] = mask @ x
        return product
    for entries in _blocks(pattern.nnz, x.shape[1]):
        row, col = pattern.row[entries], pattern.col[entries]
        source, target = (row, col) if transposed else (col, row)
        product.index_add_(0, target, x[source])
    return product


def _subpattern(pattern: Pattern, kept: Tensor) -> tuple[Pattern, Tensor]:
    """The pattern of the kept (bool [nnz]) entries, and their int64 indices."""
    index = kept.nonzero().flatten()
    if index.numel() == pattern.nnz:
        return pattern, index
    return pattern.of_entries(index, pattern.col[index], pattern.shape[1]), index


def _blocks(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows of `width` elements, each of at most BLOCK_ELEMENTS elements."""
    size = max(1, BLOCK_ELEMENTS // max(1, width))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _two_step_paths(left: Pattern, row: Tensor, right: Pattern, col: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For every query q the middles s with left[row_q, s] and right[s, col_q] both there: (q, index of the left entry,
    index of the right entry) of each such path, q ascending, then s ascending."""
    where = torch.full((right.shape[0] * right.shape[1],), -1, dtype=torch.int32)  # right's entries by position
    where[right.row * right.shape[1] + right.col] = torch.arange(right.nnz, dtype=torch.int32)
    degree = left.row_ptr[1:] - left.row_ptr[:-1]
    found = []
    for block in _blocks(row.numel(), int(degree.max()) if degree.numel() else 0):
        repeats = degree[row[block]]
        query = torch.repeat_interleave(torch.arange(block.start, block.stop), repeats)
        first = left.row_ptr[row[block]] - (torch.cumsum(repeats, 0) - repeats)  # so that first + position is the entry
        left_index = torch.arange(query.numel()) + torch.repeat_interleave(first, repeats)
        right_index = where[left.col[left_index] * right.shape[1] + col[query]]
        kept = right_index >= 0
        found.append((query[kept], left_index[kept], right_index[kept].long()))
    if not found:
        none = torch.zeros(0, dtype=torch.int64)
        return none, none, none
    return tuple(torch.cat(parts) for parts in zip(*found))


def _full_row(count: int) -> Pattern:
    return Pattern((1, count), torch.tensor([0, count]), torch.arange(count))


def _plan_linear(patterns: Sequence[Pattern]) -> NoHiddenForm:
    (only,) = patterns
    index = (only.row == only.col).nonzero().flatten()
    entry = torch.zeros(index.numel(), dtype=torch.int64)
    return NoHiddenForm(GatedMatrix(_full_row(1), entry, only.row[index], ((0, index),)))


def _plan_diagonal(patterns: Sequence[Pattern]) -> DiagonalForm:
    first, last = patterns
    neurons = torch.arange(first.shape[0])
    neuron, first_index, last_index = _two_step_paths(first, neurons, last, neurons)
    live, entry = torch.unique(neuron, return_inverse=True)
    pattern = Pattern((1, neurons.numel()), torch.tensor([0, live.numel()]), live)
    return DiagonalForm(GatedMatrix(pattern, entry, first.col[first_index], ((0, first_index), (1, last_index))))


def _plan_pairs(patterns: Sequence[Pattern]) -> tuple[PairsForm, int]:
    first, middle, last = patterns
    into, back = _mask(first).T, _mask(last).T.contiguous()  # [dim, n_1], [n_2, dim]
    closed, total = torch.zeros(middle.nnz, dtype=torch.bool), 0
    for rows in _blocks(*middle.shape):
        paths = (back[rows] @ into).flatten()[_flat(middle, rows)]
        closed[_entries(middle, rows)] = paths > 0
        total += int(paths.sum(dtype=torch.float64))
    pattern, index = _subpattern(middle, closed)
    if total > PATH_LIMIT:
        return PairsForm(GatedMatrix(pattern, direct=_MultipliedOut(pattern, index))), total
    entry, first_index, last_index = _two_step_paths(first, pattern.col, last, pattern.row)
    factors = ((0, first_index), (1, index[entry]), (2, last_index))
    return PairsForm(GatedMatrix(pattern, entry, first.col[first_index], factors)), total


def _flat(pattern: Pattern, rows: slice) -> Tensor:
    """Positions of a pattern's entries in some rows, within the flattened block of those rows."""
    entries = _entries(pattern, rows)
    return (pattern.row[entries] - rows.start) * pattern.shape[1] + pattern.col[entries]


def _entries(pattern: Pattern, rows: slice) -> slice:
    return slice(int(pattern.row_ptr[rows.start]), int(pattern.row_ptr[rows.stop]))


@dataclass(eq=False)
class _MultipliedOut:
    """values of M_ij = W2_ij sum_m W1_jm g_m W3_mi on `pattern`, without a path list; `index`: its entries in W2."""

    pattern: Pattern
    index: Tensor

    def __call__(self, field: VectorField, gate: Tensor | None) -> Tensor:
        first, middle, last = field.layers
        into, back = first.weight.T, last.weight.T
        back = back if gate is None else back * gate
        blocks = [
            (back[rows] @ into).flatten()[_flat(self.pattern, rows).to(back.device)]
            for rows in _blocks(*self.pattern.shape)
        ]
        return middle.values[self.index.to(back.device)] * torch.cat(blocks)


@dataclass(eq=False)
class _ClosedPaths:
    """L = 3: the pairs (i, k), CSR order, that close at least one path; paths = sum over pairs of the middles j, and
    end_paths = sum over pairs of the state coordinates m. i and k are None where there are too many paths to list them.
    complete: False where counting stopped, because the paths were too many to list and cost more than something
        else."""

    i: Tensor | None
    k: Tensor | None
    pairs: int
    paths: int
    end_paths: int
    complete: bool


def _count_paths(patterns: Sequence[Pattern], most: float = math.inf) -> _ClosedPaths:
    """most: a cost beyond which paths that cannot be listed need not be counted on."""
    first, second, third, last = patterns
    into, back = _mask(first).T, _mask(last).T.contiguous()
    listed: list[Tensor] | None = []
    pairs = paths = end_paths = 0
    for rows in _blocks(third.shape[0], max(second.shape)):
        if listed is None and paths + 3 * pairs >= most:
            return _ClosedPaths(None, None, pairs, paths, end_paths, complete=False)
        # [i, k]: middles j, coordinates m
        through = _mask_product(second, _mask(third, rows).T.contiguous(), transposed=True).T
        around = back[rows] @ into
        closed = (through > 0) & (around > 0)
        pairs += int(closed.sum())
        paths += int((through * closed).sum(dtype=torch.float64))
        end_paths += int((around * closed).sum(dtype=torch.float64))
        if paths + end_paths > PATH_LIMIT:
            listed = None
        if listed is not None:
            listed.append(closed.nonzero() + torch.tensor([rows.start, 0]))
    if listed is None:
        return _ClosedPaths(None, None, pairs, paths, end_paths, complete=True)
    found = torch.cat(listed) if listed else torch.zeros(0, 2, dtype=torch.int64)
    return _ClosedPaths(found[:, 0].contiguous(), found[:, 1].contiguous(), pairs, paths, end_paths, complete=True)


def _plan_paths(patterns: Sequence[Pattern], closed: _ClosedPaths) -> PathsForm:
    first, second, third, last = patterns
    pair, third_index, second_index = _two_step_paths(third, closed.i, second, closed.k)
    row_ptr = torch.zeros(closed.i.numel() + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(pair, minlength=closed.i.numel()), 0, out=row_ptr[1:])
    products = Pattern((closed.i.numel(), second.shape[0]), row_ptr, third.col[third_index])
    entry, first_index, last_index = _two_step_paths(first, closed.k, last, closed.i)
    coefficient = GatedMatrix(
        _full_row(closed.i.numel()), entry, first.col[first_index], ((0, first_index), (3, last_index))
    )
    return PathsForm(closed.i, closed.k, products, ((2, third_index), (1, second_index)), coefficient)


def columns_form(field: VectorField) -> ColumnsForm:
    """The columns form of a field with two hidden layers or more, whatever `plan` would choose."""
    return _plan_columns([layer.pattern for layer in field.layers])[0]


def _whole_cost(patterns: Sequence[Pattern], columns: Sequence["Column"]) -> int:
    """Multiply-adds of columns that go through the layers' own matrices."""
    ends = sum(column.start_row.numel() + column.end_col.numel() for column in columns)
    return len(columns) * sum(pattern.nnz for pattern in patterns[1:-1]) + ends


def _plan_columns(patterns: Sequence[Pattern]) -> tuple[ColumnsForm, int]:
    """The form, and its cost over all columns: live weights of W_2 .. W_{L+1}, and one product per live neuron."""
    first, *hidden, last = patterns
    forward, backward = [_mask(first) > 0], [_mask(last).T > 0]  # [n_l, dim]: reached from input m, reaching output m
    for pattern in hidden:
        forward.append(_mask_product(pattern, forward[-1].float()) > 0)
    for pattern in reversed(hidden):
        backward.append(_mask_product(pattern, backward[-1].float(), transposed=True) > 0)
    live = [reached & reaching for reached, reaching in zip(forward, reversed(backward))]
    entries = 0
    for pattern, before, after in zip(hidden, live, live[1:]):
        entries += int((_mask_product(pattern, before.float()) * after).sum(dtype=torch.float64))
    cost = sum(int(neurons.sum()) for neurons in live) + int(live[-1].sum()) + entries

    first_t, first_order = first.transpose
    columns = []
    for m in range(first.shape[1]):
        alive = tuple(neurons[:, m].clone() for neurons in live)
        if not bool(alive[-1].any()):
            continue
        start = slice(int(first_t.row_ptr[m]), int(first_t.row_ptr[m + 1]))
        starts = alive[0][first_t.col[start]]
        end = torch.arange(int(last.row_ptr[m]), int(last.row_ptr[m + 1]))
        end = end[alive[-1][last.col[end]]]
        columns.append(Column(
            m, first_t.col[start][starts], first_order[start][starts], last.col[end], end, alive, tuple(hidden)
        ))
    spared = 2 * entries <= len(columns) * sum(pattern.nnz for pattern in hidden)
    stacked = entries <= STACKED_ENTRIES or (spared and entries <= MOST_STACKED_ENTRIES)
    return ColumnsForm(tuple(columns), whole=not stacked), cost


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    plan: DivergencePlan, field: VectorField, t: Tensor, slopes: Sequence[Tensor], noise: Tensor | None = None
) -> Tensor:
    """What every form means, in plain torch, for reading and testing: tr df/dx, or e' (df/dx) e for "hutchinson".

    t: 0-d.  slopes: d_l of the hidden layers, each [batch, n_l].  noise: e, [batch, dim], only for "hutchinson".
    Returns [batch] (or [1] where nothing given has a batch: the exact trace of a field without hidden layers).
    """
    form, last = plan.form, field.layers[-1]
    gate = None if last.gate is None else last.gate.at(t)

    def product(pattern: Pattern, values: Tensor, x: Tensor) -> Tensor:
        return functional.linear(x, pattern.dense(values))

    if isinstance(form, NoHiddenForm):
        return form.trace.values(field, gate)
    if isinstance(form, DiagonalForm):
        return product(form.row.pattern, form.row.values(field, gate), slopes[0])[:, 0]
    if isinstance(form, PairsForm):
        return (slopes[1] * product(form.matrix.pattern, form.matrix.values(field, gate), slopes[0])).sum(1)
    if isinstance(form, PathsForm):
        q = product(form.products, form.path_products(field), slopes[1])
        return (form.coefficient.values(field, gate) * slopes[2][:, form.i] * slopes[0][:, form.k] * q).sum(1)
    if isinstance(form, ColumnsForm):
        total = slopes[0].new_zeros(len(slopes[0]))
        weights = [layer.weight for layer in field.layers[1:-1]] if form.whole else []
        for column in form.columns:
            p = torch.zeros_like(slopes[0])
            p[:, column.start_row] = field.layers[0].values[column.start_index]
            p = slopes[0] * p
            for layer, slope, (pattern, index) in zip(field.layers[1:], slopes[1:], () if form.whole else column.steps):
                p = slope * product(pattern, layer.values[index], p)
            for weight, slope in zip(weights, slopes[1:]):
                p = slope * functional.linear(p, weight)
            end = p[:, column.end_col] @ last.values[column.end_index]
            total = total + (end if gate is None else gate[column.m] * end)
        return total
    if noise is None:
        raise ValueError('evaluate: a "hutchinson" plan needs noise [batch, dim]')
    p = _times(field.layers[0], noise)
    for layer, slope in zip(field.layers[1:], slopes):
        p = _times(layer, slope * p)
    return ((noise if gate is None else noise * gate) * p).sum(1)


def _times(layer: Layer, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight)
