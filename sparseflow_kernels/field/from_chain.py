"""A chain as a graph over the same tensors, in the same order."""

from __future__ import annotations

from .chain import LinearShift, SigmoidGate, TimeFunction, VectorField
from .graph import Graph, Matrix, Node
from .graph_field import GraphField, Part


def graph_of_chain(field: VectorField) -> GraphField:
    """The same f as a graph. Its parts are the chain's tensors, in the order of `VectorField.tensors`."""
    g, parts = Graph(), []
    state, time, _ = GraphField.inputs(g, field.dim)

    def vector(values) -> Node:
        parts.append(Part(values))
        return g.vector(len(parts) - 1, values.numel())

    def of_time(part, rows: int) -> Node:
        if isinstance(part, TimeFunction):
            return g.time_function(part.at, rows)
        slope, offset = vector(part.slope), vector(part.offset)
        z = g.add(g.mul(slope, time), offset)
        return g.apply("sigmoid", z) if isinstance(part, SigmoidGate) else z

    h = state
    for layer in field.layers:
        g.origin = layer.name
        parts.append(Part(layer.values, layer.pattern, layer.name))
        z = g.linear(Matrix(layer.pattern, len(parts) - 1), h)
        bias = vector(layer.bias)
        gate = None if layer.gate is None else of_time(layer.gate, layer.out_features)
        shift = None if layer.shift is None else of_time(layer.shift, layer.out_features)
        assert not isinstance(layer.shift, SigmoidGate) and not isinstance(layer.gate, LinearShift)
        z = g.add(z, bias) if gate is None else g.add(g.mul(z, gate), g.mul(bias, gate))
        z = g.spread(g.add(z, shift), layer.out_features)
        h = g.activation(layer.activation, z)
    return GraphField(g, state, time, None, h, parts, field.device, field.dtype)
