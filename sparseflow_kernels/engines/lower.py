"""Writes a graph as the list of operations that a native engine runs (csrc/field.h): products, fused affine operations,
pointwise operations, gradients.

What is the same for all samples is not in the list: numbers that follow from the parameters alone are row vectors, computed
when the program is packed (`ahead.py`); those that follow from time are rows of the time answer, which another program
computes once an evaluation; those that follow from the context are computed in torch once a call, and are read per sample.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Callable, Collection, Iterable, Sequence

import numpy as np
import torch

from ..activations import rule_and_params
from ..field import Convolution, GraphField, Matrix, Node, Pattern
from ..field.graph import CONTEXT, TIME, from_parts, order
from ..field.transforms import adjoint
from .fusion import Affine, Product
from .instructions import code_of
from .program import Store
from .schedule import Schedule, schedule

Place = tuple[int, int, int]  # buffer, slot, first row

MOST_VECTORS, MOST_PLACES, MOST_TOTALS = 64, 1024, 15  # of a pointwise operation (csrc/validate.h, csrc/operations.h)
COTANGENT, TRACE_COTANGENT = "cotangent", "trace cotangent"  # further inputs of an adjoint


@dataclass(frozen=True)
class Bindings:
    """Where the inputs of a program come from. state: names of the inputs that are its state, in order of its rows.
    sample: bits of the bindings that differ from sample to sample."""

    state: tuple[Node, ...]
    sample: int

    def per_sample(self, node: Node) -> bool:
        if node.kind == "input":
            return bool(node.binding & (self.sample | CONTEXT))
        return bool(node.binding & self.sample) or (node.binding & CONTEXT != 0 and node.binding & TIME != 0)

    def vector(self, node: Node) -> bool:
        """One number per row, the same for all samples."""
        return not (node.binding & (self.sample | CONTEXT))


class GraphWriter:
    """One program over a native builder. After `write` or `write_adjoint`:

    matrices: (native number, matrix) of those that products read.  vectors: (native number, node) computed when packed.  timed: nodes of
    the time answer, in order of its rows.  contexts: nodes of the context, in order of its rows.
    gradients: of an adjoint: (native number of a matrix whose sums are a gradient, matrix).
    """

    def __init__(self, builder, field: GraphField, bindings: Bindings, totals: bool = False, tangents: bool = False) -> None:
        """totals: the engine's pointwise operations sum up rows.  tangents: its layers make tangents along."""
        self._able = totals, tangents
        self.builder, self.field, self.graph, self.bindings = builder, field, field.graph, bindings
        self.matrices: list[tuple[int, Matrix]] = []
        self.vectors: list[tuple[int, Node]] = []
        self.timed: list[Node] = []
        self.contexts: list[Node] = []
        self.gradients: list[tuple[int, Matrix]] = []
        self._matrix: dict[Matrix, int] = {}
        self._vector: dict[Node, int] = {}
        self._places: dict[Node, Place] = {}
        self._modulations: dict[tuple, int] = {}
        self._owned: list[tuple[int, int, int]] = []  # buffers of what is computed: (rows, slots, number)
        self._free: list[tuple[int, int, int]] = []  # those that nobody reads any more
        self._list = "body"

    # ---- whole programs

    def write(self, output: Node, trace: Sequence[Node] = ()) -> None:
        """f = output, and the trace as the sum of these nodes' rows."""
        state = self._inputs()
        f = self.builder.buffer(output.rows)
        summed = [self._summed(node) for node in trace]
        traced = [node for node in summed if node.kind != "number" or node.value != 0.0]
        plan = schedule(self.graph, [output, *traced], self.bindings.per_sample, self.bindings.vector, [output], *self._able)
        self._leaves(plan.leaves)
        self._emit(plan, {output: (f, 0, 0)}, traced)
        self.builder.graph_roles(
            sum(node.rows for node in self.bindings.state), output.rows, bool(trace), state, f, context=self._context(),
            **self._time_answer(),
        )

    def write_adjoint(
        self, output: Node, trace: Node | None, names: dict[str, Node], without: Collection[Node] = ()
    ) -> None:  # fmt: skip
        """f for the stages of a solve, and from the cotangents of f (and of the trace) those of the state, the context,
        the vectors and the matrices. names: the cotangents' input nodes.  without: inputs whose own nobody wants: zeros."""
        g, builder, per_sample = self.graph, self.builder, self.bindings.per_sample
        state = self._inputs()
        f = builder.buffer(output.rows)
        body = schedule(g, [output], per_sample, self.bindings.vector, [output], *self._able)
        given = {output: names[COTANGENT]}
        if trace is not None:
            given[trace] = names[TRACE_COTANGENT]
        leaf = lambda node: not per_sample(node) or node.kind == "input"
        found = adjoint(g, given, leaf)
        pairs = [(matrix, left, right) for matrix, both in found.matrices.items() for left, right in both]
        bars = {node: bar for node, bar in found.cotangents.items() if node not in without}
        read = [*bars.values(), *(side for _, *sides in pairs for side in sides)]
        plan = schedule(g, read, per_sample, self.bindings.vector, (), *self._able)
        self._leaves([*body.leaves, *plan.leaves, *(node for node in bars if leaf(node) and _is_trained(node))])
        cotangent, lam = builder.buffer(output.rows), -1
        self._places[names[COTANGENT]] = (cotangent, 0, 0)
        if trace is not None:
            lam = builder.buffer(1)
            self._places[names[TRACE_COTANGENT]] = (lam, 0, 0)
        ones = builder.buffer(1)
        leaves = dict(self._places)
        self._emit(body, {output: (f, 0, 0)}, [])
        self._places, self._free = leaves, list(self._owned)  # the other list runs by itself, in the same memory
        self._list = "reverse"
        pulled = builder.buffer(sum(node.rows for node in self.bindings.state))
        of_context = builder.buffer(sum(node.rows for node in self.contexts)) if self.contexts else -1
        targets: list[tuple[Node | None, Place, int]] = []
        row = 0
        for node in self.bindings.state:
            targets.append((bars.get(node), (pulled, 0, row), node.rows))
            row += node.rows
        row = 0
        for node in self.contexts:
            targets.append((bars.get(node), (of_context, 0, row), node.rows))
            row += node.rows
        self._emit(plan, {}, [], pairs, targets, [(n, bar) for n, bar in bars.items() if n in self._vector and _is_trained(n)], ones)
        builder.graph_roles(
            sum(node.rows for node in self.bindings.state), output.rows, trace is not None, state, f, ones=ones,
            context=self._context(), **self._time_answer(),
        )
        builder.graph_adjoint_roles(cotangent, lam, pulled, of_context)

    # ---- leaves

    def _inputs(self) -> int:
        rows, state = 0, self.builder.buffer(sum(node.rows for node in self.bindings.state))
        for node in self.bindings.state:
            self._places[node] = (state, 0, rows)
            rows += node.rows
        return state

    def _leaves(self, leaves: Iterable[Node]) -> None:
        """Row vectors and rows of the context, for what the operations read."""
        for node in dict.fromkeys(leaves):
            if node in self._places or node.kind == "number" or node.name in (COTANGENT, TRACE_COTANGENT):
                continue
            if self.bindings.vector(node):
                self._add_vector(node)
            else:
                self.contexts.append(node)
        if self.contexts:
            self._context_buffer = self.builder.buffer(sum(node.rows for node in self.contexts))
            row = 0
            for node in self.contexts:
                self._places[node] = (self._context_buffer, 0, row)
                row += node.rows

    def _add_vector(self, node: Node) -> None:
        if node.binding & TIME:
            row = sum(other.rows for other in self.timed)
            self.timed.append(node)
            self._vector[node] = self.builder.vector(node.rows, None, row)
        else:
            self._vector[node] = number = self.builder.vector(node.rows, torch.zeros(node.rows).numpy(), -1)
            self.vectors.append((number, node))

    @property
    def time_in_python(self) -> bool:
        """Some of what depends on time is a function in Python, so all of it is computed in torch."""
        return any(node.kind == "time" for node in order(self.timed))

    def _time_answer(self) -> dict[str, int]:
        rows = sum(node.rows for node in self.timed)
        return {"time_rows": rows} | ({"time_external": 0, "externals": 1} if self.time_in_python else {})

    def _context(self) -> int:
        return self._context_buffer if self.contexts else -1

    def _native(self, matrix: Matrix, fresh: bool = False) -> int:
        """fresh: a number of its own, for another sum of gradients, which needs the pattern and no values."""
        if matrix not in self._matrix or fresh:
            pattern = matrix.pattern
            number = self.builder.matrix(
                *matrix.shape, pattern.row_ptr.to(torch.int32).numpy(), pattern.col.to(torch.int32).numpy(),
                torch.ones(pattern.nnz).numpy(), *((matrix.window.pairs,) if isinstance(matrix, Convolution) else ()),
            )
            if fresh:
                return number
            self.matrices.append((number, matrix))
            self._matrix[matrix] = number
        return self._matrix[matrix]

    def _modulation(self, rows: int, one: Affine) -> int:
        key = (rows, one.scale, one.shift)
        if key not in self._modulations:
            scale, shift = (-1 if node is None else self._wide_vector(node, rows) for node in (one.scale, one.shift))
            self._modulations[key] = self.builder.vector_modulation(rows, scale, shift)
        return self._modulations[key]

    def _wide_vector(self, node: Node, rows: int) -> int:
        """The vector of a node with as many rows as an operation has."""
        wide = self.graph.spread(node, rows)
        if wide not in self._vector:
            self._add_vector(wide)
        return self._vector[wide]

    # ---- operations

    def _summed(self, node: Node) -> Node:
        """The node whose rows add up to this one [1]. The trace adds rows up by itself, so their sum is not computed first."""
        ones = node.kind == "linear" and node.matrix.constant and not node.transposed
        if ones and node.matrix.pattern.nnz == node.operands[0].rows and node.rows == 1 and self.bindings.per_sample(node):
            return node.operands[0]
        return node

    def _emit(
        self, plan: Schedule, placed: dict[Node, Place], traced: Sequence[Node], pairs: Sequence[tuple] = (),
        targets: Sequence[tuple[Node | None, Place, int]] = (), sums: Sequence[tuple[Node, Node]] = (), ones: int = -1,
    ) -> None:  # fmt: skip
        """placed: nodes that belong in these rows.  traced: whose rows are added to the trace.  pairs: (matrix, left,
        right) whose inner products are a gradient.  targets: what is copied where at the end (None: zeros).  sums: (vector
        node, cotangent per sample) to be summed over the samples."""
        steps = plan.steps
        outside: dict[Node, int] = {}  # nodes that are read at the end -> the last step of all
        end = max(steps.values(), default=0) + 2
        sinks = [side for _, *sides in pairs for side in sides] + [bar for bar, _, _ in targets if bar is not None]
        sinks += [bar for _, bar in sums]
        for node in [*placed, *traced]:
            outside[node] = end
        for node in sinks:
            outside[node] = end
        # A gradient is taken as soon as both of its sides are there, so that their rows are free again.
        due: dict[int, list[tuple]] = {}
        for pair in pairs:
            due.setdefault(max((steps.get(side, 0) for side in pair[1:]), default=0), []).append(pair)
        joined = self._joined(plan, placed)
        gone = self._last_reads(plan, end, placed, traced, targets, sums, due, joined)
        clusters: dict[int, dict[int, list[Node]]] = {}
        singles: dict[int, list[Node]] = {}
        totals: dict[int, dict[int, list[Node]]] = {}
        for node in plan.nodes:
            if node in plan.totals:
                rows = plan.totals[node].rows
                totals.setdefault(steps[node], {}).setdefault(rows, []).append(node)
                clusters.setdefault(steps[node], {}).setdefault(rows, [])
            elif plan.is_pointwise(node):
                clusters.setdefault(steps[node], {}).setdefault(node.rows, []).append(node)
            else:
                singles.setdefault(steps[node], []).append(node)
        owners: dict[int, list[tuple[int, int, int]]] = {}  # step -> buffers that are free after it

        def place(node: Node) -> Place:
            if node in self._places:
                return self._places[node]
            if node in placed:
                self._places[node] = placed[node]
                return placed[node]
            if node in joined:
                whole, first = joined[node]
                buffer, slot, row = place(whole)
                self._places[node] = (buffer, slot, row + first)
                return self._places[node]
            if node in plan.first:  # beside another one
                buffer, _, row = place(plan.first[node])
                self._places[node] = (buffer, 1, row)
                return self._places[node]
            second = plan.pairs.get(node)
            last = max(gone.get(node, end), 0 if second is None else gone.get(second, end))
            buffer = self._buffer(node.rows, 1 if second is None else 2)
            self._places[node] = (buffer, 0, 0)
            owners.setdefault(last, []).append((node.rows, 1 if second is None else 2, buffer))
            return self._places[node]

        for step in range(1, end):
            for node in singles.get(step, ()):
                if node.kind == "rows" and not plan.is_product(node):
                    self._rows(node, place, joined)
                else:
                    self._product(plan, node, place)
            for rows, together in clusters.get(step, {}).items():
                waiting = list(totals.get(step, {}).get(rows, ()))
                for nodes in self._pieces(together) if together else ():
                    inside = set(nodes)
                    summed = [node for node in waiting if plan.totals[node] in inside][:MOST_TOTALS]
                    waiting = [node for node in waiting if node not in summed]
                    inside |= set(summed)
                    stored = [node for node in nodes if self._stored(node, inside, plan, outside, traced, placed)]
                    own = [node for node in traced if node in inside]
                    if stored or own or summed:  # else nobody reads them
                        of_rows = [(plan.totals[node], place(node)) for node in summed]
                        self._pointwise(rows, nodes, [(node, place(node)) for node in stored], own, of_rows)
                for first in range(0, len(waiting), MOST_TOTALS):
                    of_rows = [(plan.totals[node], place(node)) for node in waiting[first : first + MOST_TOTALS]]
                    self._pointwise(rows, [], [], [], of_rows)
            for matrix, left, right in due.get(step, ()):
                self._gradient(matrix, left, right)
            self._free += owners.get(step, ())
        for matrix, left, right in due.get(0, ()):
            self._gradient(matrix, left, right)
        late = [node for node in traced if not (plan.is_pointwise(node) and node in steps)]
        for node in late:
            self._pointwise(node.rows, [], [], [node])
        for node, where in placed.items():
            if self._places.get(node) != where:
                self._copy(node, where, node.rows)
        for bar, where, rows in targets:
            self._copy(self.graph.zeros(rows) if bar is None else bar, where, rows)
        self._sums(sums, ones)

    @staticmethod
    def _stored(node: Node, inside: set[Node], plan: Schedule, outside, traced, placed) -> bool:
        """Whether a node is read by others than the operation that computes it."""
        if (node in outside and node not in traced) or node in placed:
            return True
        return any(reader not in inside for reader in plan.readers.get(node, ()))

    def _pieces(self, nodes: list[Node]) -> list[list[Node]]:
        """A pointwise operation in parts that an engine takes: so many places and row vectors at most."""
        inside = set(nodes)
        read = {operand for node in nodes for operand in node.operands} - inside
        vectors = sum(node in self._vector for node in read)
        if len(nodes) < 2 or (vectors <= MOST_VECTORS and len(read) + 2 * len(nodes) <= MOST_PLACES):
            return [nodes]
        half = len(nodes) // 2
        return self._pieces(nodes[:half]) + self._pieces(nodes[half:])

    def _last_reads(self, plan, end, placed, traced, targets, sums, due, joined) -> dict[Node, int]:
        """node -> the last step that reads its rows, directly or through a piece of them."""
        gone: dict[Node, int] = {}

        def read(node: Node, step: int) -> None:
            if gone.get(node, -1) >= step:
                return
            gone[node] = step
            if node.kind == "rows" and len(node.operands) == 1:
                read(node.operands[0], step)

        for node in plan.nodes:
            for operand in plan.operands(node):
                read(operand, plan.steps[node])
        for step, pairs in due.items():
            for _, *sides in pairs:
                for side in sides:
                    read(side, step)
        for node in [*placed, *traced, *(bar for bar, _, _ in targets if bar is not None), *(bar for _, bar in sums)]:
            read(node, end)
        for node in plan.nodes:
            if node in joined:  # its rows are those of the concatenation
                read(joined[node][0], gone.get(node, 0))
        return gone

    def _joined(self, plan: Schedule, placed: dict[Node, Place]) -> dict[Node, tuple[Node, int]]:
        """Nodes that are made in their place within a concatenation: node -> (the concatenation, first row there)."""
        found: dict[Node, tuple[Node, int]] = {}
        for whole in plan.nodes:
            if whole.kind != "rows" or len(whole.operands) < 2 or plan.is_product(whole):
                continue
            start = 0
            for part, (first, count) in zip(whole.operands, whole.pieces):
                computed = part in plan.steps and (plan.is_pointwise(part) or plan.is_product(part))
                computed = computed and part not in plan.pairs and part not in plan.first
                if computed and first == 0 and count == part.rows and part not in found and part not in placed:
                    found[part] = (whole, start)
                start += count
        return found

    def _buffer(self, rows: int, slots: int = 1) -> int:
        """A buffer of exactly so many rows and slots: one that is free, or a new one."""
        for index, (*size, number) in enumerate(self._free):
            if size == [rows, slots]:
                del self._free[index]
                return number
        self._owned.append((rows, slots, self.builder.buffer(rows, slots)))
        return self._owned[-1][2]

    def _rows(self, node: Node, place: Callable[[Node], Place], joined: dict[Node, tuple[Node, int]]) -> None:
        if len(node.operands) == 1 and self.bindings.per_sample(node.operands[0]):  # a piece: the same rows
            buffer, slot, row = self._at(node.operands[0], place)
            self._places[node] = (buffer, slot, row + node.pieces[0][0])
            return
        buffer, slot, start = place(node)
        row = 0
        for part, (first, count) in zip(node.operands, node.pieces):
            where = (buffer, slot, start + row)
            if joined.get(part) != (node, row) or self._places.get(part) != where:
                self._copy(part, where, count, first)
            row += count

    def _at(self, node: Node, place: Callable[[Node], Place] | None = None) -> Place:
        if node in self._places:
            return self._places[node]
        if node.kind == "rows" and len(node.operands) == 1:
            buffer, slot, row = self._at(node.operands[0], place)
            return buffer, slot, row + node.pieces[0][0]
        if place is None:
            raise AssertionError(f"nobody has computed {node.kind} of {node.rows} rows")
        return place(node)

    def _source(self, node: Node) -> Place:
        """Rows in a buffer; what is the same for all samples is copied into one."""
        if node in self._places or self.bindings.per_sample(node):
            return self._at(node)
        where = (self.builder.buffer(node.rows), 0, 0)
        self._copy(node, where, node.rows)
        self._places[node] = where
        return where

    def _copy(self, node: Node, where: Place, rows: int, first: int = 0) -> None:
        """rows of a node, from its row `first` on."""
        if node.kind == "constant" and node not in self._vector:
            self._add_vector(node)
        if node.kind != "number" and node not in self._places and not self.bindings.per_sample(node):
            if node not in self._vector:
                self._add_vector(node)
        if node.kind == "number":
            code = self.builder.expression(
                0, 0, 1, 0, *_arrays([(1, 0, 0, 0, 0, node.value)])
            )
            self.builder.pointwise(code, rows, [], [], [where], self._list)
        elif node in self._vector:
            code = self.builder.expression(0, 1, 1, 0, *_arrays([(2, 0, 0, 0, 0, 0.0)]))
            vectors = [(self._vector[node], first, node.rows == 1 and rows > 1)]
            self.builder.pointwise(code, rows, [], vectors, [where], self._list)
        else:
            buffer, slot, row = self._at(node)
            code = self.builder.expression(1, 0, 1, 0, *_arrays([(0, 1, 0, 0, 0, 0.0)]))
            source = (buffer, slot, row + first, node.rows == 1 and rows > 1)
            self.builder.pointwise(code, rows, [source], [], [where], self._list)

    def _product(self, plan: Schedule, node: Node, place: Callable[[Node], Place]) -> None:
        if node in plan.affine:
            one = plan.affine[node]
            rule, params = rule_and_params(one.activation)
            a, b = (*params, 1.0, 1.0)[:2]
            target = place(node)
            store = Store.VALUE if one.slope is None else Store.VALUE_SLOPE
            if one.tangent is not None:
                store = Store.TANGENT if one.seed is None else Store.SEED
            seed = {} if one.seed is None else {"seed": self._source(one.seed)}
            if one.beside is not None:
                place(one.beside)
            self.builder.affine(
                self._native(one.product.matrix), self._source(one.source), target,
                self._modulation(node.rows, one), rule.number, float(a), float(b), store, list=self._list,
                **seed,
            )  # fmt: skip
            return
        one = plan.products.get(node, Product(node))
        beside = {name: getattr(one, name) for name in ("factor", "addend")}
        self.builder.product(
            self._native(one.product.matrix), self._source(one.product.operands[0]), place(node),
            transposed=one.product.transposed, list=self._list,
            **{name: self._source(other) for name, other in beside.items() if other is not None},
        )  # fmt: skip

    def _pointwise(
        self, rows: int, nodes: Sequence[Node], stored: Sequence[tuple[Node, Place]], traced: Sequence[Node],
        totals: Sequence[tuple[Node, Place]] = (),
    ) -> None:  # fmt: skip
        """stored: which of the nodes belong in which rows.  totals: nodes whose sums of rows belong in which row."""
        is_vector = lambda node: node in self._vector
        code = code_of(nodes, [node for node, _ in stored], traced, is_vector, [node for node, _ in totals])
        inputs = [(*self._at(node), node.rows == 1 and rows > 1) for node in code.inputs]
        vectors = [(self._vector[node], 0, node.rows == 1 and rows > 1) for node in code.vectors]
        outputs = [*(where for _, where in stored), *((-1, 0, 0) for _ in traced)]
        arrays = code.arrays()
        number = self.builder.expression(
            len(inputs), len(vectors), len(outputs), code.registers,
            *(arrays[name] for name in ("op", "to", "a", "b", "c", "number")),
        )  # fmt: skip
        summed = {"totals": list(zip(code.totals, (where for _, where in totals)))} if totals else {}
        self.builder.pointwise(number, rows, inputs, vectors, outputs, self._list, **summed)

    # ---- gradients

    def _gradient(self, matrix: Matrix, left: Node, right: Node) -> None:
        number = self._native(matrix, fresh=any(other is matrix for _, other in self.gradients))
        total = self.builder.sum(matrix.pattern.nnz, False)
        self.builder.sum_of_matrix(number, total)
        self.builder.gradient(number, self._source(left), self._source(right), total)
        self.gradients.append((number, matrix))

    def _sums(self, sums: Sequence[tuple[Node, Node]], ones: int) -> None:
        for node, bar in sums:
            number = self._vector[node]
            column = Pattern((node.rows, 1), torch.arange(node.rows + 1), torch.zeros(node.rows, dtype=torch.int64))
            total = self.builder.sum(node.rows, bool(node.binding & TIME))
            self.builder.sum_of_vector(number, total)
            self.builder.gradient(self._native(self.graph.ones(column)), self._source(bar), (ones, 0, 0), total)


def _is_trained(node: Node) -> bool:
    """Whether the node depends on parts of the field, on time or on the context."""
    return (node.kind != "input" or node.name == "time") and bool(node.binding) or from_parts([node])


def _arrays(instructions: Iterable[tuple]) -> tuple:
    columns = list(zip(*instructions))
    return (*(np.array(column, dtype=np.int32) for column in columns[:5]), np.array(columns[5], dtype=np.float64))


def state_bindings(field: GraphField, *more: Node) -> Bindings:
    """Of the program that evaluates a field. more: inputs that are rows of its state too (a time per sample, the context),
    so that nothing which follows from them is computed elsewhere: right for a single evaluation."""
    inputs = (field.state, *more)
    return Bindings(inputs, functools.reduce(operator.or_, (node.binding for node in inputs)))


def time_bindings(field: GraphField) -> Bindings:
    """Of the program that computes what depends on time: its samples are times."""
    return Bindings((field.time,), TIME)
