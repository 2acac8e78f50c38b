"""FT, structured pruning: whole neurons by the l1 norm of their weights (Sparse Flows, arXiv 2106.12718, "FT").

Three things the reference implementation does not respect are kept here: the derivative's own rows survive in every
vector field of a chain of flows, not in the last alone; time's input column is nobody's neuron and stays; and what a
pruned neuron still emits, act(bias), is folded into the next bias and not dropped.

Fields that are chains of Linear layers are pruned as chains (`_Plan`), all others by their graphs (`GraphPlan`); both
give the same masks for a chain.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Iterable, TypeVar

import torch
from torch import Tensor, nn

from ..devices import lasting
from ..field import UnsupportedFieldError
from ..masks import effective, live_mask, set_mask_
from ..warn import warn
from .arguments import check_keep, check_not_compiled
from .chain import Chain, NotAChain, broadcast_rows, check_row_parameters, reaches_derivative, row_parameters
from .fields import Fields
from .graph_neurons import NeuronGroup, Neurons
from .graph_plan import GraphPlan
from .matrices import check_matrices
from .size import dense_size, size
from .wiring import Wiring

_Module = TypeVar("_Module", bound=nn.Module)

_CLOSE_ENOUGH = 0.005  # relative to the size wanted
_ALL_SUBSETS = 8  # layers up to which every choice of those that get one neuron more is tried


@lasting
def prune_neurons_(
    module: _Module,
    keep: float,
    *,
    layers: Iterable[nn.Module | str] | None = None,
    of: str = "parameters",
    fold: str = "auto",
    like: Tensor | tuple[Tensor, ...] | None = None,
) -> _Module:
    """Prune whole hidden neurons in place until the size is `keep` of the dense total; returns `module`.

    The score of a neuron is the l1 norm of its row of weights. Every hidden layer keeps the same fraction phi of its
    live rows, max(1, round(phi * live)), strongest first, but for one neuron more in some of them: phi is the largest
    (by bisection) whose size fits the budget, and the layers that the next larger phi gives another neuron get it where
    that brings the size nearer. The size met is the largest of at most `keep` that is within 0.5 % of it; where none is
    that near (few neurons, each of many weights), it is the nearest that exists, which may be a little more than `keep`.
    A module that is no larger than `keep` already is left as it is. A pruned row is masked (`torch.nn.utils.prune`;
    masks nest over repeated calls). The rows of each vector field's last layer, and time's input columns, are never
    pruned.

    Where a field is no chain, its graph says what a neuron is (`graph_neurons`): rows of weights, filters, or columns of
    a bare parameter, that meet elementwise are one neuron, which is scored by the sum of their norms and removed with all
    of them (the sum of a residual block, a gate and what it gates, the gates of a recurrent cell). A "layer" is then all
    neurons that are written by the same matrices. What belongs to the state's or the derivative's rows, and what a norm,
    a softmax or a gate of one number couples with others, is left as it is; a warning says so of the latter, and
    `neuron_report` of all.

    keep, of, layers, like: as in `prune_weights_`.
    fold: what becomes of the pruned neuron's output, a function of time (and context) alone.
        "auto": where it is constant, W_next[:, j] * constant is added to the next layer's bias, and the outgoing column
            and the neuron's bias are masked: the function is exactly that of the network with masked rows. Where it
            varies with time (gates, time biases) or with the context, where the next layer has no bias, or one that
            would have to become two (shared by several places, as at the border of a convolution that pads with zeros),
            the column and the neuron's other parameters stay, and count.
        "none": only the rows are masked (`sparseflow_kernels.compile` folds the constants of chains when it reads them).
        "drop": the neuron goes with all its parameters, constant or not, as in the reference implementation; the output
            it still had is lost, and retraining has to make up for it.

    Every layer keeps one neuron at least, so a field that was pruned by neurons alone stays connected.

    Warns when even one neuron per layer exceeds the budget, when no path leads from a field's state to its derivative any
    more (where single weights were pruned before), and names what is coupled. Raises NoNeurons (an
    UnsupportedFieldError) for fields that cannot be read, or have no neurons that can be pruned, and names the place;
    ValueError for bad arguments, compiled fields and layers whose weight is computed (weight_norm, spectral_norm).
    Nothing is changed then.
    """
    check_keep(keep, of)
    if fold not in ("auto", "none", "drop"):
        raise ValueError(f"fold must be 'auto', 'none' or 'drop', got {fold!r}")
    check_not_compiled(module)
    fields = Fields(module, layers, like)
    check_matrices(fields.matrices, module)
    chains, graphs = _sorted(fields)
    plans: list[_Plan | GraphPlan] = []
    for chain in chains:
        check_row_parameters(chain)
        plans.append(_Plan.of(chain, fold))
    if graphs is not None:
        graphs.wiring.numbering.check_maskable(graphs.wiring.seen & ~graphs.wiring.pinned)
        plans.append(GraphPlan(graphs, fold))
        _tell(graphs, bool(chains))

    if of == "parameters":
        budget = math.floor(keep * dense_size(module))
        present = size(module)
    else:
        values = [matrix.value for matrix in fields.matrices.values()]
        budget = math.floor(keep * sum(value.numel() for value in values))
        present = sum(int(torch.count_nonzero(value)) for value in values)

    allocation = _Allocation(plans, present, of)
    counts = allocation.at(1.0)
    if allocation.size(counts) > budget:
        counts = allocation.nearest(budget)
        least = allocation.size(counts)
        if counts == allocation.at(0.0) and least > (1 + _CLOSE_ENOUGH) * budget:
            warn(
                f"prune_neurons_: keep={keep} of {of} allows {budget:,} non-zero entries, but one neuron per hidden "
                f"layer leaves {least:,}; use a larger keep, or fold='drop' where gated neurons keep their time "
                "parameters"
            )
    for plan, own in zip(plans, counts):
        plan.apply_(own)
    fields.refresh_masks_()
    weights = {path: matrix.value != 0 for path, matrix in fields.matrices.items()}
    reached = [reaches_derivative(chain, weights) for chain in chains]
    if graphs is not None:
        reached += graphs.wiring.reached(graphs.wiring.numbering.values() != 0)
    if not all(reached):
        warn(
            f"prune_neurons_: keep={keep} of {of} leaves {reached.count(False)} of {len(reached)} vector fields in which no "
            "path leads from the state to its derivative; use a larger keep"
        )
    return module


@lasting
def neuron_report(
    module: nn.Module,
    *,
    layers: Iterable[nn.Module | str] | None = None,
    like: Tensor | tuple[Tensor, ...] | None = None,
) -> list[NeuronGroup]:
    """The groups of neurons that `prune_neurons_` would rank together, and those that it leaves alone, with the reason;
    str() of one is a line. Arguments as there. Raises NoNeurons for a field that cannot be read."""
    check_not_compiled(module)
    fields = Fields(module, layers, like)
    return Neurons(_wiring(fields, fields.all), fields.matrices).groups()


class NoNeurons(UnsupportedFieldError):
    """The vector field has no neurons that can be pruned, or cannot be read."""


def _sorted(fields: Fields) -> tuple[list[Chain], Neurons | None]:
    """The fields that are chains, and the neurons of the others."""
    chains, others = [], []
    for field in fields.all:
        try:
            chains.append(fields.chain(field))
        except NotAChain:
            others.append(field)
    return chains, Neurons(_wiring(fields, others), fields.matrices) if others else None


def _wiring(fields: Fields, those: list[nn.Module]) -> Wiring:
    for field in those:
        try:
            fields.graphs.read(field)
        except UnsupportedFieldError as error:
            raise NoNeurons(
                f"prune_neurons_: the neurons of {type(field).__name__} cannot be found: {error} (prune_weights_ prunes its "
                "weights one by one)"
            ) from error
    return fields.graphs.wiring(those)


def _tell(neurons: Neurons, some: bool) -> None:
    """What is not pruned by neurons: an error where nothing is or was, else a warning for what is no row of the state's."""
    groups, slices = neurons.groups(), Counter(neurons.paths)
    if not some and not any(slices[path] > 1 for group in groups if not group.reason for path in group.weights):
        raise NoNeurons("prune_neurons_: there are no neurons to prune: " + "; ".join(map(str, groups)))
    inside = [str(group) for group in groups if group.coupled]
    if inside:
        warn("prune_neurons_: " + "; ".join(inside))


Counts = tuple[tuple[int, ...], ...]  # neurons kept, by vector field and hidden layer


class _Allocation:
    """How many neurons each hidden layer of each vector field keeps, and what size that comes to."""

    def __init__(self, plans: "list[_Plan | GraphPlan]", present: int, of: str) -> None:
        self.plans, self.present, self.of = plans, present, of
        self._removed: dict[tuple[int, tuple[int, ...]], int] = {}

    def at(self, phi: float) -> Counts:
        return tuple(plan.counts_at(phi) for plan in self.plans)

    def size(self, counts: Counts) -> int:
        for key in enumerate(counts):
            if key not in self._removed:
                self._removed[key] = self.plans[key[0]].removed_at(key[1], self.of)
        return self.present - sum(self._removed[key] for key in enumerate(counts))

    def nearest(self, budget: int) -> Counts:
        """The counts that `prune_neurons_` describes."""
        low, high = 0.0, 1.0  # the size does not fall as phi grows
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.size(self.at(middle)) <= budget else (low, middle)
        base, above = self.at(low), self.at(high)
        if self.size(base) > budget:
            return base
        steps = [(f, l) for f, own in enumerate(base) for l, n in enumerate(own) if above[f][l] > n]

        def rank(counts: Counts) -> tuple:
            off = self.size(counts) - budget
            near = abs(off) <= _CLOSE_ENOUGH * budget
            return (not near, near and off > 0, abs(off), off)

        if len(steps) <= _ALL_SUBSETS:
            subsets = itertools.chain.from_iterable(itertools.combinations(steps, n) for n in range(len(steps) + 1))
            return min((_raised(base, subset) for subset in subsets), key=rank)
        tried, taken = [base], base
        for step in steps:  # as many as fit, front to back
            more = _raised(taken, [step])
            tried.append(more)
            if self.size(more) <= budget:
                taken = more
        return min(tried, key=rank)


def _raised(counts: Counts, steps: Iterable[tuple[int, int]]) -> Counts:
    """One neuron more in every (vector field, hidden layer) of `steps`."""
    more = [list(own) for own in counts]
    for field, layer in steps:
        more[field][layer] += 1
    return tuple(tuple(own) for own in more)


@dataclass(eq=False)
class _Plan:
    """One vector field's hidden neurons, ranked; `folds[l]` bool [out]: without inputs, the neuron goes entirely."""

    chain: Chain
    drop: bool
    live: list[Tensor]  # bool weight masks
    ranked: list[Tensor]  # int64, live rows of each hidden layer, strongest first
    folds: list[Tensor]

    @staticmethod
    def of(chain: Chain, fold: str) -> "_Plan":
        live, ranked, folds = [], [], []
        for index, layer in enumerate(chain.layers):
            weight = layer.weight.cpu()
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(
                    f"{layer.path}.weight has non-finite entries; pruning by magnitude has no meaning there"
                )
            live.append(weight != 0)
            if index + 1 == len(chain.layers):
                break
            norm = weight.double().abs().sum(1)
            order = torch.sort(norm, descending=True, stable=True).indices
            ranked.append(order[norm[order] > 0])
            folds.append(_foldable(chain, index, fold))
        return _Plan(chain, fold == "drop", live, ranked, folds)

    def counts_at(self, phi: float) -> tuple[int, ...]:
        """Neurons kept per hidden layer, the same fraction of the live ones in each."""
        return tuple(max(1, math.floor(phi * rows.numel() + 0.5)) for rows in self.ranked)

    def rows_kept(self, counts: tuple[int, ...]) -> list[Tensor]:
        """bool [out] per hidden layer."""
        kept = []
        for rows, live, count in zip(self.ranked, self.live, counts):
            keep = torch.zeros(live.shape[0], dtype=torch.bool)
            keep[rows[:count]] = True
            kept.append(keep)
        return kept

    def masks(self, counts: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """(bool weight masks of all layers, bool [out] of hidden neurons that go entirely). A neuron that loses its
        last input because the neurons before it went is treated as a pruned one."""
        masks, gone = [], []
        columns_gone = None
        kept = self.rows_kept(counts) + [torch.ones(self.live[-1].shape[0], dtype=torch.bool)]
        for index, (layer, live, rows) in enumerate(zip(self.chain.layers, self.live, kept)):
            mask = live & rows.unsqueeze(1)
            if columns_gone is not None:
                mask[:, layer.columns[columns_gone]] = False
            masks.append(mask)
            if index + 1 < len(self.live):
                columns_gone = ~mask.any(1) & self.folds[index]
                gone.append(columns_gone)
        return masks, gone

    def removed_at(self, counts: tuple[int, ...], of: str) -> int:
        """Non-zero entries that pruning to these counts takes away (what folding adds to a zero bias is not foreseen)."""
        masks, gone = self.masks(counts)
        removed = sum(int(live.sum()) - int(mask.sum()) for live, mask in zip(self.live, masks))
        if of == "parameters":
            for layer, rows in zip(self.chain.layers, gone):
                removed += sum(
                    int((live_mask(owner, name) & broadcast_rows(rows, effective(owner, name))).sum())
                    for owner, name in row_parameters(layer)
                )
        return removed

    @torch.no_grad()
    def apply_(self, counts: tuple[int, ...]) -> None:
        layers = self.chain.layers
        masks, gone = self.masks(counts)
        for layer, rows in zip(layers, self.rows_kept(counts)):
            set_mask_(layer.module, "weight", broadcast_rows(rows, layer.weight))
        # front to back: folding changes the next bias, and with it what the next layer's pruned neurons emit
        for index, rows in enumerate(gone):
            layer, after = layers[index], layers[index + 1]
            if not self.drop and bool(rows.any()) and after.module.bias is not None:
                values, _ = self.chain.without_inputs(index)
                columns = after.weight[:, after.columns[rows].to(after.weight.device)].double()
                shift = columns @ values[rows.to(values.device)].double()
                bias = after.module._parameters.get("bias_orig", after.module._parameters.get("bias"))
                bias.add_(shift.to(bias))
            for owner, name in row_parameters(layer):
                set_mask_(owner, name, broadcast_rows(~rows, effective(owner, name)))
            set_mask_(after.module, "weight", masks[index + 1].to(after.weight.device))


def _foldable(chain: Chain, index: int, fold: str) -> Tensor:
    """bool [out]: neurons of a hidden layer that go entirely once they have no inputs."""
    layer, after = chain.layers[index], chain.layers[index + 1]
    out = layer.module.out_features
    if fold == "drop":
        return torch.ones(out, dtype=torch.bool)
    if fold == "none":
        return torch.zeros(out, dtype=torch.bool)
    values, constant = chain.without_inputs(index)
    if after.module.bias is None:  # nowhere to fold to
        constant = torch.zeros_like(constant)
    return constant.cpu()
