"""What lies between whole grey levels and the rows that a flow's fields move: dequantisation, the logit, and squeezing.

Each is a module: forward(x) -> (y, log|det dy/dx| per sample [n]), and inverse(y) -> x. x, y: [n, channels, height,
width]. Sources: uniform dequantisation, Theis et al. 2016 (arXiv 1511.01844); the logit and the squeeze, Dinh et al.
2017 (RealNVP, arXiv 1605.08803), as FFJORD takes them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dequantise(nn.Module):
    """y = (x + u) / levels in [0, 1), for whole grey levels x in 0..levels-1 and u uniform in [0, 1), drawn anew from
    torch's global generator at every call.

    The log-determinant is that of the scaling, so that a density of y becomes one over [0, levels), whose mean over u
    is a lower bound of the log-probability of the levels.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        if isinstance(levels, bool) or int(levels) != levels or levels < 2:
            raise ValueError(f"levels must be a whole number >= 2, the count of grey levels; got {levels!r}")
        self.levels = int(levels)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """noise: the u to take, [n, ...]; 0 for none, where x need not be whole. Raises ValueError, but for a noise
        that is given, unless the values are whole numbers in 0..levels-1."""
        if noise is None:
            self.check(x)
            noise = torch.rand_like(x)
        return (x + noise) / self.levels, self.logdet(x)

    def logdet(self, x: Tensor) -> Tensor:
        """Of the scaling, [n]."""
        return x.new_full((len(x),), -math.log(self.levels) * math.prod(x.shape[1:]))

    def inverse(self, y: Tensor) -> Tensor:
        """In [0, levels), not rounded."""
        return y * self.levels

    def floor(self, y: Tensor) -> Tensor:
        """The level, 0..levels-1, that a y in [0, 1) lies in; the nearest for a y outside."""
        return self.inverse(y).floor().clamp(0, self.levels - 1)

    def check(self, x: Tensor) -> None:
        """Raises ValueError unless the values are whole numbers in 0..levels-1."""
        if not x.numel():
            return
        least, most = (float(end) for end in torch.aminmax(x))
        if not (0 <= least and most <= self.levels - 1 and bool((x == x.floor()).all())):
            raise ValueError(
                f"x must be whole grey levels 0 to {self.levels - 1}; its values go from {least:g} to {most:g}"
                + ("" if bool((x == x.floor()).all()) else " and are not whole")
                + (f". If it is scaled to [0, 1], give (x * {self.levels - 1}).round()" if most <= 1 else "")
            )

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class Logit(nn.Module):
    """y = log(s / (1 - s)) with s = alpha + (1 - 2 alpha) x, from [0, 1] to the whole line. alpha in (0, 0.5) keeps the
    ends finite; FFJORD's is 1e-6 for MNIST, and RealNVP's 0.05 for CIFAR-10."""

    def __init__(self, alpha: float = 1e-6) -> None:
        super().__init__()
        if not 0.0 < alpha < 0.5:
            raise ValueError(f"alpha must be in (0, 0.5), got {alpha!r}")
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = 1.0 - 2.0 * self.alpha
        low, high = torch.log(self.alpha + scale * x), torch.log(self.alpha + scale * (1.0 - x))  # s, and 1 - s exactly
        logdet = math.log(scale) - low - high
        return low - high, logdet.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        return (torch.sigmoid(y) - self.alpha) / (1.0 - 2.0 * self.alpha)

    def inverted(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(`inverse(y)`, its log|det dx/dy| [n])."""
        logdet = F.logsigmoid(y) + F.logsigmoid(-y) - math.log(1.0 - 2.0 * self.alpha)
        return self.inverse(y), logdet.flatten(1).sum(1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


class Squeeze(nn.Module):
    """[n, channels, height, width] -> [n, 4 channels, height / 2, width / 2]: every 2x2 block becomes four channels.
    Volumes stay."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle(y, 2)
