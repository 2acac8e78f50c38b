"""How capture says no."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..field import UnsupportedFieldError

REMEDY = "Use the module uncompiled with sfk.odeint, which hands it to torchdiffeq"
TENSORS = (
    "Compute it with tensors: torch.where(t > a, b, c) for a branch, torch.clamp for min and max, "
    "table[torch.searchsorted(knots, t)] for a lookup (and, for np.interp, torch.lerp between two of its rows), torch.sin(t) "
    "for math.sin(t)"
)
TUPLES = (
    "pass an example of the state, like=(x0, v0), so that its sizes are known; or compile the network inside it that "
    "maps (t, y) to dy/dt, and let sfk.with_divergence add the log-density; other parts of the state can be columns of "
    "one tensor (torch.cat)"
)


class NotFinite(ValueError):
    """Weights that are NaN or infinite."""


class NeedsContext(Exception):
    """A constant that differs from sample to sample: read again, with the module's tensors as context."""


class PythonValue(UnsupportedFieldError):
    """Python makes something of the value that t has in one call (`python_times`)."""


def refuse(what: str, remedy: str = REMEDY, cause: Exception | None = None) -> NoReturn:
    """Raises UnsupportedFieldError; the tracer puts the module path in front of it."""
    raise UnsupportedFieldError(f"{what} cannot be expressed as a layer of a vector field. {remedy}.") from cause


def refuse_python_value(what: str) -> NoReturn:
    """The same for what Python makes of the value that t or y has in one call."""
    raise PythonValue(
        f"{what}: Python sees the value of one call alone, so the field would be wrong at every other. {TENSORS}. Or "
        f"{REMEDY[0].lower()}{REMEDY[1:]}."
    )


def with_sparsify(module: nn.Module, error: UnsupportedFieldError) -> UnsupportedFieldError:
    """The error, with the remedy for single layers where there are pruned ones."""
    pruned = [
        name for name, part in module.named_modules()
        if name and parametrize.type_before_parametrizations(part) is nn.Linear and _mostly_zero(part.weight)
    ]
    if not pruned or "sfk.odeint" not in str(error):
        return error
    layers = f"{pruned[0]!r}" if len(pruned) == 1 else f"{pruned[0]!r} and {len(pruned) - 1} more"
    text = str(error).rstrip(".")
    hint = f"sfk.sparsify_(module) makes its pruned linear layers ({layers}) sparse there."
    return UnsupportedFieldError(f"{text}. {hint}")


def _mostly_zero(weight: torch.Tensor) -> bool:
    return 2 * int(torch.count_nonzero(weight)) <= weight.numel()
