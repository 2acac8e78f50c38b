"""Continuous normalizing flows: densities and samples by solving a vector field (Chen et al. 2018; FFJORD, 2019).

With dx/dt = f(t, x) from data at t0 to the base distribution at t0 + T, and dl/dt = -tr(df/dx), l(t0) = 0:
log p(x) = log base(z) - l, z and l at the end. Sampling solves the same field backwards.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Iterator, Literal, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..compiled_field import CompiledField
from ..compiled_field import compile as compile_field
from ..divergence import Kind
from ..divergence_field import Noise, with_divergence
from ..engines.reference import is_autocast_enabled
from ..finite import refuse_not_finite
from ..numerics.host import plain
from ..odeint import odeint_adjoint, solve
from ..solution import Stats


@dataclass(frozen=True)
class FlowStats:
    """How the last call's solves went, one entry per vector field in the order they were solved."""

    solves: tuple[Stats, ...]

    @property
    def nfe(self) -> int:
        """Evaluations of all vector fields together."""
        return sum(stats.nfe for stats in self.solves)


class ContinuousFlow(nn.Module):
    """A density on R^dim given by one vector field, or a chain of them.

    odefunc: a module f(t, x) with t 0-d and x [batch, dim], or a sequence of such: data goes through the first one
        first. Compiled fields are as good as plain modules.
    base: a distribution over vectors [dim] (event_shape (dim,)), None for the standard normal.
    divergence: "exact" or "hutchinson"; eval_divergence: the same for eval mode, None for no difference (FFJORD trains
        with "hutchinson" and reports "exact").  noise: Hutchinson's probe, "gaussian" or "rademacher", drawn once per
        solve from torch's global generator.
    t0, t1: the interval of every field.  train_end_time: give each field a parameter `sqrt_end_time`, T = its square,
        starting at t1 - t0; it has a true gradient here.
    rtol, atol, method, options: the solver's, as in `odeint`.
    gradient: "discrete" (through the steps taken) or "adjoint" (`odeint_adjoint`, no statistics).

    `stats` (FlowStats, or None) tells of the last call. Tensors are checked: shape [n, dim], the parameters' dtype and
    device, finite.
    """

    def __init__(
        self,
        odefunc: nn.Module | Sequence[nn.Module],
        dim: int = 2,
        *,
        base: Distribution | None = None,
        divergence: Kind = "exact",
        eval_divergence: Kind | None = None,
        noise: Noise = "gaussian",
        t0: float = 0.0,
        t1: float = 1.0,
        train_end_time: bool = False,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        method: str = "dopri5",
        options: dict | None = None,
        gradient: Literal["discrete", "adjoint"] = "discrete",
    ) -> None:
        super().__init__()
        several = isinstance(odefunc, (nn.ModuleList, list, tuple))
        fields: list[nn.Module] = list(odefunc) if several else [odefunc]  # type: ignore[arg-type, list-item]
        if not fields or not all(isinstance(f, nn.Module) for f in fields):
            raise TypeError("odefunc must be an nn.Module f(t, x), or a sequence of at least one such module")
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be an int, at least 1, the size of x; got {dim!r}")
        for name, value, known in (
            ("divergence", divergence, ("exact", "hutchinson")),
            ("eval_divergence", eval_divergence, (None, "exact", "hutchinson")),
            ("noise", noise, ("gaussian", "rademacher")),
            ("gradient", gradient, ("discrete", "adjoint")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
        if base is not None and tuple(base.event_shape) != (dim,):
            raise ValueError(
                f"base must be a distribution over vectors, event_shape ({dim},); it has {tuple(base.event_shape)} "
                "(torch.distributions.Independent turns batch dimensions into event dimensions)"
            )
        if t0 == t1 or (train_end_time and not t0 < t1):
            raise ValueError(f"t0 and t1 must differ, and t0 < t1 with train_end_time; got t0={t0}, t1={t1}")
        self.vector_fields = nn.ModuleList(fields)
        self.dim, self.base = dim, base
        self.divergence, self.eval_divergence, self.noise = divergence, eval_divergence, noise
        self.t0, self.t1 = float(t0), float(t1)
        self.rtol, self.atol, self.method, self.options = rtol, atol, method, options
        self.gradient = gradient
        self.sqrt_end_time: nn.ParameterList | None = None
        if train_end_time:
            like = next(self.vector_fields.parameters())
            start = torch.tensor(math.sqrt(t1 - t0), dtype=like.dtype, device=like.device)
            self.sqrt_end_time = nn.ParameterList(nn.Parameter(start.clone()) for _ in fields)
        self.stats: FlowStats | None = None

    # ------------------------------------------------------------------------------------------------------ densities

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats: x [n, dim] -> [n]. Differentiable in x and the parameters."""
        z, logdet = self.transform(x)
        if x.shape[0] == 0:  # which torch's distributions do not take
            return logdet
        if self.base is None:  # the standard normal: torch's own class takes a dozen operations for it
            return logdet - 0.5 * (z.square().sum(1) + self.dim * math.log(2.0 * math.pi))
        return self._base_log_prob(z) + logdet

    def forward(self, x: Tensor) -> Tensor:
        """`log_prob`, so that a flow can be called and wrapped (DistributedDataParallel) as any module."""
        return self.log_prob(x)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Data to base: x [n, dim] -> (z [n, dim], log|det dz/dx| [n])."""
        x = self._checked(x, "x")
        change = x.new_zeros(x.shape[0])  # l = -log|det dz/dx|
        solves: list[Stats] = []
        for index in range(len(self.vector_fields)):
            x, change = self._solve(self._with_divergence(index), (x, change), self._times(index, x), solves)
        self.stats = FlowStats(tuple(solves)) if solves else None
        return x, -change

    def inverse(self, z: Tensor) -> Tensor:
        """Base to data: z [n, dim] -> x [n, dim], without densities."""
        z = self._checked(z, "z")
        solves: list[Stats] = []
        for index in reversed(range(len(self.vector_fields))):
            z = self._solve(self.vector_fields[index], z, self._times(index, z).flip(0), solves)
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

    # ------------------------------------------------------------------------------------------------------- compiled

    def compile(self, engine: str = "auto") -> "ContinuousFlow":  # type: ignore[override]  # torch's returns nothing
        """A new flow of the same settings over `sparseflow_kernels.compile`d fields; this one is left as it is. The
        parameters are copies; a field that is used several times is one field there too. Raises ValueError for
        different fields that share parameters. (This takes the place of nn.Module.compile; for that one call
        torch.compile(flow).)"""
        compiled: dict[int, nn.Module] = {}
        owners: dict[int, int] = {}
        for number, field in enumerate(self.vector_fields):
            if id(field) in compiled:
                continue
            for name, parameter in field.named_parameters():
                owner = owners.setdefault(id(parameter), number)
                if owner != number:
                    raise ValueError(
                        f"compile: vector_fields[{number}] shares its parameter {name!r} with vector_fields[{owner}], "
                        "and compiled fields share nothing. Use one and the same field in both places, or give each "
                        "parameters of its own"
                    )
            compiled[id(field)] = compile_field(field, engine=engine, dim=self.dim)
        flow = ContinuousFlow(
            [compiled[id(field)] for field in self.vector_fields],
            self.dim,
            base=self.base,
            divergence=self.divergence,
            eval_divergence=self.eval_divergence,
            noise=self.noise,
            t0=self.t0,
            t1=self.t1,
            rtol=self.rtol,
            atol=self.atol,
            method=self.method,
            options=self.options,
            gradient=self.gradient,
        )
        if self.sqrt_end_time is not None:
            flow.sqrt_end_time = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in self.sqrt_end_time)
        return flow.train(self.training)

    @torch.no_grad()
    def copy_to(self, flow: "ContinuousFlow") -> None:
        """Write a compiled flow's current values into the flow it was compiled from (`CompiledField.copy_to`).

        Raises ValueError where that flow is of another make, has other masks, or lacks a parameter that changed.
        """
        if len(flow.vector_fields) != len(self.vector_fields) or (flow.sqrt_end_time is None) != (
            self.sqrt_end_time is None
        ):
            raise ValueError("copy_to: the other flow has another number of fields, or of end times")
        uncompiled = [i for i, field in enumerate(self.vector_fields) if not isinstance(field, CompiledField)]
        if uncompiled:
            raise ValueError(f"copy_to: vector_fields[{uncompiled[0]}] is not compiled; use load_state_dict")
        for mine, theirs in zip(self.vector_fields, flow.vector_fields):
            mine.copy_to(theirs)  # type: ignore[operator]  # a CompiledField
        if self.sqrt_end_time is not None:
            for mine, theirs in zip(self.sqrt_end_time, flow.sqrt_end_time):
                theirs.copy_(mine)

    def extra_repr(self) -> str:
        solver = f"method={self.method!r}, rtol={self.rtol}, atol={self.atol}"
        return f"dim={self.dim}, divergence={self.divergence!r}, {solver}"

    # ------------------------------------------------------------------------------------------------------- internal

    def _times(self, index: int, like: Tensor) -> Tensor:
        if self.sqrt_end_time is None:
            # an engine is told the times by the host; torchdiffeq wants them where the state is
            hosted = isinstance(self.vector_fields[index], CompiledField) and self.gradient == "discrete"
            device = torch.device("cpu") if hosted else like.device
            return torch.tensor([self.t0, self.t1], dtype=like.dtype, device=device)
        end = self.t0 + self.sqrt_end_time[index] ** 2
        return torch.stack([torch.full_like(end, self.t0), end])

    def _with_divergence(self, index: int) -> nn.Module:
        kind = self.divergence if self.training or self.eval_divergence is None else self.eval_divergence
        return with_divergence(self.vector_fields[index], kind, noise=self.noise if kind == "hutchinson" else None)

    def _solve(self, field: nn.Module, state, times: Tensor, solves: list[Stats]):
        if (state[0] if isinstance(state, tuple) else state).shape[0] == 0:
            return state
        settings: dict[str, Any] = dict(rtol=self.rtol, atol=self.atol, method=self.method, options=self.options)
        if self.gradient == "adjoint" and torch.is_grad_enabled():
            ys = odeint_adjoint(field, state, times, gradient="adjoint", **settings)
        else:
            solution = solve(field, state, times, **settings)
            solves.append(solution.stats)
            ys = solution.ys
        return tuple(part[-1] for part in ys) if isinstance(state, tuple) else ys[-1]

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

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.parameters()
        yield from (buffer for buffer in self.buffers() if buffer.is_floating_point())
        yield torch.empty(0)

    def _checked(self, x: Tensor, name: str) -> Tensor:
        """x; under torch.autocast, which makes other dtypes, in that of the parameters."""
        if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != self.dim:
            got = f"of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor [n, {self.dim}], one sample per row; got {got}")
        like = next(self._tensors())
        if x.dtype != like.dtype and x.is_floating_point() and is_autocast_enabled(x):
            x = x.to(like.dtype)
        if x.dtype != like.dtype or x.device != like.device:
            to = [(str(mine), str(theirs)) for mine, theirs in ((x.dtype, like.dtype), (x.device, like.device))]
            mine, theirs = next(pair for pair in to if pair[0] != pair[1])
            if x.dtype == like.dtype:
                mine, theirs = f"{mine!r}", f"{theirs!r}"
            raise TypeError(
                f"{name} is {x.dtype} on {x.device}, the flow's parameters are {like.dtype} on {like.device}; "
                f"move one of them, for example {name}.to({theirs}) or flow.to({mine})"
            )
        if not torch.compiler.is_compiling() and plain(x) is x:  # a question about values, which torch.func hides
            refuse_not_finite(x, name)
        return x
