"""A user's vector field as plain data: a chain of layers where it is one, else a graph of two operations.

This package imports nothing else of the library.
"""

from .chain import (
    IDENTITY,
    MOST_AXES,
    Activation,
    Gate,
    Layer,
    LinearShift,
    Pattern,
    Shift,
    SigmoidGate,
    TimeFunction,
    UnsupportedFieldError,
    VectorField,
)
from .convolution import Convolution, Window
from .graph import Graph, Matrix, Node
from .graph_field import GraphField, Part
from .layout import Layout

__all__ = [
    "IDENTITY",
    "MOST_AXES",
    "Activation",
    "Convolution",
    "Gate",
    "Graph",
    "GraphField",
    "Layer",
    "Layout",
    "LinearShift",
    "Matrix",
    "Node",
    "Part",
    "Pattern",
    "Shift",
    "SigmoidGate",
    "TimeFunction",
    "UnsupportedFieldError",
    "VectorField",
    "Window",
]
