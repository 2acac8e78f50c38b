"""Mixtures of Gaussians in many dimensions: stand-ins of a table's shape whose true density is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dataset import Dataset

COMPONENTS = 6
ROWS = (50_000, 5_000, 10_000)  # train, validation, test


def load(dim: int, *, seed: int = 0, rows: tuple[int, int, int] = ROWS) -> Dataset:
    """Rows [n, dim] of six Gaussians with means N(0, 1.5^2) and covariances of their own: in random directions, with
    standard deviations from 0.1 to 1, so that the density is thin in most directions. z-scores by train.

    floor: the mean negative log-likelihood of the test rows under the true density, nats.
    Raises ValueError for a dimension below 1.
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    means = 1.5 * normal(COMPONENTS, dim)
    directions = torch.linalg.qr(normal(COMPONENTS, dim, dim))[0]
    deviations = torch.logspace(-1.0, 0.0, dim, dtype=torch.float64)
    parts = []
    for n in rows:
        which = torch.randint(COMPONENTS, (n,), generator=generator)
        z = normal(n, dim) * deviations
        part = means[which]
        for component, axes in enumerate(directions):
            part[which == component] += z[which == component] @ axes.T
        parts.append(part)
    test = parts[2]
    logs = []
    for mean, axes in zip(means, directions):
        z = ((test - mean) @ axes) / deviations
        logs.append(-0.5 * z.square().sum(1) - deviations.log().sum() - 0.5 * dim * math.log(2.0 * math.pi))
    log_density = torch.stack(logs).logsumexp(0) - math.log(COMPONENTS)
    centre, scale = parts[0].mean(0), parts[0].std(0)
    floor = -float(log_density.mean() + scale.log().sum())
    return Dataset(f"mixture{dim}", *(((part - centre) / scale).float() for part in parts), floor)
