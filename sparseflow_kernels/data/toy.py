"""The 2-D toys of the Sparse Flows experiments (arXiv 2106.12718), in our own words after its appendix's formulas.

Every set is normalised by ONE scalar mean and ONE scalar standard deviation over all entries (unbiased), train and test
separately; the test set has half the points. A validation share of 10 % is taken from the training rows at random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Generator, Tensor

from .dataset import Dataset

Points = tuple[Tensor, Tensor]  # float64 [n, 2], int64 [n]


def gaussians(n: int, generator: Generator) -> Points:
    """6 clusters of n points: centres 4 (cos a, sin a) with a = 2 pi i / 6, standard deviation 0.5."""
    return _clusters(n, generator, *(torch.full((6,), size, dtype=torch.float32) for size in (4.0, 0.5)))


def gaussians_spiral(n: int, generator: Generator) -> Points:
    """10 clusters of n points at angles 2 pi i / 6, radii 4 down to 1, standard deviations 0.3 down to 0.1."""
    return _clusters(n, generator, _line(4.0, 1.0, 10), _line(0.3, 0.1, 10))


def spirals(n: int, generator: Generator, noise: float = 0.9) -> Points:
    """2 arms of n points: u = 780 degrees * sqrt(U), (-u cos u + noise U', u sin u + noise U''), and the mirror."""
    u = torch.sqrt(_uniform(generator, n)) * (780.0 * 2.0 * math.pi / 360.0)
    arm = torch.stack([-torch.cos(u) * u, torch.sin(u) * u], 1) + noise * _uniform(generator, n, 2)
    return torch.cat([arm, -arm]), _labels(n, n)


def spirals2(n: int, generator: Generator) -> Points:
    """`spirals` with noise 0.5."""
    return spirals(n, generator, noise=0.5)


def moons(n: int, generator: Generator) -> Points:
    """n points on two interleaved half circles; noise 0.1 U, one U per point added to both coordinates."""
    outer, inner = _line(0, math.pi, n // 2).double(), _line(0, math.pi, n - n // 2).double()
    points = torch.cat(
        [
            torch.stack([torch.cos(outer), torch.sin(outer)], 1),
            torch.stack([1.0 - torch.cos(inner), 0.5 - torch.sin(inner)], 1),
        ]
    )
    return points + 0.1 * _uniform(generator, n, 1), _labels(n // 2, n - n // 2)


def concentric(n: int, generator: Generator) -> Points:
    """n points: half on a circle of radius 0.75 (label 1), half on 1.5 (label 0), noise N(0, 0.1^2)."""
    angle = 2.0 * math.pi * _uniform(generator, n)
    radius = torch.where(torch.arange(n) < n // 2, 0.75, 1.5).double()
    points = radius.unsqueeze(1) * torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    return points + 0.1 * _normal(generator, n, 2), (torch.arange(n) < n // 2).long()


def _clusters(n: int, generator: Generator, radius: Tensor, std: Tensor) -> Points:
    points = []
    for i, (r, s) in enumerate(zip(radius.tolist(), std.tolist()), start=1):
        angle = 2.0 * math.pi * i / 6.0
        centre = torch.tensor([r * math.cos(angle), r * math.sin(angle)], dtype=torch.float64)
        shift = 1e-3 * _normal(generator, 1, 2)  # one for the whole cluster
        points.append(centre + shift + s * _normal(generator, n, 2))
    return torch.cat(points), _labels(*[n] * len(radius))


def _labels(*counts: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def _uniform(generator: Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Toy:
    """A generator, its n for training (the test set has n // 2), and what is known of the normalised density.

    std: the scalar the normalisation divides by (approximate; it varies with the draw), None where not documented.
    floor: the entropy in nats after normalisation, by Monte Carlo over the exact mixture (spirals2: histograms, 0.81 to
        0.85; the middle is given).
    """

    generate: Callable[[int, Generator], Points]
    n: int
    std: float | None = None
    floor: float | None = None


TOYS: dict[str, Toy] = {
    "gaussians": Toy(gaussians, 2730, std=2.872, floor=1.132),
    "gaussians_spiral": Toy(gaussians_spiral, 1638, std=1.904, floor=0.523),
    "spirals2": Toy(spirals2, 16384, std=6.764, floor=0.83),
    "spirals": Toy(spirals, 1024),
    "moons": Toy(moons, 1024),
    "concentric": Toy(concentric, 1024),
}


def _line(first: float, last: float, n: int) -> Tensor:
    return torch.linspace(first, last, n, dtype=torch.float32)  # whatever torch's default dtype is: the same rows


def normalise(points: Tensor) -> Tensor:
    """(points - mean) / std with one scalar mean and one scalar (unbiased) std over all entries."""
    points = points - points.mean()
    return points / points.std()


def load(name: str, *, seed: int = 0, n: int | None = None) -> Dataset:
    """One of `TOYS`. n: points per cluster, per arm or in all (as the generator takes it), None for the experiments'.

    The same seed gives the same rows on any machine with the same torch. Raises ValueError for n < 4.
    """
    toy = TOYS[name]
    n = toy.n if n is None else n
    if n < 4:
        raise ValueError(f"n must be at least 4, got {n}")
    generator = torch.Generator().manual_seed(seed)
    train, train_labels = toy.generate(n, generator)
    test, test_labels = toy.generate(n // 2, generator)
    train, test = normalise(train).float(), normalise(test).float()
    order = torch.randperm(len(train), generator=generator)
    val, rest = order[: len(train) // 10], order[len(train) // 10 :]
    return Dataset(name, train[rest], train[val], test, toy.floor, train_labels[rest], train_labels[val], test_labels)
