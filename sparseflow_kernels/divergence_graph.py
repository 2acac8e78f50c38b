"""The divergence of a graph.

Hutchinson's is one tangent. The exact one is planned term by term, by whichever takes fewer multiply-adds: the
identities of `divergence_paths`, or tangents along a few directions that stand for all columns of the Jacobian.

Two columns of the Jacobian share a tangent where neither reaches the other's row (Curtis, Powell, Reid 1974, for the
diagonal alone): then the tangent along the sum of their unit vectors holds both diagonal entries undisturbed. How many
tangents that takes, the number of colours, follows from the structure of the graph and the masks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .divergence_paths import trace_by_paths
from .field import Convolution, Graph, GraphField, Node
from .field.graph import CONTEXT, STATE, order
from .field.transforms import tangent


@dataclass(eq=False)
class GraphForm:
    """The divergence as nodes of the field's graph.

    trace: the node [1] of tr df/dx, or of e' (df/dx) e.  noise: the node [dim] of e, a further input of the graph,
    which differs from sample to sample and is constant during a solve; None for the exact divergence.  colours: how
    many tangents it takes.
    """

    trace: Node
    noise: Node | None
    colours: int


def plan_graph(field: GraphField, kind: Literal["exact", "hutchinson"]) -> tuple[GraphForm, dict[str, int], str]:
    """(form, multiply-adds per sample by name, reason, for people). Makes nodes in the field's graph."""
    g = field.graph
    before = _multiply_adds([field.output])
    if kind == "hutchinson":
        noise = g.input("noise", field.dim, CONTEXT)
        (dot,) = tangent(g, [field.output], {field.state: noise})
        trace = g.number(0.0) if dot is None else inner_product(g, noise, g.spread(dot, field.dim))
        cost = _multiply_adds([field.output, trace]) - before
        return GraphForm(trace, noise, 1), {"hutchinson": cost}, f"one tangent through the graph, {cost} multiply-adds"
    trace, multiply_adds, colours, told = g.number(0.0), 0, 0, []
    for sign, term in _terms(field.output):
        by_paths = trace_by_paths(g, term, field.state)
        by_columns = None if by_paths is not None and by_paths[1] == 0 else _trace_by_columns(field, term)
        if by_columns is None or (by_paths is not None and by_paths[1] <= by_columns[1]):
            one, cost = by_paths
            told.append("paths")
        else:
            one, cost, count = by_columns
            colours += count
            told.append(f"{count} colours")
        trace, multiply_adds = g.add(trace, g.scaled(one, sign)), multiply_adds + cost
    reason = f"term by term: {', '.join(told)}, {multiply_adds} multiply-adds"
    return GraphForm(trace, None, colours), {"colours": colours, "exact": multiply_adds}, reason


def _terms(output: Node) -> list[tuple[float, Node]]:
    """(sign, node) of the terms that the output is the sum of, without those that do not depend on the state."""
    found, waiting = [], [(1.0, output)]
    while waiting:
        sign, node = waiting.pop()
        if node.kind in ("add", "sub") and all(operand.rows == node.rows for operand in node.operands):
            a, b = node.operands
            waiting += [(sign, a), (sign if node.kind == "add" else -sign, b)]
        elif node.kind == "neg":
            waiting.append((-sign, node.operands[0]))
        elif node.binding & STATE:
            found.append((sign, node))
    return found


def _trace_by_columns(field: GraphField, term: Node) -> tuple[Node, int, int]:
    """(the node of the term's trace, multiply-adds per sample, number of tangents)."""
    g, trace = field.graph, field.graph.number(0.0)
    groups = colour(structure(term, field.state))
    for columns in groups:
        seed = torch.zeros(field.dim, dtype=torch.float64)
        seed[columns] = 1.0
        (dot,) = tangent(g, [term], {field.state: g.constant(seed)})
        if dot is not None:
            trace = g.add(trace, inner_product(g, g.constant(seed), g.spread(dot, field.dim)))
    return trace, _multiply_adds([term, trace]) - _multiply_adds([term]), len(groups)


def inner_product(g: Graph, fixed: Node, dot: Node) -> Node:
    """The node [1] of fixed . dot. As `fixed` is constant during a solve, so is its product with a transposed matrix: a
    matrix in front of `dot` is moved to it, and is not applied at every evaluation; but not a convolution to fewer
    rows, whose few multiply-adds take less than a product of all the rows that it reads. What other nodes of dot read
    is computed in any case, and is multiplied as it is."""
    readers = Counter(operand for node in order([dot]) for operand in set(node.operands))
    total, waiting = None, [(fixed, dot, 1.0)]
    while waiting:
        left, right, sign = waiting.pop()
        if readers[right] > 1:
            total = g.add(total, g.scaled(g.total(g.mul(left, right)), sign))
            continue
        if right.kind in ("add", "sub") and all(operand.rows == right.rows for operand in right.operands):
            a, b = right.operands
            waiting += [(left, a, sign), (left, b, -sign if right.kind == "sub" else sign)]
            continue
        if right.kind == "neg":
            waiting.append((left, right.operands[0], -sign))
            continue
        if right.kind == "linear" and not right.matrix.constant and not _narrows(right):
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


def _narrows(node: Node) -> bool:
    return isinstance(node.matrix, Convolution) and node.rows < node.operands[0].rows


def _multiply_adds(outputs: list[Node]) -> int:
    return sum(n.matrix.multiply_adds for n in order(outputs) if n.kind == "linear" and n.per_sample)


MOST_DIMENSIONS = 2**15  # of a state whose Jacobian's structure is looked at: a gigabyte of flags
AT_ONCE = 2**24  # numbers that `structure` holds of one node


def structure(output: Node, state: Node) -> Tensor:
    """bool [rows of output, rows of state]: where the Jacobian can be other than zero. Raises ValueError for a state of
    more than MOST_DIMENSIONS numbers."""
    if state.rows > MOST_DIMENSIONS:
        raise ValueError(
            f"exact divergence: the state has {state.rows} numbers a sample, and the Jacobian of more than "
            f'{MOST_DIMENSIONS} is not looked at; take kind="hutchinson"'
        )
    nodes = order([output], stop=lambda node: node is state)
    step = max(1, AT_ONCE // max(node.rows for node in (state, *nodes)))
    columns = torch.arange(state.rows).split(step)
    return torch.cat([_structure(nodes, output, state, piece) for piece in columns], 1)


@torch.no_grad()
def _structure(nodes: list[Node], output: Node, state: Node, columns: Tensor) -> Tensor:
    """These columns of it. nodes: down to the state, in order."""
    own = torch.zeros(state.rows, len(columns), dtype=torch.bool)
    own[columns, torch.arange(len(columns))] = True
    masks: dict[Node, Tensor | None] = {state: own}
    for node in nodes:
        if node is state:
            continue
        read = [masks[operand] for operand in node.operands]
        if all(mask is None for mask in read):
            masks[node] = None
        elif node.kind == "linear":
            pattern = node.matrix.pattern
            ones = torch.ones(pattern.nnz, dtype=torch.float32)  # whatever torch's default is
            if isinstance(node.matrix, Convolution):
                masks[node] = (node.matrix.product(read[0].T.float(), ones, node.transposed) > 0.5).T
            else:
                entries = pattern.dense(ones)
                masks[node] = ((entries.T if node.transposed else entries) @ read[0].float()) > 0
        elif node.kind == "rows":
            pieces = []
            for operand, mask, (first, count) in zip(node.operands, read, node.pieces):
                whole = torch.zeros(operand.rows, len(columns), dtype=torch.bool) if mask is None else mask
                pieces.append(whole[first : first + count])
            masks[node] = torch.cat(pieces)
        else:
            mask = torch.zeros(node.rows, len(columns), dtype=torch.bool)
            for other in read:
                mask = mask if other is None else mask | other
            masks[node] = mask
    found = masks[output]
    return torch.zeros(output.rows, len(columns), dtype=torch.bool) if found is None else found


def colour(jacobian: Tensor) -> list[Tensor]:
    """Groups of columns, int64 and ascending each, that can share a tangent, found greedily. Columns without a diagonal
    entry are in no group. jacobian: bool [dim, dim], as `structure` gives it."""
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
