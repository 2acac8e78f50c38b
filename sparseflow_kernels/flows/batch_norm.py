"""Moving batch normalisation between the fields of a flow (Dinh et al. 2017; FFJORD's MovingBatchNorm)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MovingBatchNorm(nn.Module):
    """y = (x - mean) / sqrt(variance + eps) * exp(weight) + bias over [n, features], invertible.

    mean, variance: running estimates, which a training step moves by `decay` towards those of its batch, after it has
    used them. lag: training normalises by running + lag (batch's own - running), through which gradients flow; 0: by
    the running estimates alone. (FFJORD divides that by 1 - lag^(step + 1), which at its first steps scales it up
    tenfold for a lag of 0.9; not so here.)
    """

    def __init__(self, features: int, *, eps: float = 1e-4, decay: float = 0.1, lag: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= lag < 1.0:
            raise ValueError(f"lag must be at least 0 and below 1, got {lag!r}")
        self.eps, self.decay, self.lag = eps, decay, lag
        self.weight = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.register_buffer("step", torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, features] -> (y [n, features], log|det dy/dx|, 0-d: it is the same for every row)."""
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        if self.training and len(x) > 1:
            of_batch = x.mean(0), x.var(0)
            if self.lag > 0.0:
                mean, variance = (
                    running + self.lag * (own - running) for own, running in zip(of_batch, (mean, variance))
                )
            with torch.no_grad():
                self.running_mean += self.decay * (of_batch[0] - self.running_mean)
                self.running_var += self.decay * (of_batch[1] - self.running_var)
                self.step += 1
        scale = self.weight - 0.5 * torch.log(variance + self.eps)
        return (x - mean) * torch.exp(scale) + self.bias, scale.sum()

    def inverse(self, y: Tensor) -> Tensor:
        """y [n, features] -> x, by the running estimates, as in evaluation."""
        return self.inverted(y)[0]

    def inverted(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(`inverse(y)`, its log|det dx/dy|, 0-d)."""
        scale = self.weight - 0.5 * torch.log(self.running_var + self.eps)
        return (y - self.bias) * torch.exp(-scale) + self.running_mean, -scale.sum()

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}, decay={self.decay}, lag={self.lag}"
