"""Reading the program out of a user's `nn.Module`: `forward(t, y)` -> VectorField, by meaning, not by class names.

The module runs once, on a small random batch, under a dispatch mode that sees every aten operation (tracer). Beside
each tensor stands an abstract value (values):

- a constant, independent of t and y: parameters, and whatever is computed from them (prune masks, parametrizations);
- a function of t alone; affine functions and sigmoids of them are kept as such, others as a replayable graph
  (algebra, time_program);
- a state, which depends on y: every element carries the number of a row of the program. Views, slices, joins and
  permutations are done by applying the very same operation to the numbers (rules); arithmetic makes new rows (rows).

The rows of the result, followed back to y, are the layers of the field (program). What does not fit raises
UnsupportedFieldError with the module path and the operation (refusal). Control flow on values cannot be seen; the field
is therefore always compared with the module at other points and times (verify).
"""

from __future__ import annotations

import torch
from torch import nn

from ..field import VectorField
from ..origin import Key, Origin
from .probe import check_arguments, find_probe, untouched
from .program import assemble
from .tracer import Tracer
from .verify import verify

__all__ = ["capture", "capture_with_origins"]


def capture(module: nn.Module, dim: int | None = None) -> VectorField:
    """The program of `module.forward(t, y)`, y [batch, dim] (or [dim], row by row, if only that works), t 0-d (or
    [1], [1, 1] if only those work).

    dim: size of the state; inferred from the module's weights if None.
    The module is left as it was: parameters, buffers, attributes, hooks and random state. All tensors of the field are
    detached copies in the module's dtype (float32 or float64) and device. A pruned entry (exact zero) is not in the
    pattern.

    Raises UnsupportedFieldError where the module cannot be expressed (naming the module path, the operation and the
    remedy), or where it differs from what was read; ValueError for NaN or infinite weights and for a `dim` that does
    not fit or cannot be inferred; TypeError for something that is no nn.Module with a forward of two arguments.
    """
    return capture_with_origins(module, dim)[0]


def capture_with_origins(module: nn.Module, dim: int | None = None) -> tuple[VectorField, dict[Key, Origin]]:
    """capture(), and for every tensor of the field where its entries come from, parameters named as by the module."""
    check_arguments(module, dim)
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    with untouched(module), torch.no_grad():
        probe = find_probe(module, dim)
    with untouched(module), torch.no_grad():  # restored: a module may keep what a call has computed
        tracer = Tracer(module, probe)
        field, origins = assemble(tracer, *tracer.read(*probe.point()))
    with untouched(module), torch.no_grad():
        verify(module, field, probe)
    return field, origins
