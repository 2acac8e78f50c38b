"""Is the captured field the module? Control flow on values cannot be seen in one run, so the two are compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import activations
from ..field import UnsupportedFieldError, VectorField
from .probe import Probe
from .refusal import REMEDY

POINTS = ((-1.0, 1.0), (-0.37, 0.2), (0.0, 1.0), (0.45, 3.0), (1.3, 1.0), (2.0, 0.5))  # (t, size of y)
BATCH = 5


def verify(module: nn.Module, field: VectorField, probe: Probe) -> None:
    """Raises UnsupportedFieldError unless both agree to rounding at points other than the traced one."""
    tolerance = 4000 * torch.finfo(field.dtype).eps
    for seed, (time, scale) in enumerate(POINTS, 1):
        t, y = probe.point(time, scale, seed, BATCH)
        try:
            expected = probe.run(module, t, y.clone())
        except Exception as error:
            raise UnsupportedFieldError(
                f"module {type(module).__name__}: forward(t, y) fails for another batch size or time ({error}). "
                f"{REMEDY}."
            ) from error
        got = _evaluate(field, t.reshape(()), y)
        finite = torch.isfinite(expected) & torch.isfinite(got)
        error = ((expected - got).abs() * finite).nan_to_num(0.0)
        worst = float(error.max() / (1.0 + (expected.abs() * finite).nan_to_num(0.0).max()))
        if worst > tolerance or not torch.equal(torch.isfinite(expected), torch.isfinite(got)):
            raise UnsupportedFieldError(
                f"module {type(module).__name__}: the captured field differs from the module at t = {time} (relative "
                f"error {worst:.1e}): {_suspicion(module, field, worst)} {REMEDY}."
            )


def _suspicion(module: nn.Module, field: VectorField, error: float) -> str:
    if field.dtype == torch.float64 and 0.0 < error < 1e-5:
        return (
            "is something computed in float32 on the way (torch.full or torch.tensor without dtype=)? Make it "
            "follow y.dtype, or compile the module in float32."
        )
    updates = ""
    if module.training:
        updates = " (call .eval() first if a layer updates itself in training, as spectral_norm does)"
    return f"does forward branch on values of t or y, or keep state between calls{updates}?"


def _evaluate(field: VectorField, t: Tensor, y: Tensor) -> Tensor:
    """f(t, y) by the definition, dense."""
    for layer in field.layers:
        gate, shift = layer.modulation(t)
        z = y @ layer.weight.T + layer.bias
        z = z if gate is None else gate * z
        z = z if shift is None else z + shift
        y = activations.apply(layer.activation, z)
    return y
