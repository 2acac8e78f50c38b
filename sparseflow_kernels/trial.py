"""Whether a field is worth its kernels.

For a few large samples (the nodes of a graph, a grid, as one or as some) it may not be. The kernels' vectors hold a
number of several samples each. Of few samples they use few places, while torch multiplies whole matrices. Which of the
two is quicker depends on both, so a few steps of each are timed.

Where Python computes functions of t at every stage (`capture.python_times`), that may take longer than what the
kernels gain; both are timed as well.

Nor is it for one or two evaluations of a small net, as between the observations of an ODE-RNN: to begin a solve takes
as long as several of them.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any, Callable

import torch
import torchdiffeq
from torch import Tensor, nn

from .capture.untouched import untouched
from .compiled_field import CompiledField
from .devices import lasting
from .engines.reference import is_autocast_enabled
from .field.layout import State
from .gradients import only_torch
from .numerics.tableaus import METHODS, FixedTableau
from .odeint import odeint

VECTOR = 16  # samples, of float32
SMALLEST = 8192  # multiply-adds a sample; below, torch's overhead alone takes longer
MARGIN = 1.25  # by which torch has to be quicker
STEPS, ROUNDS = 5, 3  # as few as a short solve takes
FEW, LITTLE = 2, 1_000_000  # evaluations, and their multiply-adds: half a millisecond of torch's with gradients


def is_over_at_once(module: nn.Module, y0: Any, t: Any, method: str | None, options: dict | None) -> bool:
    """Whether a solve has so few evaluations, of so little work, that torch is through before an engine has begun."""
    tableau, options = METHODS.get(method or ""), options or {}
    if not isinstance(tableau, FixedTableau) or not isinstance(y0, Tensor) or not isinstance(t, Tensor) or only_torch():
        return False
    steps, size = t.numel() - 1, options.get("step_size")
    if options.get("grid_constructor") is not None or t.dim() != 1 or steps < 1 or is_autocast_enabled(y0):
        return False
    if size is not None:
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):  # what is wrong is told by the solve
            steps = _steps_of(t, float(size))
    evaluations = steps * tableau.stages_per_step
    if not 0 < evaluations <= FEW or any(parameter.dim() > 2 for parameter in module.parameters()):  # convolutions
        return False
    samples, numbers = y0.shape[:-1].numel(), sum(parameter.numel() for parameter in module.parameters())
    return 0 < evaluations * samples * numbers < LITTLE


def _steps_of(t: Tensor, size: float) -> int:
    """0 where there is no telling."""
    steps = abs(float(t[-1].detach() - t[0].detach())) / size
    return math.ceil(steps - 1e-6) if math.isfinite(steps) else 0


@lasting
def slower_than_torch(field: CompiledField, module: nn.Module, y0: State) -> str | None:
    """The reason to leave the module to torchdiffeq, for states like y0; None where there is none. With gradients where
    these are on."""
    first, layout = y0[0] if isinstance(y0, tuple) else y0, field.layout
    samples = first.shape[:-1].numel() if layout is None else len(first) if layout.batched else 1
    in_python = bool(field.python_functions)
    if not in_python and (samples >= VECTOR or field.nnz < SMALLEST):
        return None
    if any(parameter._backward_hooks for parameter in module.parameters()):
        return None  # which would be called
    times = []
    try:
        for _ in range(1 + ROUNDS):
            times.append([_alone(module, lambda: _step(*one, y0)) for one in _sides(field, module)])
    except Exception:  # noqa: BLE001 - what the user's code raises, it raises in the solve
        return None
    ours, theirs = map(min, zip(*times[1:]))
    if ours <= MARGIN * theirs:
        return None
    if in_python:
        return (
            f"what Python computes of t is computed at every stage, and torch is quicker: {STEPS} steps take "
            f"{1e3 * theirs:.2g} ms there and {1e3 * ours:.2g} ms here; compute it with tensors"
        )
    return (
        f"its state is {samples} large sample{'s' * (samples > 1)}, of which torch is quicker: {STEPS} steps take "
        f"{1e3 * theirs:.2g} ms there and {1e3 * ours:.2g} ms here, where vectors hold {VECTOR} samples"
    )


def _sides(field: CompiledField, module: nn.Module) -> tuple[tuple[Callable, nn.Module], ...]:
    return (odeint, field), (torchdiffeq.odeint, module)


def _step(solve: Callable[..., Any], func: nn.Module, y0: State) -> None:
    """Steps of rk4, and back."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    wanted = torch.is_grad_enabled()
    starts = tuple(part.detach().clone().requires_grad_(wanted) for part in parts)
    times = torch.tensor([0.0, 1e-3], dtype=starts[0].dtype, device=starts[0].device)
    options = {"step_size": 1e-3 / STEPS}
    found = solve(func, starts if isinstance(y0, tuple) else starts[0], times, method="rk4", options=options)
    ends = found if isinstance(found, tuple) else (found,)
    if not wanted:
        return
    trained = [p for p in func.parameters() if p.requires_grad]
    loss: Tensor = sum(end[-1].sum() for end in ends)  # type: ignore[assignment]
    torch.autograd.grad(loss, [*starts, *trained], allow_unused=True, retain_graph=True)


def _alone(module: nn.Module, run: Callable[[], None]) -> float:
    """The seconds that it takes, after which the module is as it was."""
    with untouched(module):
        return _seconds(run)


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
