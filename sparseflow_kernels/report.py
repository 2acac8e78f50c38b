"""A field as a table for people: a chain by its layers, a graph by its operations, one line each; and who runs it."""

from __future__ import annotations

from typing import Any, Sequence

from .divergence import KINDS, Kind
from .engines import choose
from .field import GraphField, LinearShift, Node, SigmoidGate, TimeFunction, VectorField
from .field.graph import CONTEXT, TIME, order
from .tables import Row

MOST_LINES = 60  # of a graph
MOST_PLANNED = 2**33  # multiply-adds that looking for the form of an exact divergence may take: a second
_WHEN = {0: "once", CONTEXT: "once a call", TIME: "once an evaluation"}
_PARTS = {SigmoidGate: "sigmoid", LinearShift: "linear", TimeFunction: "function of t"}


def describe_chain(field: VectorField) -> tuple[list[str], list[Row], list[str]]:
    """Its layers, from the state to the derivative: lines before, the rows of a table, and lines after it."""
    rows: list[Row] = [("layer", "from", "out x in", "weights", "density", "activation", "gate", "shift")]
    for number, layer in enumerate(field.layers):
        params = ", ".join(f"{value:g}" for value in layer.activation.params)
        rows.append((
            str(number), layer.name or "-", f"{layer.out_features} x {layer.in_features}", str(layer.pattern.nnz),
            f"{layer.pattern.density:.1%}", layer.activation.name + (f"({params})" if params else ""),
            part_name(layer.gate), part_name(layer.shift),
        ))
    return [], rows, []


def part_name(part: SigmoidGate | LinearShift | TimeFunction | None) -> str:
    """What a layer has for a gate or a shift."""
    return "-" if part is None else _PARTS[type(part)]


def describe_graph(field: GraphField) -> tuple[list[str], list[Row], list[str]]:
    """Its operations: a line for every product, and one for the elementwise operations between two products; as
    `describe_chain` gives them."""
    nodes = [node for node in order([field.output]) if node.operands]
    rows: list[Row] = [("operation", "from", "rows", "weights", "density", "computed")]
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
    after = [f"... and {left_out} operations more"] if left_out > 0 else []
    inputs = f"state {field.layout}"
    if field.context is not None:
        names = getattr(field.read_context, "names", None)
        inputs += f", context [batch, {field.context.rows}]" + (f" ({', '.join(names)})" if names else "")
    return [f"graph over {inputs}"], rows, after


def _when(node: Node) -> str:
    return "per sample" if node.per_sample else _WHEN[node.binding]


def engine_lines(compiled: Any, field: VectorField | GraphField) -> list[str]:
    """Who runs it, how the divergence is computed, and who makes the gradient. compiled: a CompiledField;
    field: what it holds now."""
    engine, reason = choose(field, compiled.requested)
    lines = [f"multiply-adds per sample and evaluation: {compiled.nnz}", f"engine: {engine.name} ({reason})"]
    lines += compiled.packed().describe()
    kinds = KINDS if compiled.layout is None or not compiled.layout.is_tuple else ()
    long = isinstance(field, GraphField) and field.dim * compiled.nnz > MOST_PLANNED
    planned = [kind for kind in kinds if kind != "exact" or not long]
    lines += _gradient_lines(compiled, planned)
    if len(planned) < len(kinds):
        lines.append(f"exact divergence: planned where it is asked for, as {field.dim} numbers a sample take long")
    for kind in planned:
        plan = compiled.divergence_plan(kind)
        costs = ", ".join(f"{name} {cost}" for name, cost in plan.costs.items())
        form = type(plan.form).__name__.removesuffix("Form").lower()
        lines.append(f"{kind} divergence: {form} form; {plan.reason} [multiply-adds: {costs}]")
    return lines


def _gradient_lines(compiled: Any, kinds: Sequence[Kind]) -> list[str]:
    """Who makes the gradient in x and the parameters: one line, or one for the field and each divergence."""
    told: dict[str, list[str]] = {}
    for kind in (None, *kinds):
        engine = compiled.packed(kind)
        obstacle = engine.no_gradient(("x", "tensors"))
        who = f"{engine.name}" if obstacle is None else f"reference, in plain PyTorch, because {obstacle}"
        told.setdefault(who, []).append("field" if kind is None else kind)
    if len(told) == 1:
        return [f"gradient: {who}" for who in told]
    return [f"gradient ({', '.join(kinds)}): {who}" for who, kinds in told.items()]
