"""The divergence of a graph: tangents of a few directions that stand for all columns of the Jacobian, or Hutchinson's.

Two columns of the Jacobian share a tangent where neither reaches the other's row (Curtis, Powell, Reid 1974, for the
diagonal alone): then the tangent along the sum of their unit vectors holds both diagonal entries undisturbed. How many
tangents that takes, the number of colours, follows from the structure of the graph and the masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .field import Graph, GraphField, Node
from .field.graph import CONTEXT, order
from .field.transforms import tangent


@dataclass(eq=False)
class GraphForm:
    """trace: the node [1] of tr df/dx, or of e' (df/dx) e with e = `noise`, a further input of the graph (per sample,
    constant during a solve).  colours: tangents it takes."""

    trace: Node
    noise: Node | None
    colours: int


def plan_graph(field: GraphField, kind: Literal["exact", "hutchinson"]) -> tuple[GraphForm, dict[str, int], str]:
    """(form, multiply-adds per sample by name, reason)."""
    g = field.graph
    before = _multiply_adds([field.output])
    if kind == "hutchinson":
        noise = g.input("noise", field.dim, CONTEXT)
        (dot,) = tangent(g, [field.output], {field.state: noise})
        trace = g.number(0.0) if dot is None else inner_product(g, noise, g.spread(dot, field.dim))
        cost = _multiply_adds([field.output, trace]) - before
        return GraphForm(trace, noise, 1), {"hutchinson": cost}, f"one tangent through the graph, {cost} multiply-adds"
    jacobian = structure(field.output, field.state)
    groups = colour(jacobian)
    trace = g.number(0.0)
    for columns in groups:
        seed = torch.zeros(field.dim, dtype=torch.float64)
        seed[columns] = 1.0
        (dot,) = tangent(g, [field.output], {field.state: g.constant(seed)})
        if dot is not None:
            trace = g.add(trace, inner_product(g, g.constant(seed), g.spread(dot, field.dim)))
    cost = _multiply_adds([field.output, trace]) - before
    live = int(jacobian.diagonal().sum())
    reason = f"{len(groups)} colours for the {live} of {field.dim} columns whose diagonal entry is not zero"
    return GraphForm(trace, None, len(groups)), {"colours": len(groups), "columns": cost}, reason


def inner_product(g: Graph, fixed: Node, dot: Node) -> Node:
    """fixed . dot, [1], where `fixed` stays the same for a solve: what the last matrix makes of it does too."""
    total, waiting = None, [(fixed, dot, 1.0)]
    while waiting:
        left, right, sign = waiting.pop()
        if right.kind in ("add", "sub") and all(operand.rows == right.rows for operand in right.operands):
            a, b = right.operands
            waiting += [(left, a, sign), (left, b, -sign if right.kind == "sub" else sign)]
            continue
        if right.kind == "neg":
            waiting.append((left, right.operands[0], -sign))
            continue
        if right.kind == "linear" and right.matrix.part is not None:
            left, right = g.linear(right.matrix, left, not right.transposed), right.operands[0]
            left = g.spread(left, right.rows)
        elif right.kind == "rows" and len(right.operands) > 1:
            start = 0
            for operand, (first, count) in zip(right.operands, right.pieces):
                piece = g.select(operand, torch.arange(first, first + count))
                waiting.append((g.select(left, torch.arange(start, start + count)), piece, sign))
                start += count
            continue
        total = g.add(total, g.scaled(g.total(g.mul(left, right)), sign))
    return g.number(0.0) if total is None else total


def _multiply_adds(outputs: list[Node]) -> int:
    return sum(n.matrix.pattern.nnz for n in order(outputs) if n.kind == "linear" and n.per_sample)


@torch.no_grad()
def structure(output: Node, state: Node) -> Tensor:
    """bool [rows of output, rows of state]: which entries of the Jacobian can be other than zero."""
    masks: dict[Node, Tensor | None] = {state: torch.eye(state.rows, dtype=torch.bool)}
    for node in order([output], stop=lambda node: node is state):
        if node is state:
            continue
        read = [masks[operand] for operand in node.operands]
        if all(mask is None for mask in read):
            masks[node] = None
        elif node.kind == "linear":
            pattern = node.matrix.pattern
            entries = pattern.dense(torch.ones(pattern.nnz))
            masks[node] = ((entries.T if node.transposed else entries) @ read[0].float()) > 0
        elif node.kind == "rows":
            masks[node] = torch.cat([
                (torch.zeros(operand.rows, state.rows, dtype=torch.bool) if mask is None else mask)[first : first + count]
                for operand, mask, (first, count) in zip(node.operands, read, node.pieces)
            ])  # fmt: skip
        else:
            mask = torch.zeros(node.rows, state.rows, dtype=torch.bool)
            for other in read:
                mask = mask if other is None else mask | other
            masks[node] = mask
    found = masks[output]
    return torch.zeros(output.rows, state.rows, dtype=torch.bool) if found is None else found


def colour(jacobian: Tensor) -> list[Tensor]:
    """Groups of columns (int64, ascending) that share a tangent, greedily; columns without a diagonal entry are in none."""
    live = jacobian.diagonal().nonzero().flatten()
    conflict = jacobian[live][:, live]
    conflict = conflict | conflict.T
    groups: list[list[int]] = []
    blocked: list[Tensor] = []
    for place, column in enumerate(live.tolist()):
        free = next((number for number, mask in enumerate(blocked) if not bool(mask[place])), None)
        if free is None:
            free = len(groups)
            groups.append([])
            blocked.append(torch.zeros(live.numel(), dtype=torch.bool))
        groups[free].append(column)
        blocked[free] |= conflict[place]
    return [torch.tensor(group) for group in groups]
