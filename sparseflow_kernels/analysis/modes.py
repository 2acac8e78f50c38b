"""Mode analysis of generated samples, as the Sparse Flows paper makes it (arXiv 2106.12718; its published script).

The modes of a data set are the class means of its training rows, each with its class's covariance C. The distance of a
sample x to a mode m is counted in standard deviations along the direction that joins them,

    |x - m| / sqrt(u' C u) = |x - m|^2 / sqrt((x - m)' C (x - m)),      u = (x - m) / |x - m|,

which is not Mahalanobis' distance unless C is a multiple of the identity. A sample within a threshold of some mode is
of high quality; a mode is captured if it is the nearest one of at least one such sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor

THRESHOLDS = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0)
SAMPLES, REPEATS = 20_000, 15


@dataclass(frozen=True)
class Modes:
    """means: float64 [modes, dim].  covariances: float64 [modes, dim, dim]."""

    means: Tensor
    covariances: Tensor

    @staticmethod
    def of(rows: Tensor, labels: Tensor) -> "Modes":
        """Class means and (unbiased) covariances of rows [n, dim] with labels [n].

        Raises ValueError if the two do not fit, or a class has fewer than two rows.
        """
        if rows.ndim != 2 or labels.shape != rows.shape[:1]:
            raise ValueError(f"rows must be [n, dim] and labels [n]; got {list(rows.shape)} and {list(labels.shape)}")
        classes = [rows[labels == label].double() for label in labels.unique()]
        if not classes or min(map(len, classes)) < 2:
            raise ValueError("every class needs at least two rows, or it has no covariance")
        covariances = torch.stack([torch.cov(part.T).reshape(part.shape[1], -1) for part in classes])
        return Modes(torch.stack([part.mean(0) for part in classes]), covariances)

    def __len__(self) -> int:
        return len(self.means)

    def distances(self, samples: Tensor) -> Tensor:
        """float64 [n, modes], on the modes' device: from samples [n, dim] to every mode, in standard deviations along
        the joining direction; 0 at a mode itself, infinite for samples that are not finite and where the mode has no
        spread."""
        offset = samples.to(self.means)[:, None, :] - self.means
        spread = torch.einsum("nki,kij,nkj->nk", offset, self.covariances, offset).clamp(min=0).sqrt()
        square = offset.square().sum(-1)
        return torch.where(square == 0, 0.0, square / spread).nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass(frozen=True)
class ModeCoverage:
    """Means and standard deviations over the repeats (0 for a single one), threshold by threshold.

    high_quality: share of samples within the threshold of some mode.  captured: number of modes captured.
    modes: how many there are.  samples: per repeat.
    """

    modes: int
    samples: int
    repeats: int
    thresholds: tuple[float, ...]
    high_quality: tuple[float, ...]
    high_quality_std: tuple[float, ...]
    captured: tuple[float, ...]
    captured_std: tuple[float, ...]


def mode_coverage(
    sample: Callable[[int], Tensor], modes: Modes, *, samples: int = SAMPLES, repeats: int = REPEATS,
    thresholds: Sequence[float] = THRESHOLDS,
) -> ModeCoverage:  # fmt: skip
    """Draw `samples` rows by sample(n) -> [n, dim], `repeats` times, and measure them against the modes.

    sample: for example a flow's `sample`, which draws from torch's global generator.
    """
    if samples < 1 or repeats < 1:
        raise ValueError(f"samples and repeats must be at least 1; got {samples} and {repeats}")
    limits = torch.tensor(thresholds, dtype=torch.float64, device=modes.means.device)
    quality, captured = [], []
    for _ in range(repeats):
        nearest = modes.distances(sample(samples)).min(1)
        within = nearest.values[:, None] <= limits  # [n, thresholds]
        quality.append(within.double().mean(0))
        hits = torch.stack([within[nearest.indices == mode].any(0) for mode in range(len(modes))])
        captured.append(hits.sum(0).double())
    figures = []
    for runs in (torch.stack(quality), torch.stack(captured)):
        figures += [runs.mean(0), runs.std(0, correction=min(1, repeats - 1))]
    return ModeCoverage(
        len(modes), samples, repeats, tuple(map(float, thresholds)), *(tuple(values.tolist()) for values in figures)
    )
