"""The neurons of a vector field whose graph is no chain, and which of them FT (pruning by neurons) may remove.

A *slice* is the part of a weight matrix that computes one of its outputs: a row of a Linear's weight, a filter of a
convolution, a row of a gate. It writes rows of the graph. Rows that meet elementwise (the sum of a residual block, a gate and
what it lets through, the parts of a concatenation) are coupled. The slices that write coupled rows are one *neuron*, and are
removed together. A slice that is used at several places (shared weights, a convolution) couples the rows of all of them.

A neuron can be removed if, once its slices are zero, no row through which others read it depends on the state any more.
This does not hold for rows of the derivative, for rows that are combined with rows of the state, and where rows meet numbers
that depend on other neurons: in a norm or a softmax over them, or in a gate of one number for all. Such groups keep all their
neurons, and say why. A row that still depends on time or context is no obstacle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..field.graph import STATE, Node
from .matrices import WeightMatrix
from .wiring import Item, Wiring

NOTHING = -1  # the label of a row that does not depend on the state
_REMEDY = "prune_weights_ prunes its weights one by one"


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that slices of the same matrices write.

    weights: paths of the matrices.  neurons: how many there are.  live: how many of them have weights left.  reason: why
    they are not pruned by neurons; empty where they are.
    """

    weights: tuple[str, ...]
    neurons: int
    live: int
    reason: str = ""

    @property
    def coupled(self) -> bool:
        """Whether they are not pruned for another reason than that they are rows of the state or the derivative."""
        return self.reason.startswith("at ")

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(self.weights))
        what = f"{names}: {self.live} of {self.neurons} neurons live"
        return what if not self.reason else f"{what}; not pruned by neurons: {self.reason}; {_REMEDY}"


class Neurons:
    """The neurons of a module, by number.

    slice_of: int64 [elements + 2], the slice that an element belongs to; -1: none.
    neuron_of: int64 [slices + 1], the neuron that a slice belongs to; -1 behind the last.
    row_neuron: int64 [rows], the neuron that writes a row; -1: none.
    label: int64 [rows], the neuron without which a row is a constant, or depends on time and context alone; NOTHING where
        no single neuron is enough for that, or none is needed.
    reasons: for every neuron, why it cannot be removed; "" where it can.
    """

    def __init__(self, wiring: Wiring, matrices: dict[str, WeightMatrix]) -> None:
        self.wiring, self.matrices = wiring, matrices
        self.slice_of = torch.full((wiring.numbering.count + 2,), -1)
        self.paths: list[str] = []  # slice -> path of its matrix
        self._layouts: list[tuple[int, Item, int]] = []  # of the matrices: first slice, parameter, stride of the axis
        for path, matrix in matrices.items():
            self._number_slices(path, matrix)
        ends = [first for first, _, _ in self._layouts[1:]] + [len(self.paths)]
        self._matrix_of = torch.repeat_interleave(
            torch.arange(len(ends)), torch.tensor([end - first for end, (first, _, _) in zip(ends, self._layouts)])
        )
        self._writes = {node: self._is_written_by_slices(node) for node in wiring.products}
        self._carries: dict[Node, bool] = {}
        for node in wiring.nodes:  # whether a node depends on the state, or on what is pruned
            source = node.kind == "input" and bool(node.binding & STATE)
            source |= node.kind == "linear" and bool((self.slice_of[wiring.products[node].element] >= 0).any())
            self._carries[node] = node.binding != 0 and (source or any(self._carries[o] for o in node.operands))
        self._couple()
        self.of_state, self.of_all = self._labels(of_state_alone=True), self._labels(of_state_alone=False)
        single = (self.of_all != NOTHING) & (self.of_all != self.count)
        self.label = torch.where(single, self.of_all, torch.where(self.of_state == self.count, NOTHING, self.of_state))
        self.reasons = self._reasons()

    # ------------------------------------------------------------------------------------------------------ slices

    def _number_slices(self, path: str, matrix: WeightMatrix) -> None:
        item = self.wiring.numbering.item_of(*matrix.owners[0])
        shape = item.parameter.shape
        axis = matrix.axis = self._axis(item, matrix)
        self._layouts.append((len(self.paths), item, math.prod(shape[axis + 1 :])))
        index = torch.arange(shape[axis]).view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
        self.slice_of[item.elements] = len(self.paths) + index.reshape(-1)
        self.paths += [path] * shape[axis]

    def _axis(self, item: Item, matrix: WeightMatrix) -> int:
        """The axis of a matrix that counts slices. Of a bare parameter it is the one whose slices each write a single row
        where the parameter is first used."""
        if matrix.axis is not None:
            return matrix.axis
        shape = item.parameter.shape
        for node in self.wiring.nodes:
            product = self.wiring.products.get(node)
            if product is None:
                continue
            own = (product.element >= item.start) & (product.element < item.start + item.parameter.numel())
            if bool(own.any()):
                places = torch.unravel_index(product.element[own] - item.start, shape)
                for axis in range(len(shape)):
                    rest = sum(p for a, p in enumerate(places) if a != axis)
                    if _one_each(product.into[own], places[axis], rest):
                        return axis
        return 0

    def _is_written_by_slices(self, node: Node) -> Tensor:
        """bool [entries of the product]: entries of matrices for which every row of the node is written by one slice."""
        product = self.wiring.products[node]
        number = self.slice_of[product.element]
        found = torch.zeros(number.numel(), dtype=torch.bool)
        matrix = torch.where(number >= 0, self._matrix_of[number], -1)
        for one in matrix.unique().tolist():
            if one >= 0:
                own = matrix == one
                first, item, stride = self._layouts[one]
                rest = product.element[own] - item.start - (number[own] - first) * stride
                found[own] = _one_each(product.into[own], number[own], rest)
        return found

    def _couple(self) -> None:
        """Numbers the neurons, which are the connected components of rows and slices."""
        wiring, edges = self.wiring, []
        for node in wiring.nodes:
            if not self._carries[node]:
                continue
            start = wiring.start[node]
            if node.kind == "linear":
                product, written = wiring.products[node], self._writes[node]
                edges.append((start + product.into[written], wiring.rows + self.slice_of[product.element[written]]))
                if selects(node):
                    edges.append((start + product.into, wiring.start[node.operands[0]] + product.of))
                continue
            at = 0
            for number, operand in enumerate(node.operands):
                first, count = node.pieces[number] if node.kind == "rows" else (0, operand.rows)
                if self._carries[operand] and (node.kind == "rows" or count == node.rows):
                    index = torch.arange(count)
                    edges.append((start + at + index, wiring.start[operand] + first + index))
                at += count if node.kind == "rows" else 0
        a, b = (torch.cat([edge[i] for edge in edges]) if edges else torch.zeros(0, dtype=torch.int64) for i in (0, 1))
        component = components(wiring.rows + len(self.paths), a, b)
        used, of_slice = component[wiring.rows :].unique(return_inverse=True)
        self.count = used.numel()
        self.neuron_of = torch.cat([of_slice, torch.tensor([-1])])
        place = torch.searchsorted(used, component[: wiring.rows]).clamp(max=max(self.count - 1, 0))
        found = used[place] == component[: wiring.rows] if self.count else torch.zeros(wiring.rows, dtype=torch.bool)
        self.row_neuron = torch.where(found, place, -1)

    def element_neuron(self, elements: Tensor) -> Tensor:
        return self.neuron_of[self.slice_of[elements]]

    # ------------------------------------------------------------------------------------------------------ labels

    def _labels(self, of_state_alone: bool) -> Tensor:
        many, wiring = self.count, self.wiring
        label = torch.full((wiring.rows,), NOTHING)
        for node in wiring.nodes:
            own = wiring.of(label, node)
            if node.kind in ("input", "time"):
                own[:] = NOTHING if of_state_alone and not node.binding & STATE else many
            elif node.kind == "linear":
                product = wiring.products[node]
                of, by = wiring.of(label, node.operands[0])[product.of], self.element_neuron(product.element)
                gives = torch.where(by >= 0, by, of)[of != NOTHING]
                into = product.into[of != NOTHING]
                low, high = torch.full_like(own, many), torch.full_like(own, NOTHING)
                low.scatter_reduce_(0, into, gives, "amin")
                high.scatter_reduce_(0, into, gives, "amax")
                own.copy_(torch.where(high == NOTHING, NOTHING, torch.where(low == high, low, many)))
            elif node.kind == "rows":
                own.copy_(wiring.pieces(label, node))
            else:
                own.copy_(wiring.joined(label, node, self._join, NOTHING))
        return label

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a == NOTHING, b, torch.where((b == NOTHING) | (a == b), a, self.count))

    def varies(self) -> Tensor:
        """bool [neurons]: whether, without its slices, what a neuron sends to others still depends on time or context."""
        found = torch.zeros(self.count, dtype=torch.bool)
        for rows, _ in self._exits():
            neuron = self.row_neuron[rows]
            found[neuron[(self.of_all[rows] != NOTHING) & (self.of_all[rows] != neuron)]] = True
        return found

    def _exits(self) -> list[tuple[Tensor, Node]]:
        """(rows of neurons, int64, that others than the neuron itself read; the node that reads them)."""
        wiring, found = self.wiring, []
        for node in wiring.nodes:
            if node.kind == "linear":
                operand, product = node.operands[0], wiring.products[node]
                rows = wiring.start[operand] + product.of
                neuron = self.row_neuron[rows]
                outside = (neuron >= 0) & (self.element_neuron(product.element) != neuron)
                if selects(node) and self._carries[node]:
                    outside &= self.row_neuron[wiring.start[node] + product.into] != neuron
                found.append((rows[outside].unique(), node))
            elif node.kind != "rows":
                for operand in node.operands:
                    if operand.rows != node.rows:
                        row = wiring.start[operand]
                        found.append((torch.tensor([row] if int(self.row_neuron[row]) >= 0 else [], dtype=torch.int64), node))
        return found

    # ------------------------------------------------------------------------------------------------------ reasons

    def _reasons(self) -> list[str]:
        wiring, reasons = self.wiring, [""] * self.count

        def give(rows: Tensor, reason: str) -> None:
            for neuron in self.row_neuron[rows].unique().tolist():
                if neuron >= 0 and not reasons[neuron]:
                    reasons[neuron] = reason

        for output in wiring.outputs:
            give(wiring.start[output] + torch.arange(output.rows), "they are the derivative's own rows")
        for node in wiring.nodes:
            if node.kind == "input" and node.binding & STATE:
                rows = wiring.start[node] + torch.arange(node.rows)
                give(rows, "they are combined, row by row, with the state's own rows")
        for rows, reader in self._exits():
            left = rows[(self.of_state[rows] != NOTHING) & (self.of_state[rows] != self.row_neuron[rows])]
            if left.numel():
                where = next((n.origin for n in self._upwards(reader) if self._meets_others(n)), reader.origin)
                give(left, f"at {where or 'forward'!r} they meet numbers that depend on other rows (a norm, a softmax, one "
                           "gate for all)")  # fmt: skip
        for node, written in self._writes.items():  # matrices that are used neither as they are nor transposed
            product = wiring.products[node]
            by = self.element_neuron(product.element)
            outside = (by >= 0) & ~written
            mixed = outside & ~self._is_transposed(node, outside)
            for neuron in by[mixed].unique().tolist():
                reasons[neuron] = reasons[neuron] or f"at {node.origin or 'forward'!r} its rows are mixed"
        return reasons

    def _is_transposed(self, node: Node, own: Tensor) -> Tensor:
        """bool [entries of the product]: whether the entries that read a row of the operand belong to one slice each."""
        product = self.wiring.products[node]
        of, slices = product.of[own], self.slice_of[product.element[own]]
        fits = _count_pairs(of, slices) == of.unique().numel()
        return torch.full_like(own, fits)

    def _meets_others(self, node: Node) -> bool:
        return node.elementwise and any(o.rows != node.rows and self._carries[o] for o in node.operands)

    def _upwards(self, node: Node) -> list[Node]:
        """The nodes that this one depends on, nearest first, up to the products that write neurons."""
        waiting, found, seen = list(node.operands), [], set()
        while waiting:
            one = waiting.pop(0)
            if id(one) in seen or not self._carries[one]:
                continue
            seen.add(id(one))
            found.append(one)
            if one.kind != "linear" or not bool(self._writes[one].any()):
                waiting += one.operands
        return found

    # ------------------------------------------------------------------------------------------------------- groups

    def by_group(self) -> dict[tuple[tuple[str, ...], str], Tensor]:
        """(paths of the matrices that write a neuron, reason) -> the neurons, int64, in the order of their first slices."""
        own: list[list[str]] = [[] for _ in range(self.count)]
        first = [len(self.paths)] * self.count
        seen = torch.zeros(len(self.paths) + 1, dtype=torch.bool)
        seen[self.slice_of[:-2][self.wiring.seen]] = True
        for number, (path, neuron) in enumerate(zip(self.paths, self.neuron_of.tolist())):
            if bool(seen[number]):
                own[neuron].append(path)
                first[neuron] = min(first[neuron], number)
        found: dict[tuple[tuple[str, ...], str], list[int]] = {}
        for neuron in sorted(range(self.count), key=lambda n: first[n]):
            if own[neuron]:
                found.setdefault((tuple(own[neuron]), self.reasons[neuron]), []).append(neuron)
        return {key: torch.tensor(neurons) for key, neurons in found.items()}

    def strength(self, values: Tensor) -> Tensor:
        """float64 [neurons]: the sum of the absolute values in a neuron's slices. values: float64 [elements]."""
        total = torch.zeros(self.count + 1, dtype=torch.float64)
        by = self.element_neuron(torch.arange(values.numel()))
        total.index_add_(0, by % (self.count + 1), values.abs())  # elements of no neuron are counted last
        return total[:-1]

    def groups(self) -> list[NeuronGroup]:
        strength = self.strength(self.wiring.numbering.values())
        return [
            NeuronGroup(weights, neurons.numel(), int((strength[neurons] > 0).sum()), reason)
            for (weights, reason), neurons in self.by_group().items()
        ]


def selects(node: Node) -> bool:
    """Whether a product only picks rows of its operand, one for each of its own rows."""
    pattern = node.matrix.pattern
    picks = node.matrix.constant and not node.transposed and pattern.nnz == node.rows == pattern.row.unique().numel()
    return picks and (node.operands[0].rows > 1 or node.rows == 1)


def _one_each(into: Tensor, slices: Tensor, rest: Tensor) -> bool:
    """Whether every row is written by one slice. Where every row has a single entry, that holds for both axes of a matrix:
    then the axis with more distinct slices is taken. rest: the position of each entry along the other axis."""
    rows = into.unique().numel()
    if _count_pairs(into, slices) != rows:
        return False
    if into.numel() == rows and rows > 1:
        return slices.unique().numel() >= rest.unique().numel()
    return True


def _count_pairs(a: Tensor, b: Tensor) -> int:
    """How many different pairs (a[i], b[i]) there are, of numbers >= 0."""
    return 0 if a.numel() == 0 else (a * (int(b.max()) + 1) + b).unique().numel()


def components(count: int, a: Tensor, b: Tensor) -> Tensor:
    """int64 [count]: for every number the least one in its connected component. a, b: int64 [edges], the ends of the edges."""
    label = torch.arange(count)
    while a.numel():
        low = torch.minimum(label[a], label[b])
        new = label.scatter_reduce(0, label[a], low, "amin").scatter_reduce(0, label[b], low, "amin")
        new = new.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
        while not torch.equal(new, new[new]):
            new = new[new]
        if torch.equal(new, label):
            break
        label = new
    return label
