"""Continuous normalizing flows: densities and samples by solving a vector field (Chen et al. 2018; FFJORD, 2019).

With dx/dt = f(t, x) from data at t0 to the base distribution at t0 + T, and dl/dt = -tr(df/dx), l(t0) = 0:
log p(x) = log base(z) - l, z and l at the end. Sampling solves the same field backwards.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..divergence import Kind
from ..divergence_field import DivergenceField, Noise, with_divergence
from ..solution import Stats
from .batch_norm import MovingBatchNorm
from .neural_ode import FlowStats, NeuralODE, one_of
from .regularised import RegularisedSolves, checked_penalties


class ContinuousFlow(NeuralODE):
    """A density on R^dim given by one vector field, or a chain of them.

    odefunc: a module f(t, x) with t 0-d and x [batch, dim], or a sequence of such: data goes through the first one
        first. Compiled fields are as good as plain modules.
    base: a distribution over vectors [dim] (event_shape (dim,)), None for the standard normal.
    divergence: "exact" or "hutchinson"; eval_divergence: the same for eval mode, None for no difference (FFJORD trains
        with "hutchinson" and reports "exact").  noise: Hutchinson's probe, "gaussian" or "rademacher", drawn once per
        solve from torch's global generator.
    batch_norm: a MovingBatchNorm before the first field and after each, of this lag; None for none.
    penalties: "kinetic", "jacobian", "directional" (`regularised`) -> weight: `row_nll` in training mode adds the
        integrals times their weights, and the solves that make them take the place of the others. `stats.penalties` has
        their means.
    solver: the rest is NeuralODE's: t0, t1, train_end_time, rtol, atol, method, options, gradient.

    `stats` (FlowStats, or None) tells of the last call. Tensors are checked: shape [n, dim], the parameters' dtype and
    device, finite.
    """

    SETTINGS = ("base", "divergence", "eval_divergence", "noise", "penalties", *NeuralODE.SETTINGS)

    def __init__(
        self,
        odefunc: nn.Module | Sequence[nn.Module],
        dim: int = 2,
        *,
        base: Distribution | None = None,
        divergence: Kind = "exact",
        eval_divergence: Kind | None = None,
        noise: Noise = "gaussian",
        batch_norm: float | None = None,
        penalties: dict[str, float] | None = None,
        **solver: Any,
    ) -> None:
        super().__init__(odefunc, dim, **solver)
        one_of("divergence", divergence, ("exact", "hutchinson"))
        one_of("eval_divergence", eval_divergence, (None, "exact", "hutchinson"))
        one_of("noise", noise, ("gaussian", "rademacher"))
        if base is not None and tuple(base.event_shape) != (dim,):
            raise ValueError(
                f"base must be a distribution over vectors, event_shape ({dim},); it has {tuple(base.event_shape)} "
                "(torch.distributions.Independent turns batch dimensions into event dimensions)"
            )
        self.base = base
        self.divergence, self.eval_divergence, self.noise = divergence, eval_divergence, noise
        self.penalties = checked_penalties(penalties)
        if self.penalties and self.gradient != "discrete":
            raise ValueError("penalties: have the discrete gradient; leave gradient='adjoint' out")
        self._penalised: dict[tuple, RegularisedSolves] = {}
        if batch_norm is not None:
            like = next(self.vector_fields.parameters())
            norms = (MovingBatchNorm(dim, lag=batch_norm) for _ in range(1 + len(self.vector_fields)))
            self.norms = nn.ModuleList(norms).to(like)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_penalised": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"penalties": {}, "_penalised": {}, **state})  # earlier versions had none

    # ------------------------------------------------------------------------------------------------------ densities

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats: x [n, dim] -> [n]. Differentiable in x and the parameters."""
        z, logdet = self.transform(x)
        if x.shape[0] == 0:  # which torch's distributions do not take
            return logdet
        return self._base_term(z) + logdet

    def _base_term(self, z: Tensor) -> Tensor:
        if self.base is None:  # the standard normal: torch's own class takes a dozen operations for it
            return -0.5 * (z.square().sum(1) + self.dim * math.log(2.0 * math.pi))
        return self._base_log_prob(z)

    def row_nll(self, x: Tensor, labels: None = None) -> Tensor:
        """-log p(x), nats, what training minimises the mean of, in training mode with the penalties: x [n, dim] ->
        [n]."""
        if not (self.training and self.penalties):
            return -self.log_prob(x)
        z, logdet, sums = self._transform(x, tuple(self.penalties))
        weights = torch.tensor(list(self.penalties.values()), dtype=sums.dtype, device=sums.device)
        return sums @ weights - (self._base_term(z) + logdet)

    def forward(self, x: Tensor) -> Tensor:
        """`log_prob`, so that a flow can be called and wrapped (DistributedDataParallel) as any module."""
        return self.log_prob(x)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to base: x [n, dim] -> (z [n, dim], log|det dz/dx| [n])."""
        return self._transform(x, ())[:2]

    def _transform(self, x: Tensor, penalties: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """`transform`, and the integrals of the penalties by name [n, names]."""
        x = self._checked(x, "x")
        change = x.new_zeros(x.shape[0])  # l = -log|det dz/dx|
        sums = x.new_zeros(x.shape[0], len(penalties))
        solves: list[Stats] = []
        x, change = self._normed(0, x, change)
        for index in range(len(self.vector_fields)):
            field, times = self._with_divergence(index), self._times(index, x)
            if penalties and len(x):
                settings = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": self.options}
                solver = self._solver_with(index, field.kind, penalties)
                x, change, more, stats = solver(x, change, field.begin_solve(x), times, settings)
                sums, solves = sums + more, [*solves, stats]
            else:
                x, change = self._solve(field, (x, change), times, solves)
            x, change = self._normed(index + 1, x, change)
        means = tuple(sums.detach().mean(0).tolist()) if penalties else ()  # asking a GPU for nothing would wait for it
        self.stats = FlowStats(tuple(solves), means) if solves else None
        return x, -change, sums

    def _solver_with(self, index: int, kind: str, penalties: tuple[str, ...]) -> RegularisedSolves:
        field = self.vector_fields[index]
        key = (id(field), kind, penalties)
        if key not in self._penalised:
            self._penalised[key] = RegularisedSolves(field, kind, penalties)
        return self._penalised[key]

    def _normed(self, index: int, x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        if self.norms is None or not len(x):
            return x, change
        x, logdet = self.norms[index](x)
        return x, change - logdet

    def inverse(self, z: Tensor) -> Tensor:
        """Base to data: z [n, dim] -> x [n, dim], without densities."""
        z = self._checked(z, "z")
        solves: list[Stats] = []
        for index in reversed(range(len(self.vector_fields))):
            z = z if self.norms is None else self.norms[index + 1].inverse(z)
            z = self._solve(self.vector_fields[index], z, self._times(index, z).flip(0), solves)
        z = z if self.norms is None else self.norms[0].inverse(z)
        self.stats = FlowStats(tuple(solves)) if solves else None
        return z

    @torch.no_grad()
    def sample(self, shape: int | Sequence[int] = ()) -> Tensor:
        """Samples [*shape, dim] (an int n means (n,)), from torch's global generator; no gradient."""
        sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        if not all(isinstance(size, numbers.Integral) and size >= 0 for size in sizes):
            raise ValueError(f"shape must be an int or a sequence of ints, none below 0; got {shape!r}")
        shape = tuple(map(int, sizes))
        like = next(self._tensors())
        n = math.prod(shape)
        z = self._base(like).sample((n,)).to(like)
        return self.inverse(z).view(*shape, self.dim)

    # ------------------------------------------------------------------------------------------------------- internal

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, x.new_zeros(len(x))

    def _with_divergence(self, index: int) -> DivergenceField:
        kind = self.divergence if self.training or self.eval_divergence is None else self.eval_divergence
        return with_divergence(self.vector_fields[index], kind, noise=self.noise if kind == "hutchinson" else None)

    def _base_log_prob(self, z: Tensor) -> Tensor:
        try:
            return self.base.log_prob(z)
        except RuntimeError as error:
            place = self.base.sample(()).device
            if place == z.device:
                raise
            raise ValueError(
                f"base: its tensors are on {place}, the flow on {z.device}; a distribution is no module, so flow.to() "
                f"leaves it behind: make it anew with tensors on {z.device}"
            ) from error

    def _base(self, like: Tensor) -> Distribution:
        if self.base is not None:
            return self.base
        normal = torch.distributions.Normal(like.new_zeros(self.dim), like.new_ones(self.dim), validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, divergence={self.divergence!r}"
