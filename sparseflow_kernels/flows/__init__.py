"""Continuous normalizing flows, classifiers, and the vector fields they are made of."""

from .batch_norm import MovingBatchNorm
from .classifier import NeuralClassifier
from .conv_field import CONV_LAYERS, ConvField
from .continuous_flow import ContinuousFlow
from .image_flow import ImageFlow, field_shapes
from .image_transforms import Dequantise, Logit, Squeeze
from .imported import load_weights_
from .layers import LAYERS, MLPField, mlp_field
from .neural_ode import FlowStats, NeuralODE
from .zoo import IMAGES, TABULAR, ffjord_flow, image_flow, multiscale_flow, tabular_flow, toy_field

__all__ = [
    "CONV_LAYERS", "IMAGES", "LAYERS", "TABULAR", "ContinuousFlow", "ConvField", "Dequantise", "FlowStats", "ImageFlow",
    "Logit", "MLPField", "MovingBatchNorm", "NeuralClassifier", "NeuralODE", "Squeeze", "ffjord_flow", "field_shapes",
    "image_flow", "load_weights_", "mlp_field", "multiscale_flow", "tabular_flow", "toy_field",
]  # fmt: skip
