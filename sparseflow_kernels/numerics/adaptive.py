"""Adaptive Runge-Kutta solves of dy/dt = f(t, y), with torchdiffeq 0.2.5's rules to the letter.

Step sizes are chosen on the host in double precision, one read of the device per step; f sees time in the state's real
dtype. Stages at the end of a step see the time one unit in the last place early, in case f jumps there. The solver
steps over output times (f may be called beyond the last one) and reads the outputs off a quartic, or ends its steps at
them if asked (`StepOptions.stop_at_outputs`).

Autograd flows through the accepted steps, with the step sizes held fixed; also from the outputs to `times`, if those
require gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from .clock import Clock
from .fixed_grid import Trajectory, combine, solve_fixed
from .host import largest, plain
from .interpolation import evaluate_polynomial, fit_quartic
from .step_control import StepOptions, StopPoints, initial_step, trial_step, walk
from .tableaus import FixedTableau, Tableau

Function = Callable[[Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


def rms_norm(y: Tensor) -> Tensor:
    """Root mean square over all elements, real or complex."""
    return y.abs().pow(2).mean().sqrt()


def mixed_norm(*parts: int) -> Norm:
    """The norm of a state that holds the tensors of a tuple side by side, so many columns of each, and perhaps one more
    column, a log-density: the largest of their root mean squares."""

    def norm(y: Tensor) -> Tensor:
        rest = y.shape[1] - sum(parts)
        return torch.stack([rms_norm(part) for part in y.split([*parts, *([rest] if rest else [])], 1)]).amax()

    return norm


@dataclass
class _Step:
    """One accepted step, and what it takes to read outputs off it."""

    t0: float
    t1: float
    dt: float | Tensor
    shift: Tensor | None  # differentiable zero of t0
    y0: Tensor
    y1: Tensor
    k: list[Tensor]
    b_mid: tuple[float, ...]
    coefficients: tuple[Tensor, ...] | None = None

    def output(self, time: float, times: Tensor, index: int) -> Tensor:
        """The state at times[index], whose value is `time`."""
        if self.coefficients is None:
            y_mid = self.y0 + combine(self.k, self.b_mid, self.dt)
            self.coefficients = fit_quartic(self.y0, self.y1, y_mid, self.k[0], self.k[-1], self.dt)
        x: float | Tensor = (time - self.t0) / (self.t1 - self.t0)
        if times.requires_grad and torch.is_grad_enabled():
            start = self.t0 if self.shift is None else self.t0 + self.shift
            length = self.dt if isinstance(self.dt, Tensor) else self.t1 - self.t0
            x = ((times[index] - start) / length).to(self.y0.device, self.y0.real.dtype)
        return evaluate_polynomial(self.coefficients, x)


def _stages(
    f: Function, clock: Clock, tableau: Tableau, y0: Tensor, f0: Tensor, t0: float, dt: float | Tensor, t1: float,
    start: Tensor | None, end: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(y1, stages) of a step from t0 to t1; `start`, `end`: differentiable zeros of the two times."""
    size = t1 - t0 if isinstance(dt, Tensor) else dt
    k = [f0]
    y = y0
    for node, row in zip(tableau.c, tableau.a):
        if node == 1.0:
            t = clock.tell(t1, end, side=-1)
        else:
            shift = start
            if start is not None and end is not start:  # only one end of the step moves with times[0]
                shift = (1.0 - node) * start + (node * end if end is not None else 0.0)
            t = clock.tell(clock.node(t0, node, size), shift)
        y = y0 + combine(k, row, dt)
        k.append(f(t, y))
    if not tableau.last_stage_is_solution:
        y = y0 + combine(k, tableau.b, dt)
    return y, k


def solve_adaptive(
    f: Function,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    rtol: float | Tensor,
    atol: float | Tensor,
    norm: Norm = rms_norm,
    options: StepOptions = StepOptions(),
    record: bool = False,
) -> Trajectory:
    """Solve from y0 at times[0] through every time in `times`.

    f: (t, y) -> dy/dt, t a 0-d tensor in y's real dtype.  y0: any shape, real or complex floating point.
    times: [outputs], strictly increasing, read in double precision.  rtol, atol: numbers, or tensors that broadcast to
    y0.  norm: scaled error -> 0-d; a step is accepted at 1 or less.  record: keep the states at the ends of the steps.

    Raises ValueError for a point repeated in options.step_t and jump_t. A solve that cannot go on comes back with its
    status set, and NaN for the outputs it did not reach.
    """
    times = times.to(torch.float64)
    points = times.tolist()
    stops = StopPoints(points[0], options)
    solver = _Solver(f, Clock(times, y0), y0, times, tableau, rtol, atol, norm, record)
    if options.first_step is None:
        with torch.no_grad():
            dt = choose_first_step(f, solver.clock, points[0], y0, solver.f0, tableau.order, rtol, atol, norm)
        solver.nfe += 1
    else:
        dt = float(options.first_step)
    state = walk(points, dt, bool(torch.isfinite(plain(y0)).all()), tableau.order, options, stops, solver)
    ys, states = solver.ys, solver.states
    if record:
        states.append(solver.y)
    ys.extend([torch.full_like(y0, math.nan)] * (len(points) - len(ys)))
    return Trajectory(
        ys=torch.stack(ys),
        nfe=solver.nfe,
        accepted=len(state.steps),
        rejected=state.rejected,
        steps=torch.tensor(state.steps, dtype=torch.float64).reshape(-1, 2),
        status=state.status,
        t=state.t,
        dt=state.dt,
        suspects=[] if state.status == "ok" else [tensor.detach() for tensor in solver.suspects],
        states=states,
    )


class _Solver:
    """The tensors of an adaptive solve: a `Stepper`."""

    def __init__(
        self, f: Function, clock: Clock, y0: Tensor, times: Tensor, tableau: Tableau, rtol: float | Tensor,
        atol: float | Tensor, norm: Norm, record: bool,
    ) -> None:  # fmt: skip
        self.f, self.clock, self.times, self.tableau = f, clock, times, tableau
        self.rtol, self.atol, self.norm, self.record = rtol, atol, norm, record
        self.y, self.shift = y0, clock.origin
        self.f0 = f(clock.tell(times[0].item(), self.shift), y0)
        self.nfe = 1
        self.ys = [y0]
        self.states: list[Tensor] = []
        self.suspects = [y0, self.f0]
        self.tried: _Step | None = None
        self.step: _Step | None = None

    def attempt(self, t: float, dt: float, t1: float, kind: str) -> tuple[float, bool]:
        y, shift, tableau = self.y, self.shift, self.tableau
        # A step cut at a stop ends at a fixed time, so its length, not its end, moves with times[0].
        end = None if kind else shift
        length = dt if end is shift else dt - shift
        y1, k = _stages(self.f, self.clock, tableau, y, self.f0, t, length, t1, shift, end)
        self.nfe += tableau.stages_per_step
        with torch.no_grad():
            error = combine(k, tableau.b_error, dt) / (self.atol + self.rtol * torch.maximum(y.abs(), y1.abs()))
            ratio, is_bad = largest((self.norm(error), (~torch.isfinite(y1)).any().to(torch.uint8)), y.device)
        self.suspects = [y, y1, error]
        self.tried = _Step(t, t1, length, shift, y, y1, k, tableau.b_mid)
        return ratio, not is_bad

    def accept(self, t: float, dt: float, t1: float, kind: str) -> None:
        if self.record:
            self.states.append(self.y)
        self.step = self.tried
        self.y, self.f0, self.shift = self.step.y1, self.step.k[-1], None if kind else self.shift
        if kind == "jump":
            self.f0 = self.f(self.clock.tell(t1, self.shift, side=+1), self.y)
            self.nfe += 1

    def output(self, index: int, time: float) -> None:
        self.ys.append(self.step.output(time, self.times, index))


def choose_first_step(
    f: Function, clock: Clock, t0: float, y0: Tensor, f0: Tensor, order: int,
    rtol: float | Tensor, atol: float | Tensor, norm: Norm,
) -> float:  # fmt: skip
    """The first step's size (step_control.initial_step), which costs one evaluation; y0, f0 of any shape."""
    scale = atol + y0.abs() * rtol
    d0, d1 = largest((norm(y0 / scale), norm(f0 / scale)), y0.device)
    h0 = trial_step(d0, d1)
    f1 = f(clock.tell(t0 + h0), y0 + h0 * f0)
    (difference,) = largest((norm((f1 - f0) / scale),), y0.device)
    d2 = difference / h0 if h0 != 0.0 else math.copysign(math.inf, difference) if difference else math.nan
    return initial_step(h0, d1, d2, order)


def replay_adaptive(
    f: Function, y0: Tensor, times: Tensor, tableau: Tableau, steps: Tensor, options: StepOptions = StepOptions(),
    record: bool = False,
) -> Trajectory:  # fmt: skip
    """Take the accepted steps of an earlier solve again, without control.

    steps: [accepted, 2], (t, dt) as in Trajectory.steps. options: the earlier solve's; only its step_t and jump_t
    matter. Differentiable in y0, in whatever f depends on, and in `times`: the exact gradient of what the earlier solve
    computed, step sizes held fixed.
    """
    times = times.to(torch.float64)
    points = times.tolist()
    clock = Clock(times, y0)
    jumps = {float(t) for t in options.jump_t or ()}
    stops = {float(t) for t in options.step_t or ()} | jumps
    recorded = steps.tolist()
    ends = [t for t, _ in recorded[1:]] + [_end(t, dt, points[-1]) for t, dt in recorded[-1:]]

    shift, y, ys = clock.origin, y0, [y0]
    states: list[Tensor] = []
    f0 = f(clock.tell(points[0], shift), y) if recorded else None
    for (t0, dt), t1 in zip(recorded, ends):
        end = None if t1 in stops else shift
        length = dt if end is shift else dt - shift
        y1, k = _stages(f, clock, tableau, y, f0, t0, length, t1, shift, end)
        step = _Step(t0, t1, length, shift, y, y1, k, tableau.b_mid)
        while len(ys) < len(points) and points[len(ys)] <= t1:
            ys.append(step.output(points[len(ys)], times, len(ys)))
        if record:
            states.append(y)
        y, f0, shift = y1, k[-1], end
        if t1 in jumps and len(ys) < len(points):
            f0 = f(clock.tell(t1, shift, side=+1), y)
    if len(ys) < len(points):
        raise ValueError(f"replay: the recorded steps end before the last output time, {points[-1]}")
    if record:
        states.append(y)
    nfe = tableau.stages_per_step * len(recorded) + 1
    return Trajectory(torch.stack(ys), nfe, len(recorded), 0, steps, states=states)


def _end(t: float, dt: float, last: float) -> float:
    """The end of a step; one that was cut at the last output ends there, which t + dt may miss by its rounding."""
    return last if abs(t + dt - last) <= math.ulp(max(abs(t), abs(last))) else t + dt


# ---------------------------------------------------------------------------------- the request an engine is handed


def _request_state(request: Any) -> Tensor:
    """x, or x and l side by side as one [batch, dim + 1] state."""
    return request.x if request.l is None else torch.cat((request.x, request.l[:, None]), 1)


def _request_function(request: Any, f: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> Function:
    dim, sign = request.x.shape[1], request.sign

    def upward(t: Tensor, y: Tensor) -> Tensor:
        dx, dl = f(t if sign > 0 else -t, y[:, :dim])
        dy = dx if request.l is None else torch.cat((dx, dl[:, None]), 1)
        return dy if sign > 0 else -dy

    return upward


def _request_tolerance(values: Sequence[float], parts: Sequence[int], like: Tensor) -> float | Tensor:
    if len(values) == 1:
        return float(values[0])
    tolerance, start = like.new_empty(like.shape[1]), 0  # a copy from the host would wait for a GPU
    for value, count in zip(values, (*parts, 1)):
        tolerance[start : start + count].fill_(value)
        start += count
    return tolerance


@dataclass
class RequestResult:
    """The fields of an engine's SolveResult (engines/base.py), by name."""

    xs: Tensor
    ls: Tensor | None
    nfe: int
    accepted: int
    rejected: int
    steps: Tensor
    status: str
    t: float
    dt: float
    rows: tuple[int, ...]
    states: Tensor | None


def solve_request(request: Any, f: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> RequestResult:
    """Run a SolveRequest (engines/base.py) in plain torch, one step size for the whole batch.

    f(t, x [batch, dim]) -> (dx/dt [batch, dim], dl/dt [batch] or None), in the caller's own time and sign: the
    request's `sign` is applied here, to t and to both derivatives. With `request.replay` the recorded steps are taken
    again, and the counts are theirs. Differentiable as solve_adaptive is.
    """
    if request.step_control != "shared":
        raise ValueError(f"step_control={request.step_control!r}: this engine knows only 'shared'")
    y0 = _request_state(request)
    upward = _request_function(request, f)
    if isinstance(request.tableau, FixedTableau):
        result = solve_fixed(
            upward, y0, request.times, request.grid, request.tableau, request.perturb, request.record
        )
    elif request.replay is not None:
        result = replay_adaptive(
            upward, y0, request.times, request.tableau, request.replay, request.options, request.record
        )
    else:
        parts = request.parts or (request.x.shape[1],)
        norm = rms_norm if request.l is None and len(parts) == 1 else mixed_norm(*parts)
        rtol, atol = (_request_tolerance(values, parts, y0) for values in (request.rtol, request.atol))
        result = solve_adaptive(
            upward, y0, request.times, request.tableau, rtol, atol, norm, request.options, request.record
        )
    dim = request.x.shape[1]
    xs, ls = (result.ys, None) if request.l is None else (result.ys[..., :dim], result.ys[..., dim])
    states = None
    if request.record:
        states = torch.stack([y.detach()[:, :dim] for y in result.states])
    return RequestResult(
        xs, ls, result.nfe, result.accepted, result.rejected, result.steps, result.status, result.t, result.dt,
        offending_rows(result.suspects), states,
    )  # fmt: skip


def offending_rows(suspects: Sequence[Tensor]) -> tuple[int, ...]:
    """Rows (along the first axis) that are not finite in any of the tensors; if there are none, the rows of the last
    one, the scaled error, that exceed 1 anywhere."""
    if not suspects or suspects[-1].dim() < 1 or any(plain(tensor) is not tensor for tensor in suspects):
        return ()
    flat = [tensor.abs().reshape(tensor.shape[0], -1) for tensor in suspects]
    bad = torch.stack([~torch.isfinite(tensor).all(1) for tensor in flat]).any(0)
    if not bool(bad.any()):
        bad = (flat[-1] > 1).any(1)
    return tuple(bad.nonzero()[:, 0].tolist())
