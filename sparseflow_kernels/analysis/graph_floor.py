"""The floor of graphs, as `floor` has it for chains: the arithmetic at the best rates of this core.

    floor = multiply-adds / FMA rate + elementwise instructions / their rates

A multiply-add for every entry of every matrix (those that only sum or gather rows among them) and sample. Elementwise
operations that are one vector instruction each count at the FMA rate, or nothing where a product or another operation takes
them along (a sum with a product); of the others (exp, tanh, a division) the rate is measured. What is the same for all
samples counts nothing, and neither do slices, concatenations, the solver's arithmetic and memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, Sequence

import numpy as np
import torch

from ..activations import ACTIVATIONS
from ..divergence import DivergencePlan
from ..engines.lower import COTANGENT, TRACE_COTANGENT, Bindings, state_bindings
from ..field import GraphField, Node
from ..field.graph import STATE, order
from ..field.primitives import PRIMITIVES
from ..field.transforms import adjoint
from .floor import activation_rate, fma_rate

_ROWS, _SAMPLES, _TIMES = 32, 2048, 16


@lru_cache(maxsize=None)
def instruction_rate(name: str) -> float | None:
    """Numbers per second of one core, float32, of a primitive that is more than one vector instruction: by a pointwise
    operation that computes it many times and one that computes it once, or by the loop over registers of the activation of
    that name, whichever is quicker. None without the CPU extension."""
    if fma_rate() is None:
        return None
    many, once = _pointwise_seconds(name, _TIMES + 1), _pointwise_seconds(name, 1)
    rate = _ROWS * _SAMPLES * _TIMES / max(many - once, 1e-9)
    return min(max(rate, activation_rate(name) if name in ACTIVATIONS else 0.0), fma_rate())


def instruction_rates() -> dict[str, float | None]:
    """Of all of them that were asked for a floor's sake or are common."""
    names = ("div", "rsqrt", "exp", "log", "sin", "tanh", "sigmoid", "softplus", "erf")
    return {name: instruction_rate(name) for name in names}


def _pointwise_seconds(name: str, count: int) -> float:
    """Of a program that computes a primitive of its input so many times."""
    from .. import _cpu

    builder = _cpu.BuilderF32()
    state, out = builder.buffer(_ROWS), builder.buffer(_ROWS)
    register = 2  # behind the input and the output
    numbers = [PRIMITIVES[name].number] * count
    columns = {"op": [*numbers, 0], "to": [register] * count + [1], "a": [0] * count + [register]}
    columns |= {"b": [0] * (count + 1), "c": [0] * (count + 1)}
    code = {key: np.array(values, dtype=np.int32) for key, values in columns.items()}
    expression = builder.expression(1, 0, 1, 1, number=np.zeros(count + 1), **code)
    builder.pointwise(expression, _ROWS, [(state, 0, 0, False)], [], [(out, 0, 0)])
    builder.graph_roles(_ROWS, _ROWS, False, state, out)
    program = builder.compile()
    x, f = torch.rand(_SAMPLES, _ROWS) + 0.5, torch.empty(_SAMPLES, _ROWS)
    best = float("inf")
    for _ in range(9):
        before = time.perf_counter()
        program.evaluate(0.0, x.data_ptr(), 0, _SAMPLES, 1, f.data_ptr(), 0)
        best = min(best, time.perf_counter() - before)
    return best


@dataclass(frozen=True)
class GraphWork:
    """What one evaluation of a graph costs per sample: multiply_adds, and the count of every primitive by name."""

    multiply_adds: int
    instructions: dict[str, int]

    @staticmethod
    def of(field: GraphField, plan: DivergencePlan | None = None, time_per_sample: bool = False) -> "GraphWork":
        """Of f and of the trace."""
        outputs = [field.output] if plan is None else [field.output, plan.form.trace]
        return _counted(outputs, _bindings(field, time_per_sample).per_sample)

    @staticmethod
    def of_gradient(field: GraphField, plan: DivergencePlan | None = None, time_per_sample: bool = False) -> "GraphWork":
        """One evaluation turned back: whatever of f the cotangents of state, vectors and matrices need, those, and a
        multiply-add for every weight."""
        g, per_sample = field.graph, _bindings(field, time_per_sample).per_sample
        given = {field.output: g.input(COTANGENT, field.dim, STATE)}
        if plan is not None:
            given[plan.form.trace] = g.input(TRACE_COTANGENT, 1, STATE)
        found = adjoint(g, given, lambda node: not per_sample(node) or node.kind == "input")
        pairs = [(matrix, sides) for matrix, both in found.matrices.items() for sides in both]
        read = [*found.cotangents.values(), *(side for _, sides in pairs for side in sides)]
        work = _counted(read, per_sample)
        return GraphWork(work.multiply_adds + sum(matrix.multiply_adds for matrix, _ in pairs), work.instructions)

    def floor(self, samples: int) -> float | None:
        """Seconds per evaluation of `samples` samples on one core, float32; None where a rate cannot be measured."""
        peak = fma_rate()
        if peak is None:
            return None
        rates = {name: peak if PRIMITIVES[name].cheap else instruction_rate(name) for name in self.instructions}
        each = self.multiply_adds / peak + sum(count / rates[name] for name, count in self.instructions.items())
        return samples * each


def _bindings(field: GraphField, time_per_sample: bool) -> Bindings:
    return state_bindings(field, *((field.time,) if time_per_sample else ()))


def _counted(outputs: Sequence[Node], per_sample: Callable[[Node], bool]) -> GraphWork:
    multiply_adds, instructions = 0, {}
    for node in order(outputs, stop=lambda node: not per_sample(node)):
        if not per_sample(node):
            continue
        if node.kind == "linear":
            multiply_adds += node.matrix.multiply_adds
        elif node.elementwise and not _taken_along(node, per_sample):
            instructions[node.kind] = instructions.get(node.kind, 0) + node.rows
    return GraphWork(multiply_adds, instructions)


def _taken_along(node: Node, per_sample: Callable[[Node], bool]) -> bool:
    """A sum with a product is part of its multiply-adds."""
    products = (operand.kind in ("linear", "mul", "square") and per_sample(operand) for operand in node.operands)
    return node.kind in ("add", "sub") and any(products)
