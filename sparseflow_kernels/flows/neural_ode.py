"""A neural ODE: a state in R^dim carried through one vector field, or a chain of them (Chen et al. 2018).

What continuous normalizing flows and classifiers share: the fields and their interval, the solver's settings, the
compiled copy and the way back.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Iterator, Literal, Self, Sequence

import torch
from torch import Tensor, nn

from ..compiled_field import CompiledField
from ..compiled_field import compile as compile_field
from ..engines.reference import is_autocast_enabled
from ..finite import refuse_not_finite
from ..numerics.host import plain
from ..odeint import odeint_adjoint, solve
from ..solution import Stats


@dataclass(frozen=True)
class FlowStats:
    """How the last call's solves went, one entry per vector field in the order they were solved; penalties: the means
    over the rows of a ContinuousFlow's, in their order."""

    solves: tuple[Stats, ...]
    penalties: tuple[float, ...] = ()

    @property
    def nfe(self) -> int:
        """Evaluations of all vector fields together."""
        return sum(stats.nfe for stats in self.solves)


class NeuralODE(nn.Module):
    """x [n, dim] -> its state at the end of the interval [n, dim].

    odefunc: a module f(t, x) with t 0-d and x [batch, dim], or a sequence of such: x goes through the first one first.
        Compiled fields are as good as plain modules.
    t0, t1: the interval of every field.  train_end_time: give each field a parameter `sqrt_end_time`, T = its square,
        starting at t1 - t0; it has a true gradient here.
    rtol, atol, method, options: the solver's, as in `odeint`.
    gradient: "discrete" (through the steps taken) or "adjoint" (`odeint_adjoint`, no statistics).

    `stats` (FlowStats, or None) tells of the last call. Tensors are checked: shape [n, dim], the parameters' dtype and
    device, finite.
    """

    supervised = False  # whether it is trained on labels
    exact_evaluation = True  # whether the training loop evaluates by the exact trace
    evaluation_rows = 4096  # that are solved at once there
    SETTINGS: tuple[str, ...] = ("t0", "t1", "rtol", "atol", "method", "options", "gradient")
    """What of a model is not in its state dict and decides what it computes; attributes and arguments by these
    names."""

    def __init__(
        self,
        odefunc: nn.Module | Sequence[nn.Module],
        dim: int = 2,
        *,
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
        one_of("gradient", gradient, ("discrete", "adjoint"))
        if t0 == t1 or (train_end_time and not t0 < t1):
            raise ValueError(f"t0 and t1 must differ, and t0 < t1 with train_end_time; got t0={t0}, t1={t1}")
        self.vector_fields = nn.ModuleList(fields)
        self.dim = dim
        self.t0, self.t1 = float(t0), float(t1)
        self.rtol, self.atol, self.method, self.options = rtol, atol, method, options
        self.gradient = gradient
        self.sqrt_end_time: nn.ParameterList | None = None
        if train_end_time:
            like = next(self.vector_fields.parameters())
            start = torch.tensor(math.sqrt(t1 - t0), dtype=like.dtype, device=like.device)
            self.sqrt_end_time = nn.ParameterList(nn.Parameter(start.clone()) for _ in fields)
        self.norms: nn.ModuleList | None = None  # before, between and after the fields
        self.stats: FlowStats | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "norms" not in state and "norms" not in state["_modules"]:  # pickles of earlier versions
            self.norms = None

    def forward(self, x: Tensor) -> Tensor:
        """The state at the end of the last interval; differentiable in x and the parameters."""
        x = self._checked(x, "x")
        solves: list[Stats] = []
        for index in range(len(self.vector_fields)):
            x = self._solve(self.vector_fields[index], x, self._times(index, x), solves)
        self.stats = FlowStats(tuple(solves)) if solves else None
        return x

    # ------------------------------------------------------------------------------------------------------- compiled

    def compile(self, engine: str = "auto") -> Self:  # type: ignore[override]  # torch's returns nothing
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
            like = self._like_of(number)
            compiled[id(field)] = compile_field(field, engine, self.dim if like is None else None, like)
        flow = self._of_fields([compiled[id(field)] for field in self.vector_fields])
        if self.sqrt_end_time is not None:
            flow.sqrt_end_time = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in self.sqrt_end_time)
        flow.norms = copy.deepcopy(self.norms)
        return flow.train(self.training)

    @torch.no_grad()
    def copy_to(self, flow: "NeuralODE") -> None:
        """Write a compiled flow's current values into the flow it was compiled from (`CompiledField.copy_to`).

        Raises ValueError where that flow is of another make, has other masks, or lacks a parameter that changed.
        """
        if len(flow.vector_fields) != len(self.vector_fields) or any(
            (getattr(flow, part) is None) != (getattr(self, part) is None) for part in ("sqrt_end_time", "norms")
        ):
            raise ValueError("copy_to: the other flow has another number of fields, of end times or of norms")
        uncompiled = [i for i, field in enumerate(self.vector_fields) if not isinstance(field, CompiledField)]
        if uncompiled:
            raise ValueError(f"copy_to: vector_fields[{uncompiled[0]}] is not compiled; use load_state_dict")
        for mine, theirs in zip(self.vector_fields, flow.vector_fields):
            mine.copy_to(theirs)  # type: ignore[operator]  # a CompiledField
        if self.sqrt_end_time is not None:
            for mine, theirs in zip(self.sqrt_end_time, flow.sqrt_end_time):
                theirs.copy_(mine)
        if self.norms is not None:
            flow.norms.load_state_dict(self.norms.state_dict())

    def settings(self) -> dict[str, Any]:
        """The arguments by name that make another one like this of other fields."""
        return {name: getattr(self, name) for name in self.SETTINGS}

    def extra_repr(self) -> str:
        return f"dim={self.dim}, method={self.method!r}, rtol={self.rtol}, atol={self.atol}"

    # ------------------------------------------------------------------------------------------------------- internal

    def _of_fields(self, fields: list[nn.Module]) -> Self:
        """Another one like this, but for what it holds besides."""
        return type(self)(fields, self.dim, **self.settings())

    def _like_of(self, index: int) -> Tensor | None:
        """An example of the state of a field, where it is not [batch, dim]."""
        return None

    def _times(self, index: int, like: Tensor) -> Tensor:
        if self.sqrt_end_time is None:
            # an engine is told the times by the host; torchdiffeq wants them where the state is
            hosted = isinstance(self.vector_fields[index], CompiledField) and self.gradient == "discrete"
            device = torch.device("cpu") if hosted else like.device
            return torch.tensor([self.t0, self.t1], dtype=like.dtype, device=device)
        end = self.t0 + self.sqrt_end_time[index] ** 2
        return torch.stack([torch.full_like(end, self.t0), end])

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

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What training solves from: (rows in the first field's states, the log-density channel [n] at its start)."""
        return x, None

    def _enter(self, index: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The end of the solve before a field, as its start: (the state, what is done and goes on no further)."""
        return x, None

    def _leave(self, index: int, x: Tensor, done: Tensor | None) -> Tensor:
        """The inverse of `_enter`, and, as that moves numbers and changes none, its adjoint."""
        return x

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


def one_of(name: str, value: Any, known: tuple) -> None:
    """Raises ValueError unless the argument `name` has one of the known values."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")
