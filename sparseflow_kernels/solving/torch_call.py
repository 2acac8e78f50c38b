"""A solve by the torch solver in `numerics`, of anything that no engine runs: tsit5, which torchdiffeq lacks, and steps
that end at the outputs, which it lacks too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

from ..hooks import CALLBACKS
from ..numerics.adaptive import offending_rows, rms_norm, solve_adaptive
from ..numerics.tableaus import ADAPTIVE
from ..solution import Solution, SolverError, Stats
from ..warn import warn
from .arguments import State, check_tolerance, is_sequence, step_options, upward
from .delegation import begin


def callbacks_of(func: Callable) -> set[str]:
    return {name for name in CALLBACKS if getattr(func, name, None) is not None}


@dataclass
class TorchCall:
    """An adaptive method on anything an engine does not run, in torch."""

    func: Callable
    y0: State
    t: Tensor
    rtol: Any
    atol: Any
    options: dict
    reason: str
    method: str

    @staticmethod
    def make(
        func: Callable, y0: State, t: Tensor, rtol: Any, atol: Any, method: str, options: dict, reason: str
    ) -> "TorchCall":  # fmt: skip
        parts = (y0,) if isinstance(y0, Tensor) else y0
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise ValueError("y0 must be a tensor or a tuple with at least one tensor")
        if not (parts[0].is_floating_point() or parts[0].is_complex()):
            raise TypeError(f"y0 must be floating point or complex, not {parts[0].dtype}")
        if options.pop("dtype", torch.float64) != torch.float64:
            remedy = "use 'dopri5' for another time dtype"
            raise ValueError(f"options['dtype']: {method} keeps time in float64 here; {remedy}")
        if callbacks := callbacks_of(func):
            warn(f"Solver {method!r} does not support callbacks {callbacks}")
        count = None if isinstance(y0, Tensor) else len(parts)
        check_tolerance("rtol", rtol, count)
        check_tolerance("atol", atol, count)
        return TorchCall(func, y0, t, rtol, atol, options, reason, method)

    def run(self) -> Solution:
        is_tuple = isinstance(self.y0, tuple)
        times, sign = upward(self.t, (self.y0[0] if is_tuple else self.y0).device)
        begin(self.func, self.y0)
        shapes = [part.shape for part in self.y0] if is_tuple else []

        def split(flat: Tensor, *lead: int) -> tuple[Tensor, ...]:
            sizes = [shape.numel() for shape in shapes]
            return tuple(part.reshape(*lead, *shape) for part, shape in zip(flat.split(sizes, -1), shapes))

        def f(t: Tensor, y: Tensor) -> Tensor:
            dy = self.func(t if sign > 0 else -t, split(y) if is_tuple else y)
            if is_tuple:
                dy = torch.cat([part.reshape(-1) for part in dy])
            return dy if sign > 0 else -dy

        def tolerance(value: Any) -> Any:
            if is_tuple and is_sequence(value):
                rows = (torch.as_tensor(v, dtype=torch.float64).expand(s.numel()) for v, s in zip(value, shapes))
                value = torch.cat(tuple(rows))
            return torch.as_tensor(value, dtype=y0.real.dtype, device=y0.device)

        y0 = torch.cat([part.reshape(-1) for part in self.y0]) if is_tuple else self.y0
        user_norm = self.options.get("norm")

        def norm(y: Tensor) -> Any:
            if user_norm is not None:
                return user_norm(split(y) if is_tuple else y)
            return torch.stack([rms_norm(part) for part in split(y)]).amax() if is_tuple else rms_norm(y)

        options = step_options(self.options, sign)
        result = solve_adaptive(
            f, y0, times, ADAPTIVE[self.method], tolerance(self.rtol), tolerance(self.atol), norm, options
        )
        ys = split(result.ys, len(self.t)) if is_tuple else result.ys
        if result.status != "ok":
            detached = tuple(part.detach() for part in ys) if is_tuple else ys.detach()
            rows = () if is_tuple else offending_rows(result.suspects)
            raise SolverError(result.status, sign * result.t, result.dt, rows, detached, options.max_num_steps)
        steps = result.steps * torch.tensor([float(sign), 1.0], dtype=torch.float64)
        stats = Stats(
            result.nfe, result.accepted, result.rejected, steps, "numerics", self.method, reason=self.reason
        )  # fmt: skip
        return Solution(ys, stats)
