"""A solve handed over to torchdiffeq, and what can be told of it afterwards."""

from __future__ import annotations

import copy
from typing import Any, Callable

import torch
import torchdiffeq
from torch import Tensor

from ..compiled_field import CompiledField
from ..divergence_field import DivergenceField
from ..hooks import CALLBACKS
from ..numerics.tableaus import ADAPTIVE
from ..solution import Solution, Stats
from .arguments import State


def begin(func: Callable, y0: State) -> None:
    """A compiled field with Hutchinson noise draws it once per solve, also when torchdiffeq runs the solve."""
    if isinstance(func, DivergenceField) and isinstance(y0, tuple) and y0 and isinstance(y0[0], Tensor):
        func.begin_solve(y0[0])


def with_own_numbers(func: Callable, y0: State) -> Callable:
    """func, or its twin that keeps the noise and the context of the solve that starts now: the adjoint is asked for
    them when other solves may have drawn, or been given, others."""
    begin(func, y0)
    if isinstance(func, CompiledField):
        return func.pinned()
    if not isinstance(func, DivergenceField):
        return func
    twin = copy.copy(func)
    if func._drawn is not None:
        twin._buffers = {**func._buffers, "noise": func._drawn}
    if isinstance(func.field, CompiledField):
        twin._modules = {**func._modules, "field": func.field.pinned()}
    return twin


class _Observed:
    """func as torchdiffeq sees it, counting evaluations and noting accepted steps on the way."""

    def __init__(self, func: Callable, with_callbacks: bool) -> None:
        self._func = func
        self.nfe = 0
        self.accepted: list[tuple[Tensor, Tensor]] = []  # (t, dt), left where they are: reading waits for a GPU
        self.rejected = 0
        if with_callbacks:
            self.callback_accept_step = self._accept
            self.callback_reject_step = self._reject

    def __call__(self, t: Tensor, y: Any) -> Any:
        self.nfe += 1
        return self._func(t, y)

    def __getattr__(self, name: str) -> Any:  # callbacks of func itself
        if name in CALLBACKS:
            return getattr(self._func, name)
        raise AttributeError(name)

    def _accept(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.accepted.append((t0.detach(), dt.detach()))
        if (callback := getattr(self._func, "callback_accept_step", None)) is not None:
            callback(t0, y0, dt)

    def _reject(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.rejected += 1
        if (callback := getattr(self._func, "callback_reject_step", None)) is not None:
            callback(t0, y0, dt)


def handed_over(options: dict | None, t: Tensor | None, stop: bool = False) -> dict | None:
    """The options as torchdiffeq takes them, which lacks stop_at_outputs: stops at the times of t, beside the caller's
    own, or none for None. stop: where the options do not say."""
    stop = stop if options is None else options.get("stop_at_outputs", stop)
    options = options and {name: value for name, value in options.items() if name != "stop_at_outputs"}
    if not stop or t is None:
        return options
    options = options or {}
    own = [points for name in ("step_t", "jump_t") if (points := options.get(name)) is not None]
    known = [torch.as_tensor(points, dtype=torch.float64).reshape(-1).tolist() for points in own]
    stops = [time for time in t.detach().to(torch.float64).tolist()[1:] if not any(time in points for points in known)]
    if (given := options.get("step_t")) is not None:
        stops += torch.as_tensor(given, dtype=torch.float64).reshape(-1).tolist()
    return {**options, "step_t": torch.tensor(stops, dtype=torch.float64)}


def solve_by_torchdiffeq(
    func: Callable, y0: State, t: Tensor, rtol: Any, atol: Any, method: str | None, options: dict | None,
    event_fn: Callable | None, reason: str,
) -> Solution:  # fmt: skip
    method = "dopri5" if method is None else method
    tells_steps = method in ADAPTIVE
    observed = _Observed(func, tells_steps)
    ys = torchdiffeq.odeint(
        observed, y0, t, rtol=rtol, atol=atol, method=method, options=options, event_fn=event_fn
    )
    event_t = None
    if event_fn is not None:
        event_t, ys = ys
    steps = None
    if tells_steps:
        flat = [value.reshape(()) for step in observed.accepted for value in step]
        steps = (torch.stack(flat) if flat else torch.empty(0)).to("cpu", torch.float64).reshape(-1, 2)
    stats = Stats(
        observed.nfe,
        len(observed.accepted) if tells_steps else None,
        observed.rejected if tells_steps else None,
        steps,
        "torchdiffeq",
        method,
        reason=reason,
    )
    return Solution(ys, stats, event_t)
