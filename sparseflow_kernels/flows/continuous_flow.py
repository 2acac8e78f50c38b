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
        z, change, sums = self._transform(x, tuple(self.penalties))
        weights = torch.tensor(list(self.penalties.values()), dtype=sums.dtype, device=sums.device)
        return sums @ weights - (self._base_term(z) - change)

    def forward(self, x: Tensor) -> Tensor:
        """`log_prob`, so that a flow can be called and wrapped (DistributedDataParallel) as any module."""
        return self.log_prob(x)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to base: x [n, dim] -> (z [n, dim], log|det dz/dx| [n])."""
        z, change = self._forwards(x, None)
        return z, -change

    def push(
        self, x: Tensor, logp: Tensor | None = None, reverse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """FFJORD's `cnf(x, logpx, reverse)`: x [n, dim] through the flow, from data to base, or back with `reverse`;
        with logp ([n] or [n, 1]) also where that comes to, shaped like it.

        logp: the log-density that x has; then what comes back is that of the result. The solves start from it, and
        nothing is added for the base. So flows are chained, and a flow refines samples of another distribution; with
        `reverse` and the base's log-density come samples with theirs. From zeros, log p(x) = base.log_prob(z) - what
        comes back. Differentiable in x, logp and the parameters. With a batch_norm, `reverse` goes by its running
        estimates.
        """
        if logp is None:
            return self._backwards(x, None)[0] if reverse else self._forwards(x, None)[0]
        n = len(x)
        if not isinstance(logp, Tensor) or logp.shape not in ((n,), (n, 1)):
            got = list(logp.shape) if isinstance(logp, Tensor) else type(logp).__name__
            raise ValueError(f"logp must be a tensor [n] or [n, 1], a log-density for each of {n} rows; got {got}")
        start = logp.to(next(self._tensors())).reshape(n)
        x, found = self._backwards(x, start) if reverse else self._forwards(x, start)
        return x, found.reshape(logp.shape)

    def _forwards(self, x: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
        """Data to base: (z, the log-density channel l [n], which starts as `change`, zeros for None)."""
        return self._transform(x, (), change)[:2]

    def _backwards(self, z: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Base to data, the same; without densities for None."""
        z = self._checked(z, "z")
        solves: list[Stats] = []
        if self.norms is not None and len(z):
            z, change = self._denormed(len(self.vector_fields), z, change)
        for index in reversed(range(len(self.vector_fields))):
            z, change = self._solved_back(index, z, change, solves)
            if self.norms is not None and len(z):
                z, change = self._denormed(index, z, change)
        self.stats = FlowStats(tuple(solves)) if solves else None
        return z, change

    def _solved_back(
        self, index: int, z: Tensor, change: Tensor | None, solves: list[Stats]
    ) -> tuple[Tensor, Tensor | None]:
        times = self._times(index, z).flip(0)
        if change is None:
            return self._solve(self.vector_fields[index], z, times, solves), None
        return self._solve(self._with_divergence(index), (z, change), times, solves)

    def _denormed(self, index: int, z: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor | None]:
        z, logdet = self.norms[index].inverted(z)
        return z, None if change is None else change - logdet

    def _transform(
        self, x: Tensor, penalties: tuple[str, ...], change: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(z, the channel l [n], which starts as `change` (None: zeros) and falls by log|det dz/dx|, the integrals of
        the penalties by name [n, names])."""
        x = self._checked(x, "x")
        change = x.new_zeros(x.shape[0]) if change is None else change
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
        return x, change, sums

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
        return self._backwards(z, None)[0]

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
