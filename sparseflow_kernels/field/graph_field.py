"""A vector field as a graph over parts: the tensors that a module's parameters became."""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field, replace
from typing import Callable, Iterator

import torch
from torch import Tensor

from .chain import MOST_AXES, Pattern
from .graph import CONTEXT, STATE, TIME, Graph, Node, order
from .layout import Layout


_MOST_LINES = 100  # of a field that is printed


@dataclass(eq=False)
class Part:
    """One tensor of a graph: the values [nnz] of a matrix, or one number per row [rows] (pattern None)."""

    values: Tensor
    pattern: Pattern | None = None
    name: str = ""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "values", self.values


@dataclass(eq=False)
class GraphField:
    """f(t, y) as a graph; y is [batch, dim], the context (numbers given per sample) [batch, context].

    graph: the builder that made the nodes, and makes further ones.  state, time, context: the nodes of the inputs; context
    is None for a field that reads none.  output: the node of the derivative [dim].  parts: the tensors that nodes name by
    number.  device, dtype: of the parts, and of a field without parts too.  notes, refused_axes: as in VectorField.
    layout: how the user's state lies in y; None: [batch, dim].  read_context: gives the present context [batch, context]
    of the module that was read, differentiable where the module's numbers are; None where there is no context, or where it
    comes with every call.  single: the same derivative for a single evaluation with a time or a context per sample, where
    that has another form (`simplify_graph`).
    """

    graph: Graph
    state: Node
    time: Node
    context: Node | None
    output: Node
    parts: list[Part]
    device: torch.device
    dtype: torch.dtype
    notes: list[str] = dataclass_field(default_factory=list)
    refused_axes: dict[int, str] = dataclass_field(default_factory=dict)
    layout: Layout | None = None
    read_context: Callable[[], Tensor] | None = None
    single: Node | None = None

    def __post_init__(self) -> None:
        if self.layout is None:
            self.layout = Layout(((self.dim,),))

    def __repr__(self) -> str:
        """A node on each line: its number, what it is, the numbers of its operands."""
        nodes = order([self.output])
        number = {node: str(at) for at, node in enumerate(nodes)}
        lines = [f"{number[node]:>5} {node!r} {', '.join(number[operand] for operand in node.operands)}".rstrip() for node in nodes]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES // 2 : -_MOST_LINES // 2] = [f"  ... {len(lines) - _MOST_LINES} more"]
        return "\n".join([f"GraphField over {self.layout}, {self.dtype} on {self.device}", *lines])

    @staticmethod
    def inputs(graph: Graph, dim: int, context: int = 0) -> tuple[Node, Node, Node | None]:
        """The nodes (state [dim], time [1], context [context], or None for a context of 0)."""
        return (
            graph.input("state", dim, STATE), graph.input("time", 1, TIME),
            graph.input("context", context, CONTEXT) if context else None,
        )  # fmt: skip

    @property
    def layers(self) -> list[Part]:
        """The parts, under the name that a chain has for what holds its tensors."""
        return self.parts

    @property
    def dim(self) -> int:
        return self.state.rows

    @property
    def nnz(self) -> int:
        """Multiply-adds of the matrices, per sample and evaluation."""
        return sum(
            node.matrix.multiply_adds for node in order([self.output])
            if node.kind == "linear" and node.per_sample and not node.matrix.constant
        )

    @property
    def functions(self) -> list[Node]:
        """The functions of time in Python that f reads. This is asked at every call."""
        if self.graph.functions == []:
            return []
        return [node for node in order([self.output]) if node.kind == "time"]

    def refused(self, axes: int) -> str | None:
        """Why this field does not run states with so many axes; None: it does."""
        return self.refused_axes.get(min(axes, MOST_AXES)) if self.refused_axes else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for number, part in enumerate(self.parts):
            yield f"{number}.values", part.values

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "GraphField":
        """The same field with `function` applied to every tensor."""
        parts = [replace(part, values=function(part.values)) for part in self.parts]
        like = parts[0].values if parts else torch.empty(0, dtype=self.dtype, device=self.device)
        return replace(self, parts=parts, device=like.device, dtype=like.dtype, notes=list(self.notes))
