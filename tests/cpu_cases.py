"""What the tests of the CPU engine share: states, a function of time, thread counts, processes that may crash."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparseflow_kernels import threads as threads_module

F64 = torch.float64


@pytest.fixture
def threads(monkeypatch):
    """set_num_threads, undone afterwards. Work is shared among as many, also where it is too little for that to pay."""
    native = pytest.importorskip("sparseflow_kernels._cpu")
    monkeypatch.setattr(threads_module, "_count", threads_module._count)
    native.force_threads(True)
    yield threads_module.set_num_threads
    native.force_threads(False)


class Wave:
    """A function of t alone that is neither a sigmoid nor affine, one value per row."""

    def __init__(self, rows: int, seed: int) -> None:
        self.frequency = torch.randn(rows, generator=torch.Generator().manual_seed(seed), dtype=F64)

    def __call__(self, t):
        return 0.7 + 0.5 * torch.sin(self.frequency.to(t.dtype) * t + 1.0)


def states(batch: int, dim: int, dtype=F64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, generator=generator, dtype=F64).to(dtype)
    noise = (torch.randint(0, 2, (batch, dim), generator=generator) * 2 - 1).to(dtype)
    return x, noise


def isolated_environment(**more: str) -> dict[str, str]:
    """For a Python of its own, started with -P: it imports what this one would, and the tests' helpers."""
    path = [os.path.dirname(os.path.abspath(__file__)), *filter(None, map(str, sys.path))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **more}


PRELUDE = """
import torch
torch.set_num_threads(1)
from random_fields import random_field
from sparseflow_kernels import divergence
from sparseflow_kernels.engines.cpu import CpuEngine
"""


def in_a_process_of_its_own(code: str, *, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """Runs code that might crash or hang the interpreter."""
    command = [sys.executable, "-P", "-c", PRELUDE + code]
    return subprocess.run(command, env=isolated_environment(**environment), capture_output=True, text=True, timeout=timeout)
