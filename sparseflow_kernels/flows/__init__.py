"""Continuous normalizing flows and the vector fields they are made of."""

from .classifier import NeuralClassifier
from .continuous_flow import ContinuousFlow
from .layers import LAYERS, MLPField, mlp_field
from .neural_ode import FlowStats, NeuralODE
from .zoo import TABULAR, tabular_flow, toy_field

__all__ = [
    "LAYERS", "TABULAR", "ContinuousFlow", "FlowStats", "MLPField", "NeuralClassifier", "NeuralODE", "mlp_field",
    "tabular_flow", "toy_field",
]  # fmt: skip
