"""A warning points at the line of the one who called, however deep the call is in this package and in torch."""

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from test_pruning import Unreadable
from torch import nn

import sparseflow_kernels as sfk
from sparseflow_kernels.data.dataset import Dataset
from sparseflow_kernels.flows import ContinuousFlow, mlp_field
from sparseflow_kernels.pruning import prune_neurons_, prune_weights_
from sparseflow_kernels.training import prune_cycle_
from sparseflow_kernels.warn import warn


class Warning_(nn.Module):
    def forward(self, x):
        return sfk.odeint(lambda t, y: -y, x, torch.tensor([0.0, 1.0]), method="tsit5", options={"unknown": 1})


def line():
    return inspect.currentframe().f_back.f_lineno


def field():
    return mlp_field(3, (8, 8), layer="concatsquash")


def cut():
    return line(), prune_weights_(field(), 0.02, remove_dead=False)


def one_neuron():
    return line(), prune_neurons_(field(), 0.01)


def unreadable():
    return line(), prune_weights_(Unreadable(), 0.5)


def in_the_loop():
    return line(), prune_cycle_(ContinuousFlow(field(), 3), 0.01, "neurons", None)


def on_another_default_device():  # a decorator of ours is between, and a context of torch's
    with torch.device("meta"):
        return line(), prune_weights_(module, 0.02, remove_dead=False)


def a_solve():
    t = torch.tensor([0.0, 1.0])
    return line(), sfk.odeint(lambda t, y: -y, torch.ones(2), t, method="tsit5", options={"unknown": 1})


def a_cycle():
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    flow = ContinuousFlow(field(), 3, rtol=1e-2, atol=1e-2)
    cycles = sfk.sparse_flow(flow, Dataset("rows", rows, rows, rows), (0.01,), method="neurons", steps=1)
    next(cycles)
    return line(), next(cycles)


module = field()


CALLS = [cut, one_neuron, unreadable, in_the_loop, on_another_default_device, a_solve, a_cycle]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_warning_points_at_the_callers_line(call):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        number, _ = call()
    assert record and {(warning.filename, warning.lineno) for warning in record} == {(__file__, number)}


def test_calls_through_torch_are_not_the_callers_line():
    with pytest.warns(UserWarning, match="Unexpected arguments") as record:
        number, _ = line(), nn.Sequential(nn.Identity(), Warning_())(torch.ones(2))
    # the line that solves is the caller's own, though torch called it
    assert record[0].filename == __file__ and record[0].lineno != number
    with pytest.warns(UserWarning, match="words") as record:
        number, _ = line(), warn("words")
    assert (record[0].filename, record[0].lineno) == (__file__, number)


def test_there_is_one_way_to_warn():
    package = Path(sfk.__file__).parent
    own = [
        path.name for path in package.rglob("*.py")
        if path.name != "warn.py" and re.search(r"\bwarnings\.warn\(|\bstacklevel\b", path.read_text())
    ]  # fmt: skip
    assert own == []
