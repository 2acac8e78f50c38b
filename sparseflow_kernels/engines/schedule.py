"""The order in which the nodes of a graph are computed, and which of them are one operation.

Every node that differs from sample to sample gets a step. Elementwise nodes of the same step and number of rows are one
pointwise operation, so each is put off to the step of its first reader. A slope that only the backward pass reads is
computed there, from values that are kept anyway. Products are computed as soon as their operands are there.
"""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field
from typing import Callable, Collection, Iterable, Sequence

from ..field import Graph, Node
from ..field.graph import order
from .fusion import Affine, Fuser, Product


@dataclass(eq=False)
class Schedule:
    """nodes: all that differ from sample to sample, operands first.  steps: their steps.  affine, products: node -> the
    fused operation that makes it (its inner nodes are in no list).  pairs: the node in the first slot of a buffer -> the
    one in the second.  totals: a sum of rows -> the node whose rows they are, which a pointwise operation takes along.
    leaves: nodes that are given, and are read by these.

    first: the node in the second slot -> the one in the first.  makers: a slope or tangent -> the node of `affine` whose
    operation makes it; it is in no list, but has that one's step."""

    nodes: list[Node]
    steps: dict[Node, int]
    affine: dict[Node, Affine]
    products: dict[Node, Product]
    pairs: dict[Node, Node]
    totals: dict[Node, Node]
    leaves: list[Node]
    readers: dict[Node, list[Node]] = dataclass_field(default_factory=dict)

    def __post_init__(self) -> None:
        self.makers = {one.beside: node for node, one in self.affine.items() if one.beside is not None}
        self.first = {second: first for first, second in self.pairs.items()}
        for node in self.nodes:
            for operand in self.operands(node):
                self.readers.setdefault(operand, []).append(node)

    def operands(self, node: Node) -> Sequence[Node]:
        """What an operation reads."""
        fused = self.affine.get(node) or self.products.get(node)
        return node.operands if fused is None else fused.operands

    def is_product(self, node: Node) -> bool:
        return node.kind == "linear" or node in self.affine or node in self.products or node in self.makers

    def is_pointwise(self, node: Node) -> bool:
        return node.elementwise and not self.is_product(node)


def schedule(
    g: Graph, outputs: Iterable[Node], per_sample: Callable[[Node], bool], uniform: Callable[[Node], bool],
    apart: Collection[Node] = (), with_totals: bool = False, with_tangents: bool = False,
) -> Schedule:  # fmt: skip
    """per_sample: which nodes are to be computed; all others are given.  uniform: which of these are the same for all
    samples.  apart: outputs whose rows are given from outside, so that nothing can lie beside them.  with_totals: sums of
    rows are made by pointwise operations, and not by products.  with_tangents: layers make tangents along with values."""
    outputs = list(outputs)
    reached = order(outputs, stop=lambda node: not per_sample(node) or node.kind == "input")
    nodes = [node for node in reached if per_sample(node) and node.kind != "input"]
    leaves = [node for node in reached if not per_sample(node) or node.kind == "input"]
    fixed = set(outputs)
    totals = {node: node.operands[0] for node in nodes if with_totals and _is_total(node)}
    fused = Fuser(g, nodes, fixed, apart, totals, per_sample, uniform).find(with_tangents)
    found = Schedule(fused.nodes, {}, fused.affine, fused.products, fused.pairs, totals, leaves)
    _assign(found, fixed, per_sample)
    found.nodes = sorted(fused.nodes, key=lambda node: found.steps[node])
    return found


def _assign(found: Schedule, fixed: set[Node], per_sample: Callable[[Node], bool]) -> None:
    steps = found.steps

    def beside(reader: Node, operand: Node) -> int:
        """The number of steps by which an operand must come before its reader."""
        together = found.is_pointwise(operand) and (
            reader in found.totals or (found.is_pointwise(reader) and reader.rows == operand.rows)
        )
        return 0 if together else 1

    for node in found.nodes:
        read = [operand for operand in found.operands(node) if operand in steps]
        steps[node] = max((steps[operand] + beside(node, operand) for operand in read), default=1)
        if node in found.affine and found.affine[node].beside is not None:
            steps[found.affine[node].beside] = steps[node]
    for node in reversed(found.nodes):
        # A node is put off only if it is no output, and if no operand would have to be kept for it alone.
        readers = found.readers.get(node, ())
        if node in fixed or not found.is_pointwise(node) or not readers:
            continue
        latest = min(steps[reader] - beside(reader, node) for reader in readers)
        stays = [operand for operand in node.operands if operand in steps and not _outlives(found, operand, node, fixed)]
        if len(stays) <= 1:
            steps[node] = max(steps[node], latest)


def _is_total(node: Node) -> bool:
    """It is the sum of all rows of its operand, each once."""
    if node.kind != "linear" or node.rows != 1 or not node.matrix.constant:
        return False
    return node.matrix.pattern.nnz == node.operands[0].rows > 1


def _outlives(found: Schedule, operand: Node, node: Node, fixed: set[Node]) -> bool:
    """An operand is read by others than this node too."""
    return operand in fixed or any(reader is not node for reader in found.readers.get(operand, ()))
