"""What the tests of the CUDA engine share. They run on a GPU where there is one and the extension is built; elsewhere on
the CPU, where the same kernels run thread by thread over a shim (csrc/tests/cuda_host), if the module `_cuda_host` is built
(`make native`); else they skip. Shapes are small: the shim takes nanoseconds for what a GPU's thread does at once."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cpu_cases import states as cpu_states
from random_fields import random_field
from test_cpu_engine import any_field
from torch import Tensor

from sparseflow_kernels.divergence import DivergencePlan
from sparseflow_kernels.engines import cuda_shapes
from sparseflow_kernels.engines.base import Engine, SolveRequest
from sparseflow_kernels.engines.cuda import CudaEngine
from sparseflow_kernels.engines.cuda_solve import CudaSolver
from sparseflow_kernels.field import LinearShift, SigmoidGate, TimeFunction, VectorField
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import FIXED, METHODS

F32, F64 = torch.float32, torch.float64
T = 0.375  # exact in float32


def _host_module():
    """The kernels on the host: the file SPARSEFLOW_CUDA_HOST names, or in that folder; else in build/native."""
    named = os.environ.get("SPARSEFLOW_CUDA_HOST")
    place = Path(named) if named else Path(__file__).parent.parent / "build" / "native"
    found = [place] if place.is_file() else sorted(place.glob("_cuda_host*.so"))
    if not found:
        pytest.skip(f"no GPU here, and no _cuda_host*.so in {place}: `make native` builds it", allow_module_level=True)
    spec = importlib.util.spec_from_file_location("_cuda_host", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _native_module():
    if torch.cuda.is_available():
        try:
            return CudaEngine.native()
        except ImportError:
            pass
    return None


NATIVE = _native_module()
ON_GPU = NATIVE is not None
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
NATIVE = NATIVE or _host_module()


class _Limited:
    """The native module, on a device that has less of something."""

    def __init__(self, **limits: int) -> None:
        self._limits = limits

    def __getattr__(self, name: str):
        return getattr(NATIVE, name)

    def probe(self) -> dict:
        found = NATIVE.probe()
        return found | {"devices": [one | self._limits for one in found["devices"]]}


def engine_on(engine: type[CudaSolver] = CudaEngine, **limits: int) -> type[CudaSolver]:
    """The engine on a device with other limits: shared_per_block (bytes), multiprocessors, ..."""
    module = _Limited(**limits)

    class Limited(engine):
        device_type = DEVICE.type

        @staticmethod
        def native():
            return module

    return Limited


TestedEngine = engine_on()


@pytest.fixture(autouse=True)
def poison():
    """What torch.empty gives is full of NaNs: what a kernel forgets to write, or reads too early, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def dense_above(monkeypatch):
    """Sets from which density on a matrix is stored whole."""
    return lambda density: monkeypatch.setattr(cuda_shapes, "DENSE_ABOVE", density)


def on_device(field: VectorField) -> VectorField:
    return field.map_tensors(lambda tensor: tensor.to(DEVICE))


def states(batch: int, dim: int, dtype=F64, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, noise = cpu_states(batch, dim, dtype, seed)
    return x.to(DEVICE), noise.to(DEVICE)


def field_of(sizes=(3, 12, 9, 3), dtype=F64, **options) -> VectorField:
    defaults = dict(density=0.5, activation="tanh", gate=True, shift=True, seed=5)
    return on_device(random_field(sizes, dtype=dtype, **(defaults | options)))


def kernels_field(seed: int) -> VectorField:
    """`test_cpu_engine.any_field` with gates and shifts that a kernel can compute."""

    def part(value, kind, out: int):
        if not isinstance(value, TimeFunction):
            return value
        generator = torch.Generator().manual_seed(seed)
        return kind(*(torch.randn(out, generator=generator, dtype=F64) for _ in range(2)))

    field = any_field(seed)
    return on_device(VectorField([
        replace(layer, gate=part(layer.gate, SigmoidGate, layer.out_features),
                shift=part(layer.shift, LinearShift, layer.out_features))
        for layer in field.layers
    ]))  # fmt: skip


def request_of(
    engine: Engine, x: Tensor, noise: Tensor | None = None, method: str = "dopri5", *, times=(0.2, 0.5, 1.1),
    tolerance: float = 1e-5, **more,
) -> SolveRequest:  # fmt: skip
    """A solve of the engine's own kind from x; tolerances and l differ between components."""
    plan: DivergencePlan | None = engine.plan
    times = torch.as_tensor(times, dtype=F64)
    given = dict(
        x=x, l=None, times=times, sign=1, tableau=METHODS[method], rtol=(tolerance,), atol=(tolerance,),
        options=StepOptions(),
        grid=torch.linspace(float(times[0]), float(times[-1]), 6, dtype=F64) if method in FIXED else None,
    )  # fmt: skip
    if plan is not None:
        tolerances = (tolerance, 2 * tolerance)
        given |= dict(l=torch.linspace(-1, 1, len(x), dtype=x.dtype, device=x.device), rtol=tolerances, atol=tolerances)
        given["noise"] = noise if plan.kind == "hutchinson" else None
    return SolveRequest(**given | more)


def close(got: Tensor | None, want: Tensor | None, bound: float = 1e-10, what: str = "") -> None:
    """Within `bound` of the largest number wanted, or of 1, NaNs in the same places; None stands for zeros."""
    if want is None or got is None:
        given = got if want is None else want
        assert given is None or not bool(given.any()), what
        return
    assert got.shape == want.shape and got.dtype == want.dtype and got.device == want.device, what
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaNs in other places"
    got, want = got.nan_to_num(), want.nan_to_num()
    if want.numel():
        error = (got - want).abs().max() / want.abs().max().clamp(min=1.0)
        assert error <= bound, f"{what}: {error:.2e}"


def same_bits(one, other, *what) -> None:
    """Tensors, or sequences of them and None, are equal bit for bit (a NaN is a NaN)."""
    if isinstance(one, Tensor):
        one, other = (one,), (other,)
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None), what
        if a is not None:
            assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan()), what
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), what
