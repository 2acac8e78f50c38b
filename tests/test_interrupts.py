"""Ctrl-C ends whatever the CPU engine is at: an alarm raises what Ctrl-C raises, after a while, in work that would take
far longer. What is aimed at is 0.2 s; machines that test are busy, and the bound here tells that from a hang."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from cpu_cases import threads  # noqa: F401

import sparseflow_kernels as sfk
from sparseflow_kernels import SparseLinear
from sparseflow_kernels.divergence_field import with_divergence
from sparseflow_kernels.engines.base import SolveRequest, SolveResult
from sparseflow_kernels.engines.cpu import CpuEngine
from sparseflow_kernels.field import Activation, Layer, Pattern, VectorField
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import METHODS

_cpu = pytest.importorskip("sparseflow_kernels._cpu")
pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread only"
)
AFTER, LATENCY = 0.25, 1.5
F64 = torch.float64


def wide_field(width: int = 1024, dim: int = 2) -> VectorField:
    def layer(out: int, into: int, activation: str) -> Layer:
        pattern = Pattern.from_mask(torch.ones(out, into, dtype=torch.bool))
        return Layer(pattern, torch.randn(pattern.nnz) / into, torch.zeros(out), activation=Activation(activation))

    return VectorField([layer(width, dim, "tanh"), layer(width, width, "tanh"), layer(dim, width, "identity")])


@pytest.fixture(scope="module")
def field() -> VectorField:
    torch.manual_seed(0)
    return wide_field()


@pytest.fixture(scope="module")
def compiled(field):
    return sfk.compile(field, engine="cpu")


def waited() -> float:
    """Seconds that this thread has been ready to run while others had the processor; Linux says."""
    counts = Path("/proc/thread-self/schedstat")
    return int(counts.read_text().split()[1]) * 1e-9 if counts.exists() else 0.0


def interrupted(work) -> None:
    """work() is ended by the alarm, soon."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    began = time.perf_counter() - waited()
    try:
        signal.setitimer(signal.ITIMER_REAL, AFTER)
        with pytest.raises(KeyboardInterrupt):
            work()
        late = time.perf_counter() - waited() - began - AFTER
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert late < LATENCY, f"{late:.2f} s after the signal"


def request_of(x: torch.Tensor, method: str, steps: int) -> SolveRequest:
    grid = torch.linspace(0.0, 1.0, steps + 1, dtype=F64)
    return SolveRequest(
        x, None, torch.tensor([0.0, 1.0], dtype=F64), 1, METHODS[method], (1e-9,), (1e-9,), StepOptions(), grid=grid
    )


def many(rows: int, columns: int = 2) -> torch.Tensor:
    return torch.zeros(rows, columns)


BIG = 200_000  # samples: one evaluation of them takes many seconds

WORK = {
    "one long step": lambda f: sfk.solve(f, many(BIG), torch.tensor([0.0, 1.0])),
    "tiles that step on their own": lambda f: sfk.solve(
        f, torch.randn(2000, 2), torch.tensor([0.0, 1e4]), rtol=1e-9, atol=1e-9, step_control="per_tile"
    ),
    "a fixed grid": lambda f: sfk.odeint(f, torch.randn(50, 2), torch.linspace(0, 1, 20_000), method="rk4"),
    "a long step of a fixed grid": lambda f: sfk.odeint(f, many(BIG), torch.tensor([0.0, 1.0]), method="euler"),
    "an evaluation": lambda f: f(0.0, many(BIG)),
    "an evaluation with its divergence": lambda f: with_divergence(f, "hutchinson", torch.ones(BIG, 2))(
        torch.tensor(0.0), (many(BIG), torch.zeros(BIG))
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WORK)
def test_forwards(what, compiled, threads):  # noqa: F811
    sfk.set_num_threads(2)
    x = torch.randn(5, 2)
    with torch.no_grad():
        before = compiled(0.3, x)
        interrupted(lambda: WORK[what](compiled))
        assert torch.equal(compiled(0.3, x), before)
        solved = sfk.odeint(compiled, x, torch.tensor([0.0, 0.1]))
    assert torch.equal(solved[0], x) and bool(torch.isfinite(solved).all())


@pytest.mark.parametrize("count", [1, 2])
def test_backward_passes(count, field, threads):  # noqa: F811
    sfk.set_num_threads(count)
    engine = CpuEngine(field)
    small = torch.randn(7, 2)
    wanted = ("x", "tensors")

    def gradient() -> list[torch.Tensor]:
        found = engine.evaluate_backward(0.3, small, None, torch.ones_like(small), None, wanted)
        return [found.x, *found.tensors]

    before = gradient()
    # steps of no solve at all, but as many as there may be
    steps, x = 2000, many(200)
    states = torch.zeros(steps + 1, 200, 2)
    taken = torch.stack((torch.arange(steps) / steps, torch.full((steps,), 1 / steps)), 1).to(F64)
    result = SolveResult(None, None, 0, steps, 0, taken, states=states, derivatives=torch.zeros(0, 200, 2))
    interrupted(lambda: engine.solve_backward(request_of(x, "rk4", steps), result, torch.ones(2, 200, 2), None, wanted))
    interrupted(lambda: engine.evaluate_backward(0.0, many(BIG), None, torch.ones(BIG, 2), None, wanted))
    assert all(torch.equal(now, then) for now, then in zip(gradient(), before))


def test_through_autograd(compiled):
    x = many(60_000).requires_grad_()
    loss = compiled(0.0, x).sum()
    interrupted(loss.backward)


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_sparse_layer(part, threads):  # noqa: F811
    sfk.set_num_threads(2)
    layer = SparseLinear.from_linear(torch.nn.Linear(1000, 1000))
    x, small = torch.zeros(20_000, 1000), torch.randn(3, 1000)
    before = layer(small).detach()
    if part == "forward":
        with torch.no_grad():
            interrupted(lambda: [layer(x) for _ in range(500)])
    else:
        pattern, sums = layer.pattern, torch.zeros(layer.pattern.nnz)
        native = _cpu.SparseLinearF32(1000, 1000, pattern.row_ptr.int().numpy(), pattern.col.int().numpy())
        interrupted(lambda: [
            native.gradient(x.data_ptr(), x.data_ptr(), len(x), 2, sums.data_ptr()) for _ in range(500)
        ])
    assert torch.equal(layer(small), before)


def test_packing(threads):  # noqa: F811
    """Four million weights to sort into streams for five widths, one of which the clock chooses."""
    engine = CpuEngine(wide_field(2000))
    x = torch.randn(4, 2)
    interrupted(lambda: [CpuEngine(engine._field).evaluate(0.0, x) for _ in range(20)])
    assert bool(torch.isfinite(engine.evaluate(0.0, x)).all())


def test_who_waits_for_another_thread(field):
    """The main thread waits for a program that another thread is at."""
    engine = CpuEngine(field)
    engine.program.force_width(0)
    x = many(30_000)
    thread = threading.Thread(target=lambda: engine.evaluate(0.0, x))
    thread.start()
    time.sleep(0.1)
    waiting = thread.is_alive()
    interrupted(lambda: [engine.evaluate(0.0, x) for _ in range(20)])
    thread.join()
    assert waiting, "the other thread was done before"


def test_measurements():
    interrupted(lambda: _cpu.fma_peak(60.0))
    interrupted(lambda: _cpu.bench_spmm(2000, 2000, 0.5, repeats=10_000))
    interrupted(lambda: _cpu.activation_rate(1, repeats=1_000_000))
