"""Continuous normalizing flows, classifiers, and the vector fields they are made of."""

from .batch_norm import MovingBatchNorm
from .classifier import NeuralClassifier
from .continuous_flow import ContinuousFlow
from .imported import load_weights_
from .layers import LAYERS, MLPField, mlp_field
from .neural_ode import FlowStats, NeuralODE
from .zoo import TABULAR, ffjord_flow, tabular_flow, toy_field

__all__ = [
    "LAYERS", "TABULAR", "ContinuousFlow", "FlowStats", "MLPField", "MovingBatchNorm", "NeuralClassifier", "NeuralODE",
    "ffjord_flow", "load_weights_", "mlp_field", "tabular_flow", "toy_field",
]  # fmt: skip
