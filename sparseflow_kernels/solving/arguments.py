"""The arguments of a solver call, checked as torchdiffeq checks them and brought into one form: time runs upwards."""

from __future__ import annotations

import difflib
import math
import numbers
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch._C._functorch import is_batchedtensor

from ..engines.base import SolveRequest
from ..numerics.step_control import StepOptions, StopPoints
from ..numerics.tableaus import ADAPTIVE, METHODS, Tableau
from ..warn import warn

State = Tensor | tuple[Tensor, ...]

STEP_OPTIONS = frozenset(option.name for option in fields(StepOptions))
GRID_OPTIONS = frozenset(("step_size", "grid_constructor", "interp", "perturb"))

_MOST_STEPS = 2**31 - 1  # what torchdiffeq can count to
_RULES = {  # option -> (is it one?, what it has to be)
    "min_step": (lambda v: 0.0 <= v < math.inf, "a finite number, 0 or more"),
    "max_step": (lambda v: v > 0.0, "a positive number"),
    "first_step": (lambda v: 0.0 <= v < math.inf, "a finite positive number, or None to have it chosen"),
    "step_size": (lambda v: 0.0 < v < math.inf, "a finite positive number"),
    "safety": (lambda v: 0.0 < v <= 1.0, "above 0 and at most 1: it makes a step smaller than the error asks for"),
    "ifactor": (lambda v: 1.0 <= v < math.inf, "a finite number, 1 or more: the most that a step may grow by"),
    "dfactor": (lambda v: 0.0 < v < 1.0, "between 0 and 1: a step that was rejected must shrink"),
    "max_num_steps": (
        lambda v: 0.0 <= v <= _MOST_STEPS,
        "a number of steps from 0 to 2**31 - 1, the default and no limit",
    ),
}


def _known_options(method: str) -> frozenset[str]:
    if method in ADAPTIVE:
        return STEP_OPTIONS | {"norm", "dtype"}
    if method == "scipy_solver":
        return frozenset(("solver", "min_step", "max_step", "norm", "grid_points", "eps"))
    return GRID_OPTIONS | {"norm"} | ({"max_iters", "max_order"} if method not in METHODS else set())


def checked_options(options: dict, method: str | None, name: str) -> dict:
    """The caller's options in a new dict, without those that the method does not know: a warning names them.

    name: of the argument.  Raises TypeError, ValueError for what no solve can use, before anything runs.
    """
    if not isinstance(options, dict):
        raise TypeError(f"{name} must be a dict, not {type(options).__name__}")
    known = _known_options("dopri5" if method is None else method)
    unknown = {option: value for option, value in options.items() if option not in known}
    if unknown:
        hints = [
            f"options[{option!r}]: did you mean {near[0]!r}?" if near else f"options[{option!r}] is none of its options"
            for option in unknown
            for near in [difflib.get_close_matches(str(option), sorted(known), 1)]
        ]
        warn(f"{method or 'dopri5'}: Unexpected arguments {unknown} are ignored. {'; '.join(hints)}")
    options = {option: value for option, value in options.items() if option in known}
    for option, value in options.items():
        if option in _RULES:
            _check_option(name, option, value)
        elif option in ("step_t", "jump_t") and value is not None and _has_nan(value):
            raise ValueError(f"{name}[{option!r}] must hold points of time, and one is NaN: {value}")
        elif option == "stop_at_outputs" and not isinstance(value, bool):
            raise TypeError(f"{name}['stop_at_outputs'] must be True or False, not {value!r}")
    if "min_step" in options and "max_step" in options:
        least, most = _option_number(options["min_step"]), _option_number(options["max_step"])
        if least > most:
            raise ValueError(f"{name}: min_step must be at most max_step, and they are {least:g} and {most:g}")
    return options


def _has_nan(points: Any) -> bool:
    if isinstance(points, Tensor):  # one that is being traced has no values
        return not torch.compiler.is_compiling() and bool(points.isnan().any())
    points = points if is_sequence(points) else (points,)
    return any(point != point for point in points)


def _option_number(value: Any) -> float | None:
    """A float out of whatever stands for one: a number, an array or tensor of one element."""
    try:
        return None if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _check_option(name: str, option: str, value: Any) -> None:
    if value is None and option in ("first_step", "step_size"):
        return
    number, (holds, wanted) = _option_number(value), _RULES[option]
    if number is None:
        raise TypeError(f"{name}[{option!r}] must be {wanted}, not {value!r}")
    if not holds(number):
        text = f"{name}[{option!r}] must be {wanted}, not {number:g}"
        # torchdiffeq tries such a step, and says this of it
        raise AssertionError(f"underflow in dt 0.0: {text}") if option == "first_step" else ValueError(text)


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
    if is_batchedtensor(t):
        raise ValueError(
            "t cannot be vmapped: all items share the times; put all of them in one t, and pick afterwards"
        )
    t = t.to("cpu")
    values = t.detach().tolist()  # plain floats: a dozen tensor operations would cost as much as a small solve
    sign = -1 if len(values) > 1 and values[0] > values[1] else 1
    if not all(sign * before < sign * after for before, after in zip(values, values[1:])):
        bad = next((f", and t[{i}] is NaN" for i, value in enumerate(values) if math.isnan(value)), "")
        raise AssertionError(f"t must be strictly increasing or decreasing{bad}")
    if not all(map(math.isfinite, values)):
        raise AssertionError("t must be finite")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
        raise NotImplementedError(
            "t has a forward-mode tangent (torch.func.jvp, jacfwd), along which a solve has no derivative here: "
            "differentiate in t backwards (torch.func.vjp, jacrev, backward)"
        )
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


def check_not_negative(name: str, tolerance: Any) -> None:
    """Raises ValueError for a tolerance with a number below 0, or with NaN; other nonsense is for `check_tolerance`."""
    if type(tolerance) is float and tolerance >= 0.0:  # nearly always
        return
    if isinstance(tolerance, Tensor):
        # one that is being traced has no values
        bad = not torch.compiler.is_compiling() and not tolerance.is_complex() and not bool((tolerance >= 0).all())
    elif isinstance(tolerance, numbers.Real):
        bad = not tolerance >= 0
    else:
        for entry in tolerance if isinstance(tolerance, (tuple, list)) else ():
            check_not_negative(name, entry)
        return
    if bad:
        shown = tolerance.min().item() if isinstance(tolerance, Tensor) else tolerance
        raise ValueError(f"{name} must be 0 or more, and no NaN, not {shown:g}")


def is_sequence(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:  # a number, or an array or tensor without axes
        return False
    return True


def _number(value: Any) -> float | None:
    """A float out of a number or a tensor without axes; None for anything else."""
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 and not value.is_complex() else None
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
        elif name in ("max_num_steps", "stop_at_outputs"):
            given[name] = int(value) if name == "max_num_steps" else bool(value)
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
        # The caller's dtype decides how many steps there are, and where they begin, as it does in torchdiffeq.
        first = t.detach()[0] * sign
        span = t.detach()[-1] * sign - first
        count = int(torch.ceil(span / size + 1).item())
        if count > _MOST_STEPS:
            span = span.item()
            raise ValueError(f"options['step_size'] of {size:g} makes {count} points, for a span of {span:g}: too many")
        steps = torch.arange(0, max(count - 1, 0), dtype=t.dtype) * size
        inner = (steps + first.cpu()).to(torch.float64)
        # By rounding, the last of them may lie at the end or beyond: a step of next to nothing in torchdiffeq, too.
        inner = inner.minimum(torch.nextafter(end.detach(), start.detach())) + (start - start.detach())
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
