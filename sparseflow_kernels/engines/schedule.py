"""The order in which the nodes of a graph are computed, and which of them are one operation.

Every node that differs from sample to sample gets a step. Elementwise nodes of the same step and number of rows are one
pointwise operation, so each is put off to the step of its first reader. A slope that only the backward pass reads is
computed there, from values that are kept anyway. Products are computed as soon as their operands are there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field as dataclass_field
from typing import Callable, Iterable, Sequence

from ..activations import ACTIVATIONS
from ..field import IDENTITY, Activation, Graph, Node
from ..field.graph import order


@dataclass(eq=False)
class Affine:
    """act(scale * (W source) + shift), one fused operation. scale, shift: nodes that are the same for all samples."""

    product: Node
    scale: Node | None
    shift: Node | None
    activation: Activation

    @property
    def source(self) -> Node:
        return self.product.operands[0]


@dataclass(eq=False)
class Schedule:
    """nodes: all that differ from sample to sample, operands first.  steps: their steps.  affine: node -> the fused
    operation that makes it (its inner nodes are in no list).  sums: product node -> the node that is added to it, for
    nodes that are such a sum.  leaves: nodes that are given, and are read by these."""

    nodes: list[Node]
    steps: dict[Node, int]
    affine: dict[Node, Affine]
    sums: dict[Node, tuple[Node, Node]]
    readers: dict[Node, list[Node]]
    leaves: list[Node] = dataclass_field(default_factory=list)

    def operands(self, node: Node) -> Sequence[Node]:
        """What an operation reads."""
        if node in self.affine:
            return (self.affine[node].source,)
        if node in self.sums:
            product, addend = self.sums[node]
            return (product.operands[0], addend)
        return node.operands

    def is_product(self, node: Node) -> bool:
        return node.kind == "linear" or node in self.affine or node in self.sums

    def is_pointwise(self, node: Node) -> bool:
        return node.elementwise and not self.is_product(node)


def schedule(
    g: Graph, outputs: Iterable[Node], per_sample: Callable[[Node], bool], uniform: Callable[[Node], bool],
    fused: bool,
) -> Schedule:  # fmt: skip
    """per_sample: which nodes are to be computed; all others are given.  uniform: which of these are the same for all
    samples.  fused: with affine operations where a node is one."""
    outputs = list(outputs)
    reached = order(outputs, stop=lambda node: not per_sample(node) or node.kind == "input")
    nodes = [node for node in reached if per_sample(node) and node.kind != "input"]
    leaves = [node for node in reached if not per_sample(node) or node.kind == "input"]
    readers: dict[Node, list[Node]] = {}
    for node in nodes:
        for operand in node.operands:
            readers.setdefault(operand, []).append(node)
    fixed = set(outputs)
    affine = _affine(g, nodes, readers, fixed, per_sample, uniform) if fused else {}
    inner = set().union(*(_inside(node, one) for node, one in affine.items()))
    nodes = [node for node in nodes if node not in inner or node in affine]
    sums = _sums(nodes, fixed, affine, per_sample, uniform)
    absorbed = {product for product, _ in sums.values()}
    nodes = [node for node in nodes if node not in absorbed]
    found = Schedule(nodes, {}, affine, sums, {}, leaves)
    for node in nodes:
        for operand in found.operands(node):
            found.readers.setdefault(operand, []).append(node)
    _assign(found, fixed, per_sample)
    found.nodes = sorted(nodes, key=lambda node: found.steps[node])
    return found


def _assign(found: Schedule, fixed: set[Node], per_sample: Callable[[Node], bool]) -> None:
    steps = found.steps

    def beside(reader: Node, operand: Node) -> int:
        """The number of steps by which an operand must come before its reader."""
        together = found.is_pointwise(reader) and found.is_pointwise(operand) and reader.rows == operand.rows
        return 0 if together else 1

    for node in found.nodes:
        read = [operand for operand in found.operands(node) if operand in steps]
        steps[node] = max((steps[operand] + beside(node, operand) for operand in read), default=1)
    for node in reversed(found.nodes):
        # A node is put off only if it is no output, and if no operand would have to be kept for it alone.
        readers = found.readers.get(node, ())
        if node in fixed or not found.is_pointwise(node) or not readers:
            continue
        latest = min(steps[reader] - beside(reader, node) for reader in readers)
        stays = [operand for operand in node.operands if operand in steps and not _outlives(found, operand, node, fixed)]
        if len(stays) <= 1:
            steps[node] = max(steps[node], latest)


def _outlives(found: Schedule, operand: Node, node: Node, fixed: set[Node]) -> bool:
    """An operand is read by others than this node too."""
    return operand in fixed or any(reader is not node for reader in found.readers.get(operand, ()))


# ------------------------------------------------------------------------------------------------- fused operations


def _affine(
    g: Graph, nodes: Sequence[Node], readers: dict[Node, list[Node]], fixed: set[Node],
    per_sample: Callable[[Node], bool], uniform: Callable[[Node], bool],
) -> dict[Node, Affine]:  # fmt: skip
    found: dict[Node, Affine] = {}
    taken: set[Node] = set()
    for node in reversed(nodes):  # outermost first, so that the activation goes with its product
        if node in taken:
            continue
        activation, z = g.activations.get(node, (IDENTITY, node))
        if activation.name not in ACTIVATIONS:
            continue
        one = _linear_part(z, activation, per_sample, uniform)
        if one is None or (one.product is node and activation == IDENTITY):
            continue
        inside = _inside(node, one)
        if any(n in fixed or n in taken or any(r is not node and r not in inside for r in readers.get(n, ())) for n in inside):
            continue
        found[node] = one
        taken |= inside | {node}
    return found


def _linear_part(
    z: Node, activation: Activation, per_sample: Callable[[Node], bool], uniform: Callable[[Node], bool]
) -> Affine | None:  # fmt: skip
    """z as scale * (W h) + shift."""

    def without(node: Node) -> tuple[Node, Node] | None:
        """The operand that differs from sample to sample, and the other one, which does not."""
        for moving, still in (node.operands, node.operands[::-1]):
            if per_sample(moving) and uniform(still):
                return moving, still
        return None

    shift = scale = None
    node = z
    for kind in ("add", "mul"):
        if node.kind == kind:
            parts = without(node)
            if parts is None:
                return None
            node, other = parts
            shift, scale = (other, scale) if kind == "add" else (shift, other)
    if node.kind != "linear" or node.rows != z.rows or not per_sample(node):
        return None
    return Affine(node, scale, shift, activation)


def _inside(node: Node, one: Affine) -> set[Node]:
    """The nodes between the product, which is one of them, and the result, which is not."""
    found: set[Node] = set()
    waiting = list(node.operands)
    while waiting:
        other = waiting.pop()
        if other in found or other in one.product.operands or not other.operands:
            continue
        if other is one.scale or other is one.shift:
            continue
        found.add(other)
        if other is not one.product:
            waiting += other.operands
    return found


def _sums(
    nodes: Sequence[Node], fixed: set[Node], affine: dict[Node, Affine], per_sample: Callable[[Node], bool],
    uniform: Callable[[Node], bool],
) -> dict[Node, tuple[Node, Node]]:  # fmt: skip
    """sum -> (product, addend), for every sum W h + a that the product can compute with its addend."""
    counts = Counter(operand for node in nodes if node not in affine for operand in node.operands)
    counts.update(one.source for one in affine.values())
    found: dict[Node, tuple[Node, Node]] = {}
    taken: set[Node] = set()
    for node in nodes:
        if node.kind != "add" or node in affine:
            continue
        for product, addend in (node.operands, node.operands[::-1]):
            alone = product.kind == "linear" and product not in affine and counts[product] == 1
            if alone and product not in fixed and product not in taken and not uniform(addend) and addend.rows == node.rows:
                if product.rows == node.rows and addend is not product and per_sample(product):
                    found[node] = (product, addend)
                    taken.add(product)
                    break
    return found
