"""WT, unstructured pruning: one global magnitude ranking (Sparse Flows, arXiv 2106.12718, "WT")."""

from __future__ import annotations

import math
from typing import Iterable, TypeVar

import torch
from torch import Tensor, nn

from ..devices import lasting
from ..field import UnsupportedFieldError
from ..masks import count, effective, set_mask_
from ..warn import warn
from .arguments import check_keep, check_not_compiled
from .chain import (
    Chain,
    NotAChain,
    broadcast_rows,
    check_row_parameters,
    live_parameters,
    neurons_read,
    reaches_derivative,
    row_parameters,
)
from .fields import Fields
from .floor import GraphFloor, chain_floor, chain_holds
from .graph_neurons import Neurons
from .matrices import WeightMatrix, check_matrices
from .size import dense_size, size
from .wiring import Wiring

_Module = TypeVar("_Module", bound=nn.Module)


@lasting
def prune_weights_(
    module: _Module,
    keep: float,
    *,
    layers: Iterable[nn.Module | str] | None = None,
    of: str = "parameters",
    remove_dead: bool = True,
    min_neurons: int = 0,
    like: Tensor | tuple[Tensor, ...] | None = None,
) -> _Module:
    """Prune single weights in place, by global magnitude, to the keep ratio `keep`; returns `module`.

    All |w| of the `weight_matrices` (of linear layers, convolutions, recurrent cells, attention, and parameters used as
    matrices; each once, however often it is used) are ranked together and the largest stay; equal magnitudes are settled
    by position. Biases, norms and factors of single rows are not ranked. The masks are `torch.nn.utils.prune`'s, so training goes on through them, and they nest: an
    entry once pruned never comes back. Calling again with a larger `keep` changes nothing.

    keep: in (0, 1], always relative to the dense total.
    of: "parameters" (the paper's size: keep * all parameters is the number of non-zero entries left, and biases and
        time conditioning count), or "weights" (keep * prunable weights stay, whatever else there is). Of the POWER
        flow's parameters 8.6 % are not prunable: keep 0.1 of parameters leaves far fewer than 0.1 of its weights.
    remove_dead: also mask every parameter (incoming weights, bias, gate, time bias) of neurons that nobody reads any
        more. This does not change the function, and the size freed is spent on weights that live: the number of
        top-ranked weights is searched so that the size after removal fits the budget, and what is still left goes to
        the strongest weights between neurons that live. So the size is met exactly, as long as enough neurons live.
        Needs fields that `sparseflow_kernels.compile` can read; for others a warning is given and dead parameters stay,
        and count.
    min_neurons: where the ranking would leave a layer with fewer neurons (channels of a convolution) connected from the
        state to the derivative than this (a global ranking can empty a layer of a deep thin field), so many stay in every
        layer, through strong weights, against the ranking and if need be beyond the budget. In a graph a layer is a
        group of `neuron_report`.
    like: an example of the state, for fields that `sparseflow_kernels.compile` needs one for: [..., dim], or a tuple.

    Warns when the budget cuts every path from a field's state to its derivative, or when `min_neurons` needs more than
    it. Raises ValueError for bad arguments, compiled fields and layers whose weight is computed (weight_norm,
    spectral_norm), NotAChain for `min_neurons` on a field that cannot be read. Nothing is changed then.
    """
    check_keep(keep, of)
    if min_neurons < 0 or min_neurons != int(min_neurons):
        raise ValueError(f"min_neurons must be a whole number >= 0, got {min_neurons!r}")
    check_not_compiled(module)
    fields = Fields(module, layers, like)
    found = fields.matrices
    check_matrices(found, module)
    weights = {path: matrix.value for path, matrix in found.items()}
    chains, graphs = _wired(fields, remove_dead, min_neurons)

    live = count(weights.values())
    elsewhere = size(module) - live
    if of == "parameters":
        budget = math.floor(keep * dense_size(module))
    else:
        budget = math.floor(keep * sum(weight.numel() for weight in weights.values()))
    outside = elsewhere if of == "parameters" else 0

    ranking = _Ranking(weights, {})
    searched = chains if remove_dead else []
    elements = _Elements(found, graphs) if graphs.nodes else None
    floor = GraphFloor(Neurons(graphs, found), min_neurons) if elements is not None and min_neurons else None

    def outcome(n: int) -> tuple[int, dict[str, Tensor], list[tuple[Chain, list[Tensor]]]]:
        """Size in the budget's terms when the n top-ranked weights stay and dead neurons go."""
        masks = ranking.top(n)
        total, removed = outside, []
        if elements is not None and remove_dead:
            dead = elements.remove_dead(masks)
            if of == "parameters":
                total -= elements.others(dead)
        for chain in searched:
            read = neurons_read(chain, masks)
            removed.append((chain, read))
            for layer, rows in zip(chain.layers, read):
                masks[layer.matrix] &= broadcast_rows(rows, masks[layer.matrix])
                if of == "parameters":
                    total -= live_parameters(layer, ~rows)
        return total + count(masks.values()), masks, removed

    def best(least: int) -> tuple[int, dict[str, Tensor], list[tuple[Chain, list[Tensor]]]]:
        """The outcome that fits the budget, of at least so many top-ranked weights."""
        low, high = least, live  # invariant: `low` fits the budget (or is the least there is)
        if outcome(high)[0] <= budget:
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if outcome(middle)[0] <= budget else (low, middle)
        total, masks, removed = outcome(low)
        if total < budget and low < live:  # the next weight would bring back a neuron, and more than fits with it
            eligible = _between_live(removed, weights)
            if elements is not None and remove_dead:
                elements.limit_to_live(eligible, masks)
            added = ranking.next(low, budget - total, eligible)
            masks = {path: mask | added[path] for path, mask in masks.items()}
        return total, masks, removed

    total, masks, removed = best(0)
    held = all(chain_holds(chain, masks, min_neurons) for chain in chains if min_neurons)
    if not held or (floor is not None and not floor.holds(elements.alive(masks))):
        protected = chain_floor(chains, weights, min_neurons)
        if floor is not None:
            elements.add_(protected, floor.elements(graphs.numbering.values()))
        ranking = _Ranking(weights, protected)
        total, masks, removed = best(count(protected.values()))
    if total > budget:
        warn(
            f"prune_weights_: keep={keep} of {of} allows {budget:,} non-zero entries, but {total:,} remain "
            f"({total - count(masks.values()):,} outside the prunable weights, {count(masks.values()):,} weights held "
            "by min_neurons); use a larger keep, of='weights', or fewer min_neurons",
        )
    reached = [reaches_derivative(chain, masks) for chain in chains]
    reached += [] if elements is None else graphs.reached(elements.alive(masks))
    cut = reached.count(False)
    if count(masks.values()) == 0 or cut:
        which = f"{cut} of {len(reached)} vector fields" if cut else "no weight at all: a field"
        warn(
            f"prune_weights_: keep={keep} of {of} leaves {which} in which no path leads from the state to its "
            "derivative; use a larger keep, of='weights', or min_neurons",
        )

    for chain, _ in removed:
        check_row_parameters(chain)
    dead = elements.dead_others(masks) if elements is not None and remove_dead else None
    if dead is not None:
        graphs.numbering.check_maskable(dead)  # before anything is changed
    for path, matrix in found.items():
        matrix.mask_(masks[path])
    for chain, read in removed:
        for layer, rows in zip(chain.layers, read):
            for owner, name in row_parameters(layer):
                set_mask_(owner, name, broadcast_rows(rows, effective(owner, name)))
    if dead is not None:
        graphs.numbering.mask_(dead)
    fields.refresh_masks_()
    return module


class _Ranking:
    """Weights of all layers, strongest first; `top(n)` are nested in n."""

    def __init__(self, weights: dict[str, Tensor], protected: dict[str, Tensor]) -> None:
        self.shapes = {path: weight.shape for path, weight in weights.items()}
        self.device = next(iter(weights.values())).device
        score = torch.cat([weight.abs().reshape(-1).to(self.device) for weight in weights.values()])
        for path, mask in protected.items():
            weights_before = sum(self.shapes[p].numel() for p in list(self.shapes)[: list(self.shapes).index(path)])
            score[weights_before : weights_before + mask.numel()][mask.reshape(-1).to(self.device)] = math.inf
        self.order = torch.sort(score, descending=True, stable=True).indices

    def top(self, n: int) -> dict[str, Tensor]:
        """bool masks with the n strongest weights (n at most the number of non-zero ones)."""
        flat = torch.zeros(self.order.numel(), dtype=torch.bool, device=self.device)
        flat[self.order[:n]] = True
        return self._unflatten(flat)

    def next(self, start: int, n: int, eligible: dict[str, Tensor]) -> dict[str, Tensor]:
        """bool masks with the n strongest eligible weights after the first `start` of the ranking."""
        allowed = torch.cat([mask.reshape(-1).to(self.device) for mask in eligible.values()])
        rest = self.order[start:]
        flat = torch.zeros_like(allowed)
        flat[rest[allowed[rest]][:n]] = True
        return self._unflatten(flat)

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {path: part.view(shape).clone() for (path, shape), part in zip(self.shapes.items(), parts)}


def _wired(fields: Fields, remove_dead: bool, min_neurons: int) -> tuple[list[Chain], Wiring]:
    """The fields that are chains, and the wiring of those that are read as graphs."""
    chains: list[Chain] = []
    graphs: list[nn.Module] = []
    for vector_field in fields.all if remove_dead or min_neurons else []:
        try:
            chains.append(fields.chain(vector_field))
            continue
        except NotAChain:
            pass
        try:
            fields.graphs.read(vector_field)
            graphs.append(vector_field)
        except UnsupportedFieldError as error:
            if min_neurons:
                raise NotAChain(f"min_neurons needs fields that can be read: {error}") from error
            warn(f"prune_weights_: dead parameters are left and count towards the size: {error}")
    return chains, fields.graphs.wiring(graphs)


class _Elements:
    """Masks of matrices as elements of all parameters, and what is dead among these (`Wiring`)."""

    def __init__(self, matrices: dict[str, WeightMatrix], graphs: Wiring) -> None:
        self.graphs = graphs
        self.items = {path: graphs.numbering.item_of(*matrix.owners[0]) for path, matrix in matrices.items()}
        self.live = graphs.numbering.values() != 0
        self.ranked = torch.zeros_like(self.live)
        for item in self.items.values():
            self.ranked[item.elements] = True

    def alive(self, masks: dict[str, Tensor]) -> Tensor:
        """bool [elements]. A matrix that is not ranked stays as it is."""
        alive = torch.ones_like(self.live)
        for path, item in self.items.items():
            alive[item.elements] = masks[path].reshape(-1).cpu()
        return alive

    def remove_dead(self, masks: dict[str, Tensor]) -> Tensor:
        """Take what is dead out of the masks; bool [elements], all that is."""
        dead = self.graphs.dead(self.alive(masks))
        for path, item in self.items.items():
            masks[path] &= ~dead[item.elements].view(masks[path].shape).to(masks[path].device)
        return dead

    def others(self, dead: Tensor) -> int:
        """How many of these are not zero, and not ranked."""
        return int((dead & self.live & ~self.ranked).sum())

    def dead_others(self, masks: dict[str, Tensor]) -> Tensor:
        return self.graphs.dead(self.alive(masks)) & ~self.ranked

    def add_(self, masks: dict[str, Tensor], elements: Tensor) -> None:
        """Elements, bool [elements], to masks of the matrices."""
        for path, item in self.items.items():
            masks[path] |= elements[item.elements].view(masks[path].shape).to(masks[path].device)

    def limit_to_live(self, eligible: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
        """Take out of eligible whose return would bring something dead back, or change nothing."""
        costly = self.graphs.returns_alone(self.alive(masks))
        for path, item in self.items.items():
            eligible[path] &= ~costly[item.elements].view(eligible[path].shape).to(eligible[path].device)


def _between_live(removed: list[tuple[Chain, list[Tensor]]], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """bool masks of the non-zero weights whose return costs one entry each: none brings a dead neuron back."""
    eligible = {path: (weight != 0).cpu() for path, weight in weights.items()}
    for chain, read in removed:
        for index, (layer, rows) in enumerate(zip(chain.layers, read)):
            mask = eligible[layer.matrix] & rows.unsqueeze(1)
            if index > 0:
                mask[:, layer.columns[~read[index - 1]]] = False
            eligible[layer.matrix] = mask
    return eligible
