"""The order in which the nodes of a graph are computed, and which of them are one operation.

Every node that differs from sample to sample gets a step. Elementwise nodes of the same step and number of rows are one
pointwise operation, so each is put off to the step of its first reader. A slope that only the backward pass reads is
computed there, from values that are kept anyway. Products are computed as soon as their operands are there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field as dataclass_field, replace
from typing import Callable, Collection, Iterable, Sequence

from ..activations import ACTIVATIONS
from ..field import IDENTITY, Activation, Graph, Node
from ..field.graph import order
from ..field.transforms import slope


@dataclass(eq=False)
class Affine:
    """act(scale * (W source) + shift), one fused operation. scale, shift: nodes that are the same for all samples.
    slope: the node of act' there, where the operation makes that too."""

    product: Node
    scale: Node | None
    shift: Node | None
    activation: Activation
    slope: Node | None = None

    @property
    def source(self) -> Node:
        return self.product.operands[0]


@dataclass(eq=False)
class Product:
    """factor * (W source) + addend, one operation; its inner nodes are made by nobody else. factor, addend: as many rows
    per sample."""

    product: Node
    factor: Node | None = None
    addend: Node | None = None

    @property
    def operands(self) -> tuple[Node, ...]:
        return tuple(node for node in (self.product.operands[0], self.factor, self.addend) if node is not None)


@dataclass(eq=False)
class Schedule:
    """nodes: all that differ from sample to sample, operands first.  steps: their steps.  affine, products: node -> the
    fused operation that makes it (its inner nodes are in no list).  slopes: a slope -> the node of `affine` whose operation
    makes it; it is in no list either, but has that one's step.  totals: a sum of rows -> the node whose rows they are,
    which a pointwise operation takes along.  leaves: nodes that are given, and are read by these."""

    nodes: list[Node]
    steps: dict[Node, int]
    affine: dict[Node, Affine]
    products: dict[Node, Product]
    readers: dict[Node, list[Node]]
    leaves: list[Node] = dataclass_field(default_factory=list)
    totals: dict[Node, Node] = dataclass_field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slopes = {one.slope: node for node, one in self.affine.items() if one.slope is not None}

    def operands(self, node: Node) -> Sequence[Node]:
        """What an operation reads."""
        if node in self.affine:
            return (self.affine[node].source,)
        return self.products[node].operands if node in self.products else node.operands

    def is_product(self, node: Node) -> bool:
        return node.kind == "linear" or node in self.affine or node in self.products or node in self.slopes

    def is_pointwise(self, node: Node) -> bool:
        return node.elementwise and not self.is_product(node)


def schedule(
    g: Graph, outputs: Iterable[Node], per_sample: Callable[[Node], bool], uniform: Callable[[Node], bool],
    apart: Collection[Node] = (), with_totals: bool = False,
) -> Schedule:  # fmt: skip
    """per_sample: which nodes are to be computed; all others are given.  uniform: which of these are the same for all
    samples.  apart: outputs whose rows are given from outside, so that nothing can lie beside them.  with_totals: sums of
    rows are made by pointwise operations, and not by products."""
    outputs = list(outputs)
    reached = order(outputs, stop=lambda node: not per_sample(node) or node.kind == "input")
    nodes = [node for node in reached if per_sample(node) and node.kind != "input"]
    leaves = [node for node in reached if not per_sample(node) or node.kind == "input"]
    readers: dict[Node, list[Node]] = {}
    for node in nodes:
        for operand in node.operands:
            readers.setdefault(operand, []).append(node)
    fixed = set(outputs)
    totals = {node: node.operands[0] for node in nodes if with_totals and _is_total(node)}
    affine = _affine(g, nodes, readers, fixed, apart, per_sample, uniform, totals)
    inner = set().union(*(_inside(node, one) for node, one in affine.items()))
    beside = {one.slope: node for node, one in affine.items() if one.slope is not None}
    # A node and its slope are made together, as soon as either was to be.
    nodes = list(dict.fromkeys(beside.get(node, node) for node in nodes if node not in inner or node in affine))
    products = _products(nodes, fixed, affine, per_sample, uniform, totals)
    absorbed = set().union(*(_absorbed(node, one) for node, one in products.items()))
    nodes = [node for node in nodes if node not in absorbed]
    found = Schedule(nodes, {}, affine, products, {}, leaves, totals)
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
        together = found.is_pointwise(operand) and (
            reader in found.totals or (found.is_pointwise(reader) and reader.rows == operand.rows)
        )
        return 0 if together else 1

    for node in found.nodes:
        read = [operand for operand in found.operands(node) if operand in steps]
        steps[node] = max((steps[operand] + beside(node, operand) for operand in read), default=1)
        if node in found.affine and found.affine[node].slope is not None:
            steps[found.affine[node].slope] = steps[node]
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


# ------------------------------------------------------------------------------------------------- fused operations


def _affine(
    g: Graph, nodes: Sequence[Node], readers: dict[Node, list[Node]], fixed: set[Node], apart: Collection[Node],
    per_sample: Callable[[Node], bool], uniform: Callable[[Node], bool], totals: Collection[Node],
) -> dict[Node, Affine]:  # fmt: skip
    computed = set(nodes)
    found: dict[Node, Affine] = {}
    taken: set[Node] = set()

    def alone(node: Node, one: Affine) -> bool:
        """Nobody else reads what is inside."""
        inside = _inside(node, one)
        made = {node, one.slope}
        return not any(
            n in fixed or n in taken or any(r not in made and r not in inside for r in readers.get(n, ())) for n in inside
        )

    for node in reversed(nodes):  # outermost first, so that the activation goes with its product
        if node in taken:
            continue
        activation, z = g.activations.get(node, (IDENTITY, node))
        if activation.name not in ACTIVATIONS:
            continue
        one = _linear_part(z, activation, per_sample, uniform)
        if one is None or one.product in totals or (one.product is node and activation == IDENTITY):
            continue
        derivative = None if activation == IDENTITY else slope(g, node)  # a module may have written it out itself
        if derivative in computed and derivative not in taken and one.scale is None and node not in apart:
            with_slope = replace(one, slope=derivative)
            if alone(node, with_slope):
                one = with_slope
        if one.slope is None and not alone(node, one):
            continue
        found[node] = one
        taken |= _inside(node, one) | {node} | ({one.slope} if one.slope is not None else set())
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
    if node.kind != "linear" or node.transposed or node.rows != z.rows or not per_sample(node):
        return None
    return Affine(node, scale, shift, activation)


def _inside(node: Node, one: Affine) -> set[Node]:
    """The nodes between the product, which is one of them, and the results, which are not."""
    found: set[Node] = set()
    waiting = [*node.operands, *(() if one.slope is None else one.slope.operands)]
    while waiting:
        other = waiting.pop()
        if other in found or other in one.product.operands or not other.operands:
            continue
        if other in (one.scale, one.shift, node, one.slope):
            continue
        found.add(other)
        if other is not one.product:
            waiting += other.operands
    return found


def _products(
    nodes: Sequence[Node], fixed: set[Node], affine: dict[Node, Affine], per_sample: Callable[[Node], bool],
    uniform: Callable[[Node], bool], totals: Collection[Node],
) -> dict[Node, Product]:  # fmt: skip
    """Factors and addends that a product takes along on its way."""
    made = Schedule([], {}, affine, {}, {})
    counts = Counter(operand for node in nodes for operand in made.operands(node))
    found: dict[Node, Product] = {}
    taken: set[Node] = set()
    for node in nodes:
        if node.kind not in ("mul", "add") or node in affine:
            continue
        for inner, other in (node.operands, node.operands[::-1]):
            if counts[inner] != 1 or inner is other or any(inner in held for held in (fixed, taken, affine, totals)):
                continue
            one = Product(inner) if inner.kind == "linear" and per_sample(inner) else found.get(inner)
            if one is None or one.addend is not None or uniform(other) or not inner.rows == other.rows == node.rows:
                continue
            if node.kind == "mul" and one.factor is None:
                found[node] = replace(one, factor=other)
            elif node.kind == "add":
                found[node] = replace(one, addend=other)
            else:
                continue
            taken.add(inner)
            break
    return {node: one for node, one in found.items() if node not in taken}


def _absorbed(node: Node, one: Product) -> set[Node]:
    """The nodes that such an operation makes on its way: the product, and its product with the factor."""
    inner = {one.product}
    if one.factor is not None and one.addend is not None:
        inner |= {operand for operand in node.operands if operand is not one.addend}
    return inner
