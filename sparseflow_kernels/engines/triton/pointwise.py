"""Pointwise operations as kernels: the instructions of an expression (csrc/expression.h) become the source of one Triton
function, whose values stay in registers. Two operations with the same expression share it, wherever their operands lie.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from typing import Any, Callable, Sequence

import triton
import triton.language as tl

from . import functions
from .builder import Expression
from .elementwise import sigmoid, tanh
from .launching import jit
from .sums import places

MOST_FACTORS = 16  # of a power that is written as products


def _power(a: str, number: float) -> str:
    """Roots, squares, cubes and their reciprocals as torch makes them; other small whole powers by multiplication."""
    if number == 0.5:
        return f"sqrt({a})"
    if number == -0.5:
        return f"reciprocal(sqrt({a}))"
    if number == int(number) and 0 < abs(number) <= MOST_FACTORS if abs(number) < 2**31 else False:
        product = " * ".join([a] * int(abs(number)))
        return f"({product})" if number > 0 else f"reciprocal({product})"
    return f"power({a}, tl.zeros_like({a}) + {_literal(number)})"


def _literal(number: float) -> str:
    """Infinities have no name in the language."""
    text = repr(number).replace("inf", "1e999")
    return "(1e999 - 1e999)" if text == "nan" else f"({text})"


# By number of the instruction: its value, from the names of places a, b, c, of a row vector v and from the number n.
INSTRUCTIONS: dict[int, Callable[..., str]] = {
    0: lambda a, **_: a,
    1: lambda n, **_: f"tl.full([ROWS, BATCH], {_literal(n)}, memory.dtype.element_ty)",
    2: lambda v, **_: v,
    3: lambda a, b, **_: f"{a} + {b}",
    4: lambda a, b, **_: f"{a} - {b}",
    5: lambda a, b, **_: f"{a} * {b}",
    6: lambda a, b, **_: f"divide({a}, {b})",
    7: lambda a, **_: f"-{a}",
    8: lambda a, n, **_: f"{a} + {_literal(n)}",
    9: lambda a, n, **_: f"{a} * {_literal(n)}",
    10: lambda a, **_: f"tl.abs({a})",
    11: lambda a, **_: f"sign({a})",
    12: lambda a, b, **_: f"maximum({a}, {b})",
    13: lambda a, b, **_: f"minimum({a}, {b})",
    14: lambda a, **_: f"sqrt({a})",
    15: lambda a, **_: f"reciprocal(sqrt({a}))",
    16: lambda a, **_: f"reciprocal({a})",
    17: lambda a, **_: f"exp({a})",
    18: lambda a, **_: f"expm1({a})",
    19: lambda a, **_: f"log({a})",
    20: lambda a, **_: f"log1p({a})",
    21: lambda a, **_: f"tl.sin({a})",
    22: lambda a, **_: f"tl.cos({a})",
    23: lambda a, **_: f"tan({a})",
    24: lambda a, **_: f"tanh({a})",
    25: lambda a, **_: f"sigmoid({a})[0]",
    26: lambda a, **_: f"softplus({a})",
    27: lambda a, **_: f"tl.erf({a})",
    28: lambda a, n, **_: _power(a, n),
    29: lambda a, b, **_: f"power({a}, {b})",
    30: lambda a, b, **_: f"tl.where({a} > {b}, 1.0, 0.0).to(memory.dtype.element_ty)",
    31: lambda a, b, **_: f"tl.where({a} >= {b}, 1.0, 0.0).to(memory.dtype.element_ty)",
    32: lambda a, b, **_: f"tl.where({a} == {b}, 1.0, 0.0).to(memory.dtype.element_ty)",
    33: lambda a, b, c, **_: f"tl.where({a} != 0.0, {b}, {c})",
    34: lambda a, **_: f"atan({a})",
    35: lambda a, **_: f"asin({a})",
    36: lambda a, **_: f"acos({a})",
    37: lambda a, **_: f"sinh({a})",
    38: lambda a, **_: f"cosh({a})",
    39: lambda a, b, **_: f"atan2({a}, {b})",
    40: lambda a, **_: f"tl.floor({a})",
    41: lambda a, b, c, **_: f"{a} * {b} + {c}",
    42: lambda a, v, **_: f"{a} * {v}",
    43: lambda a, v, **_: f"{a} + {v}",
    44: lambda a, **_: f"{a} * {a}",
}
OF_VECTORS = (2, 42, 43)  # instructions whose b is a row vector

_NAMES = ("divide", "reciprocal", "sqrt", "sign", "maximum", "minimum", "exp", "expm1", "log", "log1p", "softplus", "tan",
          "sinh", "cosh", "atan", "asin", "acos", "atan2", "power")  # fmt: skip


def source_of(
    expression: Expression, inputs: Sequence[bool], vectors: Sequence[bool], outputs: Sequence[bool]
) -> tuple[str, list[str]]:
    """(a kernel, the names of its operands' first rows). inputs, vectors: whether one row or number serves all rows.
    outputs: whether it is added to the trace."""
    first_of_outputs = expression.inputs
    rows = [f"r{n}" for n in range(len(inputs))]
    rows += [f"w{n}" for n, traced in enumerate(outputs) if not traced]
    names = [*rows, *(f"numbers{n}" for n in range(len(vectors)))]
    lines = [
        "row = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)",
        "samples = (tl.program_id(0) // row_tiles) * BATCH + tl.arange(0, BATCH)",
        "live = row < n_rows",
        "inside = samples < padded",
        "mask = live[:, None] & inside[None, :]",
    ]
    # Values are whole tiles, also where one row serves all: tiles of one row among others are more than Triton's compiler
    # (3.7) can give a layout to.
    for n, broadcast in enumerate(inputs):
        at = "0 * row" if broadcast else "row"
        lines.append(f"p{n} = tl.load(places(memory, r{n} + {at}, padded, samples, 1), mask=mask, other=0.0)")
    for n, broadcast in enumerate(vectors):
        at = "0 * row" if broadcast else "row"
        lines.append(f"v{n} = tl.broadcast_to(tl.load(numbers{n} + {at}, mask=live, other=0.0)[:, None], [ROWS, BATCH])")
    for op, to, a, b, c, number in expression.code:
        value = INSTRUCTIONS[op](
            a=f"p{a}", b=f"p{b}", c=f"p{c}", v=f"v{b}" if op in OF_VECTORS else "", n=number
        )  # fmt: skip
        lines.append(f"p{to} = {value}")
    traces = []
    for n, traced in enumerate(outputs):
        place = f"p{first_of_outputs + n}"
        if traced:
            traces.append(f"tl.where(mask, {place}, 0.0)")
        else:
            lines.append(f"tl.store(places(memory, w{n} + row, padded, samples, 1), {place}, mask=mask)")
    if traces:
        lines.append(f"total = tl.sum({' + '.join(traces)}, axis=0)")
        lines.append("tile = (tl.program_id(0) % row_tiles).to(tl.int64)")
        lines.append("tl.store(partials + tile * padded + samples, total, mask=inside)")
    arguments = ["memory", "padded", "n_rows", "row_tiles", "partials", *names, "ROWS: tl.constexpr", "BATCH: tl.constexpr"]
    body = "\n".join(f"    {line}" for line in lines)
    return f"def pointwise({', '.join(arguments)}):\n{body}\n", rows


@functools.lru_cache(maxsize=4096)
def _kernel(source: str, rows: tuple[str, ...]) -> Any:
    # Triton reads the source of what it compiles by way of `inspect`, which looks here for what is in no file.
    name = f"<pointwise {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    known: dict[str, Any] = {function: getattr(functions, function) for function in _NAMES}
    known |= {"tl": tl, "triton": triton, "places": places, "sigmoid": sigmoid, "tanh": tanh, "__name__": __name__}
    exec(compile(source, name, "exec"), known)
    return jit(("n_rows", "row_tiles", *rows))(known["pointwise"])


def kernel_of(
    expression: Expression, inputs: Sequence[bool], vectors: Sequence[bool], outputs: Sequence[bool]
) -> Any:
    """The kernel of an operation: launched with the memory of all buffers, its stride, rows, tiles of rows, the partial
    sums of the trace (or None), the first row of every input and of every output that is no trace, and the row vectors."""
    source, rows = source_of(expression, inputs, vectors, outputs)
    return _kernel(source, tuple(rows))
