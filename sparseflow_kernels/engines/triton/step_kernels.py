"""The kernels of a step between evaluations of the field: elementwise work on states [rows, padded batch], whose last row
is the log-density where there is one. Stages lie behind each other, k [stages, rows, padded].

Weights of sums over stages are read from device memory, already times dt; which of them are zero is known when the kernel
is compiled (the bits of a mask), because a zero weight must not meet an infinite stage.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launching import jit
from .sums import places

_ANY = ("n_rows", "row_tiles", "dim", "batch", "n_partials", "last", "n", "measured", "xs", "ls", "x_slopes", "l_slopes")


@triton.jit
def _tile(n_rows, row_tiles, padded, ROWS: tl.constexpr, BATCH: tl.constexpr):
    row = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    samples = (tl.program_id(0) // row_tiles) * BATCH + tl.arange(0, BATCH)
    return row, samples, (row < n_rows)[:, None] & (samples < padded)[None, :]


@triton.jit
def _combined(k, k_stage, at, mask, weights, latest, LATEST: tl.constexpr, WEIGHTS: tl.constexpr, STAGES: tl.constexpr):
    """sum over the stages j in WEIGHTS of weights[j] k_j; `latest` is k of stage LATEST."""
    total = tl.zeros_like(latest)
    for j in tl.static_range(STAGES):
        if (WEIGHTS >> j) & 1:
            if j == LATEST:
                term = latest
            else:
                term = tl.load(k + j * k_stage.to(tl.int64) + at, mask=mask, other=0.0)
            total += term * tl.load(weights + j)
    return total


@triton.jit
def _derivative(
    f, f_row, partials, n_partials, row, samples, mask, dim, padded, SIGN: tl.constexpr, DIVERGENCE: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """SIGN * (f, -trace) of these rows; the trace is the sum of the rows of `partials`, in a fixed order."""
    value = tl.load(places(f, row, f_row, samples, 1), mask=mask & (row < dim)[:, None], other=0.0)
    if DIVERGENCE:
        trace = tl.zeros([BATCH], dtype=f.dtype.element_ty)
        # only the tile with the last row needs it
        part = tl.where(tl.max(row, axis=0) >= dim, 0, n_partials)
        while part < n_partials:
            some = part + tl.arange(0, 4)
            mask_some = (some < n_partials)[:, None] & (samples < padded)[None, :]
            trace += tl.sum(tl.load(places(partials, some, padded, samples, 1), mask=mask_some, other=0.0), axis=0)
            part += 4
        value = tl.where((row == dim)[:, None], -trace[None, :], value)
    return value * SIGN


@jit(_ANY)
def begin(
    flag, y0, y1, k, k_stage, last, n_rows, row_tiles, dim, padded, weights, x, x_row,
    WEIGHTS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """The start of a step. Where `flag` says that the last one was accepted its end becomes the state, and, if WEIGHTS is
    not empty, its last stage the first. Then the state of the first evaluation, into the field's input `x`."""
    row, samples, mask = _tile(n_rows, row_tiles, padded, ROWS, BATCH)
    at = row.to(tl.int64)[:, None] * padded + samples[None, :]
    accepted = tl.load(flag) != 0.0
    y = tl.load(y0 + at, mask=mask, other=0.0)
    y = tl.where(accepted, tl.load(y1 + at, mask=mask, other=0.0), y)
    tl.store(y0 + at, y, mask=mask)
    if WEIGHTS != 0:
        slope = tl.load(k + at, mask=mask, other=0.0)
        slope = tl.where(accepted, tl.load(k + last.to(tl.int64) * k_stage + at, mask=mask, other=0.0), slope)
        tl.store(k + at, slope, mask=mask)
        y += _combined(k, k_stage, at, mask, weights, slope, 0, WEIGHTS, STAGES)
    tl.store(places(x, row, x_row, samples, 1), y, mask=mask & (row < dim)[:, None])


@jit(_ANY)
def advance(
    f, f_row, partials, n_partials, y0, k, k_stage, n_rows, row_tiles, dim, padded, weights, x, x_row, y1,
    STAGE: tl.constexpr, WEIGHTS: tl.constexpr, STAGES: tl.constexpr, SIGN: tl.constexpr, DIVERGENCE: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Takes the derivative of stage STAGE from the field's output into k, and makes the next state, y0 + sum of weights k:
    for the field's input `x`, or for `y1`, where it is the end of the step. WEIGHTS of -1: no next state."""
    row, samples, mask = _tile(n_rows, row_tiles, padded, ROWS, BATCH)
    at = row.to(tl.int64)[:, None] * padded + samples[None, :]
    latest = _derivative(
        f, f_row, partials, n_partials, row, samples, mask, dim, padded, SIGN, DIVERGENCE, ROWS, BATCH
    )
    tl.store(k + STAGE * k_stage.to(tl.int64) + at, latest, mask=mask)
    if WEIGHTS >= 0:
        y = tl.load(y0 + at, mask=mask, other=0.0)
        y += _combined(k, k_stage, at, mask, weights, latest, STAGE, WEIGHTS, STAGES)
        if y1 is not None:
            tl.store(y1 + at, y, mask=mask)
        if x is not None:
            tl.store(places(x, row, x_row, samples, 1), y, mask=mask & (row < dim)[:, None])


@jit(_ANY)
def finish(
    f, f_row, partials, n_partials, y0, k, k_stage, n_rows, row_tiles, dim, batch, padded, weights, error_weights, y1,
    tolerance, bounds, measured,
    COMPONENTS: tl.constexpr, STAGE: tl.constexpr, WEIGHTS: tl.constexpr, ERROR_WEIGHTS: tl.constexpr, STAGES: tl.constexpr, SIGN: tl.constexpr,
    DIVERGENCE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """The end of an adaptive step: its last stage, y1 (where WEIGHTS is not -1: else it is there), and of every program
    what the error's norm is made of, measured [programs, COMPONENTS + 1] in double: the sums of the squares of the scaled
    error over the rows of each component of the state, bounds [COMPONENTS + 1], and how many numbers of y1 are not finite.
    tolerance [2, rows]: rtol and atol."""
    row, samples, mask = _tile(n_rows, row_tiles, padded, ROWS, BATCH)
    at = row.to(tl.int64)[:, None] * padded + samples[None, :]
    latest = _derivative(
        f, f_row, partials, n_partials, row, samples, mask, dim, padded, SIGN, DIVERGENCE, ROWS, BATCH
    )
    tl.store(k + STAGE * k_stage.to(tl.int64) + at, latest, mask=mask)
    y = tl.load(y0 + at, mask=mask, other=0.0)
    if WEIGHTS >= 0:
        end = y + _combined(k, k_stage, at, mask, weights, latest, STAGE, WEIGHTS, STAGES)
        tl.store(y1 + at, end, mask=mask)
    else:
        end = tl.load(y1 + at, mask=mask, other=0.0)
    error = _combined(k, k_stage, at, mask, error_weights, latest, STAGE, ERROR_WEIGHTS, STAGES)
    rtol = tl.load(tolerance + row, mask=row < n_rows, other=1.0)[:, None]
    atol = tl.load(tolerance + n_rows + row, mask=row < n_rows, other=1.0)[:, None]
    size = tl.maximum(tl.abs(y), tl.abs(end), propagate_nan=tl.PropagateNan.ALL)
    scaled = (error / (atol + rtol * size)).to(tl.float64)
    counts = mask & (samples < batch)[None, :]
    square = tl.where(counts, scaled * scaled, 0.0)
    bad = tl.where(counts & ((end - end) != 0.0), 1.0, 0.0).to(tl.float64)
    out = measured + tl.program_id(0).to(tl.int64) * (COMPONENTS + 1)
    for component in tl.static_range(COMPONENTS):
        of_this = ((row >= tl.load(bounds + component)) & (row < tl.load(bounds + component + 1)))[:, None]
        tl.store(out + component, tl.sum(tl.sum(tl.where(of_this, square, 0.0), axis=1), axis=0))
    tl.store(out + COMPONENTS, tl.sum(tl.sum(bad, axis=1), axis=0))


@jit(_ANY)
def total(measured, n, result, WIDTH: tl.constexpr, N: tl.constexpr):
    """result [WIDTH] = sums over the programs of `finish`, in a fixed order."""
    lane = tl.arange(0, N)
    for what in tl.static_range(WIDTH):
        acc = tl.zeros([N], dtype=tl.float64)
        start = 0
        while start < n:
            acc += tl.load(measured + (start + lane) * WIDTH + what, mask=start + lane < n, other=0.0)
            start += N
        tl.store(result + what, tl.sum(acc, axis=0))


@jit(_ANY)
def read_off(
    numbers, y0, y1, k, k_stage, n_rows, row_tiles, dim, batch, padded, xs, ls, x_slopes, l_slopes,
    WEIGHTS: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """An output at fraction x of a step into xs [batch, dim] and ls [batch], off the quartic of numerics/interpolation.py;
    its derivative into x_slopes, l_slopes, where wanted. numbers: x, dt, then the weights of the middle point."""
    row, samples, mask = _tile(n_rows, row_tiles, padded, ROWS, BATCH)
    mask = mask & (samples < batch)[None, :]
    at = row.to(tl.int64)[:, None] * padded + samples[None, :]
    x = tl.load(numbers)
    dt = tl.load(numbers + 1)
    a = tl.load(y0 + at, mask=mask, other=0.0)
    b = tl.load(y1 + at, mask=mask, other=0.0)
    first = tl.load(k + at, mask=mask, other=0.0)
    last = tl.load(k + (STAGES - 1) * k_stage.to(tl.int64) + at, mask=mask, other=0.0)
    middle = a + _combined(k, k_stage, at, mask, numbers + 2, first, 0, WEIGHTS, STAGES)
    slope0 = dt * first
    slope1 = dt * last
    quadratic = slope1 - 4.0 * slope0 - 11.0 * a - 5.0 * b + 16.0 * middle
    cubic = 5.0 * slope0 - 3.0 * slope1 + 18.0 * a + 14.0 * b - 32.0 * middle
    quartic = 2.0 * (slope1 - slope0) - 8.0 * (a + b) + 16.0 * middle
    value = a + x * (slope0 + x * (quadratic + x * (cubic + x * quartic)))
    out = samples.to(tl.int64)[None, :] * dim + row[:, None]
    of_state = mask & (row < dim)[:, None]
    of_density = mask & (row == dim)[:, None]
    tl.store(xs + out, value, mask=of_state)
    if ls is not None:
        tl.store(ls + samples[None, :] + 0 * row[:, None], value, mask=of_density)
    if x_slopes is not None:
        slope = (slope0 + x * (2.0 * quadratic + x * (3.0 * cubic + x * 4.0 * quartic))) / dt
        tl.store(x_slopes + out, slope, mask=of_state)
        if l_slopes is not None:
            tl.store(l_slopes + samples[None, :] + 0 * row[:, None], slope, mask=of_density)


# ---- the way back


@jit(_ANY)
def combine(
    y0, k, k_stage, n_rows, row_tiles, padded, weights, out, WEIGHTS: tl.constexpr, STAGES: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """out = y0 + sum of weights k, all of n_rows rows."""
    row, samples, mask = _tile(n_rows, row_tiles, padded, ROWS, BATCH)
    at = row.to(tl.int64)[:, None] * padded + samples[None, :]
    y = tl.load(y0 + at, mask=mask, other=0.0)
    tl.store(out + at, y + _combined(k, k_stage, at, mask, weights, y, -1, WEIGHTS, STAGES), mask=mask)


@jit(_ANY)
def prepare(
    state, cotangent, n_rows, row_tiles, dim, padded, x, x_row, v, v_row, lam,
    SIGN: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """A state [dim, padded] into the field's input x, and the cotangent of SIGN * (f, -trace) [rows, padded] into that of f
    (v) and of the trace (lam, if there is one)."""
    row, samples, mask = _tile(n_rows, row_tiles, padded, ROWS, BATCH)
    at = row.to(tl.int64)[:, None] * padded + samples[None, :]
    of_state = mask & (row < dim)[:, None]
    tl.store(places(x, row, x_row, samples, 1), tl.load(state + at, mask=of_state, other=0.0), mask=of_state)
    given = tl.load(cotangent + at, mask=mask, other=0.0) * SIGN
    tl.store(places(v, row, v_row, samples, 1), given, mask=of_state)
    if lam is not None:
        of_trace = mask & (row == dim)[:, None]
        tl.store(lam + samples[None, :] + 0 * row[:, None], -given, mask=of_trace)


@jit(_ANY)
def spread(
    source, source_row, n_rows, row_tiles, padded, weights, cotangents, k_stage, start, WEIGHTS: tl.constexpr,
    STAGES: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """What a state's cotangent owes: start += source, and of every stage in WEIGHTS cotangents[j] += weights[j] source."""
    row, samples, mask = _tile(n_rows, row_tiles, padded, ROWS, BATCH)
    at = row.to(tl.int64)[:, None] * padded + samples[None, :]
    given = tl.load(places(source, row, source_row, samples, 1), mask=mask, other=0.0)
    tl.store(start + at, tl.load(start + at, mask=mask, other=0.0) + given, mask=mask)
    for j in tl.static_range(STAGES):
        if (WEIGHTS >> j) & 1:
            place = cotangents + j * k_stage.to(tl.int64) + at
            tl.store(place, tl.load(place, mask=mask, other=0.0) + given * tl.load(weights + j), mask=mask)
