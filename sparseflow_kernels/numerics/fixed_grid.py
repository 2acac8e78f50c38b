"""Fixed-grid Runge-Kutta solves of dy/dt = f(t, y), with torchdiffeq 0.2.5's rules, and what the solvers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Sequence

import torch
from torch import Tensor

from .clock import Clock
from .interpolation import linear
from .tableaus import FixedTableau


@dataclass
class Trajectory:
    """What a solve in plain torch came to.

    ys: [outputs, *y0.shape].  nfe, accepted, rejected: counts.  steps: float64 CPU [accepted, 2], (t, dt) of every
    accepted step.  status: "ok", "underflow", "non_finite" or "max_num_steps"; then t, dt say where it stopped and
    `suspects` holds the state, the one tried after it and the scaled error (or the first derivative).
    states: y at the ends of the accepted steps, [accepted + 1] of them, if the solve was asked to `record` them.
    """

    ys: Tensor
    nfe: int
    accepted: int
    rejected: int
    steps: Tensor
    status: str = "ok"
    t: float = 0.0
    dt: float = 0.0
    suspects: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


def combine(k: Sequence[Tensor], weights: Sequence[float], dt: float | Tensor) -> Tensor:
    """dt * sum_i weights[i] k[i], skipping zero weights; dt a number or a 0-d tensor."""
    scale = 1.0 if isinstance(dt, Tensor) else dt
    # add_ is safe under autograd: neither a scaled sum nor its terms are saved for backward. Under vmap a stage may
    # stand for many where the sum does not yet.
    add = Tensor.add if torch._C._are_functorch_transforms_active() else Tensor.add_
    total = None
    for stage, weight in zip(k, weights):
        if weight != 0.0:
            total = stage * (scale * weight) if total is None else add(total, stage, alpha=scale * weight)
    if total is None:
        total = torch.zeros_like(k[0])
    return total * dt.to(total.device, total.real.dtype) if isinstance(dt, Tensor) else total


def solve_fixed(
    f: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    times: Tensor,
    grid: Tensor,
    tableau: FixedTableau,
    perturb: bool = False,
    record: bool = False,
) -> Trajectory:
    """Step on `grid` from y0 at times[0]; outputs between grid points are interpolated linearly.

    f: (t, y) -> dy/dt, t a 0-d tensor in y's real dtype.  times: [outputs] and grid: [points], increasing, with the
    same ends.  perturb: see f just above the start of a step and just below its end.
    Differentiable in y0, f's parameters, `times` and `grid`. The status is always "ok": nothing is checked on the way.
    """
    times, grid = times.to(torch.float64), grid.to(torch.float64)
    points, knots = times.tolist(), grid.tolist()
    clock = Clock(times, y0)
    with_grid_grad = grid.requires_grad and torch.is_grad_enabled()
    with_time_grad = with_grid_grad or (times.requires_grad and torch.is_grad_enabled())
    next_stages, prev_stages = (tableau.next_stages, tableau.prev_stages) if perturb else ((), ())

    y, ys = y0, [y0]
    states: list[Tensor] = []
    for i, (t0, t1) in enumerate(zip(knots, knots[1:])):
        dt: float | Tensor = grid[i + 1] - grid[i] if with_grid_grad else t1 - t0
        k: list[Tensor] = []
        for stage, (node, row) in enumerate(zip(tableau.c, tableau.a)):
            shift = None
            if with_grid_grad:
                moving = (1.0 - node) * grid[i] + node * grid[i + 1]
                shift = moving - moving.detach()
            side = 1 if stage in next_stages else -1 if stage in prev_stages else 0
            t = clock.tell(t1 if node == 1.0 else t0 + node * (t1 - t0), shift, side)
            k.append(f(t, y + combine(k, row, dt) if k else y))
        y1 = y + combine(k, tableau.b, dt)
        if record:
            states.append(y)
        while len(ys) < len(points) and points[len(ys)] <= t1:
            time = points[len(ys)]
            if time == t1:
                ys.append(y1)
            else:
                x: float | Tensor = (time - t0) / (t1 - t0)
                if with_time_grad:
                    x = (times[len(ys)] - grid[i]) / (grid[i + 1] - grid[i])
                    x = x.to(y.device, y.real.dtype)
                ys.append(linear(y, y1, x))
        y = y1
    steps = torch.tensor([(a, b - a) for a, b in zip(knots, knots[1:])], dtype=torch.float64).reshape(-1, 2)
    if record:
        states.append(y)
    nfe = tableau.stages_per_step * len(steps)
    return Trajectory(torch.stack(ys), nfe, len(steps), 0, steps, t=knots[-1], states=states)
