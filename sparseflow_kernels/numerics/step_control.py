"""The step-size rule, in plain floats: what every adaptive solve decides between two steps, free of tensors.

Time is the solver's own, always upward, in double precision.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Protocol, Sequence


@dataclass(frozen=True)
class StepOptions:
    """The options of an adaptive solve, with torchdiffeq's names and defaults, and one of our own.

    min_step, max_step: bounds of the step size; a step of min_step or less is accepted whatever its error.
    first_step: size of the first step; None chooses it (`initial_step`), which costs one evaluation more.
    step_t: times to stop at. jump_t: the same, where f is discontinuous: it is evaluated anew behind the point.
        Both in the solver's upward time (negated for a decreasing solve), in any order.
    safety, ifactor, dfactor: the next step is dt * safety / ratio^(1/order), at most ifactor and at least dfactor
        times dt.
    max_num_steps: bound on the steps within one output interval.
    stop_at_outputs: end steps at the output times, and do not read outputs off inside a step: for methods whose steps
        are of a higher order than their interpolant. Not torchdiffeq's.
    """

    min_step: float = 0.0
    max_step: float = math.inf
    first_step: float | None = None
    step_t: tuple[float, ...] | None = None
    jump_t: tuple[float, ...] | None = None
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    max_num_steps: int = 2**31 - 1
    stop_at_outputs: bool = False


def clamp(dt: float, options: StepOptions) -> float:
    """dt within [min_step, max_step]; a NaN stays one."""
    return min(max(dt, options.min_step), options.max_step)


def proposed_step(dt: float, options: StepOptions) -> float:
    """The step to try for a wanted size dt: min_step for one that is not finite, else dt within its bounds."""
    return clamp(dt if math.isfinite(dt) else options.min_step, options)


def is_accepted(dt: float, error_ratio: float, options: StepOptions) -> bool:
    """Accept a step of size dt whose scaled error norm is error_ratio? (A NaN ratio is rejected.)"""
    return dt <= options.min_step or (error_ratio <= 1.0 and not dt > options.max_step)


def next_step_size(dt: float, error_ratio: float, order: int, options: StepOptions) -> float:
    """The size to want after a step of size dt: dt * min(ifactor, max(safety / ratio^(1/order), d)), within the bounds,
    with d = 1 for a ratio below 1 (an accepted step never shrinks the next) and dfactor otherwise. NaN for a NaN ratio.
    """
    if error_ratio == 0.0:
        return clamp(dt * options.ifactor, options)
    if math.isnan(error_ratio):
        return math.nan
    floor = 1.0 if error_ratio < 1.0 else options.dfactor
    factor = min(options.ifactor, max(options.safety / error_ratio ** (1.0 / order), floor))
    return clamp(dt * factor, options)


def trial_step(d0: float, d1: float) -> float:
    """First half of the automatic first step: the size of an explicit Euler step to look ahead with.

    d0, d1: norms of y0 and f0, both scaled by atol + rtol |y0|.
    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section II.4.
    """
    return 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1


def initial_step(h0: float, d1: float, d2: float, order: int) -> float:
    """Second half: the first step, from the trial step h0 and d2 = norm of (f(t0 + h0, y0 + h0 f0) - f0) / h0, scaled.

    The exponent is 1 / order with the method's own order. A NaN in h0 or d1 comes back as NaN; one in d2 alone (the
    look ahead left the domain of f) is ignored, as in torchdiffeq.
    """
    if math.isnan(h0) or math.isnan(d1):
        return math.nan
    d2 = 0.0 if math.isnan(d2) and d1 > 1e-15 else d2
    if d1 <= 1e-15 and not d2 > 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        h1 = (0.01 / max(d1, d2)) ** (1.0 / order)
    return min(100.0 * h0, h1)


class StopPoints:
    """The forced stops of one solve (`step_t`, `jump_t`), and where in them the solve is.

    As in torchdiffeq a list moves on only when a step was cut at its current point, so a step that lands on the point
    by itself leaves the list there for good. Raises ValueError for a point given twice.
    """

    def __init__(self, t0: float, options: StepOptions) -> None:
        self._steps = sorted(float(t) for t in options.step_t or () if t >= t0)
        self._jumps = sorted(float(t) for t in options.jump_t or () if t >= t0)
        if len(set(self._steps + self._jumps)) < len(self._steps) + len(self._jumps):
            raise ValueError("`step_t` and `jump_t` must not have any repeated elements between them.")
        self._next_step = min(bisect_right(self._steps, t0), len(self._steps) - 1)
        self._next_jump = min(bisect_right(self._jumps, t0), len(self._jumps) - 1)

    def cut(self, t0: float, dt: float) -> tuple[float, float, str]:
        """(t1, dt, kind) of a step of dt from t0 after cutting it at the next stop; kind is "", "step" or "jump"."""
        t1, kind = t0 + dt, ""
        if self._steps and t0 < self._steps[self._next_step] < t1:
            t1, kind = self._steps[self._next_step], "step"
            dt = t1 - t0
        if self._jumps and t0 < self._jumps[self._next_jump] < t0 + dt:
            t1, kind = self._jumps[self._next_jump], "jump"
            dt = t1 - t0
        return t1, dt, kind

    def passed(self, kind: str) -> None:
        """An accepted step ended at a stop of this kind."""
        if kind == "step":
            self._next_step = min(self._next_step + 1, len(self._steps) - 1)
        elif kind == "jump":
            self._next_jump = min(self._next_jump + 1, len(self._jumps) - 1)


class Stepper(Protocol):
    """Whoever holds a solve's tensors: takes the steps that `walk` decides on."""

    def attempt(self, t: float, dt: float, t1: float, kind: str) -> tuple[float, bool]:
        """Try a step of dt from t to t1, cut at a stop of this kind: (scaled error norm, is the new state finite)."""

    def accept(self, t: float, dt: float, t1: float, kind: str) -> None:
        """The step tried last is accepted. Behind a "jump" the derivative is evaluated anew."""

    def output(self, index: int, time: float) -> None:
        """Read the output off the step accepted last."""


@dataclass
class Walk:
    """What the control of a solve came to, as in Trajectory (fixed_grid.py)."""

    t: float
    dt: float
    status: str = "ok"
    steps: list[tuple[float, float]] = field(default_factory=list)
    rejected: int = 0


def walk(
    points: Sequence[float],
    dt: float,
    finite: bool,
    order: int,
    options: StepOptions,
    stops: StopPoints,
    stepper: Stepper,
) -> Walk:
    """The control of an adaptive solve: steps from points[0] past every other output time, the first of size dt, and
    what is accepted. finite: is the initial state?"""
    state = Walk(points[0], dt)
    for index, time in enumerate(points[1:], start=1):
        tried = 0
        while time > state.t:
            state.dt = dt = proposed_step(state.dt, options)
            if tried >= options.max_num_steps:
                state.status = "max_num_steps"
            elif not state.t + dt > state.t:
                state.status = "underflow"
            elif not finite:
                state.status = "non_finite"
            if state.status != "ok":
                return state
            tried += 1
            t1, dt, kind = stops.cut(state.t, dt)
            wished = 0.0
            if options.stop_at_outputs and t1 > time:
                t1, wished, dt, kind = time, state.dt, time - state.t, ""
            ratio, is_finite = stepper.attempt(state.t, dt, t1, kind)
            accepted = is_accepted(dt, ratio, options)
            if accepted:
                stepper.accept(state.t, dt, t1, kind)
                state.steps.append((state.t, dt))
                state.t, finite = t1, is_finite
                stops.passed(kind)
            else:
                state.rejected += 1
            state.dt = next_step_size(dt, ratio, order, options)
            if accepted and wished > state.dt:
                state.dt = wished  # an output says nothing about the step after it
        stepper.output(index, time)
    return state
