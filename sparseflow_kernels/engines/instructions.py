"""Elementwise nodes as the code of one pointwise operation (csrc/expression.h)."""

from __future__ import annotations

from dataclasses import dataclass, field as dataclass_field
from typing import Callable, Sequence

import numpy as np

from ..field import Node
from ..field.primitives import PRIMITIVES

COPY, NUMBER, ROW, ADD_NUMBER, MULTIPLY_NUMBER, POWER_NUMBER, MULTIPLY_ADD, ROW_MULTIPLY, ROW_ADD = (
    0, 1, 2, 8, 9, 28, 41, 42, 43
)  # fmt: skip


@dataclass
class Code:
    """The code of one pointwise operation. An instruction is (operation, place of the result, places a, b and c of the
    operands, number); places count the inputs, then the outputs, then the registers."""

    inputs: list[Node] = dataclass_field(default_factory=list)
    vectors: list[Node] = dataclass_field(default_factory=list)
    outputs: list[Node] = dataclass_field(default_factory=list)  # a node twice, where it is kept and added to the trace
    totals: list[int] = dataclass_field(default_factory=list)  # places whose rows are summed up
    registers: int = 0
    instructions: list[tuple[int, int, int, int, int, float]] = dataclass_field(default_factory=list)

    def arrays(self) -> dict[str, np.ndarray]:
        names = ("op", "to", "a", "b", "c")
        columns = list(zip(*self.instructions)) or [()] * 6
        found = {name: np.array(column, dtype=np.int32) for name, column in zip(names, columns)}
        return found | {"number": np.array(columns[5], dtype=np.float64)}


def code_of(
    nodes: Sequence[Node], outputs: Sequence[Node], traced: Sequence[Node], is_vector: Callable[[Node], bool],
    totals: Sequence[Node] = (),
) -> Code:
    """The code that computes elementwise nodes, given with operands before what reads them.

    outputs: nodes whose values are wanted, each in rows of its own; one that is not among `nodes` is copied.  traced: nodes
    whose rows are added to the trace.  is_vector: says of a leaf that it is one number per row, the same for all samples.
    totals: nodes whose sums over rows are wanted.
    """
    code = Code(outputs=[*outputs, *traced])
    inside = set(nodes)
    reads: dict[Node, int] = {}
    for node in nodes:
        for operand in node.operands:
            reads[operand] = reads.get(operand, 0) + 1
    for node in [*code.outputs, *totals]:
        reads[node] = reads.get(node, 0) + 1
    fused = _products_of_sums(nodes, inside, reads, {*code.outputs, *totals}, is_vector)
    absorbed = set(fused.values())
    work = [node for node in nodes if node not in absorbed]

    def operands_of(node: Node) -> list[Node]:
        if node in fused:
            product = fused[node]
            return [*product.operands, next(o for o in node.operands if o is not product)]
        return list(node.operands)

    for node in [*(operand for done in work for operand in operands_of(done)), *code.outputs, *totals]:
        if node in inside or node.kind == "number":
            continue
        kind = code.vectors if is_vector(node) else code.inputs
        if node not in kind:
            kind.append(node)
    place: dict[Node, int] = {node: number for number, node in enumerate(code.inputs)}
    first_output = len(code.inputs)
    own = {}
    for number, node in enumerate(outputs):
        own.setdefault(node, first_output + number)
    base = first_output + len(code.outputs)

    last: dict[Node, int] = {}
    for number, node in enumerate(work):
        for operand in operands_of(node):
            last[operand] = number
    for node in [*code.outputs, *totals]:
        last[node] = len(work)
    free: list[int] = []
    emit = code.instructions.append

    def register() -> int:
        if free:
            return free.pop()
        code.registers += 1
        return base + code.registers - 1

    def load(node: Node) -> int:
        """The place of an operand. A number or a vector is loaded into a register first."""
        if node in place:
            return place[node]
        where = place[node] = register()
        if node.kind == "number":
            emit((NUMBER, where, 0, 0, 0, node.value))
        else:
            emit((ROW, where, 0, code.vectors.index(node), 0, 0.0))
        return where

    for number, node in enumerate(work):
        operands = operands_of(node)
        instruction = _short(node, operands, code.vectors, place) if node not in fused else None
        if instruction is None:
            places = [load(operand) for operand in operands]
            op = MULTIPLY_ADD if node in fused else PRIMITIVES[node.kind].number
            instruction = (op, *(places + [0, 0])[:3], 0.0)
        done = [operand for operand in set(operands) if last.get(operand) == number and place.get(operand, -1) >= base]
        target = own.get(node)
        if target is None:
            target = register()  # no register of an operand, which the instruction reads while it writes
        place[node] = target
        op, a, b, c, value = instruction
        emit((op, target, a, b, c, value))
        free += [place[operand] for operand in done]
    for number, node in enumerate(code.outputs):
        where = first_output + number
        if place.get(node) != where:
            emit((COPY, where, load(node), 0, 0, 0.0))
    code.totals = [load(node) for node in totals]
    return code


def _short(node: Node, operands: list[Node], vectors: list[Node], place: dict[Node, int]) -> tuple | None:
    """The instruction of a node that takes a number or a vector as it is, (operation, a, b, c, number). None where there is no
    such instruction, or where the other operand is in no place yet."""
    if node.kind not in ("add", "sub", "mul", "pow") or len(operands) != 2:
        return None
    a, b = operands
    if node.kind in ("add", "mul") and (a.kind == "number" or (a in vectors and a not in place)):
        a, b = b, a
    if a not in place:
        return None
    if b.kind == "number":
        match node.kind:
            case "add":
                return ADD_NUMBER, place[a], 0, 0, b.value
            case "sub":
                return ADD_NUMBER, place[a], 0, 0, -b.value
            case "mul":
                return MULTIPLY_NUMBER, place[a], 0, 0, b.value
            case "pow":
                return POWER_NUMBER, place[a], 0, 0, b.value
    if b in vectors and b not in place and node.kind in ("add", "mul"):
        return (ROW_ADD if node.kind == "add" else ROW_MULTIPLY), place[a], vectors.index(b), 0, 0.0
    return None


def _products_of_sums(
    nodes: Sequence[Node], inside: set[Node], reads: dict[Node, int], outputs: set[Node],
    is_vector: Callable[[Node], bool],
) -> dict[Node, Node]:  # fmt: skip
    """node -> its operand a * b, for every sum a * b + c whose product nothing else reads."""
    plain = lambda node: node.kind != "number" and not is_vector(node)
    found: dict[Node, Node] = {}
    for node in nodes:
        if node.kind != "add" or node.operands[0] is node.operands[1]:
            continue
        for product, other in (node.operands, node.operands[::-1]):
            alone = product in inside and product.kind == "mul" and reads[product] == 1 and product not in outputs
            if alone and product not in found and all(map(plain, (*product.operands, other))):
                found[node] = product
                break
    return found
