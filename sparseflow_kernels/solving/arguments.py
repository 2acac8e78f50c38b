"""The arguments of a solver call, checked as torchdiffeq checks them and brought into one form: time runs upwards."""

from __future__ import annotations

import math
import numbers
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..engines.base import SolveRequest
from ..numerics.step_control import StepOptions, StopPoints
from ..numerics.tableaus import METHODS, Tableau
from ..warn import warn

State = Tensor | tuple[Tensor, ...]

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
STEP_OPTIONS = frozenset(option.name for option in fields(StepOptions))
GRID_OPTIONS = frozenset(("step_size", "grid_constructor", "interp", "perturb"))


def upward(t: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """(upward times, sign) after torchdiffeq's checks of `t`; differentiable."""
    if not isinstance(t, Tensor):
        raise AssertionError(f"t must be a torch.Tensor, not {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(f"`t` must be a floating point Tensor but is a {t.type()}")
    if t.dim() != 1:
        raise AssertionError(f"t must be one dimensional, not of shape {list(t.shape)}")
    if len(t) == 0:
        raise IndexError("t is empty; it must hold the initial time, and the times to solve for")
    if t.device != device and t.device.type != "cpu":  # the host reads the times: the CPU is where they are best
        warn("t is not on the same device as y0. Coercing to y0.device.")
    t = t.to("cpu")
    values = t.detach().tolist()  # plain floats: a dozen tensor operations would cost as much as a small solve
    sign = -1 if len(values) > 1 and values[0] > values[1] else 1
    if not all(sign * before < sign * after for before, after in zip(values, values[1:])):
        raise AssertionError("t must be strictly increasing or decreasing")
    if not all(map(math.isfinite, values)):
        raise AssertionError("t must be finite")
    times = (t if sign > 0 else -t).to(torch.float64)
    return times, sign


def check_tolerance(name: str, tolerance: Any, parts: int | None) -> None:
    """parts: the number of tensors of a tuple state, else None."""
    if tolerance is None or isinstance(tolerance, (str, bytes)):
        raise TypeError(f"{name} must be a number, a tensor or a sequence with one per tensor of y0, not {tolerance!r}")
    if isinstance(tolerance, Tensor) and tolerance.requires_grad:
        raise AssertionError(f"{name} cannot require gradient")
    if parts is not None and is_sequence(tolerance) and len(tuple(tolerance)) != parts:
        raise AssertionError(f"If using tupled {name} it must have the same length as the tuple y0")


def is_sequence(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:  # a number, or an array or tensor without axes
        return False
    return True


def _number(value: Any) -> float | None:
    """A float out of a number or a one-element tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 else None
    return float(value) if isinstance(value, numbers.Real) else None


def numbers_of(tolerance: Any, parts: int) -> tuple[float, ...] | None:
    """One float per tensor of the state, or None if the tolerance is not made of plain numbers."""
    if is_sequence(tolerance):
        values = tuple(_number(value) for value in tolerance) if parts > 1 else (None,)
    else:
        values = (_number(tolerance),) * parts
    return None if any(value is None for value in values) else values


def step_options(options: dict, sign: int) -> StepOptions:
    """StepOptions in upward time, from the user's dict (names outside it ignored)."""
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in STEP_OPTIONS or (value is None and name in ("first_step", "step_t", "jump_t")):
            continue
        if name in ("step_t", "jump_t"):
            flat = torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1).tolist()
            given[name] = tuple(sign * point for point in flat)
        elif name == "max_num_steps":
            given[name] = int(value)
        else:
            given[name] = float(value)
    return StepOptions(**given)


def grid_of(t: Tensor, times: Tensor, sign: int, options: dict) -> Tensor:
    """float64 CPU grid in upward time, as torchdiffeq would step on it; differentiable in t. A grid_constructor
    among the options is called with t alone."""
    step_size, constructor = options.get("step_size"), options.get("grid_constructor")
    if step_size is not None and constructor is not None:
        raise ValueError("step_size and grid_constructor are mutually exclusive arguments.")
    if constructor is not None:
        grid = (sign * constructor(t)).to("cpu", torch.float64)
    elif step_size is not None:
        start, end = times[0], times[-1]
        size = float(step_size)
        if not size > 0.0:
            raise ValueError(f"options['step_size'] must be positive, not {size}")
        # the caller's dtype decides how many steps there are, as it does in torchdiffeq
        span = t.detach()[-1] * sign - t.detach()[0] * sign
        count = int(torch.ceil(span / size + 1).item())
        inner = torch.arange(0, max(count - 1, 0), dtype=torch.float64) * size + start
        grid = torch.cat((inner, end[None])) if len(times) > 1 else times
    else:
        return times
    if grid.numel() == 0 or bool(grid[0] != times[0]) or bool(grid[-1] != times[-1]):
        raise AssertionError("the grid of a fixed-grid method must start at t[0] and end at t[-1]")
    return grid


def request_of(
    x: Tensor, l: Tensor | None, noise: Tensor | None, t: Tensor, times: Tensor, sign: int,  # noqa: E741
    rtol: tuple[float, ...], atol: tuple[float, ...], method: str, options: dict, step_control: str = "shared",
) -> SolveRequest:  # fmt: skip
    """What an engine is asked. x, l, noise: as in SolveRequest.  times, sign: `upward` of the caller's t.  options: the
    caller's, but for the grid_constructor, see `grid_of`."""
    tableau = METHODS[method]
    adaptive = isinstance(tableau, Tableau)
    steps = step_options(options, sign) if adaptive else StepOptions()
    if steps.step_t or steps.jump_t:
        StopPoints(times[0].item(), steps)  # refuses repeated points, whatever the engine does
    return SolveRequest(
        x=x, l=l, times=times, sign=sign, tableau=tableau, rtol=rtol, atol=atol, options=steps,
        grid=None if adaptive else grid_of(t, times, sign, options), perturb=bool(options.get("perturb", False)),
        noise=noise, step_control=step_control,
    )  # fmt: skip
