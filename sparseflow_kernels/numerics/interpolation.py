"""Reading the solution off between the ends of a step."""

from __future__ import annotations

from torch import Tensor


def fit_quartic(
    y0: Tensor, y1: Tensor, y_mid: Tensor, f0: Tensor, f1: Tensor, dt: float | Tensor
) -> tuple[Tensor, ...]:  # fmt: skip
    """Coefficients, lowest power first, of the quartic p(x) on [0, 1] with p(0) = y0, p(1/2) = y_mid, p(1) = y1,
    p'(0) = dt f0, p'(1) = dt f1. All states of one shape; dt a number or a 0-d tensor."""
    slope0, slope1 = dt * f0, dt * f1
    quadratic = slope1 - 4 * slope0 - 11 * y0 - 5 * y1 + 16 * y_mid
    cubic = 5 * slope0 - 3 * slope1 + 18 * y0 + 14 * y1 - 32 * y_mid
    quartic = 2 * (slope1 - slope0) - 8 * (y0 + y1) + 16 * y_mid
    return y0, slope0, quadratic, cubic, quartic


def evaluate_polynomial(coefficients: tuple[Tensor, ...], x: float | Tensor) -> Tensor:
    """p(x) by Horner's rule; x a number or a 0-d tensor in the coefficients' real dtype."""
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = coefficient + x * value
    return value


def linear(y0: Tensor, y1: Tensor, x: float | Tensor) -> Tensor:
    """y0 + x (y1 - y0)."""
    return y0 + x * (y1 - y0)
