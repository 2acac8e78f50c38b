"""The elementary functions of pointwise expressions (csrc/expression.h) over all arguments, infinities and NaN included.
What `elementwise` makes from arithmetic is made of it here too; log, sin, cos, erf and the roots are Triton's own, which on
a GPU are the accurate ones of libdevice. The formulas of the arcs are Cephes'. All are within a few units in the last
place, but for powers in float64, whose relative error grows with the logarithm of the result: 1e-13 at the ends of the
range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import _exp_parts, _power_of_two, exp_of_negative, log1p_of_unit


@triton.jit
def divide(a, b):
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def reciprocal(a):
    return divide(tl.zeros_like(a) + 1.0, a)


@triton.jit
def sqrt(a):
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    else:
        return tl.sqrt(a)


@triton.jit
def sign(a):
    return tl.where(a > 0.0, 1.0, tl.where(a < 0.0, -1.0, 0.0)).to(a.dtype)


@triton.jit
def maximum(a, b):
    """NaN if either is."""
    return tl.where(a == a, tl.where(a > b, a, b), a)


@triton.jit
def minimum(a, b):
    return tl.where(a == a, tl.where(a < b, a, b), a)


@triton.jit
def exp(a):
    if a.dtype == tl.float64:
        low = -750.0
        high = 710.0
    else:
        low = -105.0
        high = 89.0
    n, tail = _exp_parts(tl.where(a < low, low, tl.where(a > high, high, a)))
    half = tl.floor(n * 0.5)  # in two factors: the result may be denormal, and the power alone infinite
    return (tail + 1.0) * _power_of_two(half, a) * _power_of_two(n - half, a)


@triton.jit
def expm1(a):
    """Of half the power, since the whole one may be infinite where the result is not."""
    if a.dtype == tl.float64:
        high = 710.0
    else:
        high = 89.0
    n, tail = _exp_parts(tl.where(a < -60.0, -60.0, tl.where(a > high, high, a)))
    power = _power_of_two(n - 1.0, a)
    half = power * tail + (power - 0.5)
    return tl.where(a == 0.0, a, half + half)


@triton.jit
def log(a):
    """libdevice's takes a denormal number for zero."""
    if a.dtype == tl.float32:
        small = (a > 0.0) & (a < 1.1754943508222875e-38)
        return tl.log(tl.where(small, a * 16777216.0, a)) - tl.where(small, 16.635532333438686, 0.0)
    else:
        return tl.log(a)


@triton.jit
def log1p(a):
    """What 1 + a loses to rounding is added again."""
    total = a + 1.0
    lost = tl.where(a < 1.0, a - (total - 1.0), 1.0 - (total - a))
    inner = (total > 0.0) & (total < float("inf"))
    out = tl.log(total) + tl.where(inner, lost / tl.where(inner, total, 1.0), 0.0)
    return tl.where(a == 0.0, a, out)


@triton.jit
def softplus(a):
    return tl.where(a < 0.0, 0.0, a) + log1p_of_unit(exp_of_negative(-tl.abs(a)))


@triton.jit
def tan(a):
    return divide(tl.sin(a), tl.cos(a))


@triton.jit
def sinh(a):
    size = tl.abs(a)
    e = expm1(tl.where(size > 1.0, 1.0, size))
    root = exp(size * 0.5)
    large = (0.5 * root) * root - 0.5 / (root * root)
    out = tl.where(size > 1.0, large, 0.5 * (e + e / (e + 1.0)))
    out = tl.where(a == a, out, a)
    return tl.where(a < 0.0, -out, tl.where(a == 0.0, a, out))


@triton.jit
def cosh(a):
    root = exp(tl.abs(a) * 0.5)
    return (0.5 * root) * root + 0.5 / (root * root)


@triton.jit
def _atan_of_positive(a):
    """For a >= 0, infinity too."""
    far = a > 2.414213562373095
    if a.dtype == tl.float64:
        middle = (a > 0.66) & (a <= 2.414213562373095)
    else:
        middle = (a > 0.4142135623730950) & (a <= 2.414213562373095)
    safe = tl.where(far, a, 1.0)
    x = tl.where(far, -(1.0 / safe), tl.where(middle, (a - 1.0) / (a + 1.0), tl.where(far, 0.0, a)))
    z = x * x
    none = tl.zeros_like(a)  # two plain numbers would be chosen between in single precision
    start = tl.where(far, 1.5707963267948966, tl.where(middle, 0.7853981633974483, none))
    if a.dtype == tl.float64:
        p = z * -8.750608600031904122785e-1 - 1.615753718733365076637e1
        p = p * z - 7.500855792314704667340e1
        p = p * z - 1.228866684490136173410e2
        p = p * z - 6.485021904942025371773e1
        q = z + 2.485846490142306297962e1
        q = q * z + 1.650270098316988542046e2
        q = q * z + 4.328810604912902668951e2
        q = q * z + 4.853903996359136964868e2
        q = q * z + 1.945506571482613964425e2
        rest = x * (z * (p / q)) + x
        # what pi loses to rounding
        rest += tl.where(far, 6.123233995736765886130e-17, tl.where(middle, 3.061616997868382943065e-17, none))
    else:
        p = z * 8.05374449538e-2 - 1.38776856032e-1
        p = p * z + 1.99777106478e-1
        p = p * z - 3.33329491539e-1
        rest = p * z * x + x
    return start + rest


@triton.jit
def atan(a):
    out = _atan_of_positive(tl.abs(a))
    return tl.where(a < 0.0, -out, tl.where(a == 0.0, a, out))


@triton.jit
def asin(a):
    size = tl.abs(a)
    out = 2.0 * _atan_of_positive(size / (1.0 + sqrt((1.0 - size) * (1.0 + size))))
    return tl.where(a < 0.0, -out, tl.where(a == 0.0, a, out))


@triton.jit
def acos(a):
    return 2.0 * _atan_of_positive(sqrt((1.0 - a) / (1.0 + a)))


@triton.jit
def _negative(a):
    """The sign bit."""
    return (a < 0.0) | ((a == 0.0) & (1.0 / tl.where(a == 0.0, a, 1.0) < 0.0))


@triton.jit
def atan2(a, b):
    """The angle of the point (b, a)."""
    y = tl.abs(a)
    x = tl.abs(b)
    both = (y == float("inf")) & (x == float("inf"))
    none = (y == 0.0) & (x == 0.0)
    angle = _atan_of_positive(tl.where(both, 1.0, y / tl.where(none | both, 1.0, x)))
    angle = tl.where((a != a) | (b != b), a + b, angle)
    angle = tl.where(_negative(b), 3.141592653589793 - angle + 1.2246467991473532e-16, angle)
    return tl.where(_negative(a), -angle, angle)


@triton.jit
def power(a, b):
    """a ** b."""
    size = tl.abs(a)
    if a.dtype == tl.float32:  # in double, so that no bits are lost in the logarithm
        of_size = exp(b.to(tl.float64) * tl.log(size.to(tl.float64))).to(tl.float32)
    else:
        of_size = exp(b * tl.log(size))
    of_size = tl.where((size == 1.0) & (b == b), 1.0, of_size)
    whole = tl.floor(b) == b
    odd = whole & (tl.floor(b * 0.5) * 2.0 != b)
    negative = _negative(a)
    out = tl.where(negative & odd, -of_size, of_size)
    finite = (size < float("inf")) & (tl.abs(b) < float("inf"))
    outside = (a < 0.0) & ~whole & finite
    out = tl.where(outside, (a - a) / tl.where(outside, a - a, 1.0), out)
    return tl.where((b == 0.0) | (a == 1.0), 1.0, out)
