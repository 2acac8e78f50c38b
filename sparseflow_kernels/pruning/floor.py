"""The floor under a global ranking: weights that keep so many neurons of every layer on a path from the state to its
derivative. Without it a ranking over all layers may empty one of a deep thin field, which then moves nothing.

A path is as strong as the product of its weights' magnitudes. In a chain the strongest neurons are chosen layer by layer; in a
graph (convolutions, residual sums, gates) the strongest paths through neurons are found by two walks over all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..field.graph import STATE, Node, order
from .chain import Chain, connected_neurons, neurons_read, reaches_derivative
from .graph_neurons import Neurons
from .wiring import Wiring


def chain_holds(chain: Chain, masks: dict[str, Tensor], n: int) -> bool:
    """Whether n neurons of every hidden layer are connected, given bool weight masks by path."""
    return reaches_derivative(chain, masks) and all(int(one.sum()) >= n for one in connected_neurons(chain, masks))


def chain_floor(chains: list[Chain], weights: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """bool masks by path: weights that keep n neurons per hidden layer connected, strongest first; of those that are so
    now."""
    alive = {path: (weight != 0).cpu() for path, weight in weights.items()}
    protected = {path: torch.zeros_like(weight, dtype=torch.bool) for path, weight in weights.items()}
    for chain in chains:
        before = torch.arange(chain.dim)
        read = neurons_read(chain, alive)
        for index, layer in enumerate(chain.layers):
            weight = weights[layer.matrix].abs().cpu()[:, layer.columns]
            strength = torch.where(read[index], weight[:, before].amax(1), -1.0)
            if index + 1 < len(chain.layers):
                chosen = torch.sort(strength, descending=True, stable=True).indices[:n]
            else:
                chosen = torch.arange(weight.shape[0])
            block = weight[chosen][:, before]
            mask = torch.zeros_like(weight, dtype=torch.bool)
            if index + 1 < len(chain.layers) or index == 0:
                mask[chosen, before[block.argmax(1)]] = True
            if index > 0:  # and every neuron chosen before is read
                mask[chosen[block.argmax(0)], before] = True
            full = torch.zeros_like(protected[layer.matrix], device="cpu")
            full[:, layer.columns] = mask & (weight > 0)
            protected[layer.matrix] |= full.to(protected[layer.matrix].device)
            before = chosen
    return protected


class GraphFloor:
    """The same for fields that are graphs. A layer is what `Neurons.by_group` ranks together or leaves alone together; of those
    that the derivative's own rows belong to one neuron is enough. A path through a product of two neurons (attention) is one
    through either; whether the other factor is zero by then is not looked at."""

    def __init__(self, neurons: Neurons, n: int) -> None:
        self.neurons, self.wiring, self.n = neurons, neurons.wiring, n
        self.layers = list(neurons.by_group().values())
        self.fields = [_Part(self.wiring, output) for output in self.wiring.outputs]
        now = self._connected(self.wiring.numbering.values() != 0)
        self.wanted = [
            [min(1 if last else n, int(on[members].sum())) for members, last in self._layers(part)]
            for part, on in zip(self.fields, now)
        ]  # what only time or a context reaches is not connected to begin with

    def holds(self, alive: Tensor) -> bool:
        """alive: bool [elements], those that are not held at zero."""
        return all(
            int(on[members].sum()) >= least
            for part, on, wanted in zip(self.fields, self._connected(alive), self.wanted)
            for (members, _), least in zip(self._layers(part), wanted)
        )

    def elements(self, values: Tensor) -> Tensor:
        """bool [elements]: those on the strongest paths through the n neurons of every layer that have the strongest ones.
        values: float64 [elements], masks applied."""
        found = torch.zeros(values.numel(), dtype=torch.bool)
        with torch.enable_grad():
            for part in self.fields:
                logs = torch.cat([values.abs().log(), values.new_zeros(2)]).requires_grad_()
                through = part.from_state(logs) + part.to_derivative(logs)
                best = torch.full((self.neurons.count + 1,), -torch.inf, dtype=torch.float64)
                best = best.scatter_reduce(0, self.neurons.row_neuron[part.rows] % best.numel(), through, "amax")
                chosen = []
                for members, last in self._layers(part):
                    score = best[members]
                    ranked = score[torch.sort(score.detach(), descending=True, stable=True).indices]
                    ranked = ranked[: 1 if last else self.n]
                    chosen.append(ranked[ranked.detach().isfinite()])
                total = torch.cat(chosen).sum() if chosen else best.new_zeros(())
                if total.requires_grad:  # a maximum's gradient is where it is taken: the path
                    found |= torch.autograd.grad(total, logs)[0][:-2] != 0
        return found

    def _connected(self, alive: Tensor) -> list[Tensor]:
        """For every field, bool [neurons + 1]: those that the state reaches and the derivative depends on."""
        on = self.wiring.read(alive)[0] & self.wiring.fed(alive)
        return [self._marked(self.neurons.row_neuron[part.rows][on[part.rows]]) for part in self.fields]

    def _marked(self, numbers: Tensor) -> Tensor:
        found = torch.zeros(self.neurons.count + 1, dtype=torch.bool)
        found[numbers] = True
        found[-1] = False  # -1: nobody's rows
        return found

    def _layers(self, part: "_Part") -> list[tuple[Tensor, bool]]:
        """(neurons of a layer that this field has, whether the derivative's own rows are among theirs)."""
        here, own = (self._marked(self.neurons.row_neuron[rows]) for rows in (part.rows, part.output))
        found = [members[here[members]] for members in self.layers]
        return [(members, bool(own[members].any())) for members in found if members.numel()]


class _Part:
    """One field of a wiring: its nodes in order, and its rows. Walks return the logarithm of the strength of the strongest path
    for each of its rows, float64, -inf where there is none. logs: float64 [elements + 2], of the magnitudes of the elements."""

    def __init__(self, wiring: Wiring, output: Node) -> None:
        self.wiring, self.nodes = wiring, order([output])
        first, last = self.nodes[0], self.nodes[-1]
        self.rows = slice(wiring.start[first], wiring.start[last] + last.rows)
        self.output = slice(wiring.start[output], wiring.start[output] + output.rows)

    def from_state(self, logs: Tensor) -> Tensor:
        strength: dict[Node, Tensor] = {}
        for node in self.nodes:
            none = torch.full((node.rows,), -torch.inf, dtype=torch.float64)
            operands = [strength[operand] for operand in node.operands]
            if node.kind == "linear":
                product = self.wiring.products[node]
                entries = operands[0][product.of] + self._weights(node, logs)
                strength[node] = none.scatter_reduce(0, product.into, entries, "amax")
            elif node.kind == "rows":
                parts = zip(operands, node.pieces)
                strength[node] = torch.cat([one[first : first + count] for one, (first, count) in parts])
            elif node.kind == "input" and node.binding & STATE:
                strength[node] = torch.zeros_like(none)
            else:
                strength[node] = none
                for operand in operands:
                    strength[node] = torch.maximum(strength[node], operand.expand(node.rows))
        return torch.cat([strength[node] for node in self.nodes])

    def to_derivative(self, logs: Tensor) -> Tensor:
        strength = {node: torch.full((node.rows,), -torch.inf, dtype=torch.float64) for node in self.nodes}
        output = self.nodes[-1]
        strength[output] = torch.zeros_like(strength[output])
        for node in reversed(self.nodes):
            own, at = strength[node], 0
            for number, operand in enumerate(node.operands):
                there = strength[operand]
                if node.kind == "linear":
                    product = self.wiring.products[node]
                    entries = own[product.into] + self._weights(node, logs)
                    there = there.scatter_reduce(0, product.of, entries, "amax")
                elif node.kind == "rows":
                    first, count = node.pieces[number]
                    index = torch.arange(first, first + count)
                    there = there.scatter_reduce(0, index, own[at : at + count], "amax")
                    at += count
                else:
                    there = torch.maximum(there, own if operand.rows == node.rows else own.amax().expand(operand.rows))
                strength[operand] = there
        return torch.cat([strength[node] for node in self.nodes])

    def _weights(self, node: Node, logs: Tensor) -> Tensor:
        product = self.wiring.products[node]
        scale = torch.where(product.element >= 0, product.scale, product.fixed)
        return logs[product.element] + scale.abs().log()
