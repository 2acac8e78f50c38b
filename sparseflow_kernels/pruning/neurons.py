"""FT, structured pruning: whole neurons by the l1 norm of their weights (Sparse Flows, arXiv 2106.12718, "FT").

Three things the reference implementation does not respect are kept here: the derivative's own rows survive in every
vector field of a chain of flows, not in the last alone; time's input column is nobody's neuron and stays; and what a
pruned neuron still emits, act(bias), is folded into the next bias and not dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Iterable, TypeVar

import torch
from torch import Tensor, nn

from ..devices import factories_on_cpu
from ..warn import warn
from .chain import Chain, broadcast_rows, row_parameters, trace_chain, vector_fields
from .masks import check_keep, effective, live_mask, prunable_layers, set_mask_
from .size import dense_size, size

_Module = TypeVar("_Module", bound=nn.Module)


@factories_on_cpu
def prune_neurons_(
    module: _Module,
    keep: float,
    *,
    layers: Iterable[nn.Module | str] | None = None,
    of: str = "parameters",
    fold: str = "auto",
) -> _Module:
    """Prune whole hidden neurons in place until the size is at most `keep` of the dense total; returns `module`.

    The score of a neuron is the l1 norm of its row of weights. Every hidden layer keeps the same fraction phi of its
    live rows, max(1, round(phi * live)), strongest first; phi is the largest (by bisection) whose size fits the budget.
    A pruned row is masked (`torch.nn.utils.prune`; masks nest over repeated calls). The rows of each vector field's
    last layer, and time's input columns, are never pruned.

    keep, of: as in `prune_weights_`.
    fold: what becomes of the pruned neuron's output, a function of time alone.
        "auto": where it is constant, W_next[:, j] * constant is added to the next layer's bias, and the outgoing column
            and the neuron's bias are masked: the function is exactly that of the network with masked rows. Where it
            varies with time (gates, time biases) the column and the time parameters stay, and count.
        "none": only the rows are masked (`sparseflow_kernels.compile` folds the constants when it reads the field).
        "drop": the neuron goes with all its parameters, constant or not, as in the reference implementation; the output
            it still had is lost, and retraining has to make up for it.

    Warns when even one neuron per layer exceeds the budget. Raises NotAChain (an UnsupportedFieldError) for fields
    that are not chains of Linear layers, ValueError for bad arguments.
    """
    check_keep(keep, of)
    if fold not in ("auto", "none", "drop"):
        raise ValueError(f"fold must be 'auto', 'none' or 'drop', got {fold!r}")
    found = prunable_layers(module, layers)
    plans = []
    for vector_field in vector_fields(module):
        inside = set(map(id, vector_field.modules()))
        chain = trace_chain(vector_field, {p: layer for p, layer in found.items() if id(layer) in inside})
        plans.append(_Plan.of(chain, fold))

    if of == "parameters":
        budget = math.floor(keep * dense_size(module))
        present = size(module)
    else:
        budget = math.floor(keep * sum(layer.weight.numel() for layer in found.values()))
        present = sum(int(live_mask(layer).sum()) for layer in found.values())

    def size_at(phi: float) -> int:
        return present - sum(plan.removed_at(phi, of) for plan in plans)

    if size_at(1.0) <= budget:
        phi = 1.0
    else:
        low, high = 0.0, 1.0  # the size does not fall as phi grows
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if size_at(middle) <= budget else (low, middle)
        phi = low
        if size_at(phi) > budget:
            warn(
                f"prune_neurons_: keep={keep} of {of} allows {budget:,} non-zero entries, but one neuron per hidden "
                f"layer leaves {size_at(phi):,}; use a larger keep, or fold='drop' where gated neurons keep their time "
                "parameters",
            )
    for plan in plans:
        plan.apply_(phi)
    return module


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

    def rows_kept(self, phi: float) -> list[Tensor]:
        """bool [out] per hidden layer."""
        kept = []
        for rows, live in zip(self.ranked, self.live):
            keep = torch.zeros(live.shape[0], dtype=torch.bool)
            keep[rows[: max(1, math.floor(phi * rows.numel() + 0.5))]] = True
            kept.append(keep)
        return kept

    def masks(self, phi: float) -> tuple[list[Tensor], list[Tensor]]:
        """(bool weight masks of all layers, bool [out] of hidden neurons that go entirely). A neuron that loses its
        last input because the neurons before it went is treated as a pruned one."""
        masks, gone = [], []
        columns_gone = None
        kept = self.rows_kept(phi) + [torch.ones(self.live[-1].shape[0], dtype=torch.bool)]
        for index, (layer, live, rows) in enumerate(zip(self.chain.layers, self.live, kept)):
            mask = live & rows.unsqueeze(1)
            if columns_gone is not None:
                mask[:, layer.columns[columns_gone]] = False
            masks.append(mask)
            if index + 1 < len(self.live):
                columns_gone = ~mask.any(1) & self.folds[index]
                gone.append(columns_gone)
        return masks, gone

    def removed_at(self, phi: float, of: str) -> int:
        """Non-zero entries that pruning to phi takes away (what folding adds to a zero bias is not foreseen)."""
        masks, gone = self.masks(phi)
        removed = sum(int(live.sum()) - int(mask.sum()) for live, mask in zip(self.live, masks))
        if of == "parameters":
            for layer, rows in zip(self.chain.layers, gone):
                removed += sum(
                    int((live_mask(owner, name) & broadcast_rows(rows, effective(owner, name))).sum())
                    for owner, name in row_parameters(layer)
                )
        return removed

    @torch.no_grad()
    def apply_(self, phi: float) -> None:
        layers = self.chain.layers
        masks, gone = self.masks(phi)
        for layer, rows in zip(layers, self.rows_kept(phi)):
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
