"""The number of threads of the native engines."""

from __future__ import annotations

import pytest
import torch

import sparseflow_kernels as sfk
from sparseflow_kernels import threads


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
