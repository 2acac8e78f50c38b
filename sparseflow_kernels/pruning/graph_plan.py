"""Pruning neurons of graphs (FT): what else is removed with a neuron, which biases take up its constant, what size is left.

The slices of a pruned neuron are masked. What it still sends to others is then a constant, or a function of time and context.
If it is a constant, and every product that reads it adds a bias of its own, the constant is added to that bias, and the
entries that read the neuron are masked. The function stays exactly that of the module with masked slices. What nothing reads
any more (biases, gates, what only removed neurons read) is masked too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..field.graph import Node
from .graph_neurons import Neurons, selects
from .wiring import Wiring

_TIME = 0.3712953  # the time at which constants are computed; neurons that depend on time are not folded
_SAME = 1e-9  # relative: shifts of one bias at two places are the same number, up to rounding in float64


class GraphPlan:
    """The neurons of the fields that are graphs, in the order in which they are pruned; `neurons._Plan` is the same for a
    chain. fold: "auto", "drop" or "none", as in `prune_neurons_`."""

    def __init__(self, neurons: Neurons, fold: str) -> None:
        self.neurons, self.wiring, self.fold = neurons, neurons.wiring, fold
        numbering = self.wiring.numbering
        self.values = numbering.values()
        self.live = self.values != 0
        self.unmasked = numbering.unmasked()
        self.of_element = neurons.element_neuron(torch.arange(numbering.count))
        strength = neurons.strength(self.values)
        self.ranked: list[Tensor] = []  # neurons of each group that can be pruned, strongest first
        for (_, reason), members in neurons.by_group().items():
            if not reason:
                order = members[torch.sort(strength[members], descending=True, stable=True).indices]
                order = order[strength[order] > 0]
                if order.numel():
                    self.ranked.append(order)
        self.removable = torch.zeros(neurons.count + 1, dtype=torch.bool)
        for members in self.ranked:
            self.removable[members] = True
        self.uses = _uses(neurons)
        self.biases = _Biases(self.wiring)
        self.folds = self._foldable()

    def counts_at(self, phi: float) -> tuple[int, ...]:
        """How many neurons each group keeps, if it keeps the fraction phi of its live ones, and one at least."""
        return tuple(max(1, int(phi * members.numel() + 0.5)) for members in self.ranked)

    def removed_at(self, counts: tuple[int, ...], of: str) -> int:
        """How many non-zero elements are removed when every group keeps so many neurons. Biases that are zero, and become
        something else by folding, are not counted. of: "parameters", or "weights" for elements of pruned matrices alone."""
        removed = self.live & self._removed(counts)[0]
        if of == "weights":
            removed = removed & (self.of_element >= 0)
        return int(removed.sum())

    @torch.no_grad()
    def apply_(self, counts: tuple[int, ...]) -> None:
        """Prunes the module in place: every group keeps so many neurons."""
        removed, rows_only = self._removed(counts)
        if self.fold == "auto":
            while True:
                shifts, conflicts = self._shifts(removed, rows_only)
                if not bool(conflicts.any()):
                    break
                self.folds = self.folds & ~conflicts[:-1]  # not folded: what reads these neurons stays
                removed, rows_only = self._removed(counts)
            for item in self.wiring.numbering.items:
                shift = shifts[item.elements]
                if bool((shift != 0).any()):
                    item.parameter.add_(shift.view(item.parameter.shape).to(item.parameter))
        self.wiring.numbering.mask_(removed)

    # ------------------------------------------------------------------------------------------------ what goes

    def _removed(self, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(bool [elements], all that are removed; bool [elements], those of them in slices of the chosen neurons)."""
        chosen = torch.zeros(self.neurons.count + 1, dtype=torch.bool)
        for members, count in zip(self.ranked, counts):
            chosen[members[count:]] = True
        rows_only = chosen[self.of_element]
        removed = rows_only.clone()
        if self.fold == "none":
            return removed, rows_only
        folds = torch.cat([self.folds, torch.zeros(1, dtype=torch.bool)])
        element, label, row = self.uses
        while True:
            alive = self.unmasked & ~removed
            read, used = self.wiring.read(alive)
            left = torch.zeros(self.neurons.count + 1, dtype=torch.int64)
            left.index_add_(0, self.of_element % left.numel(), (alive & self.live & self.wiring.seen).long())
            gone = (left == 0) & self.removable & folds
            kept = read[row] & ~gone[label]
            free = torch.zeros(alive.numel(), dtype=torch.bool)
            free[element] = True
            free[element[kept]] = False
            new = alive & ((free & (self.of_element >= 0)) | (self.wiring.seen & ~used & ~self.wiring.pinned))
            if not bool(new.any()):
                return removed, rows_only
            removed |= new

    # ------------------------------------------------------------------------------------------------- folding

    def _foldable(self) -> Tensor:
        """bool [neurons]: whether what reads a neuron can be removed with it, its constant being folded into biases."""
        everything = self.removable[:-1].clone()
        if self.fold == "none":
            return torch.zeros_like(everything)
        if self.fold == "drop":
            return everything
        folds = everything & ~self.neurons.varies()
        element, label, row = self.uses
        no_bias = self.removable[label] & (self.biases.site_of[row] < 0)
        folds[label[no_bias]] = False
        self.folds = folds
        rows_only = self.removable[self.of_element]
        while True:
            conflicts = self._shifts(None, rows_only)[1][:-1]
            if not bool((self.folds & conflicts).any()):
                return self.folds
            self.folds = self.folds & ~conflicts

    def _shifts(self, removed: Tensor | None, rows_only: Tensor) -> tuple[Tensor, Tensor]:
        """What folding adds to the biases when the elements `removed` are removed; None: all neurons that fold.

        Returns (float64 [elements], what is added to each; bool [neurons + 1], the neurons for which one bias, used at
        several places, would have to become two numbers).
        """
        neurons, wiring, sites = self.neurons, self.wiring, self.biases
        values = torch.where(rows_only | ~self.unmasked, 0.0, self.values)
        emitted = wiring.emitted(values, _TIME)
        folds = torch.cat([self.folds, torch.zeros(1, dtype=torch.bool)])
        read = None if removed is None else wiring.read(self.unmasked & ~removed)[0]
        total = torch.zeros(sites.count, dtype=torch.float64)
        asks: list[tuple[Tensor, Tensor]] = []
        for node, product in wiring.products.items():
            operand, element = node.operands[0], product.element
            label = wiring.of(neurons.label, operand)[product.of]
            own = (element >= 0) & (neurons.slice_of[element] >= 0) & (label >= 0) & folds[label]
            own &= neurons.element_neuron(element) != label
            if removed is not None:
                own &= removed[element.clamp(min=0)]
            into = wiring.start[node] + product.into
            if read is not None:
                own &= read[into]
            site = sites.site_of[into]
            own &= site >= 0
            if bool(own.any()):
                weights = self.values if removed is None else values
                amount = weights[element[own]] * product.scale[own] * wiring.of(emitted, operand)[product.of[own]]
                total.index_add_(0, site[own], amount)
                asks.append((site[own], label[own]))
        conflicts = torch.zeros(neurons.count + 1, dtype=torch.bool)
        shifts = torch.zeros(wiring.numbering.count, dtype=torch.float64)
        asking = torch.zeros(sites.count, dtype=torch.bool)
        for site, _ in asks:
            asking[site] = True
        bias = sites.bias_of
        active = bias >= 0
        if read is not None:
            active &= read[sites.row_of]
        low = torch.full((wiring.numbering.count,), torch.inf, dtype=torch.float64)
        high = torch.full_like(low, -torch.inf)
        low.scatter_reduce_(0, bias[active], total[active], "amin")
        high.scatter_reduce_(0, bias[active], total[active], "amax")
        apart = high - low > _SAME * (1 + high.abs())
        unsafe = apart | ~sites.complete
        for site, label in asks:
            conflicts[label[unsafe[bias[site]]]] = True
        settled = asking & ~unsafe[bias]
        shifts[bias[settled]] = total[settled]
        return shifts, conflicts


def _uses(neurons: Neurons) -> tuple[Tensor, Tensor, Tensor]:
    """For every entry of a pruned matrix: its element, the label of the row that it reads (-1: none), and the row that it adds
    to, int64 [entries] each. Entries by which a neuron reads itself are left out."""
    wiring, found = neurons.wiring, []
    for node, product in wiring.products.items():
        own = neurons.slice_of[product.element] >= 0
        label = wiring.of(neurons.label, node.operands[0])[product.of]
        own &= (label < 0) | (neurons.element_neuron(product.element) != label)
        found.append((product.element[own], label[own], wiring.start[node] + product.into[own]))
    if not found:
        return (torch.zeros(0, dtype=torch.int64),) * 3
    return tuple(torch.cat([one[i] for one in found]) for i in range(3))


class _Biases:
    """The places where biases are added to products. A *site* is a row of a sum to which an element of a parameter is added,
    times one.

    site_of: int64 [rows], the site that a row of a product leads to; -1: none.
    bias_of, row_of: int64 [sites], the element that is added, and the row of the sum.
    complete: bool [elements], whether the element is used at sites alone.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self._plain: dict[Node, Tensor | None] = {}
        self._readers: dict[Node, list[Node]] = {}
        for node in wiring.nodes:
            self._plain[node] = self._elements(node)
            for operand in node.operands:
                self._readers.setdefault(operand, []).append(node)
        self.site_of = torch.full((wiring.rows,), -1)
        self.count = 0
        self._known: dict[Node, tuple[int, Node]] = {}  # sum -> its first site
        biases, rows = [], []
        for node in wiring.products:
            if self._plain[node] is not None:
                continue
            found = self._sum_after(node)
            if found is None:
                continue
            total, vector, place = found
            if total not in self._known:
                self._known[total] = (self.count, vector)
                biases.append(self._plain[vector].expand(total.rows))
                rows.append(wiring.start[total] + torch.arange(total.rows))
                self.count += total.rows
            first, vector = self._known[total]
            here = self._plain[vector].expand(total.rows)[place] >= 0
            wiring.of(self.site_of, node).copy_(torch.where(here, first + place, -1))
        empty = torch.zeros(0, dtype=torch.int64)
        self.bias_of, self.row_of = (torch.cat(x) if x else empty for x in (biases, rows))
        uses, at_sites = (torch.zeros(wiring.numbering.count + 2, dtype=torch.int64) for _ in range(2))
        for node in wiring.nodes:
            if self._plain[node] is None:
                for operand in node.operands:
                    plain = self._plain[operand]
                    if plain is not None:
                        uses.index_add_(0, plain % uses.numel(), torch.ones_like(plain))
        for product in wiring.products.values():
            uses.index_add_(0, product.element % uses.numel(), torch.ones_like(product.element))
        for output in wiring.outputs:
            if self._plain[output] is not None:
                uses.index_add_(0, self._plain[output] % uses.numel(), torch.ones_like(self._plain[output]))
        at_sites.index_add_(0, self.bias_of % uses.numel(), torch.ones_like(self.bias_of))
        self.complete = (uses == at_sites)[:-2] & ~wiring.pinned

    def _elements(self, node: Node) -> Tensor | None:
        """int64 [rows]: the element that a row is equal to; -1: none. None for a node that is no selection of elements."""
        if node.kind == "vector":
            vector = self.wiring.vectors[node]
            return torch.where(vector.scale == 1, vector.element, -1)
        parts = [self._plain[operand] for operand in node.operands]
        if not parts or any(part is None for part in parts):
            return None
        if node.kind == "rows":
            return torch.cat([part[first : first + count] for part, (first, count) in zip(parts, node.pieces)])
        if node.kind == "linear" and selects(node):
            return parts[0][node.matrix.pattern.col]
        return None

    def _sum_after(self, node: Node) -> tuple[Node, Node, Tensor] | None:
        """(sum, vector, int64 [rows of node], the row of the sum that each becomes): where a vector is added to the rows of a
        product, if there are only sums and changes of order in between; else None."""
        place = torch.arange(node.rows)
        while True:
            readers = self._readers.get(node, [])
            if len(readers) != 1:
                return None
            reader = readers[0]
            if reader.kind == "add" and reader.rows == node.rows:
                other = next((o for o in reader.operands if o is not node), None)
                if other is None:
                    return None
                found = self._vector_in(reader, other)
                if found is not None:
                    return *found, place
            else:
                moved = self._moved(reader, node)
                if moved is None:
                    return None
                place = moved[place]
            node = reader

    def _moved(self, reader: Node, node: Node) -> Tensor | None:
        """int64 [rows of node]: the row of the reader that each becomes; None where a row becomes no row, or several."""
        if reader.kind == "rows":
            of = torch.cat([
                torch.arange(first, first + count) if operand is node else torch.full((count,), -1)
                for operand, (first, count) in zip(reader.operands, reader.pieces)
            ])  # fmt: skip
        elif reader.kind == "linear" and selects(reader):
            of = reader.matrix.pattern.col
        else:
            return None
        own = of >= 0
        if not torch.equal(of[own].sort().values, torch.arange(node.rows)):
            return None
        place = torch.empty(node.rows, dtype=torch.int64)
        place[of[own]] = own.nonzero()[:, 0]
        return place

    def _vector_in(self, total: Node, node: Node) -> tuple[Node, Node] | None:
        if self._plain[node] is not None:
            return (total, node) if node.rows == total.rows else None
        if node.kind == "add" and len(self._readers.get(node, [])) == 1 and node.rows == total.rows:
            for operand in node.operands:
                found = self._vector_in(node, operand)
                if found is not None:
                    return found
        return None
