"""One thread per process (tests run in parallel processes, and threads would hide order-dependent sums), fixed seeds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
