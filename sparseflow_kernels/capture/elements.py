"""Elements of states, and the two things that are done with them: primitives, and products with matrices.

Every element of a state has a number, which says its sample and its row of the graph. Elements that are the same for all
samples (constants and functions of t that were joined to a state) have the sample ANY. An element of a result has the
sample of its operands; operands of two samples are refused. The row of a result depends on the rows of the operands
alone, so that all samples get the same rows, wherever the axis of the samples lies.
"""

from __future__ import annotations

import math
from typing import Any, Callable

import torch
from torch import Tensor

from ..field import Node
from .algebra import apply, typed
from .functions import product
from .graph_table import GraphTable, distinct, distinct_lines
from .operations import aten
from .refusal import REMEDY, NeedsContext, refuse
from .samples import ROUNDING, STRIDE
from .values import NOT_PLAIN, Constant, StateValue, TimeValue

WHOLE = f"Where the state's first axis is no batch, compile with an example of it, like=y0. Otherwise u{REMEDY[1:]}"
ANY = 1 << 20  # the sample of elements that are alike in all samples
MASK = STRIDE - 1
MOST_GROUPS = 64  # groups that one matrix of parameters is applied to, with a node each; more are one matrix
LARGEST = 1 << 25  # entries of a product that is written out

Make = Callable[..., Node]


def rows_of(ids: Tensor) -> Tensor:
    return ids & MASK


def samples_of(ids: Tensor) -> Tensor:
    return ids >> 40


def same_for_all(rows: Tensor) -> Tensor:
    return rows + ANY * STRIDE


def broadcast(*shapes: torch.Size) -> torch.Size:
    return torch.broadcast_shapes(*shapes) if any(shape != shapes[0] for shape in shapes) else torch.Size(shapes[0])


def merged(samples: Tensor, axis: int = 0) -> Tensor:
    """The one sample that the elements along an axis have. Raises UnsupportedFieldError where they have several."""
    one = samples.amin(axis)
    if not bool(((samples == one.unsqueeze(axis)) | (samples == ANY)).all()):
        refuse("a sum over the samples of the batch", WHOLE)
    return one


def _distinct_of_samples(rows: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """`distinct` of rows that mostly are the same ones `count` times over, for the samples."""
    if count > 1 and rows[0].numel():
        lines = [row.view(count, -1) for row in rows]
        if all(torch.equal(line, line[:1].expand_as(line)) for line in lines):
            first, inverse = distinct([line[0] for line in lines])
            return first, inverse.repeat(count)
    return distinct(rows)


class Elements:
    """Makes elements, int64 tensors of any shape.

    time_ids: gives the elements of a function of t (graph_time).  context_ids: gives the elements of a constant that differs
    from sample to sample (context); None: such a constant raises NeedsContext.
    """

    def __init__(
        self, table: GraphTable, size: int, name: Callable[[], str], matrix_name: Callable[[Constant], str]
    ) -> None:
        """size: of the batch.  name: gives the name of the module that runs now.  matrix_name: gives that of a matrix."""
        self.table, self.graph, self.size, self.name, self.matrix_name = table, table.graph, size, name, matrix_name
        self.time_ids: Callable[[TimeValue], Tensor] | None = None
        self.context_ids: Callable[[Constant, Tensor], Tensor] | None = None
        self.copies_whole = False  # the operation that is read is given truth values or whole numbers first
        self.zero = same_for_all(torch.tensor(table.zero_row))
        self.lowest = self.ids(-math.inf)  # what masks put where a softmax leaves an element out

    # ---------------------------------------------------------------------------------------------- values as elements

    def typed(self, value: Any) -> Constant | TimeValue:
        """A number, constant or function of t in the field's dtype and device."""
        return typed(value, self.table.dtype, self.table.device)

    def ids(self, value: Any, samples: Tensor | None = None) -> Tensor:
        """The elements of any value, of its shape. samples: those of what it meets, of a shape that it can be expanded to;
        the result has this shape where a constant differs from sample to sample."""
        if isinstance(value, StateValue):
            return value.ids
        if isinstance(value, TimeValue):
            return self.time_ids(value)
        value = self.typed(value)
        if samples is not None and value.value.numel() > 1:
            return self._beside(value, samples)
        return same_for_all(self.table.rows_of_entries(value, self._vector_name(value)))

    def _vector_name(self, value: Constant) -> str:
        return self.table.parameters.first_name(value) or self.name() or "a constant"

    def _beside(self, value: Constant, samples: Tensor) -> Tensor:
        """The elements of a constant that meets elements of known samples. Entries that are alike in all samples become
        one row."""
        entries = torch.arange(value.value.numel()).view(value.shape).expand(samples.shape).reshape(-1)
        flat = samples.reshape(-1)
        if not bool((flat != ANY).any()):
            return same_for_all(self.table.rows_of_entries(value, self._vector_name(value)))
        parts = self.by_sample(flat)
        if parts is None:  # one sample alone
            return same_for_all(self.table.rows_of_entries(value, self._vector_name(value)))
        first = entries[parts[0]]
        if bool((entries[parts] == first).all()):
            return same_for_all(self.table.rows_of_entries(value, self._vector_name(value)))
        if self._alike(value, entries[parts], first):
            canonical = entries.clone()
            canonical[parts] = first.expand_as(parts)
            used, inverse = canonical.unique(return_inverse=True)
            picked = apply(aten.index.Tensor, apply(aten.reshape.default, value, [-1]), [
                Constant(used.to(value.value.device))
            ])  # fmt: skip
            rows = self.table.rows_of_entries(picked, self._vector_name(value))
            return same_for_all(rows[inverse]).view(samples.shape)
        if self.context_ids is None:
            raise NeedsContext
        return self.context_ids(value, entries.view(samples.shape), samples)

    def by_sample(self, samples: Tensor) -> Tensor | None:
        """Positions [samples, n] of the elements of each sample, in order; None if there is one sample only."""
        found = samples[samples != ANY]
        present = found.unique()
        if present.numel() < 2:
            return None
        order = torch.argsort(samples, stable=True)[: found.numel()]
        if found.numel() % present.numel():
            refuse("an operation that mixes the samples of the batch", WHOLE)
        parts = order.view(present.numel(), -1)
        if not bool((samples[parts] == present[:, None]).all()):
            refuse("an operation that mixes the samples of the batch", WHOLE)
        return parts

    @staticmethod
    def _alike(value: Constant, entries: Tensor, first: Tensor) -> bool:
        """The entries of every sample are those of the first, up to a matrix product's rounding."""
        flat = value.value.detach().reshape(-1).cpu()
        mine, others = flat[first], flat[entries]
        if not torch.equal(mine.expand_as(others), others):
            if not flat.is_floating_point():
                return False
            rounding = ROUNDING * torch.finfo(flat.dtype).eps * float(flat.abs().max())
            if not bool(((mine - others).abs() <= rounding).all()):
                return False
        if value.source is None:
            return True
        source = value.sources.reshape(-1)
        if bool((source[entries] != source[first]).any()):
            return False
        # Computed entries that are alike now: of parameters, as copies are; of the module's tensors, by chance.
        return not bool((source[entries] == NOT_PLAIN).any()) or not value.from_attributes

    def together(self, values: list[Any], axis: int) -> list[Tensor]:
        """The elements of values that are joined along an axis. Constants are taken for the samples of the states beside
        them."""
        lines = None
        for value in values:
            if isinstance(value, StateValue) and value.ids.numel():
                samples = samples_of(value.ids)
                one = samples.amin(axis, keepdim=True)
                if bool(((samples == one) | (samples == ANY)).all()):
                    lines = one if lines is None else torch.minimum(lines, one)
                else:
                    lines = None
                    break
        return [
            self.ids(v, None if lines is None else lines.expand(v.shape)) if not isinstance(v, StateValue) else v.ids
            for v in values
        ]

    # ------------------------------------------------------------------------------------------------------ primitives

    def pointwise(self, make: Make, *values: Any, shape: torch.Size | None = None) -> StateValue:
        """Applies make(graph, *nodes), a function of nodes, to the elements of values that broadcast. shape: one more
        shape that takes part in that."""
        shape = broadcast(*(v.shape for v in values if hasattr(v, "shape")), *((shape,) if shape else ()))
        states = [v.ids.expand(shape) for v in values if isinstance(v, StateValue)]
        timed = [self.time_ids(v).expand(shape) for v in values if isinstance(v, TimeValue)]
        samples = self._samples(states + timed, shape)
        ids = [self.ids(v, samples).expand(shape) for v in values]
        if self.context_ids is not None:  # context has samples of its own
            samples = self._samples(ids, shape)
        rows = [rows_of(i).reshape(-1) for i in ids]
        first, inverse = _distinct_of_samples(rows, shape[0] if shape else 1)
        made = self._rows(make, [r[first] for r in rows])
        return StateValue(samples * STRIDE + made[inverse].view(shape))

    def chosen(self, mask: Tensor, a: Any, b: Any, shape: torch.Size) -> StateValue:
        """a where the mask is true, else b: a mask that never changes moves elements, and computes nothing."""
        samples = self._samples([v.ids.expand(shape) for v in (a, b) if isinstance(v, StateValue)], shape)
        first, second = (self.ids(v, samples).expand(shape) for v in (a, b))
        return StateValue(torch.where(mask.cpu().expand(shape), first, second))

    def _samples(self, ids: list[Tensor], shape: torch.Size) -> Tensor:
        if not ids:
            return torch.full(shape, ANY)
        samples = [samples_of(i) for i in ids]
        one = samples[0]
        for other in samples[1:]:
            one = torch.minimum(one, other)
        if len(samples) > 1 and not all(bool(((s == one) | (s == ANY)).all()) for s in samples):
            refuse("an operation across the samples of the batch", WHOLE)
        return one

    def _rows(self, make: Make, rows: list[Tensor]) -> Tensor:
        """New rows, one for each tuple of rows. Rows that are computed at different times become different nodes."""
        binding = self.table.bindings(rows[0])
        for other in rows[1:]:
            binding = binding | self.table.bindings(other)
        if binding.numel() and bool((binding == binding[0]).all()):
            return self.table.add(make(self.graph, *map(self.table.node_of, rows)), binding.numel())
        made = torch.empty(binding.numel(), dtype=torch.int64)
        for part in self._classes(binding):
            nodes = [self.table.node_of(r[part]) for r in rows]
            made[part] = self.table.add(make(self.graph, *nodes), part.numel())
        return made

    @staticmethod
    def _classes(binding: Tensor) -> list[Tensor]:
        """Positions of the rows that are computed at the same time: all that is computed per sample and evaluation is one
        class, and each other binding is one."""
        binding = torch.where((binding & 1).bool() | (binding == 6), 1, binding)
        return [(binding == kind).nonzero()[:, 0] for kind in binding.unique().tolist()]

    # ------------------------------------------------------------------------------------------------------- matrices

    def contract(self, lines: Tensor, matrix: Constant, name: str, which: Tensor | None = None) -> Tensor:
        """A matrix [q, k] times lines of elements [n, k]: elements [n, q]. With `which`, int64 [n], the matrix is [m, q, k],
        and line i is multiplied by number which[i] of it."""
        samples = merged(samples_of(lines), 1)
        rows = rows_of(lines)
        keyed = rows if which is None else torch.cat([rows, which[:, None]], 1)
        first, inverse = distinct_lines(keyed)
        rows, which = rows[first], None if which is None else which[first]
        several = which is not None and which.unique().numel() > 1
        if which is not None and not several:
            matrix = apply(aten.select.int, matrix, 0, int(which[0]))
        if not several and (len(rows) == 1 or (len(rows) <= MOST_GROUPS and self._own(matrix) and self._runs(rows))):
            made = torch.stack([self._product(matrix, line, name) for line in rows])
        else:
            made = self._unrolled(rows, matrix, which if several else None, name)
        return samples[:, None] * STRIDE + made[inverse]

    @staticmethod
    def _own(matrix: Constant) -> bool:
        return matrix.source is not None

    @staticmethod
    def _runs(rows: Tensor) -> bool:
        """Whether every line consists of consecutive rows, with at most three breaks."""
        return int((rows[:, 1:] - rows[:, :-1] != 1).sum(1).max() if rows.shape[1] > 1 else 0) <= 3

    def planes_by_binding(self, planes: Tensor) -> list[Tensor]:
        """Numbers of the planes of rows [planes, pixels] that are computed at the same time; planes of zeros are in none. A
        plane of which some rows differ from sample to sample is one of these."""
        zero = (planes == self.table.zero_row).all(1)
        binding = self.table.bindings(planes)
        binding = torch.where((binding & 1).bool() | (binding == 6), 1, binding)
        mixed = binding.amin(1) != binding.amax(1)
        binding = torch.where(mixed, 1, binding[:, 0])
        return [(~zero & (binding == kind)).nonzero()[:, 0] for kind in binding[~zero].unique().tolist()]

    def _product(self, matrix: Constant, line: Tensor, name: str) -> Tensor:
        """The q new rows of a matrix [q, k] times rows [k]."""
        total, width = None, matrix.shape[0]
        keep = (line != self.table.zero_row).nonzero()[:, 0]
        for part in self._classes(self.table.bindings(line[keep])):
            columns = keep[part]
            own = matrix
            if columns.numel() != line.numel():
                own = apply(aten.index_select.default, matrix, 1, Constant(columns.to(self.table.device)))
            row = torch.arange(width).repeat_interleave(columns.numel())
            col = torch.arange(columns.numel()).repeat(width)
            built = self.table.matrix(apply(aten.reshape.default, own, [-1]), row, col, (width, columns.numel()), name)
            if built is not None:
                total = self.graph.add(total, self.graph.linear(built, self.table.wide_node_of(line[columns])))
        return self.table.add(self.graph.zeros(width) if total is None else total, width)

    def _unrolled(self, rows: Tensor, matrix: Constant, which: Tensor | None, name: str) -> Tensor:
        """The rows [n, q] of a matrix times many lines of rows [n, k], by one large matrix in which the entries of the small
        one are repeated."""
        count, inner = rows.shape
        width = matrix.shape[-2]
        flat = apply(aten.reshape.default, matrix, [-1])
        entry = self._kept_entries(flat)
        number, o, j = entry // (width * inner), entry // inner % width, entry % inner
        if which is None:
            if count * entry.numel() > LARGEST:
                refuse(f"a product with so many entries ({count} x {entry.numel()})")
            u = torch.arange(count).repeat_interleave(entry.numel())
            e = torch.arange(entry.numel()).repeat(count)
        else:
            pairs = [(lines := (which == m).nonzero()[:, 0], (number == m).nonzero()[:, 0]) for m in which.unique()]
            if sum(a.numel() * b.numel() for a, b in pairs) > LARGEST:
                refuse("a product with so many entries")
            u = torch.cat([lines.repeat_interleave(own.numel()) for lines, own in pairs])
            e = torch.cat([own.repeat(lines.numel()) for lines, own in pairs])
        source, target = rows[u, j[e]], u * width + o[e]
        alive = source != self.table.zero_row
        source, target, picked = source[alive], target[alive], entry[e[alive]]
        total = None
        for part in self._classes(self.table.bindings(source)):
            used, col = source[part].unique(return_inverse=True)
            cells = target[part] * used.numel() + col
            if cells.unique().numel() != cells.numel():  # a row twice in one line
                lines = torch.stack([u[alive][part], j[e[alive]][part]], 1)
                places, col = lines.unique(dim=0, return_inverse=True)
                used = rows[places[:, 0], places[:, 1]]
            entries = apply(aten.index.Tensor, flat, [Constant(picked[part].to(self.table.device))])
            built = self.table.matrix(entries, target[part], col, (count * width, used.numel()), name)
            if built is not None:
                total = self.graph.add(total, self.graph.linear(built, self.table.wide_node_of(used)))
        total = self.graph.zeros(count * width) if total is None else total
        return self.table.add(total, count * width).view(count, width)

    def _kept_entries(self, flat: Constant) -> Tensor:
        """The numbers of the entries that are not zero, or are zero now and may be trained."""
        keep = (flat.value != 0).cpu()
        if flat.source is not None:
            keep |= flat.sources.reshape(-1) != -1
        return keep.nonzero()[:, 0]

    def sums(self, groups: Tensor, name: str = "") -> Tensor:
        """The sums of groups of elements [n, terms]: elements [n]."""
        if groups.shape[1] == 1:
            return groups[:, 0]
        ones = Constant(torch.ones(1, groups.shape[1], dtype=self.table.dtype, device=self.table.device))
        return self.contract(groups, ones, name)[:, 0]

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """The sums of a * b over the last axis. a, b: elements of shapes that broadcast."""
        shape = broadcast(a.shape, b.shape)
        if math.prod(shape) > LARGEST:
            refuse(f"a sum over so many products of states ({math.prod(shape)})")
        terms = self.pointwise(product, StateValue(a), StateValue(b)).ids
        return self.sums(terms.reshape(-1, shape[-1])).view(shape[:-1])

    def tree(self, make: Make, groups: Tensor) -> Tensor:
        """Combines the elements of groups [n, terms] by `make`, two by two, into elements [n]."""
        while groups.shape[1] > 1:
            half = groups.shape[1] // 2
            pairs = self.pointwise(make, StateValue(groups[:, :half]), StateValue(groups[:, half: 2 * half])).ids
            groups = torch.cat([pairs, groups[:, 2 * half:]], 1)
        return groups[:, 0]
