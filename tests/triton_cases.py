"""What the tests of the triton engine share. They run on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1 was set
before Python started (test_triton_interpreted.py starts such processes); else they skip. Shapes are tiny: the interpreter
takes milliseconds per tile."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() and not INTERPRETED else torch.device("cpu")
F32, F64 = torch.float32, torch.float64

if DEVICE.type == "cpu" and not INTERPRETED:
    pytest.skip("no GPU here; test_triton_interpreted.py runs this file in Triton's interpreter", allow_module_level=True)

from sparseflow_kernels.field import TimeFunction, VectorField  # noqa: E402


class _Moved:
    """A function of time of the tests' own, whose numbers are on the CPU."""

    def __init__(self, function) -> None:
        self.function = function

    def __call__(self, t: Tensor) -> Tensor:
        return self.function(t.cpu()).to(t.device)


def on_device(field: VectorField) -> VectorField:
    def part(value):
        return TimeFunction(_Moved(value.function), value.rows) if isinstance(value, TimeFunction) else value

    field = field.map_tensors(lambda tensor: tensor.to(DEVICE))
    layers = [replace(layer, gate=part(layer.gate), shift=part(layer.shift)) for layer in field.layers]
    return VectorField(layers, field.notes)


def close(got: Tensor | None, want: Tensor | None, bound: float = 1e-10, what: str = "") -> None:
    """Within `bound` of the largest number wanted, or of 1; None stands for zeros."""
    if want is None or got is None:
        given = got if want is None else want
        assert given is None or not bool(given.any()), what
        return
    assert got.shape == want.shape and got.dtype == want.dtype and got.device == want.device, what
    if want.numel():
        error = (got - want).abs().max() / want.abs().max().clamp(min=1.0)
        assert error <= bound, f"{what}: {error:.2e}"
