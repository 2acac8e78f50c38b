"""Exceptions of this package cross processes and can be copied, whole."""

from __future__ import annotations

import concurrent.futures
import copy
import importlib
import multiprocessing
import pickle
import re
from pathlib import Path

import pytest
import sparseflow_kernels as sfk
import torch
from torch import nn

from sparseflow_kernels.flows import mlp_field


def _exceptions():
    """Every exception class that the package's sources define."""
    found, root = [], Path(sfk.__file__).parent
    for source in sorted(root.rglob("*.py")):
        for name in re.findall(r"^class (\w+)\(.*(?:Error|Exception|_Portable)\b.*\):", source.read_text(), re.MULTILINE):
            module = ".".join(("sparseflow_kernels", *source.relative_to(root).with_suffix("").parts))
            found.append(getattr(importlib.import_module(module), name))
    assert {sfk.SolverError, sfk.GradientError, sfk.UnsupportedFieldError} < set(found)
    return [kind for kind in found if issubclass(kind, BaseException) and not kind.__name__.startswith("_")]


def _made(kind):
    if kind is sfk.SolverError:
        return kind("underflow", 0.5, 1e-3, [1, 4], (torch.randn(2, 3), torch.randn(2)), 10)
    if kind is sfk.GradientError:
        return kind("it is not finite", "Mend it.", 3, 0.5, 0.1, [7], 9)
    return kind("what it is")


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("kind", _exceptions())
def test_they_come_back_whole(kind, way):
    error = _made(kind)
    error.add_note("noted")
    again = way(error)
    assert type(again) is kind and str(again) == str(error) and again.args == error.args
    assert again.__notes__ == ["noted"] and vars(again).keys() == vars(error).keys()
    for name, value in vars(error).items():
        if name == "ys":
            assert all(map(torch.equal, again.ys, value))
        else:
            assert getattr(again, name) == value


def test_tensors_come_back_alone():
    """Not the memory that they are a part of, and no graph."""
    ys = torch.randn(100_000, requires_grad=True)[:2] * 2
    data = pickle.dumps(sfk.SolverError("non_finite", 0.0, 0.1, (), ys.detach()[:1], 1))
    assert len(data) < 10_000
    assert torch.equal(pickle.loads(data).ys, ys.detach()[:1])


class Spectral(torch.nn.Module):
    def forward(self, t, y):
        return y * torch.linalg.svdvals(y[:, :, None] * y[:, None])[:, :1]


def _fails(kind):
    field = sfk.compile(mlp_field(2, (8,)))
    y = torch.ones(3, 2, requires_grad=True)
    if kind == "solve":
        return sfk.odeint(field, y * torch.tensor([[1.0], [torch.nan], [1.0]]), torch.tensor([0.0, 1.0]))
    if kind == "gradient":
        return (sfk.odeint(field, y, torch.tensor([0.0, 1.0])).sum() * torch.nan).backward()
    return sfk.compile(Spectral(), dim=2)


def test_a_pool_of_processes_hands_them_on():
    expected = {"solve": sfk.SolverError, "gradient": sfk.GradientError, "capture": sfk.UnsupportedFieldError}
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = {kind: pool.submit(_fails, kind).exception(timeout=120) for kind in expected}
    # the process that made them is gone
    assert {kind: type(error) for kind, error in errors.items()} == expected
    assert errors["solve"].rows == (1,) and errors["solve"].t == 0.0 and errors["solve"].ys.shape == (2, 3, 2)


@pytest.mark.parametrize("use", [
    lambda m: sfk.prune_weights_(m, keep=0.5), lambda m: sfk.prune_neurons_(m, keep=0.5), sfk.sparsify_,
    lambda m: sfk.SparseLinear.from_linear(m[0]), sfk.compile,
])  # fmt: skip
def test_a_weight_without_numbers(use):
    module = nn.Sequential(nn.Linear(3, 3, device="meta"), nn.Tanh(), nn.Linear(3, 3, device="meta"))
    with pytest.raises(ValueError, match="meta device; materialise the module first"):
        use(module)
