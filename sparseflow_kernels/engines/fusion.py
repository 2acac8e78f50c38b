"""Which nodes of a graph one operation over a matrix makes: layers with their slopes or tangents, products with a factor
and an addend."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Callable, Collection, Sequence

from ..activations import ACTIVATIONS
from ..field import IDENTITY, Activation, Graph, Matrix, Node
from ..field.transforms import slope


@dataclass(eq=False)
class Affine:
    """act(scale * (W source) + shift), one fused operation. scale, shift: nodes that are the same for all samples.

    slope: the node of act' there, where the operation makes that too.  tangent: a node that is made in its place, and for
    which alone the slope is: act' * seed; or act' * (W moved), or W moved itself, of which `second` is the product: value
    and tangent are made over one stream of weights then, where `moved` lies beside the source.
    """

    product: Node
    scale: Node | None
    shift: Node | None
    activation: Activation
    slope: Node | None = None
    tangent: Node | None = None
    second: Node | None = None
    seed: Node | None = None

    @property
    def source(self) -> Node:
        return self.product.operands[0]

    @property
    def operands(self) -> tuple[Node, ...]:
        more = () if self.second is None else self.second.operands
        return (*self.product.operands, *more, *(() if self.seed is None else (self.seed,)))

    @property
    def beside(self) -> Node | None:
        """What the operation makes besides its value, in the slot beside it."""
        return self.slope if self.tangent is None else self.tangent


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


@dataclass
class Fusion:
    """nodes: what operations make, operands first; what is made inside or beside is in no list.  affine, products: node ->
    the fused operation that makes it.  pairs: nodes that lie in one buffer, the one in the first slot -> the one in the
    second."""

    nodes: list[Node]
    affine: dict[Node, Affine]
    products: dict[Node, Product]
    pairs: dict[Node, Node]


class Fuser:
    """Finds the fused operations among nodes that differ from sample to sample."""

    def __init__(
        self, g: Graph, nodes: Sequence[Node], fixed: set[Node], apart: Collection[Node], totals: Collection[Node],
        per_sample: Callable[[Node], bool], uniform: Callable[[Node], bool],
    ) -> None:  # fmt: skip
        """nodes: operands first.  fixed: those that are read from outside.  apart: those whose rows are given, so that
        nothing can lie beside them.  totals: sums of rows, which no product makes.  per_sample, uniform: as in `schedule`."""
        self.g, self.nodes, self.fixed, self.apart, self.totals = g, nodes, fixed, apart, totals
        self.per_sample, self.uniform = per_sample, uniform
        self.readers: dict[Node, list[Node]] = {}
        for node in nodes:
            for operand in node.operands:
                self.readers.setdefault(operand, []).append(node)

    def find(self, with_tangents: bool) -> Fusion:
        affine = self._affine()
        pairs: dict[Node, Node] = {}
        nodes = None
        if with_tangents:
            moving, pairs = self._with_tangents(affine)
            nodes = self._made(moving)  # None: a tangent would wait for its own value
            affine = affine if nodes is None else moving
        if nodes is None:
            nodes, pairs = self._made(affine), {}
        pairs |= {node: one.beside for node, one in affine.items() if one.beside is not None}
        products = self._products(nodes, affine)
        absorbed = set().union(*(_absorbed(node, one) for node, one in products.items()))
        return Fusion([node for node in nodes if node not in absorbed], affine, products, pairs)

    def _made(self, affine: dict[Node, Affine]) -> list[Node] | None:
        """The nodes that operations make, operands first; None where some wait for each other."""
        inner = set().union(*(_inside(node, one) for node, one in affine.items()))
        maker = {one.beside: node for node, one in affine.items() if one.beside is not None}
        made = dict.fromkeys(maker.get(node, node) for node in self.nodes if node not in inner or node in affine)
        found: list[Node] = []
        state: dict[Node, int] = {}  # 1: its operands are looked at, 2: it is in the list
        waiting = [(node, False) for node in reversed(made)]
        while waiting:
            node, done = waiting.pop()
            if done:
                state[node] = 2
                found.append(node)
                continue
            if node in state:
                continue
            state[node] = 1
            waiting.append((node, True))
            for operand in affine[node].operands if node in affine else node.operands:
                operand = maker.get(operand, operand)
                if state.get(operand) == 1:
                    return None
                if operand in made and operand not in state:
                    waiting.append((operand, False))
        return found

    # ---- layers

    def _affine(self) -> dict[Node, Affine]:
        computed = set(self.nodes)
        found: dict[Node, Affine] = {}
        taken: set[Node] = set()
        for node in reversed(self.nodes):  # outermost first, so that the activation goes with its product
            if node in taken:
                continue
            activation, z = self.g.activations.get(node, (IDENTITY, node))
            if activation.name not in ACTIVATIONS:
                continue
            one = self._linear_part(z, activation)
            if one is None or one.product in self.totals or (one.product is node and activation == IDENTITY):
                continue
            derivative = None if activation == IDENTITY else slope(self.g, node)  # a module may have written it out itself
            if derivative in computed and derivative not in taken and one.scale is None and node not in self.apart:
                with_slope = replace(one, slope=derivative)
                if self._alone(node, with_slope, taken):
                    one = with_slope
            if one.slope is None and not self._alone(node, one, taken):
                continue
            found[node] = one
            taken |= _inside(node, one) | {node} | ({one.slope} if one.slope is not None else set())
        return found

    def _alone(self, node: Node, one: Affine, taken: Collection[Node]) -> bool:
        """Nobody else reads what is inside."""
        inside = _inside(node, one)
        known = {node, one.beside, *inside}
        return not any(
            n in self.fixed or n in taken or any(reader not in known for reader in self.readers.get(n, ())) for n in inside
        )

    def _linear_part(self, z: Node, activation: Activation) -> Affine | None:
        """z as scale * (W h) + shift."""

        def without(node: Node) -> tuple[Node, Node] | None:
            """The operand that differs from sample to sample, and the other one, which does not."""
            for moving, still in (node.operands, node.operands[::-1]):
                if self.per_sample(moving) and self.uniform(still):
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
        if node.kind != "linear" or node.transposed or node.rows != z.rows or not self.per_sample(node):
            return None
        return Affine(node, scale, shift, activation)

    def _with_tangents(self, affine: dict[Node, Affine]) -> tuple[dict[Node, Affine], dict[Node, Node]]:
        """The layers, with tangents where their sources can lie beside each other; and these sources as pairs."""
        absorbed = set().union(*(_inside(node, one) for node, one in affine.items()))
        by_matrix: dict[Matrix, list[Node]] = {}
        for node in self.nodes:
            if node.kind == "linear" and not node.transposed and node not in absorbed and node not in self.totals:
                by_matrix.setdefault(node.matrix, []).append(node)
        found, pairs = dict(affine), {}
        beside = {one.slope for one in affine.values()}  # what lies in a second slot
        own = {node for node in self.nodes if node not in absorbed and node.kind != "rows" and node not in self.totals}

        def can_pair(x: Node, moved: Node) -> bool:
            if pairs.get(x) is moved or (x in found and found[x].tangent is moved):
                return True
            free = all(
                n in own and n not in self.apart and n not in beside and n not in pairs
                and not (n in found and found[n].beside is not None) for n in (x, moved)
            )  # fmt: skip
            # a layer's value lies in a first slot
            return free and x is not moved and x.rows == moved.rows and moved not in found

        for node in self.nodes:
            one = found.get(node)
            if one is None or one.scale is not None or node in self.apart:
                continue
            for second in by_matrix.get(one.product.matrix, ()):
                tangent = self._tangent(one, second)
                if tangent is None or tangent in self.apart or tangent in beside or tangent in pairs or tangent in found:
                    continue
                moving = replace(one, tangent=tangent, second=second)
                if node in pairs or not can_pair(one.source, second.operands[0]) or not self._alone(node, moving, ()):
                    continue
                found[node] = moving
                beside.discard(one.slope)
                beside |= {tangent, second.operands[0]}
                if found.get(one.source) is None or found[one.source].tangent is not second.operands[0]:
                    pairs[one.source] = second.operands[0]
                by_matrix[one.product.matrix].remove(second)
                break
            else:
                seeded = self._seeded(one)
                free = seeded is not None and not any(seeded.tangent in held for held in (self.apart, beside, pairs, found))
                if free and node not in pairs and self._alone(node, seeded, ()):
                    found[node] = seeded
                    beside.discard(one.slope)
                    beside.add(seeded.tangent)
        return found, pairs

    def _seeded(self, one: Affine) -> Affine | None:
        """The layer with the node of act' * seed beside its value, if that alone reads the slope."""
        readers = self.readers.get(one.slope, ())
        if one.slope is None or len(readers) != 1 or readers[0].kind != "mul" or one.slope in self.fixed:
            return None
        (seed,) = (o for o in readers[0].operands if o is not one.slope)
        whole = seed.rows == one.slope.rows and not self.uniform(seed)
        return replace(one, tangent=readers[0], seed=seed) if whole else None

    def _tangent(self, one: Affine, second: Node) -> Node | None:
        """The node of act' * (W moved), of which W moved is `second`, if nobody else reads either factor."""
        if one.activation == IDENTITY:
            return second
        readers = self.readers.get(second, ())
        if one.slope is None or len(readers) != 1 or readers[0].kind != "mul" or one.slope in self.fixed:
            return None
        (tangent,) = readers
        return tangent if set(tangent.operands) == {second, one.slope} and self.readers[one.slope] == [tangent] else None

    # ---- products

    def _products(self, nodes: Sequence[Node], affine: dict[Node, Affine]) -> dict[Node, Product]:
        """Factors and addends that a product takes along on its way."""
        counts = Counter(o for node in nodes for o in (affine[node].operands if node in affine else node.operands))
        found: dict[Node, Product] = {}
        taken: set[Node] = {one.beside for one in affine.values()}
        for node in nodes:
            if node.kind not in ("mul", "add") or node in affine:
                continue
            for inner, other in (node.operands, node.operands[::-1]):
                busy = any(inner in held for held in (self.fixed, taken, affine, self.totals))
                if counts[inner] != 1 or inner is other or busy:
                    continue
                one = Product(inner) if inner.kind == "linear" and self.per_sample(inner) else found.get(inner)
                if one is None or one.addend is not None or self.uniform(other):
                    continue
                if not inner.rows == other.rows == node.rows:
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


def _inside(node: Node, one: Affine) -> set[Node]:
    """The nodes between the products, which are some of them, and the results, which are not."""
    results = (node, one.beside, one.scale, one.shift, *one.operands)
    products = (one.product, one.second)
    found: set[Node] = set()
    waiting = [*node.operands, *(() if one.slope is None else one.slope.operands)]
    if one.tangent is not one.second:
        waiting += one.tangent.operands
    while waiting:
        other = waiting.pop()
        if other in found or other in results or not other.operands:
            continue
        found.add(other)
        if other not in products:
            waiting += other.operands
    return found


def _absorbed(node: Node, one: Product) -> set[Node]:
    """The nodes that such an operation makes on its way: the product, and its product with the factor."""
    inner = {one.product}
    if one.factor is not None and one.addend is not None:
        inner |= {operand for operand in node.operands if operand is not one.addend}
    return inner
