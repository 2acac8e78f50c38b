"""A graph as a table for people: its operations, one line each."""

from __future__ import annotations

from .field import GraphField, Node
from .field.graph import CONTEXT, TIME, order

WHEN = {0: "once", CONTEXT: "once a call", TIME: "once an evaluation"}
MOST_LINES = 60


def describe_graph(field: GraphField) -> list[str]:
    """Products one line each, the elementwise operations between them together."""
    nodes = [node for node in order([field.output]) if node.operands]
    rows = [("operation", "from", "rows", "weights", "density", "computed")]
    run: list[Node] = []

    def close() -> None:
        if run:
            names = ", ".join(dict.fromkeys(node.kind for node in run))
            rows.append((names, run[-1].origin or "-", str(run[-1].rows), "", "", _when(run[-1])))
            run.clear()

    for node in nodes:
        if node.kind == "linear" and not node.matrix.constant:
            close()
            pattern = node.matrix.pattern
            name = field.parts[node.matrix.part].name if node.matrix.part is not None else node.origin
            title = "product with the transpose" if node.transposed else "product"
            rows.append((title, name or "-", str(node.rows), str(pattern.nnz), f"{pattern.density:.1%}", _when(node)))
            continue
        if run and (_when(run[-1]), run[-1].rows) != (_when(node), node.rows):
            close()
        run.append(node)
    close()
    left_out = len(rows) - 1 - MOST_LINES
    rows = rows[: MOST_LINES + 1]
    rows = [tuple(cell if len(cell) < 48 else cell[:45] + "..." for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if left_out > 0:
        lines.append(f"... and {left_out} operations more")
    inputs = f"state {field.layout}"
    if field.context is not None:
        names = getattr(field.read_context, "names", None)
        inputs += f", context [batch, {field.context.rows}]" + (f" ({', '.join(names)})" if names else "")
    return [f"graph over {inputs}", *lines]


def _when(node: Node) -> str:
    return "per sample" if node.per_sample else WHEN[node.binding]
