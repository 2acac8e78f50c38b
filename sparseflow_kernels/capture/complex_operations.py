"""What operations on complex numbers are in real ones.

A complex number is a pair of real tensors, and a rule is plain torch on pairs: whoever follows tensors follows these like any
others. A Fourier transform along an axis is a product with a constant matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from torch import Tensor

from .operations import STRUCTURAL, base_name
from .refusal import refuse
from .registry import argument
from .trees import tree_map

Part = Tensor | float | None  # None is zero
ROUNDED = 1e-14  # sines and cosines of multiples of a turn are zero, or larger than this
_I64 = torch.int64


@dataclass(frozen=True, eq=False)
class Pair:
    """A complex number, or one of the code."""

    real: Part
    imag: Part = None


Rule = Callable[[Any, tuple, dict], Any]
RULES: dict[str, Rule] = {}
# Linear, with real arguments beside: done to both parts.
OF_BOTH = {
    *STRUCTURAL, "sum", "mean", "cumsum", "neg", "tril", "triu", "constant_pad_nd", "diag_embed", "trace", "slice_backward",
    "select_backward", "diagonal_backward", "index_add", "scatter_add", "copy", "zero", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "unfold", "diff", "index_put", "masked_fill", "where", "slice_scatter",
    "select_scatter", "contiguous", "resolve_conj", "resolve_neg",
}  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def of_complex(func: Any, args: tuple, kwargs: dict) -> Any:
    """The operation on pairs, which stand for complex tensors and numbers: a pair, a real tensor, or several of them. Raises
    UnsupportedFieldError for what no rule expresses."""
    base = base_name(func)
    if base not in RULES:
        refuse(f"the operation {base} on complex numbers made of t or of the state")
    return RULES[base](func, args, kwargs)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def plus(a: Part, b: Part) -> Part:
    return b if a is None else a if b is None else a + b


def minus(a: Part, b: Part) -> Part:
    return a if b is None else -b if a is None else a - b


def times(a: Part, b: Part) -> Part:
    if a is None or b is None or any(isinstance(x, float) and x == 0.0 for x in (a, b)):
        return None
    for x, y in ((a, b), (b, a)):
        if isinstance(x, float) and x in (1.0, -1.0):
            return y if x == 1.0 else -y
    return a * b


def pair(value: Any) -> Pair:
    if isinstance(value, Pair):
        return value
    return Pair(value.real, value.imag) if isinstance(value, complex) else Pair(value)


def product(a: Pair, b: Pair) -> Pair:
    real = minus(times(a.real, b.real), times(a.imag, b.imag))
    return Pair(real, plus(times(a.real, b.imag), times(a.imag, b.real)))


def scaled(a: Pair, by: Part) -> Pair:
    return Pair(times(a.real, by), times(a.imag, by))


def conjugate(a: Pair) -> Pair:
    return Pair(a.real, minus(None, a.imag))


def square(a: Pair) -> Part:
    """Of the magnitude."""
    return plus(times(a.real, a.real), times(a.imag, a.imag))


def quotient(a: Pair, b: Pair) -> Pair:
    over = lambda x, y: None if x is None else x / y
    if b.imag is None:
        return Pair(over(a.real, b.real), over(a.imag, b.real))
    top, bottom = product(a, conjugate(b)), square(b)
    return Pair(over(top.real, bottom), over(top.imag, bottom))


def alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of one shape."""
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return a.expand(shape), b.expand(shape)


def magnitude(a: Pair) -> Tensor:
    if a.real is None or a.imag is None:
        return (a.real if a.imag is None else a.imag).abs()
    return torch.linalg.vector_norm(torch.stack(alike(a.real, a.imag), -1), dim=-1)


def angle(a: Pair) -> Tensor:
    """Its gradient is zero at zero, as torch has it."""
    imag = torch.zeros_like(a.real) if a.imag is None else a.imag
    real = torch.zeros_like(imag) if a.real is None else a.real
    return torch.atan2(imag, torch.where(torch.logical_and(real == 0, imag == 0), torch.ones_like(real), real))


def sign(a: Pair) -> Pair:
    size = magnitude(a)
    size = torch.where(size == 0, torch.ones_like(size), size)
    return quotient(a, Pair(size))


def exponential(a: Pair) -> Pair:
    size = 1.0 if a.real is None else a.real.exp()
    return Pair(size) if a.imag is None else Pair(times(size, a.imag.cos()), times(size, a.imag.sin()))


def logarithm(a: Pair) -> Pair:
    return Pair(magnitude(a).log(), angle(a))


def power(a: Pair, exponent: Pair) -> Pair:
    number = exponent.real
    if exponent.imag is None and isinstance(number, (int, float)) and number == int(number) and 0 < abs(number) <= 8:
        made = a
        for _ in range(int(abs(number)) - 1):
            made = product(made, a)
        return made if number > 0 else quotient(Pair(1.0), made)
    return exponential(product(logarithm(a), exponent))


def _sine(a: Pair) -> Pair:
    return Pair(a.real.sin() * a.imag.cosh(), a.real.cos() * a.imag.sinh())


def _cosine(a: Pair) -> Pair:
    return Pair(a.real.cos() * a.imag.cosh(), -a.real.sin() * a.imag.sinh())


def _hyperbolic_tangent(a: Pair) -> Pair:
    t, c, s = a.real.tanh(), a.imag.cos(), a.imag.sin()
    return quotient(Pair(t * c, s), Pair(c, t * s))


UNARY: dict[str, Callable[[Pair], Any]] = {
    "conj": conjugate, "_conj": conjugate, "conj_physical": conjugate, "_conj_physical": conjugate,
    "abs": magnitude, "angle": angle, "sgn": sign, "exp": exponential, "log": logarithm, "sin": _sine, "cos": _cosine,
    "tanh": _hyperbolic_tangent, "square": lambda a: product(a, a), "reciprocal": lambda a: quotient(Pair(1.0), a),
    "sqrt": lambda a: power(a, Pair(0.5)), "real": lambda a: a.real, "imag": lambda a: a.imag,
    "view_as_real": lambda a: torch.stack([a.real, a.imag], -1),
    "sigmoid": lambda a: quotient(Pair(1.0), Pair(*_one_more(exponential(scaled(a, -1.0))))),
    "isnan": lambda a: torch.logical_or(a.real.isnan(), a.imag.isnan()),
    "isinf": lambda a: torch.logical_or(a.real.isinf(), a.imag.isinf()),
}  # fmt: skip
BINARY: dict[str, Callable[[Pair, Pair], Any]] = {
    "mul": product, "div": quotient, "true_divide": quotient, "pow": power,
    "eq": lambda a, b: _same(a, b), "ne": lambda a, b: ~_same(a, b),
}


def _one_more(a: Pair) -> tuple[Part, Part]:
    return plus(a.real, 1.0), a.imag


def _same(a: Pair, b: Pair) -> Tensor:
    zero = lambda x: 0.0 if x is None else x
    return torch.logical_and(zero(a.real) == zero(b.real), zero(a.imag) == zero(b.imag))


@rule(*UNARY)
def unary(func: Any, args: tuple, kwargs: dict) -> Any:
    return UNARY[base_name(func)](args[0])


@rule(*BINARY)
def binary(func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs.get("rounding_mode") is not None:
        refuse("a rounded quotient of complex numbers")
    return BINARY[base_name(func)](pair(args[0]), pair(args[1]))


@rule("add", "sub", "rsub")
def added(func: Any, args: tuple, kwargs: dict) -> Pair:
    a, b = pair(args[0]), pair(args[1])
    a, b = (b, a) if base_name(func) == "rsub" else (a, b)
    alpha = argument(args, kwargs, 2, "alpha", 1)
    b = b if alpha == 1 else product(b, pair(alpha))
    join = plus if base_name(func) == "add" else minus
    return Pair(join(a.real, b.real), join(a.imag, b.imag))


@rule("view_as_complex")
def joined(func: Any, args: tuple, kwargs: dict) -> Pair:
    return Pair(args[0].select(-1, 0), args[0].select(-1, 1))


@rule("complex")
def of_parts(func: Any, args: tuple, kwargs: dict) -> Pair:
    return Pair(*alike(*args[:2]))


@rule("polar")
def polar(func: Any, args: tuple, kwargs: dict) -> Pair:
    return Pair(args[0] * args[1].cos(), args[0] * args[1].sin())


@rule("linalg_vector_norm", "norm")
def norm(func: Any, args: tuple, kwargs: dict) -> Tensor:
    return func(magnitude(args[0]), *args[1:], **kwargs)


# ---------------------------------------------------------------------------------------- what is done to both parts


def _real_dtypes(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    dtype = lambda a: a.to_real() if isinstance(a, torch.dtype) and a.is_complex else a
    return tree_map(dtype, args), tree_map(dtype, kwargs)


@rule(*OF_BOTH)
def _of_both(func: Any, args: tuple, kwargs: dict) -> Any:
    """Real tensors among complex ones have no imaginary part; conditions and indices are the same for both."""
    base = base_name(func)
    among = {"where": (1, 2), "masked_fill": (0, 2), "index_put": (0, 2), "index_add": (0, 3), "scatter_add": (0, 3),
             "slice_scatter": (0, 1), "select_scatter": (0, 1), "constant_pad_nd": (0, 2), "copy": (0, 1)}.get(base, (0,))  # fmt: skip
    args, kwargs = _real_dtypes(args, kwargs)

    def part(a: Any, which: str) -> Any:
        if isinstance(a, (Pair, complex)):
            made = getattr(pair(a), which)
            other = getattr(pair(a), "imag" if which == "real" else "real")
            return made if made is not None else torch.zeros_like(other) if isinstance(other, Tensor) else 0.0
        if isinstance(a, Tensor) and which == "imag":
            return torch.zeros_like(a)
        return 0.0 if isinstance(a, float) and which == "imag" else a

    made = []
    for which in ("real", "imag"):
        own = [tree_map(lambda a: part(a, which), a) if i in among else a for i, a in enumerate(args)]  # noqa: B023
        # The parts may lie in memory in another order than their tensor.
        made.append(own[0].reshape(own[1]) if base in ("view", "_unsafe_view") else func(*own, **kwargs))
    if isinstance(made[0], Tensor):
        return Pair(*made)
    return [Pair(a, b) for a, b in zip(*made)]


@rule("_to_copy")
def to_copy(func: Any, args: tuple, kwargs: dict) -> Any:
    dtype, a = kwargs.get("dtype"), pair(args[0])
    args, kwargs = _real_dtypes(args, kwargs)
    real = func(a.real, **kwargs)
    if dtype is not None and not dtype.is_complex:
        return real  # torch warns that the imaginary part is lost
    return Pair(real, None if a.imag is None else func(a.imag, **kwargs))


@rule("fill")
def fill(func: Any, args: tuple, kwargs: dict) -> Pair:
    value = pair(args[1])
    like = lambda part: torch.full_like(args[0].real, 0.0) + (0.0 if part is None else part)
    return Pair(like(value.real), like(value.imag))


# ------------------------------------------------------------------------------------------------------------ matrices


def matrix_product(a: Pair, b: Pair, multiply: Callable[[Tensor, Tensor], Tensor]) -> Pair:
    """Of two complex matrices each part is one product, with both parts beside each other."""
    if a.imag is None or b.imag is None:
        by = lambda x, y: None if x is None or y is None else multiply(x, y)
        return Pair(by(a.real, b.real), by(a.real, b.imag) if a.imag is None else by(a.imag, b.real))
    axis = -1 if b.real.dim() == 1 else -2
    both = torch.cat([a.real, a.imag], -1)
    return Pair(
        multiply(both, torch.cat([b.real, -b.imag], axis)), multiply(both, torch.cat([b.imag, b.real], axis))
    )


@rule("mm", "bmm", "mv", "matmul")
def matrices(func: Any, args: tuple, kwargs: dict) -> Pair:
    return matrix_product(pair(args[0]), pair(args[1]), func)


@rule("dot", "vdot")
def dot(func: Any, args: tuple, kwargs: dict) -> Pair:
    first = pair(args[0])
    made = product(conjugate(first) if base_name(func) == "vdot" else first, pair(args[1]))
    return Pair(*(None if part is None else part.sum() for part in (made.real, made.imag)))


@rule("addmm", "baddbmm", "addmv")
def added_product(func: Any, args: tuple, kwargs: dict) -> Pair:
    made = scaled_by(matrix_product(pair(args[1]), pair(args[2]), torch.matmul), kwargs.get("alpha", 1))
    summand = scaled_by(pair(args[0]), kwargs.get("beta", 1))
    return Pair(plus(summand.real, made.real), plus(summand.imag, made.imag))


def scaled_by(a: Pair, factor: Any) -> Pair:
    return a if factor == 1 else product(a, pair(factor))


@rule("linalg_matrix_exp", "linalg_inv_ex")
def of_matrix(func: Any, args: tuple, kwargs: dict) -> Any:
    """A complex matrix is a real one of twice the size."""
    a = args[0]
    made = func(torch.cat([torch.cat([a.real, -a.imag], -1), torch.cat([a.imag, a.real], -1)], -2), **kwargs)
    first = made if isinstance(made, Tensor) else made[0]
    n = a.real.shape[-1]
    found = Pair(first[..., :n, :n], first[..., n:, :n])
    return found if isinstance(made, Tensor) else [found, *made[1:]]


# -------------------------------------------------------------------------------------------------- Fourier transforms


def waves(n: int, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cosines, sines) [n, count] of 2 pi j k / n, whose zeros are zero."""
    number = (torch.arange(n, dtype=_I64)[:, None] * torch.arange(count, dtype=_I64)) % n
    turn = torch.arange(n, dtype=torch.float64) * (2.0 * math.pi / n)
    table = [torch.where(wave.abs() < ROUNDED, torch.zeros_like(wave), wave) for wave in (turn.cos(), turn.sin())]
    return tuple(wave[number].to(like.dtype).to(like.device) for wave in table)


def _along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    return torch.matmul(x.movedim(axis, -1), matrix).movedim(-1, axis)


def transformed(a: Pair, axis: int, forward: bool, count: int | None = None) -> Pair:
    """The discrete Fourier transform along an axis, without a factor; the first `count` frequencies."""
    n = a.real.shape[axis]
    count = n if count is None else count
    cosine, sine = waves(n, count, a.real)
    sine = -sine if forward else sine
    if a.imag is None:
        made = _along(a.real, axis, torch.cat([cosine, sine], 1))
    else:
        matrix = torch.cat([torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)], 0)
        made = _along(torch.cat([a.real, a.imag], axis), axis, matrix)
    return Pair(made.narrow(axis, 0, count), made.narrow(axis, count, count))


def real_series(a: Pair, axis: int, n: int) -> Tensor:
    """The n real numbers whose transform begins with these numbers, times n."""
    count = a.real.shape[axis]
    cosine, sine = (wave.t() for wave in waves(n, count, a.real))
    twice = torch.full((count, 1), 2.0, dtype=a.real.dtype, device=a.real.device)
    twice[0] = 1.0
    if n % 2 == 0 and count == n // 2 + 1:
        twice[-1] = 1.0
    return _along(torch.cat([a.real, a.imag], axis), axis, torch.cat([cosine * twice, -sine * twice], 0))


def _factor(sizes: Iterator[int] | list[int], normalization: int) -> float:
    return math.prod(sizes) ** {0: 0.0, 1: -0.5, 2: -1.0}[normalization]


@rule("_fft_r2c")
def of_real(func: Any, args: tuple, kwargs: dict) -> Pair:
    x, axes, normalization, onesided = args[:4]
    *others, last = axes
    n = x.shape[last]
    made = transformed(Pair(x), last, True, n // 2 + 1 if onesided else None)
    for axis in others:
        made = transformed(made, axis, True)
    return scaled(made, _factor([x.shape[axis] for axis in axes], normalization))


@rule("_fft_c2c")
def of_complex_numbers(func: Any, args: tuple, kwargs: dict) -> Pair:
    made, axes, normalization, forward = args[:4]
    for axis in axes:
        made = transformed(made, axis, forward)
    return scaled(made, _factor([made.real.shape[axis] for axis in axes], normalization))


@rule("_fft_c2r")
def to_real(func: Any, args: tuple, kwargs: dict) -> Tensor:
    made, axes, normalization, n = args[:4]
    *others, last = axes
    for axis in others:
        made = transformed(made, axis, False)
    size = [*(made.real.shape[axis] for axis in others), n]
    return times(real_series(made, last, n), _factor(size, normalization))


def is_complex(a: Any) -> bool:
    """A complex tensor or number."""
    return a.is_complex() if isinstance(a, Tensor) else isinstance(a, complex)
