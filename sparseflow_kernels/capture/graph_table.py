"""The rows of a graph while it is read. Every row belongs to a node, and has a number."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

import torch
from torch import Tensor

from ..field import Convolution, Graph, Matrix, Node, Part, Pattern, Window
from ..field.graph import SAMPLES
from ..origin import Key, Origin
from ..trained import Held, starts_at_zero
from .algebra import apply
from .operations import aten
from .provenance import ParameterNumbers
from .refusal import NotFinite
from .replay import Attribute, Forms, Replay, with_tensors
from .values import NOT_PLAIN, Constant
from .zeros import take_zeros

PER_SAMPLE = SAMPLES[0]


class Numbers:
    """A growing list of int64 numbers that can be indexed by a tensor."""

    def __init__(self) -> None:
        self._all, self.count = torch.zeros(1024, dtype=torch.int64), 0

    def extend(self, value: int, count: int) -> None:
        while self.count + count > self._all.numel():
            self._all = torch.cat([self._all, torch.zeros_like(self._all)])
        self._all[self.count: self.count + count] = value
        self.count += count

    def __getitem__(self, index: Tensor) -> Tensor:
        return self._all[index]


class GraphTable:
    """Rows by number, the nodes that they belong to, and the parts that these nodes name.

    parts: the tensors of the field.  origins: where their entries come from.
    """

    def __init__(self, graph: Graph, parameters: ParameterNumbers, held: dict[str, Held], device: torch.device) -> None:
        self.graph, self.parameters, self.device = graph, parameters, device
        self.parts: list[Part] = []
        self.origins: dict[Key, Origin] = {}
        self._parameters_held = held
        self.attribute: Callable[[Attribute], Constant] | None = None  # gives what the module holds under a name
        self._nodes: list[Node] = []
        self._starts: list[int] = []
        self._block, self._binding = Numbers(), Numbers()
        self._first: dict[int, int] = {}  # id of a node -> its first row
        self._gathered: dict[bytes, Node] = {}
        self._entry_rows: dict[int, tuple[Constant, Tensor]] = {}  # by id, which the kept constant keeps
        self._forms = Forms()
        self._known_parts: dict[tuple, int | Matrix] = {}
        self.zero_row = int(self.add(graph.number(0.0)))

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters.dtype

    @property
    def count(self) -> int:
        return self._block.count

    # ------------------------------------------------------------------------------------------------ rows and nodes

    def add(self, node: Node, count: int | None = None) -> Tensor:
        """The numbers of the node's rows, int64 [rows]; a node of one row gives its number `count` times."""
        rows = self._rows(node)
        return rows if count is None or node.rows == count else rows.expand(count)

    def _rows(self, node: Node) -> Tensor:
        if node.kind == "rows":  # its rows are rows of its operands
            parts = zip(node.operands, node.pieces)
            return torch.cat([self._rows(operand)[first: first + count] for operand, (first, count) in parts])
        first = self._first.get(id(node))
        if first is None:
            first = self._first[id(node)] = self._block.count
            self._block.extend(len(self._nodes), node.rows)
            self._binding.extend(PER_SAMPLE if node.per_sample else node.binding, node.rows)
            self._nodes.append(node)
            self._starts.append(first)
        return torch.arange(first, first + node.rows)

    def bindings(self, rows: Tensor) -> Tensor:
        return self._binding[rows]

    def node_of(self, rows: Tensor) -> Node:
        """A node whose rows are these, int64 [n]; a node of one row where they are all the same one."""
        if rows.numel() > 1 and bool((rows == rows[0]).all()):
            rows = rows[:1]
        key = rows.numpy().tobytes()
        node = self._gathered.get(key)
        if node is None:
            node = self._gathered[key] = self._gather(rows)
        return node

    def wide_node_of(self, rows: Tensor) -> Node:
        return self.graph.spread(self.node_of(rows), rows.numel())

    def _gather(self, rows: Tensor) -> Node:
        blocks = self._block[rows]
        ends = (blocks[1:] != blocks[:-1]).nonzero()[:, 0] + 1
        if not ends.numel():
            return self._take(int(blocks[0]), rows)
        distinct = blocks.unique().numel()
        if ends.numel() + 1 > 4 * distinct + 4:  # many short runs: gather every row once, then pick them all at once
            used, inverse = rows.unique(return_inverse=True)
            return self.graph.select(self._gather(used), inverse)
        bounds = [0, *ends.tolist(), rows.numel()]
        pieces = [self._take(int(blocks[a]), rows[a:b]) for a, b in zip(bounds, bounds[1:])]
        return self.graph.concatenate(pieces)

    def _take(self, block: int, rows: Tensor) -> Node:
        node, index = self._nodes[block], rows - self._starts[block]
        if node.kind == "constant":
            return self.graph.spread(self.graph.constant(node.tensor[index]), index.numel())
        if node.rows == 1:
            return self.graph.spread(node, index.numel())
        return self.graph.select(node, index)

    # ------------------------------------------------------------------------------------------- tensors of the field

    def rows_of_entries(self, value: Constant, name: str) -> Tensor:
        """The number of a row for every entry of a constant, int64 of its shape. Entries that come from the same element of a
        parameter, times the same number, share a row."""
        if id(value) not in self._entry_rows:
            self._entry_rows[id(value)] = (value, self._rows_of_entries(value, name))
        return self._entry_rows[id(value)][1]

    def _rows_of_entries(self, value: Constant, name: str) -> Tensor:
        value = self._held(value)
        flat = value.value.detach().reshape(-1)
        if value.source is None:
            return self._rows_of_numbers(flat).view(value.shape)
        if value.in_order:  # a parameter, or a part of one
            entries = apply(aten.reshape.default, value, [-1])
            return self.add(self.graph.vector(self._part(entries, None, name), flat.numel()), flat.numel()).view(value.shape)
        source, factor = value.sources.reshape(-1), value.factors.reshape(-1)
        free = (source != NOT_PLAIN) & ((source < 0) | (factor == 0))
        rows = torch.empty(flat.numel(), dtype=torch.int64)
        if bool(free.any()):
            rows[free] = self._rows_of_numbers(flat[free.to(flat.device)])
        owned = (~free).nonzero()[:, 0]
        if owned.numel():
            first, inverse = distinct([
                torch.where(source[owned] >= 0, source[owned], -2 - owned), factor[owned].view(torch.int64)
            ])  # fmt: skip
            entries = apply(aten.index.Tensor, apply(aten.reshape.default, value, [-1]), [self._index(owned[first])])
            rows[owned] = self.add(self.graph.vector(self._part(entries, None, name), first.numel()))[inverse]
        return rows.view(value.shape)

    def _rows_of_numbers(self, numbers: Tensor) -> Tensor:
        used, inverse = numbers.cpu().to(torch.float64).unique(return_inverse=True)
        self._finite(used, "a constant")
        return self.add(self.graph.constant(used), used.numel())[inverse]

    def matrix(
        self, entries: Constant, row: Tensor, col: Tensor, shape: tuple[int, int], name: str, window: Window | None = None
    ) -> Matrix | None:  # fmt: skip
        """The sparse matrix with entries [n] at the places (row, col), int64 [n], which differ. None where no entry is left.
        With a window, the convolution of which this is the weight, [out, in * taps].

        Raises NotFinite for NaN and infinite values.
        """
        entries = self._held(entries)
        keep = (entries.value != 0).cpu()
        if not bool(keep.all()):
            if entries.source is not None:
                keep |= starts_at_zero(self.parameters.origin(entries), self._parameters_held)
                take_zeros(entries, ~keep, self.parameters, self._parameters_held)
            kept = keep.nonzero()[:, 0]
            entries, row, col = apply(aten.index.Tensor, entries, [self._index(kept)]), row[kept], col[kept]
        if not row.numel():
            return None
        pattern, order = Pattern.from_coo(shape, row, col)
        if window is None and entries.source is None and bool((entries.value == 1).all()):
            return self.graph.ones(pattern)
        if not torch.equal(order, torch.arange(order.numel())):
            entries = apply(aten.index.Tensor, entries, [self._index(order)])
        key = (*self._content(entries), shape, pattern.row_ptr.numpy().tobytes(), pattern.col.numpy().tobytes(), window)
        if key not in self._known_parts:
            part = self._part(entries, pattern, name)
            self._known_parts[key] = Matrix(pattern, part) if window is None else Convolution(pattern, part, window=window)
        return self._known_parts[key]

    def _index(self, index: Tensor) -> Constant:
        return Constant(index.to(self.device))

    def _content(self, entries: Constant) -> tuple:
        """A key that is equal for constants that stay equal whatever values the parameters take."""
        if entries.source is None:
            return ("numbers", entries.value.detach().cpu().to(torch.float64).numpy().tobytes())
        form = self._forms.number(entries.node) if bool((entries.sources == NOT_PLAIN).any()) else None
        return ("entries", form, entries.sources.numpy().tobytes(), entries.factors.numpy().tobytes(),
                entries.value.detach().cpu().to(torch.float64).numpy().tobytes())  # fmt: skip

    def _part(self, entries: Constant, pattern: Pattern | None, name: str) -> int:
        key = ("part", *self._content(entries), None if pattern is None else id(pattern))
        if key not in self._known_parts:
            values = entries.value.detach().to(self.dtype).clone()
            self._finite(values, name)
            number = self._known_parts[key] = len(self.parts)
            self.parts.append(Part(values, pattern, name))
            self.origins[(number, "values")] = self.parameters.origin(entries)
        return self._known_parts[key]

    def _held(self, entries: Constant) -> Constant:
        """The constant as it becomes a tensor of the field: attributes of the module in it are fixed to their present
        numbers."""
        if not entries.from_attributes:
            return entries
        self.parameters.take(entries)
        node = with_tensors(entries.node, lambda leaf: self.attribute(leaf).value)
        if isinstance(node, Tensor) or not Replay(node, self.dtype).leaves():
            return Constant(entries.value)
        return replace(entries, node=node)

    @staticmethod
    def _finite(values: Tensor, name: str) -> None:
        if not bool(torch.isfinite(values).all()) and not (name == "a constant" and not bool(values.isnan().any())):
            raise NotFinite(f"layer {name!r}: values computed from the weights holds NaN or infinite values")


def distinct(columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The distinct tuples among n, which are given as columns [n]: (where each is met first, in that order; for every
    position the number of its tuple)."""
    n = columns[0].numel()
    whole = torch.arange(n)
    for column in columns:
        if n < 2 or bool((column[1:] > column[:-1]).all()):
            return whole, whole
    code = columns[0]
    for column in columns[1:]:
        if n and bool((column == column[0]).all()):
            continue
        a, b = code.unique(return_inverse=True)[1], column.unique(return_inverse=True)[1]
        code = a * (int(b.max()) + 1) + b
    used, inverse = code.unique(return_inverse=True)
    first = torch.full((used.numel(),), n).scatter_reduce(0, inverse, whole, "amin")
    order = first.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel())
    return first[order], place[inverse]


def distinct_lines(lines: Tensor) -> tuple[Tensor, Tensor]:
    """`distinct` for the lines of [n, k]; by their hashes where no two lines have the same one."""
    generator = torch.Generator().manual_seed(0)
    hashed = torch.zeros(len(lines), dtype=torch.int64)
    factors = torch.randint(1 << 62, (lines.shape[1],), generator=generator) * 2 + 1
    hashed = (lines * factors).sum(1)
    first, inverse = distinct([hashed])
    if not torch.equal(lines[first][inverse], lines):  # two lines with one hash
        used, inverse = lines.unique(dim=0, return_inverse=True)
        first = torch.full((len(used),), len(lines)).scatter_reduce(0, inverse, torch.arange(len(lines)), "amin")
    return first, inverse

