"""Calls that meet: a compiled field whose function of time runs the same field, from within or from another thread."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from cpu_cases import in_a_process_of_its_own, threads  # noqa: F401

import sparseflow_kernels as sfk
from sparseflow_kernels.engines.native import OneCaller
from sparseflow_kernels.field import Activation, Layer, Pattern, TimeFunction, VectorField

pytest.importorskip("sparseflow_kernels._cpu")
MESSAGE = "a function of time may not run the same compiled field"
T = torch.tensor([0.0, 1.0])


class Gate:
    """A function of time that first does what it is told to, once at a time."""

    def __init__(self) -> None:
        self.act, self.inside, self.calls = None, False, 0

    def __call__(self, t):
        if self.act is not None and not self.inside:
            self.inside, self.calls = True, self.calls + 1
            try:
                self.act(t)
            finally:
                self.inside = False
        return torch.sigmoid(torch.arange(8.0) * t)


def field_with(gate) -> VectorField:
    torch.manual_seed(0)
    first, last = (Pattern.from_mask(torch.ones(shape, dtype=torch.bool)) for shape in ((8, 2), (2, 8)))
    return VectorField([
        Layer(first, torch.randn(16) * 0.5, torch.randn(8), TimeFunction(gate), None, Activation("tanh")),
        Layer(last, torch.randn(16) * 0.5, torch.zeros(2)),
    ])  # fmt: skip


def outer(field, batch: int, **more):
    with torch.no_grad():
        return sfk.solve(field, torch.ones(batch, 2), T, **more).ys


def another_solve(field, batch: int, method: str):
    with torch.no_grad():
        return sfk.odeint(field, torch.randn(batch, 2), torch.tensor([0.0, 0.3]), method=method)


INNER = {
    "solve": lambda f: another_solve(f, 900, "dopri8"),
    "solve of few": lambda f: another_solve(f, 2, "rk4"),
    "evaluate": lambda f: f(0.1, torch.randn(300, 2)),
    "backward": lambda f: f(0.1, torch.randn(300, 2).requires_grad_()).sum().backward(),
    "widths": lambda f: f.packed().program.force_width(1),
    "values": lambda f: f.packed().program.renew([(0, (torch.zeros(16).data_ptr(), 16))], [], []),
    "measure": lambda f: f.packed().program.tile_seconds(),
}


@pytest.mark.parametrize("batch", [5, 200, 3000])
@pytest.mark.parametrize("inner", INNER)
def test_a_function_of_time_that_runs_the_field_is_told_so(inner, batch):
    gate = Gate()
    field = sfk.compile(field_with(gate), engine="cpu")
    before = outer(field, batch)
    gate.act = lambda t: INNER[inner](field)
    with pytest.raises(RuntimeError, match=MESSAGE):
        outer(field, batch)
    with torch.no_grad(), pytest.raises(RuntimeError, match=MESSAGE):
        field(0.2, torch.ones(batch, 2))
    assert gate.calls == 2
    gate.act = None
    assert torch.equal(outer(field, batch), before)


def test_it_may_go_on_without():
    """Who catches the error has the right solution."""
    gate = Gate()
    field = sfk.compile(field_with(gate), engine="cpu")
    before = outer(field, 100)

    def act(t):
        with pytest.raises(RuntimeError, match=MESSAGE):
            another_solve(field, 3000, "dopri5")

    gate.act = act
    assert torch.equal(outer(field, 100), before) and gate.calls > 3


@pytest.mark.parametrize("count", [1, 3])
def test_from_a_helping_thread(count, threads):  # noqa: F811
    """Tiles that step on their own ask for the functions of time on whatever thread they are."""
    threads(count)
    gate = Gate()
    field = sfk.compile(field_with(gate), engine="cpu")
    before = outer(field, 3000, step_control="per_tile")
    gate.act = lambda t: another_solve(field, 5, "rk4")
    with pytest.raises(RuntimeError, match=MESSAGE):
        outer(field, 3000, step_control="per_tile")
    gate.act = None
    assert torch.equal(outer(field, 3000, step_control="per_tile"), before)


def test_another_field_may_be_run(threads):  # noqa: F811
    threads(3)
    gate = Gate()
    field, other = sfk.compile(field_with(gate), engine="cpu"), sfk.compile(field_with(Gate()), engine="cpu")
    before = outer(field, 3000, step_control="per_tile"), outer(field, 200)
    gate.act = lambda t: another_solve(other, 700, "dopri5")
    found = outer(field, 3000, step_control="per_tile"), outer(field, 200)
    assert gate.calls > 3 and all(map(torch.equal, found, before))


def test_new_values_from_within():
    """The solve that is under way ends with the values it began with; a call made within has the new ones."""
    gate = Gate()
    field = sfk.compile(field_with(gate), engine="cpu")
    before, found = outer(field, 50), []

    def act(t):
        if not found:
            with torch.no_grad():
                field.layers[0].values.mul_(0.5)
            found.append(another_solve(field, 10, "dopri5"))

    gate.act = act
    assert torch.equal(outer(field, 50), before) and len(found) == 1
    gate.act = None
    after = outer(field, 50)
    assert not torch.equal(after, before)
    fresh = sfk.compile(field_with(Gate()), engine="cpu")
    with torch.no_grad():
        fresh.layers[0].values.mul_(0.5)
    assert torch.equal(outer(fresh, 50), after)


def test_a_grid_constructor_may_solve_the_field():
    field = sfk.compile(field_with(Gate()), engine="cpu")
    solved = []

    def grid(func, y0, t):
        solved.append(another_solve(field, 400, "dopri5"))
        return torch.linspace(0.0, 1.0, 11)

    with torch.no_grad():
        found = sfk.odeint(field, torch.ones(7, 2), T, method="rk4", options={"grid_constructor": grid})
        plain = sfk.odeint(field, torch.ones(7, 2), T, method="rk4", options={"step_size": 0.1})
    assert len(solved) == 1
    torch.testing.assert_close(found, plain)


def test_two_threads_at_once():
    """Each gets what it would get alone; who waits does not keep the other's function of time from Python."""
    gate = Gate()
    field = sfk.compile(field_with(gate), engine="cpu")
    sizes = (5, 700, 33, 3000)
    alone, found = [outer(field, n) for n in sizes], {}

    def run(first: int) -> None:
        for turn in range(12):
            i = (first + turn) % len(sizes)
            found[first, turn] = torch.equal(outer(field, sizes[i]), alone[i])

    workers = [threading.Thread(target=run, args=(first,)) for first in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(found) == 36 and all(found.values())


def test_a_signal_handler_is_told_so():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    field = sfk.compile(field_with(Gate()), engine="cpu")
    program, heard = field.packed().program, []
    program.force_width(0)
    x = torch.zeros(2_000_000, 2)
    f = torch.empty_like(x)

    def handler(*_):
        try:
            program.evaluate(0.0, x.data_ptr(), 0, 5, 1, f.data_ptr(), 0)
        except RuntimeError as error:
            heard.append(str(error))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)  # again, where it came between two calls
        for _ in range(2000):
            program.evaluate(0.0, x.data_ptr(), 0, len(x), 1, f.data_ptr(), 0)
            if heard:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert heard and MESSAGE in heard[0]


def test_endless_recursion_is_an_error_too():
    """A function of time that makes a field of its own to run, which asks it, and so on."""
    result = in_a_process_of_its_own("""
import sys
import sparseflow_kernels as sfk
from test_reentrance import field_with
def gate(t):
    with torch.no_grad():
        sfk.compile(field_with(gate), engine="cpu")(0.0, torch.ones(3, 2))
    return torch.ones(8)
sys.setrecursionlimit(400)
try:
    gate(0.0)
except RecursionError:
    print("told so")
""")
    assert result.returncode == 0 and "told so" in result.stdout, result.stderr[-2000:]


def test_the_lock_of_engines_in_python():
    lock, order = OneCaller(), []
    with lock:
        with pytest.raises(RuntimeError, match=MESSAGE):
            with lock:
                pass
        other = threading.Thread(target=lambda: [lock.__enter__(), order.append("other"), lock.__exit__()])
        other.start()
        other.join(0.1)
        order.append("first")
    other.join(10)
    assert order == ["first", "other"]
    with lock:
        pass
