"""Fields too large for 32-bit offsets are refused when they are compiled, at once; so is what exceeds them later."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

import sparseflow_kernels as sfk
from sparseflow_kernels import SparseLinear
from sparseflow_kernels.engines import available, choose
from sparseflow_kernels.engines.cpu import CpuEngine
from sparseflow_kernels.engines.cuda import CudaEngine, _image_bytes
from sparseflow_kernels.field import Activation, Layer, Pattern, UnsupportedFieldError, VectorField

_cpu = pytest.importorskip("sparseflow_kernels._cpu")


def sparse(out: int, into: int, entries: int = 0, dtype=torch.float32, activation="identity") -> Layer:
    """A layer with a weight in each of its first `entries` rows."""
    row_ptr = torch.arange(out + 1).clamp(max=entries)
    pattern = Pattern((out, into), row_ptr, torch.arange(entries) % into)
    bias = torch.zeros((), dtype=dtype).expand(out)
    return Layer(pattern, torch.ones(entries, dtype=dtype), bias, activation=Activation(activation))


def hourglass(width: int, dim: int = 2, entries: int = 3) -> VectorField:
    return VectorField([sparse(width, dim, entries, activation="tanh"), sparse(dim, width, 2)])


def stand_in(*shapes: tuple[int, int, int], dtype=torch.float32) -> SimpleNamespace:
    """What `unsupported` looks at, of layers (out, in, weights) that need not exist."""
    layers = [
        SimpleNamespace(
            name=str(number), out_features=out, in_features=into, gate=None, shift=None,
            pattern=SimpleNamespace(shape=(out, into), nnz=nnz, density=nnz / (out * into)),
        ) for number, (out, into, nnz) in enumerate(shapes)
    ]  # fmt: skip
    return SimpleNamespace(layers=layers, dim=shapes[0][1], dtype=dtype, device=torch.device("cpu"))


def test_the_cpu_engine_refuses_wide_fields():
    most = _cpu.MOST_ROWS
    fits = most - 2 * (2 + 1) - 1
    assert CpuEngine.unsupported(hourglass(fits)) is None
    for field in (hourglass(fits + 1), hourglass(5_000_000), VectorField([sparse(3_000_000, 3_000_000, 3)])):
        began = time.perf_counter()
        reason = CpuEngine.unsupported(field)
        assert time.perf_counter() - began < 1.0
        assert f"more than the {most} that 32-bit offsets reach" in reason and "engine='reference'" in reason
        with pytest.raises(ValueError, match="32-bit offsets"):
            CpuEngine(field)


def test_the_limit_is_the_native_one():
    builder = _cpu.BuilderF32()
    x = builder.buffer(2)
    builder.buffer(_cpu.MOST_ROWS - 3 - 1)
    builder.roles(2, False, x, x)
    builder.compile()
    builder.buffer(1)
    with pytest.raises(ValueError, match="too wide for 32-bit offsets"):
        builder.compile()


def test_compile_says_so_at_once():
    """All neurons alive, so that nothing is simplified away."""
    width = 4_300_000
    wide = VectorField([sparse(width, 2, width, activation="tanh"), Layer(
        Pattern((2, width), torch.tensor([0, width, width]), torch.arange(width)), torch.ones(width), torch.zeros(2)
    )])  # fmt: skip
    with pytest.raises(UnsupportedFieldError, match='engine="cpu" cannot run this field: .*32-bit offsets'):
        sfk.compile(wide, engine="cpu")
    engine, reason = choose(wide)
    assert engine.name == "reference" and "32-bit offsets" in reason


def test_too_many_weights():
    most = _cpu.MOST_ENTRIES
    assert CpuEngine.unsupported(stand_in((20_000, 20_000, most))) is None
    assert f"has {most + 1} weights" in CpuEngine.unsupported(stand_in((20_000, 20_000, most + 1)))


def test_divergence_and_gradient_are_wider():
    """A field that just fits: its divergence is refused, its gradient is the reference engine's."""
    field = hourglass(_cpu.MOST_ROWS * 2 // 3)
    assert CpuEngine.unsupported(field) is None
    engine = CpuEngine(field)
    assert "cannot be run" in engine.no_gradient(("x",)) and "32-bit offsets" in engine.no_gradient(("x",))
    plan = SimpleNamespace(kind="exact", form=None)
    with pytest.raises(UnsupportedFieldError, match="divergence of this field: .*32-bit offsets"):
        CpuEngine(field, plan)
    x = torch.ones(1, 2, requires_grad=True)
    compiled = sfk.compile(hourglass(_cpu.MOST_ROWS * 2 // 3), engine="cpu")
    compiled(0.0, x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_the_gpu_engines():
    layers = ((60_000, 60_000, 200_000_000), (60_000, 60_000, 200_000_000))
    assert _image_bytes(stand_in(*layers)) > 2**31 > _image_bytes(stand_in(layers[0]))
    half_full = stand_in((40_000, 40_000, 800_000_000))  # stored whole
    assert _image_bytes(half_full) > 4 * 40_000**2
    assert "wider than 65535" in _refusal(CudaEngine, hourglass(70_000))
    assert "more than the 2 GB" in _refusal(CudaEngine, stand_in(*layers))
    found, obstacle = available("triton")
    if found is not None and "triton" not in (found.unsupported(stand_in((2, 2, 4))) or "").split(" is ")[0]:
        for large in (stand_in((4, 4, 2**31)), stand_in((2**30, 4, 4), (4, 2**30, 4))):
            assert "32-bit offsets" in _refusal(found, large)


def _refusal(engine, field) -> str:
    """What the engine says of the field's size, as if the field were on a GPU that there is."""
    with pytest.MonkeyPatch.context() as patch:
        if engine is CudaEngine:
            patch.setattr(engine, "native", staticmethod(lambda: None))
            patch.setattr(engine, "device_type", "cpu")
            patch.setattr("sparseflow_kernels.engines.cuda_device.cuda_obstacle", lambda *_: None)
            patch.setattr("sparseflow_kernels.engines.cuda_device.probe", lambda *_: None)
        else:
            patch.setenv("TRITON_INTERPRET", "1")
        return engine.unsupported(field) or ""


def test_too_many_samples():
    engine = CpuEngine(hourglass(3))
    with pytest.raises(ValueError, match="y has 2147483647 rows, more than the .* that 32 bits count"):
        engine.evaluate(0.0, torch.zeros(1, 2).expand(2**31 - 1, 2))


def test_a_sparse_layer():
    row_ptr, col = torch.arange(6_000_001).clamp(max=2), torch.tensor([0, 1])
    layer = SparseLinear(Pattern((6_000_000, 2), row_ptr, col))
    with pytest.raises(ValueError, match="6000000 features .* 32-bit offsets"):
        layer(torch.ones(1, 2))
