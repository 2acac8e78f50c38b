"""What was saved by earlier versions is found where they looked for it."""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

import sparseflow_kernels as sfk

NAMES = """
capture.replay.TimeProgram compiled_field.CompiledField compiled_field._follow_assigned
divergence_field.DivergenceField field.chain.Activation
field.chain.Layer field.chain.Pattern field.chain.VectorField field.graph.Graph field.graph.Matrix field.graph.Node
field.graph_field.GraphField field.graph_field.Part field.layout.Layout layer_parameters.LayerParameters live.Watch
operators.Described origin.Origin origin.Recipe packing.Packing pruning.masks._Refresh sparse_linear.SparseLinear
trained.Entries trained.Shares
""".split()


@pytest.mark.parametrize("name", NAMES)
def test_names_that_pickles_hold_stay(name):
    module, _, leaf = name.rpartition(".")
    assert hasattr(importlib.import_module(f"sparseflow_kernels.{module}"), leaf)


def test_a_compiled_field_of_version_0_1_0_is_read():
    class Old(nn.Module):
        def forward(self, t, y):
            return y.sin() - y

    field = sfk.compile(Old(), engine="reference", dim=3)
    state = field.__getstate__()
    state["_program"] = state.pop("skeleton")
    again = type(field).__new__(type(field))
    again.__setstate__(state)
    y = torch.randn(4, 3)
    for other in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(other(0.5, y), field(0.5, y))
