"""Continuous normalizing flows and the vector fields they are made of."""

from .continuous_flow import ContinuousFlow, FlowStats
from .layers import LAYERS, MLPField, mlp_field
from .zoo import TABULAR, tabular_flow, toy_field

__all__ = ["LAYERS", "TABULAR", "ContinuousFlow", "FlowStats", "MLPField", "mlp_field", "tabular_flow", "toy_field"]
