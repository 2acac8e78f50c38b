"""Exact rewriting of a field that is a graph: rows that nobody reads go, and rows that no sample changes are computed
once.

A pruned matrix has empty columns, whose rows nobody reads, and empty rows, whose neurons depend on the parameters
alone, or on them and time. Both are found row by row:

- a row is *live* if a path of entries leads from it to the derivative. Others go, and with them the values of parts
  that only they read;
- a live row *varies* if a path leads to it from the state or the context. Others are computed apart, as numbers that
  are the same for all samples: a product with them is a part of the next bias then. A single evaluation with a time
  per sample does without (`GraphField.single`): computing them for every sample takes it less time than their
  bookkeeping.

Operations without a matrix, and their operands, keep the same rows, so that nothing has to be gathered: where they
would differ, all of them have the rows of any. What follows from the context is not computed apart: as further numbers
that every evaluation reads per sample it would take longer than as rows of the state's.

A product skips an entry that is not there, whatever it would be multiplied with: that a row is never computed changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from .field import GraphField, Pattern
from .field.convolution import Convolution
from .field.graph import CONTEXT, STATE, Graph, Matrix, Node, evaluate, order
from .field.graph_field import Part
from .field.primitives import PRIMITIVES
from .field.transforms import slope
from .origin import Key, Origin

LEAST = 1 / 32  # of the rows that are computed per sample, or of the work; for less the graph stays as it is
DEAR = 12  # multiply-adds in the time of a function like exp
LEAST_FIXED = 16  # rows that are computed apart: fewer do not pay for what that takes at every gradient


def simplify_graph(field: GraphField, origins: Mapping[Key, Origin]) -> tuple[GraphField, dict[Key, Origin], str]:
    """(the same function of its parameters with fewer rows, the origins of its tensors, what happened)."""
    told = []
    live = Rows(field, apart=False)
    if live.saved > LEAST * live.rows:
        told.append(f"{live.saved} of {live.rows} rows per sample are read by nobody: they are left out")
        field, origins = _Rewriting(field, live, Graph()).field_without(origins)
    varying = Rows(field, apart=True)
    if varying.saved > max(LEAST * varying.rows, LEAST_FIXED - 1):
        output = _Rewriting(field, varying, field.graph).output()
        if _work(output) < (1 - LEAST) * _work(field.output):
            of_all = f"{varying.saved} of {varying.rows} rows per sample"
            told.append(f"{of_all} are the same for all: they are computed once")
            field = replace(field, output=output, single=field.output)
    return field, dict(origins), "\n".join(told)


def _work(output: Node) -> int:
    """What an evaluation takes per sample, in multiply-adds: a sum that a product is split into counts, too."""
    work = 0
    for node in order([output]):
        if node.per_sample and node.kind == "linear":
            work += node.matrix.multiply_adds
        elif node.per_sample and node.elementwise:
            work += node.rows * (1 if PRIMITIVES[node.kind].cheap else DEAR)
    return work


class Rows:
    """Which rows of which nodes are computed, and when.

    nodes: that the derivative depends on, operands first.  live, varies: node -> bool [rows].  bindings: node -> the
    binding of every row.  rows: that are computed per sample and evaluation.  saved: how many of them need not be.
    """

    def __init__(self, field: GraphField, apart: bool) -> None:
        """apart: whether rows that do not vary are told from those that do."""
        g = field.graph
        self._activations = g.activations
        self.slopes = {slope: node for node, slope in g.slopes.items() if slope.operands}
        self.nodes = order([field.output], operands=self.operands)
        self.rows = self.saved = 0
        if not any(_has_gaps(node.matrix) for node in self.nodes if node.kind == "linear"):
            return
        self._entries: dict[tuple[int, bool], tuple[np.ndarray, np.ndarray]] = {}
        self.bindings: dict[Node, np.ndarray] = {}
        for node in self.nodes:
            self.bindings[node] = self._binding(node) if apart else np.full(node.rows, node.binding, dtype=np.uint8)
        self.varies = {node: (bits & (STATE | CONTEXT)) != 0 for node, bits in self.bindings.items()}
        self.live = {node: np.full(node.rows, node.kind == "input") for node in self.nodes}
        self.live[field.output][:] = True
        self.varies[field.output] |= field.output.per_sample  # its rows need not be put together then
        while self._spread_reading() or self._align():
            pass
        for node in self.nodes:
            if node.per_sample and node.kind != "input":
                self.rows += node.rows
                self.saved += node.rows - int((self.live[node] & self.varies[node]).sum())

    def operands(self, node: Node) -> tuple[Node, ...]:
        """What an activation, or its slope, is a function of, and not what it is written with."""
        node = self.slopes.get(node, node)
        known = self._activations.get(node)
        return node.operands if known is None else (known[1],)

    def entries(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of every entry of a product's matrix, the way round in which it is used."""
        key = id(node.matrix), node.transposed
        if key not in self._entries:
            pattern = node.matrix.pattern
            row, col = pattern.row.numpy(), pattern.col.numpy()
            self._entries[key] = (col, row) if node.transposed else (row, col)
        return self._entries[key]

    def _binding(self, node: Node) -> np.ndarray:
        operands = self.operands(node)
        if not operands or isinstance(node.matrix, Convolution):
            return np.full(node.rows, node.binding, dtype=np.uint8)
        of = [self.bindings[operand] for operand in operands]
        if node.kind == "linear":
            row, col = self.entries(node)
            found = np.zeros(node.rows, dtype=np.uint8)
            for bit in (1, 2, 4):
                found[row[(of[0][col] & bit) != 0]] |= bit
            return found
        if node.kind == "rows":
            return np.concatenate([self.bindings[operand][below] for operand, _, below in _pieces(node)])
        found = np.zeros(node.rows, dtype=np.uint8)
        for bits in of:
            found |= bits
        return found

    def _spread_reading(self) -> bool:
        """From every node to its operands: what a live row reads is live. True where something changed."""
        changed = False
        for node in reversed(self.nodes):
            live, operands = self.live[node], self.operands(node)
            if not operands or not live.any():
                continue
            if isinstance(node.matrix, Convolution):
                changed |= _add(live, True) | _add(self.live[operands[0]], True)
                changed |= _add(self.varies[operands[0]], operands[0].per_sample)
            elif node.kind == "linear":
                row, col = self.entries(node)
                reads = np.zeros(operands[0].rows, dtype=bool)
                reads[col[live[row]]] = True
                changed |= _add(self.live[operands[0]], reads)
            elif node.kind == "rows":
                for operand, above, below in _pieces(node):
                    changed |= _add(self.live[operand][below], live[above])
            else:
                for operand in operands:
                    changed |= _add(self.live[operand], live if operand.rows == node.rows else live.any())
        return changed

    def _align(self) -> bool:
        """Operations without a matrix and their operands get the same rows per sample. True where something changed."""
        changed = False
        for node in self.nodes:
            if node.kind == "linear" or not node.per_sample:
                continue
            if node.kind == "rows":
                pairs = _pieces(node)
            else:
                pairs = ((one, slice(None), slice(None)) for one in self.operands(node) if one.rows == node.rows)
            for operand, above, below in pairs:
                if operand.per_sample:
                    live, varies = self.live[node][above], self.varies[node][above]
                    read, moves = self.live[operand][below], self.varies[operand][below]
                    changed |= _add(moves, live & varies)
                    changed |= _add(live, read & moves & varies)
        return changed


def _add(rows: np.ndarray, more: np.ndarray | bool | np.bool_) -> bool:
    """rows |= more, in place; whether that changed them."""
    if not np.any(more & ~rows):
        return False
    rows |= more
    return True


def _pieces(node: Node) -> Iterator[tuple[Node, slice, slice]]:
    """Of a concatenation: (operand, its rows in the node, those rows in the operand)."""
    start = 0
    for operand, (first, count) in zip(node.operands, node.pieces):
        yield operand, slice(start, start + count), slice(first, first + count)
        start += count


def _has_gaps(matrix: Matrix) -> bool:
    """It has a row or a column without entries."""
    if isinstance(matrix, Convolution):
        return False
    pattern = matrix.pattern
    if bool((pattern.row_ptr[1:] == pattern.row_ptr[:-1]).any()):
        return True
    return not bool(torch.bincount(pattern.col, minlength=pattern.shape[1]).all())


@dataclass
class _Group:
    """Rows of a node that are computed together: int64, ascending, and the new node that they are."""

    rows: np.ndarray
    node: Node


class _Rewriting:
    """The field's nodes again, with the rows that are wanted."""

    def __init__(self, field: GraphField, rows: Rows, graph: Graph) -> None:
        """graph: the field's own, to go on with its parts as they are; or a new one, for parts with fewer values."""
        self.field, self.rows, self.g = field, rows, graph
        self._wanted = self._find_wanted()
        self._groups: dict[Node, list[_Group]] = {}
        self._blocks: dict[tuple, tuple[Pattern, np.ndarray]] = {}
        self._matrices: dict[tuple, Matrix] = {}
        self._parts: list[tuple[int, np.ndarray]] = []  # the new parts: which old one's, and which of its values
        self._number: dict[int, int] = {}  # of an old part: the new one that holds all of its values that are read
        self._found: dict[tuple[int, bytes], tuple[int, np.ndarray | None]] = {}  # a part's values: (new part, entries)
        self._divides = graph is not field.graph
        if self._divides:
            self._divide()

    # ---- parts

    def _divide(self) -> None:
        """New parts of those values that are read. What is read in several places apart from each other makes parts of
        its own: nothing has to be selected when the field is packed then, or put together again for a gradient."""
        reads: list[dict[bytes, np.ndarray]] = [{} for _ in self.field.parts]

        def read(number: int, own: np.ndarray) -> None:
            if len(own):
                reads[number][own.tobytes()] = own

        def whole(number: int) -> Tensor:
            read(number, np.arange(self.field.parts[number].values.numel()))
            return self.field.parts[number].values

        like = torch.empty(0, dtype=self.field.dtype, device=self.field.device)
        for node in self.rows.nodes:
            made = node.made if node.matrix is None else node.matrix.made
            for index in self._wanted[node]:
                if made is not None:
                    with torch.no_grad():
                        made(whole, like)  # what it reads is not known otherwise
                elif node.kind == "vector":
                    read(node.part, index if node.tensor is None else node.tensor.numpy()[index])
                elif node.matrix is not None and node.matrix.part is not None:
                    for rows, cols in self._around(node, index):
                        read(node.matrix.part, _of_part(node.matrix, self._block(node.matrix, rows, cols)[1]))
        for number, several in enumerate(reads):
            if not several:
                continue
            union = np.unique(np.concatenate(list(several.values())))
            if sum(map(len, several.values())) == len(union):
                self._found |= {(number, key): (self._part(number, own), None) for key, own in several.items()}
            else:
                new = self._part(number, union)
                self._found |= {(number, key): (new, np.searchsorted(union, own)) for key, own in several.items()}
            self._number[number] = len(self._parts) - 1

    def _values_of(self, number: int, own: np.ndarray) -> tuple[int, Tensor | None]:
        """(part, entries; None: all) of the new field that are these values of an old part."""
        if self._divides:
            number, entries = self._found[number, own.tobytes()]
            return number, None if entries is None else torch.from_numpy(entries)
        return number, None if len(own) == self.field.parts[number].values.numel() else torch.from_numpy(own)

    def _part(self, number: int, own: np.ndarray) -> int:
        self._parts.append((number, own))
        return len(self._parts) - 1

    def _around(self, node: Node, index: np.ndarray) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
        """(rows, columns) of the pieces of a product's matrix that make these rows; None: all."""
        if isinstance(node.matrix, Convolution):
            yield None, None
            return
        (operand,) = self.rows.operands(node)
        for columns in self._wanted[operand] if operand.per_sample else [self.rows.live[operand].nonzero()[0]]:
            yield (columns, index) if node.transposed else (index, columns)

    def _block(self, matrix: Matrix, rows: np.ndarray | None, cols: np.ndarray | None) -> tuple[Pattern, np.ndarray]:
        """(the pattern of these rows and columns of a matrix, which of its entries they are)."""
        key = id(matrix), *(None if index is None else index.tobytes() for index in (rows, cols))
        if key not in self._blocks:
            pattern = matrix.pattern
            if rows is None:
                self._blocks[key] = pattern, np.arange(pattern.nnz)
            else:
                row, col = pattern.row.numpy(), pattern.col.numpy()
                row_place, col_place = (_places(index, size) for index, size in zip((rows, cols), pattern.shape))
                own = ((row_place[row] >= 0) & (col_place[col] >= 0)).nonzero()[0]
                row_ptr = np.zeros(len(rows) + 1, dtype=np.int64)
                np.cumsum(np.bincount(row_place[row[own]], minlength=len(rows)), out=row_ptr[1:])
                places = torch.from_numpy(row_ptr), torch.from_numpy(col_place[col[own]])
                self._blocks[key] = Pattern((len(rows), len(cols)), *places), own
        return self._blocks[key]

    def _values(self, number: int, own: np.ndarray) -> Part:
        part = self.field.parts[number]
        if len(own) == part.values.numel():
            return part
        index = torch.from_numpy(own)
        pattern = part.pattern and part.pattern.of_entries(index, part.pattern.col[index], part.pattern.shape[1])
        return replace(part, values=part.values[index.to(part.values.device)], pattern=pattern)

    def _made(self, made: Callable) -> Callable:
        return _Renumbered(made, self._number) if self._divides else made

    # ---- nodes

    def output(self) -> Node:
        """The derivative again."""
        for node in self.rows.nodes:
            self.g.origin = node.origin
            self._groups[node] = [_Group(index, self._of_rows(node, index)) for index in self._wanted[node]]
        self.g.origin = ""
        return self._fetch(self.field.output, np.arange(self.field.dim))

    def field_without(self, origins: Mapping[Key, Origin]) -> tuple[GraphField, dict[Key, Origin]]:
        """(the field in the new graph, the origins of its tensors)."""
        old, g = self.field, self.g
        field = replace(
            old, graph=g, state=g.input("state", old.dim, old.state.binding), time=g.input("time", 1, old.time.binding),
            context=old.context and g.input("context", old.context.rows, old.context.binding), output=self.output(),
            parts=[self._values(number, own) for number, own in self._parts], notes=list(old.notes),
        )  # fmt: skip
        return field, {
            (new, "values"): origins[number, "values"].take(torch.from_numpy(own))
            for new, (number, own) in enumerate(self._parts)
        }

    def _find_wanted(self) -> dict[Node, list[np.ndarray]]:
        """Of every node, the rows that are made together, int64, ascending. What is computed per sample is made once,
        apart from the rows that no sample changes; of others whatever is read, in just these rows."""
        rows = self.rows
        wanted: dict[Node, dict[bytes, np.ndarray]] = {node: {} for node in rows.nodes}

        def want(node: Node, index: np.ndarray) -> None:
            if len(index):
                index = index if node.rows > 1 else np.zeros(1, dtype=np.int64)
                wanted[node][index.tobytes()] = index

        for node in reversed(rows.nodes):
            if node.per_sample:
                live, varies, bindings = rows.live[node], rows.varies[node], rows.bindings[node]
                rest = live & ~varies
                for mask in (live & varies, *(rest & (bindings == binding) for binding in np.unique(bindings[rest]))):
                    want(node, mask.nonzero()[0])
            elif node is self.field.output:
                want(node, np.arange(node.rows))
            for index in wanted[node].values():
                for operand, own in self._reads(node, index):
                    if not operand.per_sample:
                        want(operand, own)
        return {node: list(found.values()) for node, found in wanted.items()}

    def _reads(self, node: Node, index: np.ndarray) -> Iterator[tuple[Node, np.ndarray]]:
        """(operand, its rows) that these rows of a node read; of a product all that are live."""
        if node.kind == "rows":
            for operand, above, below in _pieces(node):
                yield operand, index[(index >= above.start) & (index < above.stop)] - above.start + below.start
            return
        for operand in self.rows.operands(node):
            yield operand, self.rows.live[operand].nonzero()[0] if node.kind == "linear" else index

    def _of_rows(self, node: Node, index: np.ndarray) -> Node:
        g, operands = self.g, self.rows.operands(node)
        take = torch.from_numpy(index)
        act = self.rows.slopes.get(node, node)
        if act in self.field.graph.activations:
            activation, (z,) = self.field.graph.activations[act][0], operands
            new = g.activation(activation, self._fetch(z, index))
            if act is node:
                return new
            if new in g.activations:
                return slope(g, new)
            at = torch.tensor([[self._fetch(z, index).value]], dtype=torch.float64)
            part = lambda number: self.field.parts[number].values
            return g.number(float(evaluate([node], {}, part, {z: at}, like=at)[0]))
        match node.kind:
            case "input":
                return g.select(g.input(node.name, node.rows, node.binding), take)
            case "number":
                return g.number(node.value)
            case "constant":
                return g.spread(g.constant(node.tensor[take]), len(index))
            case "made":
                return g.select(g.computed(self._made(node.made), node.rows), take)
            case "time":
                return g.select(g.time_function(node.function, node.rows), take)
            case "vector":
                own = index if node.tensor is None else node.tensor.numpy()[index]
                number, entries = self._values_of(node.part, own)
                return g.vector(number, len(index), entries)
            case "linear":
                return self._product(node, index)
            case "rows":
                return g.concatenate([self._fetch(part, own) for part, own in self._reads(node, index) if len(own)])
        fetched = [self._fetch(operand, index) for operand in operands]
        build = {"add": g.add, "sub": g.sub, "mul": g.mul, "neg": g.neg, "square": g.square}.get(node.kind)
        return g.spread(g.apply(node.kind, *fetched) if build is None else build(*fetched), len(index))

    def _product(self, node: Node, index: np.ndarray) -> Node:
        (operand,) = self.rows.operands(node)
        total = None
        for rows, cols in self._around(node, index):
            columns = rows if node.transposed else cols
            source = self._fetch(operand, np.arange(operand.rows) if columns is None else columns)
            if (matrix := self._matrix(node.matrix, rows, cols)).pattern.nnz:
                total = self.g.add(total, self.g.linear(matrix, source, node.transposed))
        return self.g.zeros(len(index)) if total is None else self.g.spread(total, len(index))

    def _matrix(self, matrix: Matrix, rows: np.ndarray | None, cols: np.ndarray | None) -> Matrix:
        pattern, own = self._block(matrix, rows, cols)
        if not self._divides and len(own) == matrix.pattern.nnz and pattern.shape == matrix.shape:
            return matrix
        key = id(matrix), id(pattern)
        if key not in self._matrices:
            if matrix.constant:
                found = self.g.ones(pattern) if rows is not None else matrix
            elif matrix.made is not None:
                found = replace(matrix, pattern=pattern, made=_Chosen(self._made(matrix.made), torch.from_numpy(own)))
            elif not len(own):
                found = Matrix(pattern)
            else:
                number, entries = self._values_of(matrix.part, _of_part(matrix, own))
                found = replace(matrix, pattern=pattern, part=number, entries=entries)
            self._matrices[key] = found
        return self._matrices[key]

    def _fetch(self, operand: Node, index: np.ndarray) -> Node:
        """These rows of an old node, live ones; the one row that there is, for all of them."""
        groups = self._groups[operand]
        if operand.rows == 1:
            return groups[0].node
        for group in groups:
            if len(group.rows) == len(index) and (group.rows == index).all():
                return group.node
        for group in groups:
            if np.isin(index, group.rows).all():
                return self.g.select(group.node, torch.from_numpy(np.searchsorted(group.rows, index)))
        rows = np.concatenate([group.rows for group in groups])
        order = np.argsort(rows)
        together = self.g.concatenate([self.g.spread(group.node, len(group.rows)) for group in groups])
        return self.g.select(together, torch.from_numpy(order[np.searchsorted(rows, index, sorter=order)]))


def _of_part(matrix: Matrix, own: np.ndarray) -> np.ndarray:
    """Which values of the part these entries of a matrix are."""
    return own if matrix.entries is None else matrix.entries.numpy()[own]


def _places(index: np.ndarray, size: int) -> np.ndarray:
    places = np.full(size, -1)
    places[index] = np.arange(len(index))
    return places


@dataclass(frozen=True)
class _Renumbered:
    """`Made` of a field whose parts have other numbers now."""

    made: Callable
    number: Mapping[int, int]

    def __call__(self, part: Callable[[int], Tensor], like: Tensor) -> Tensor:
        return self.made(lambda old: part(self.number[old]), like)


@dataclass(frozen=True)
class _Chosen:
    """Some of what a `Made` computes."""

    made: Callable
    entries: Tensor

    def __call__(self, part: Callable[[int], Tensor], like: Tensor) -> Tensor:
        return self.made(part, like)[self.entries.to(like.device)]
