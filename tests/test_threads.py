"""The number of threads of the native engines; that a second one never loses; processes forked beside them."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
from cpu_cases import in_a_process_of_its_own
from random_fields import random_field

import sparseflow_kernels as sfk
from sparseflow_kernels import threads
from sparseflow_kernels.engines.cpu import CpuEngine


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(threads, "_count", None)


def test_follows_torch_until_told_otherwise():
    before = torch.get_num_threads()
    assert threads.get_num_threads() == before
    try:
        torch.set_num_threads(3)
        assert threads.get_num_threads() == 3
        sfk.set_num_threads(2)
        assert threads.get_num_threads() == 2
        torch.set_num_threads(1)
        assert threads.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert sfk.set_num_threads is threads.set_num_threads


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_is_refused(count):
    with pytest.raises(ValueError, match=f"count must be at least 1, not {count}"):
        sfk.set_num_threads(count)
    assert threads.get_num_threads() == torch.get_num_threads()


@pytest.mark.parametrize("count", [1.0, "2", None, True])
def test_other_types_are_refused(count):
    with pytest.raises(TypeError, match=f"count must be an int, not {type(count).__name__}"):
        sfk.set_num_threads(count)


# ---- as many threads as pay


def seconds(engine: CpuEngine, y: torch.Tensor, count: int) -> float:
    """The quickest of many evaluations."""
    threads.set_num_threads(count)
    best = float("inf")
    for _ in range(300):
        begin = time.perf_counter()
        engine.evaluate(0.5, y)
        best = min(best, time.perf_counter() - begin)
    return best


def test_two_threads_do_not_lose_where_there_is_little_to_do():
    engine = CpuEngine(random_field((3, 16, 3), 0.5, seed=1, dtype=torch.float32))
    y = torch.randn(40, 3)  # tiles enough to be shared
    one, two = seconds(engine, y, 1), seconds(engine, y, 2)
    assert two < 2 * one, f"{one * 1e6:.1f} us by one thread, {two * 1e6:.1f} us by two"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there is no affinity to set")
def test_no_more_threads_than_the_cores_the_process_may_use():
    result = in_a_process_of_its_own("""
import os
from sparseflow_kernels import _cpu, threads
allowed = sorted(os.sched_getaffinity(0))
assert 1 <= _cpu.usable_cores() <= len(allowed)
os.sched_setaffinity(0, allowed[:1])
assert _cpu.usable_cores() == 1
threads.set_num_threads(8)
engine = CpuEngine(random_field((8, 100, 100, 8), 0.5, seed=1, dtype=torch.float32))
tasks = len(os.listdir("/proc/self/task"))
for _ in range(5):
    engine.evaluate(0.5, torch.randn(20000, 8))  # several milliseconds
assert len(os.listdir("/proc/self/task")) == tasks, "threads beyond the one core"
""")
    assert result.returncode == 0, result.stderr


# ---- forks


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="processes are not forked here")
def test_a_child_forked_while_another_thread_solves_the_same_field():
    result = in_a_process_of_its_own("""
import os, signal, threading, time
from sparseflow_kernels import _cpu, threads

threads.set_num_threads(4)
_cpu.force_threads(True)
field = random_field((3, 60, 60, 3), 0.5, seed=1, dtype=torch.float32)
engine = CpuEngine(field, divergence.plan(field, "exact"))
x = torch.randn(5000, 3)

def work():
    f, trace = engine.evaluate_with_divergence(0.5, x)
    gradient = engine.evaluate_backward(0.5, x, None, f, trace, ("tensors",))
    return [f, trace, gradient.x, *gradient.tensors]

def busy():
    while not stop:
        engine.update(field)
        work()

wanted, stop = work(), False
thread = threading.Thread(target=busy)
thread.start()
try:
    for child in range(12):
        time.sleep(0.003 * child)
        pid = os.fork()
        if pid == 0:
            signal.alarm(40)  # a child that blocks dies of it
            same = all(torch.equal(a, b) for a, b in zip(work(), wanted))
            os._exit(0 if same else 3)
        status = os.waitpid(pid, 0)[1]
        assert status == 0, f"child {child}: {status}"
finally:
    stop = True
    thread.join()
assert all(torch.equal(a, b) for a, b in zip(work(), wanted))
""")
    assert result.returncode == 0, result.stderr
