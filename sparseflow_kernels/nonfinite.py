"""What becomes of a gradient that is not finite: an error that explains it, or the gradient as it is, as torch's
own."""

from __future__ import annotations

import gc
from typing import Callable

from torch.amp import GradScaler

from .warn import warn

MODES = ("auto", "raise", "pass")

_mode = "auto"


def set_nonfinite_gradients(mode: str) -> None:
    """What the backward pass of a solve does from now on with a gradient that is not finite, in the whole process.

    "raise": raises GradientError, which says where it began. "pass": hands NaN and infinity on, as torchdiffeq and
    torch do, and does not look. "auto", the default: "pass" while a torch.amp.GradScaler is at work, which finds them
    itself, skips the step and lowers its scale; "raise" without one. At work is every scaler that has scaled a loss and
    still exists. A gradient that is not finite at a scale of 1 or less has other reasons than the scale, and is
    explained by a warning. For a scaler that is not torch's, say "pass".

    Holds for `odeint`, `solve` and both gradients of `odeint_adjoint` on compiled fields. Evaluations and SparseLinear
    hand on whatever comes, as torch's operations do. Raises ValueError for another mode.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"set_nonfinite_gradients: mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
    _mode = mode


def get_nonfinite_gradients() -> str:
    """What `set_nonfinite_gradients` said."""
    return _mode


def is_watched() -> bool:
    """Does anybody want to know whether a gradient is finite?"""
    return _mode != "pass"


def refuse(explain: Callable[[], Exception]) -> None:
    """A gradient is not finite. Raises explain(), or returns where the gradient is to be handed on as it is."""
    scales = [] if _mode == "raise" else _scales()
    if _mode == "pass" or (scales and max(scales) > 1.0):
        return
    error = explain()
    if not scales:
        raise error
    warn(f"{error} It is not the GradScaler's doing, whose scale is {max(scales):g} by now.")


def _scales() -> list[float]:
    """The scales of the GradScalers that have scaled a loss. A loss does not say what it was multiplied by, so they are
    looked for among all objects: a matter of 0.1 s, once an overflow."""
    found = [known for known in gc.get_objects() if issubclass(type(known), GradScaler)]
    used = [scaler for scaler in found if getattr(scaler, "_scale", True) is not None]  # the first loss makes the scale
    return [scaler.get_scale() for scaler in used if scaler.is_enabled()]
