"""Resident memory stays where it is, over thousands of solves, evaluations, training steps and compilations, and over
calls that end in an exception. Each in a process of its own, after a warm-up."""

from __future__ import annotations

import sys

import pytest
from cpu_cases import in_a_process_of_its_own

pytest.importorskip("sparseflow_kernels._cpu")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")

PROGRAM = """
import ctypes, gc, os, threading
import sparseflow_kernels as sfk
from torch import nn

class Field(nn.Module):
    def __init__(self, *middle):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), *middle, nn.Linear(40, 2))
    def forward(self, t, y):
        return self.net(y)

sfk.set_num_threads(2)
field, times = sfk.compile(Field(nn.Linear(40, 40), nn.Tanh()), engine="cpu"), torch.tensor([0.0, 1.0])
optimizer = torch.optim.SGD(field.parameters(), lr=1e-3)
sizes = (1, 7, 300, 64)

@torch.no_grad()
def solve(i):
    sfk.odeint(field, torch.randn(sizes[i % 4], 2), times, method=("dopri5", "rk4")[i % 2])

@torch.no_grad()
def evaluate(i):
    field(0.1, torch.randn(sizes[i % 4], 2))

def train(i):
    optimizer.zero_grad()
    sfk.odeint(field, torch.randn(sizes[i % 4], 2), times).square().mean().backward()
    optimizer.step()

@torch.no_grad()
def compile_anew(i):
    sfk.compile(Field(), engine="cpu")(0.1, torch.randn(sizes[i % 4], 2))

@torch.no_grad()
def fail(i):
    try:
        sfk.odeint(field, torch.full((sizes[i % 4], 2), torch.nan), times)
    except sfk.SolverError:
        pass

def resident():
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed between pieces in use is no growth
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

work, count = {work}, {count}
for i in range(count // 5 + 20):
    work(i)
before = resident()
for i in range(count):
    work(i)
print("grew by", resident() - before, "MB")
"""
MOST = 6.0  # MB: 3 KB a call over 2,000 of them, far less than the smallest workspace


@pytest.mark.parametrize(
    "work,count",
    [("solve", 2000), ("evaluate", 2000), ("train", 2000), ("fail", 2000),
     ("compile_anew", 200), pytest.param("compile_anew", 800, marks=pytest.mark.slow)],
)  # fmt: skip
def test_does_not_grow(work, count):
    result = in_a_process_of_its_own(PROGRAM.replace("{work}", work).replace("{count}", str(count)), timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout.split("grew by ")[1].split()[0]) < MOST, result.stdout
