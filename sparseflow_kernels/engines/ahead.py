"""What a program reads as numbers that are the same for all samples, made by native programs of their own.

Numbers that follow from the parameters alone are computed whenever parameters change, and gradients go back through them
at every training step; those that follow from time have gradients at every time of a solve. In torch each of their nodes
costs tens of microseconds, which is more than small fields compute altogether.
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor

from ..field import GraphField, Node
from ..field.graph import STATE, TIME, order
from .graph_native import GraphNativeEngine, GraphProgram, ProgramSums
from .lower import COTANGENT, Bindings, GraphWriter
from .native import address

_LEAVES = frozenset(("vector", "number", "constant", "made"))


class _Everything(Bindings):
    """Of a program that computes all that there is to compute: parts' values alone are numbers."""

    def per_sample(self, node: Node) -> bool:
        return node.kind not in _LEAVES

    def vector(self, node: Node) -> bool:
        return node.kind in _LEAVES


def in_torch(node: Node) -> bool:
    """Whether no program computes it: a function in Python does, or nothing has to."""
    return node.kind in _LEAVES or any(one.kind == "time" for one in order([node]))


class Ahead:
    """Nodes that depend on parameters and time alone; each time is a sample.

    rows: of every node that is computed, in this order.  Packed when it is first asked for.
    """

    def __init__(self, builder: Callable, field: GraphField, nodes: Sequence[Node]) -> None:
        """builder: of native programs."""
        self.rows = {node: node.rows for node in nodes}
        self._builder, self._field = builder, field
        self._output = field.graph.concatenate(nodes)
        self._programs: dict[bool, GraphProgram] = {}

    def _program(self, adjoint: bool, engine: GraphNativeEngine) -> GraphProgram:
        if adjoint not in self._programs:
            builder, g = self._builder(), self._field.graph
            writer = GraphWriter(builder, self._field, _Everything((self._field.time,), TIME), totals=True, tangents=True)
            if adjoint:
                writer.write_adjoint(self._output, None, {COTANGENT: g.input(COTANGENT, self._output.rows, STATE)})
                self._programs[adjoint] = GraphProgram(builder.compile_adjoint(), writer)
            else:
                writer.write(self._output)
                self._programs[adjoint] = GraphProgram(builder.compile(), writer)
        program = self._programs[adjoint]
        if program.stamp != engine.stamp:
            engine.renew(program)
        return program

    def values(self, engine: GraphNativeEngine) -> list[Tensor]:
        """[rows] of every node. None of them depends on time."""
        time, found = torch.zeros(1, 1, dtype=engine.dtype), torch.empty(self._output.rows, dtype=engine.dtype)
        self._program(False, engine).native.evaluate(0.0, time.data_ptr(), 0, 1, 1, found.data_ptr(), 0)
        return list(found.split(list(self.rows.values())))

    def backward(
        self, engine: GraphNativeEngine, times: Tensor, grad: Tensor
    ) -> tuple[GraphProgram, ProgramSums, Tensor]:
        """(the program, the sums that it made of its parts' gradients, the gradient of times).

        times: [n].  grad: [n, the rows of all nodes], the gradients of the nodes at these times.
        """
        program, of_times = self._program(True, engine), torch.empty_like(times)
        raw = program.native.evaluate(
            t=0.0, x=times.data_ptr(), noise=0, batch=len(times), threads=1, grad_f=grad.data_ptr(),
            grad_trace=address(None), grad_x=of_times.data_ptr(),
        )
        return program, sums_of(program.writer, raw), of_times


def sums_of(writer: GraphWriter, raw: dict) -> ProgramSums:
    """What a native program summed up."""
    vectors = {n: torch.from_numpy(raw["vectors"][n]) for n, _ in writer.vectors if len(raw["vectors"][n])}
    times = cotangents = torch.empty(0)
    if writer.timed:
        times, cotangents = (torch.from_numpy(raw[name]) for name in ("time_points", "time_cotangents"))
    return ProgramSums(lambda number: torch.from_numpy(raw["matrices"][number]), vectors, times, cotangents)
