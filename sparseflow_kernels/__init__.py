"""Whole-solve kernels for pruned neural ODEs and continuous normalizing flows.

    import sparseflow_kernels as sfk

    field = sfk.compile(odefunc)                      # an nn.Module f(t, y) as a field, without its zeros
    y = sfk.odeint(field, y0, t, rtol=1e-5, atol=1e-5)
    aug = sfk.with_divergence(field, "exact")         # (x, l) -> (dx/dt, -tr df/dx)
"""

from .accelerate import accelerate
from .build_info import build_info
from .compiled_field import CompiledField, compile  # noqa: A004
from .divergence_field import DivergenceField, with_divergence
from .field import GraphField, UnsupportedFieldError, VectorField
from .flows import ContinuousFlow
from .nonfinite import get_nonfinite_gradients, set_nonfinite_gradients
from .odeint import odeint, odeint_adjoint, odeint_dense, odeint_event, solve
from .pruning import prune_neurons_, prune_weights_
from .solution import GradientError, Solution, SolverError
from .sparse_conv import SparseConv2d
from .sparse_linear import SparseLinear
from .sparsify import sparsify_
from .threads import get_num_threads, set_num_threads
from .training import sparse_flow

__version__ = "0.2.0"

__all__ = [
    "CompiledField",
    "ContinuousFlow",
    "DivergenceField",
    "GradientError",
    "GraphField",
    "Solution",
    "SolverError",
    "SparseConv2d",
    "SparseLinear",
    "UnsupportedFieldError",
    "VectorField",
    "accelerate",
    "build_info",
    "compile",
    "get_nonfinite_gradients",
    "get_num_threads",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "prune_neurons_",
    "prune_weights_",
    "set_nonfinite_gradients",
    "set_num_threads",
    "solve",
    "sparse_flow",
    "sparsify_",
    "with_divergence",
]
