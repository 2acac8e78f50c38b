"""Size as the Sparse Flows paper counts it (arXiv 2106.12718): non-zero entries over ALL parameters, biases, time
conditioning and trained end times included; a keep ratio is relative to the dense total of the same module."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..masks import effective_parameters
from ..tables import html_table
from .matrices import weight_matrices


def size(module: nn.Module) -> int:
    """Number of non-zero entries over all parameters, seen through pruning masks."""
    return sum(int(torch.count_nonzero(tensor)) for _, tensor in effective_parameters(module))


def dense_size(module: nn.Module) -> int:
    """Number of entries over all parameters, pruned or not."""
    return sum(tensor.numel() for _, tensor in effective_parameters(module))


def keep_ratio(module: nn.Module) -> float:
    """size / dense_size: the paper's keep ratio k. Its prune ratio is 1 - k."""
    return size(module) / dense_size(module)


@dataclass(frozen=True)
class ParameterSize:
    """One parameter: its path, whether its entries are ranked by pruning, and its non-zero and all entries."""

    path: str
    prunable: bool
    live: int
    total: int


@dataclass(frozen=True)
class SparsityReport:
    """Sizes parameter by parameter; `str()` is a table."""

    parameters: tuple[ParameterSize, ...]

    @property
    def live(self) -> int:
        return sum(row.live for row in self.parameters)

    @property
    def total(self) -> int:
        return sum(row.total for row in self.parameters)

    @property
    def live_weights(self) -> int:
        return sum(row.live for row in self.parameters if row.prunable)

    @property
    def total_weights(self) -> int:
        return sum(row.total for row in self.parameters if row.prunable)

    def _repr_html_(self) -> str:
        rows = [("parameter", "prunable", "live", "of", "share")]
        for row in (*self.parameters, ParameterSize("all", False, self.live, self.total)):
            share = f"{row.live / max(1, row.total):.1%}"
            rows.append((row.path, "yes" if row.prunable else "", f"{row.live:,}", f"{row.total:,}", share))
        return html_table(rows)

    def __str__(self) -> str:
        width = max(len(row.path) for row in self.parameters) + 2
        lines = [
            f"{row.path + (' *' if row.prunable else ''):<{width}} {row.live:>10,} of {row.total:>10,}"
            f"  {row.live / max(1, row.total):6.1%}"
            for row in self.parameters
        ]
        weights = self.live_weights / max(1, self.total_weights)
        lines.append(f"{'all':<{width}} {self.live:>10,} of {self.total:>10,}  {self.live / max(1, self.total):6.1%}")
        lines.append(f"* prunable weights: {self.live_weights:,} of {self.total_weights:,} ({weights:.1%})")
        return "\n".join(lines)


def sparsity_report(module: nn.Module) -> SparsityReport:
    """Live and total entries of every parameter."""
    try:
        weights = set(weight_matrices(module))
    except ValueError:  # nothing prunable: a report is still an answer
        weights = set()
    return SparsityReport(
        tuple(
            ParameterSize(path, path in weights, int(torch.count_nonzero(tensor)), tensor.numel())
            for path, tensor in effective_parameters(module)
        )
    )


def _geometric(first: float, last: float, n: int) -> tuple[float, ...]:
    return tuple(first * math.exp(math.log(last / first) * i / (n - 1)) for i in range(n))


def _linear(first: float, last: float, n: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * i / (n - 1) for i in range(n))


_TO_TEN_PERCENT = _geometric(0.70, 0.10, 8)
_TO_FIVE_PERCENT = _geometric(0.80, 0.05, 12)

KEEP_RATIOS: dict[str, tuple[float, ...]] = {
    "toy": _geometric(0.80, 0.20, 20) + _linear(0.18, 0.02, 9),
    "power": _TO_TEN_PERCENT,
    "gas": _TO_TEN_PERCENT,
    "bsds300": _TO_TEN_PERCENT,
    "hepmass": _TO_FIVE_PERCENT,
    "images": _TO_FIVE_PERCENT,
    "miniboone": _TO_FIVE_PERCENT + (0.04, 0.03, 0.02, 0.01),
}
"""The paper's schedules of keep ratios, largest first: the cycles of train, prune, retrain."""
