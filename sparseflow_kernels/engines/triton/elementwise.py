"""Activations with their slopes and curvatures, from arithmetic alone: Triton's own `exp` is an approximation in float32,
and its other functions are not in the interpreter. The reductions, and the formulas of every activation, are those of the
CPU engine (csrc/cpu/vector_math.h), where their accuracy is explained. Numbers of activations: csrc/activations.h.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _power_of_two(n, like):
    """2^n in the type of `like`, for an integer-valued n of a normal number."""
    if like.dtype == tl.float64:
        return ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exp_parts(x):
    """exp(x) = 2^n (1 + tail), |log(1 + tail)| <= log(2) / 2."""
    n = tl.floor(x * 1.4426950408889634074 + 0.5)
    if x.dtype == tl.float64:
        # log(2) in two pieces; the first has trailing zero bits, so n times it is exact
        r = x - n * 0.693147180558298714458942413330078125
        r = r - n * 1.6465949582897082e-12
        q = r * (1.0 / 87178291200.0) + 1.0 / 6227020800.0
        q = q * r + 1.0 / 479001600.0
        q = q * r + 1.0 / 39916800.0
        q = q * r + 1.0 / 3628800.0
        q = q * r + 1.0 / 362880.0
        q = q * r + 1.0 / 40320.0
        q = q * r + 1.0 / 5040.0
        q = q * r + 1.0 / 720.0
        q = q * r + 1.0 / 120.0
        q = q * r + 1.0 / 24.0
        q = q * r + 1.0 / 6.0
        q = q * r + 0.5
    else:
        r = x - n * 0.693145751953125
        r = r - n * 1.42860677e-6
        q = r * 0.001390129392167424 + 0.008363162139962861
        q = q * r + 0.04166685362032535
        q = q * r + 0.166665771895718
        q = q * r + 0.49999999551878493
    return n, r + r * r * q


@triton.jit
def exp_of_negative(x):
    """exp(x) for x <= 0; a NaN stays one."""
    if x.dtype == tl.float64:
        low = -750.0
    else:
        low = -105.0
    n, tail = _exp_parts(tl.where(x < low, low, x))
    half = tl.floor(n * 0.5)  # in two factors: the result may be denormal
    return (tail + 1.0) * _power_of_two(half, x) * _power_of_two(n - half, x)


@triton.jit
def expm1_of_negative(x):
    """(exp(x) - 1, exp(x)) for x <= 0, the first accurate near zero, the second down to exp(-87); a NaN stays one."""
    n, tail = _exp_parts(tl.where(x < -87.0, -87.0, x))
    power = _power_of_two(n, x)
    return power * tail + (power - 1.0), power * tail + power


@triton.jit
def tanh(x):
    e, _ = expm1_of_negative(-2.0 * tl.abs(x))
    magnitude = -e / (e + 2.0)
    return tl.where(x < 0.0, -magnitude, tl.where(x == 0.0, x, magnitude))


@triton.jit
def sigmoid(x):
    """(sigmoid(x), sigmoid(-x), exp(-|x|)) from one division."""
    e = exp_of_negative(-tl.abs(x))
    large = 1.0 / (e + 1.0)
    small = e * large
    return tl.where(x < 0.0, small, large), tl.where(x < 0.0, large, small), e


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for 0 <= e <= 1."""
    if e.dtype == tl.float64:
        # 2 atanh(y), y = e / (2 + e) <= 1/3: (atanh(y) / y - 1) / y^2 by its Taylor series
        y = e / (e + 2.0)
        u = y * y
        q = u * (1.0 / 35.0) + 1.0 / 33.0
        q = q * u + 1.0 / 31.0
        q = q * u + 1.0 / 29.0
        q = q * u + 1.0 / 27.0
        q = q * u + 1.0 / 25.0
        q = q * u + 1.0 / 23.0
        q = q * u + 1.0 / 21.0
        q = q * u + 1.0 / 19.0
        q = q * u + 1.0 / 17.0
        q = q * u + 1.0 / 15.0
        q = q * u + 1.0 / 13.0
        q = q * u + 1.0 / 11.0
        q = q * u + 1.0 / 9.0
        q = q * u + 1.0 / 7.0
        q = q * u + 1.0 / 5.0
        q = q * u + 1.0 / 3.0
        return 2.0 * y + 2.0 * y * u * q
    else:
        q = e * -0.0032440239917 + 0.0198514569890
        q = q * e - 0.0569595240939
        q = q * e + 0.1060365384412
        q = q * e - 0.1530559194908
        q = q * e + 0.1967593903760
        q = q * e - 0.2495413361191
        q = q * e + 0.3332996241213
        q = q * e - 0.4999990242259
        q = q * e + 0.9999999952872
        return e * q


@triton.jit
def sincos(x):
    """(sin(x), cos(x)). Beyond 8192 (float32) or 2^20 the reduction loses bits, one for every doubling."""
    n = tl.floor(x * 0.31830988618379067154 + 0.5)
    if x.dtype == tl.float64:  # pi in pieces: n times the first ones is exact
        r = x - n * 3.1415926534682512
        r = r - n * 1.2154201012607932e-10
        r = r - n * 4.044532497591901e-21
    else:
        r = x - n * 3.140625
        r = r - n * 9.67025756835938e-4
        r = r - n * 6.2771141529083e-7
        r = r - n * 1.2154201e-10
    u = r * r
    if x.dtype == tl.float64:
        s = u * (-1.0 / 121645100408832000.0) + 1.0 / 355687428096000.0
        s = s * u - 1.0 / 1307674368000.0
        s = s * u + 1.0 / 6227020800.0
        s = s * u - 1.0 / 39916800.0
        s = s * u + 1.0 / 362880.0
        s = s * u - 1.0 / 5040.0
        s = s * u + 1.0 / 120.0
        s = s * u - 1.0 / 6.0
        c = u * (1.0 / 2432902008176640000.0) - 1.0 / 6402373705728000.0
        c = c * u + 1.0 / 20922789888000.0
        c = c * u - 1.0 / 87178291200.0
        c = c * u + 1.0 / 479001600.0
        c = c * u - 1.0 / 3628800.0
        c = c * u + 1.0 / 40320.0
        c = c * u - 1.0 / 720.0
        c = c * u + 1.0 / 24.0
    else:
        s = u * 2.63383426216e-06 - 0.000198224035711
        s = s * u + 0.00833323906614
        s = s * u - 0.166666659218
        c = u * -2.65408074663e-07 + 2.47858931874e-05
        c = c * u - 0.00138888108463
        c = c * u + 0.041666666055
    odd = (n - 2.0 * tl.floor(n * 0.5)) != 0.0
    sine, cosine = r + r * u * s, 1.0 - 0.5 * u + u * u * c
    return tl.where(odd, -sine, sine), tl.where(odd, -cosine, cosine)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """(act(z), act'(z), act''(z)); what is not used costs nothing. Where a derivative jumps it is what
    sparseflow_kernels/activations.py says."""
    if ACTIVATION == 1:  # tanh
        h = tanh(z)
        slope = 1.0 - h * h
        curvature = -2.0 * h * slope
    elif ACTIVATION == 2:  # sigmoid
        h, complement, _ = sigmoid(z)
        slope = h * complement
        curvature = slope * (complement - h)
    elif ACTIVATION == 3:  # softplus with beta A, threshold B
        x = z * A
        linear = x > B
        s, complement, e = sigmoid(x)
        positive = tl.where(x < 0.0, 0.0, x)
        h = tl.where(linear, z, (positive + log1p_of_unit(e)) * (1.0 / A))
        slope = tl.where(linear, 1.0, s)
        curvature = tl.where(linear, 0.0, A * (s * complement))
    elif ACTIVATION == 4:  # relu
        h = tl.where(z < 0.0, 0.0, z)
        slope = tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)
        curvature = tl.zeros_like(z)
    elif ACTIVATION == 5:  # elu with alpha A
        below, power = expm1_of_negative(tl.where(z > 0.0, 0.0, z))
        h = tl.where(z > 0.0, z, A * below)
        slope = tl.where(z > 0.0, 1.0, A * power)
        curvature = tl.where(z > 0.0, 0.0, slope)
    elif ACTIVATION == 6:  # silu
        s, complement, _ = sigmoid(z)
        h = z * s
        slope = s + h * complement
        curvature = s * complement * (2.0 + z * (complement - s))
    elif ACTIVATION == 7:  # sin
        h, slope = sincos(z)
        curvature = -h
    elif ACTIVATION == 8:  # square
        h = z * z
        slope = z + z
        curvature = tl.zeros_like(z) + 2.0
    elif ACTIVATION == 9:  # cube
        h = z * z * z
        slope = 3.0 * z * z
        curvature = 6.0 * z
    elif ACTIVATION == 10:  # gelu, by the error function
        bounded = tl.where(z > 40.0, 40.0, tl.where(z < -40.0, -40.0, z))  # beyond, the density is zero
        density = 0.39894228040143267794 * tl.exp(-0.5 * bounded * bounded)
        below = 0.5 + 0.5 * tl.erf(0.70710678118654752440 * z)
        h = z * below
        slope = below + bounded * density
        curvature = density * (2.0 - bounded * bounded)
    else:
        h = z
        slope = tl.zeros_like(z) + 1.0
        curvature = tl.zeros_like(z)
    return h, slope, curvature
