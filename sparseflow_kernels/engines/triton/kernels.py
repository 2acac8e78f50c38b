"""The kernels of a program's operations (csrc/field.h): a product with what follows it fused behind it.

Every kernel of rows begins with the same arguments: the matrix (order of its rows, row pointers, columns, values, and of a
dense one the number of columns and the width of its storage), the source and its strides, the samples. What is absent is
None. Strides are in elements; a "tangent" is the distance of slot 1 from slot 0.
"""

from __future__ import annotations

import triton.language as tl

from .elementwise import activate, sigmoid
from .launching import jit
from .sums import inner_products, outer_products, places, sums, tile_rows, tile_samples

_OF_ROWS = ("n_rows", "row_tiles", "count", "scale", "shift", "coefficient")
_FLAT = ("n", "n_tiles", "n_entries", "entry_tiles", "n_splits", "n_lasting", "batch", "scale", "time", "sums", "out",
         "splits", "of_gate", "scale_stride", "n_rows", "row_tiles", "n_columns", "column_tiles")


@jit(_OF_ROWS)
def product(
    order, n_rows, row_tiles, row_ptr, col, values, count, depth, source, row_stride, sample_stride, tangent, batch,
    target, target_row, target_sample, target_tangent, bias, factor, factor_row, factor_stride, addend, addend_stride,
    factor2, factor2_row, factor2_stride,
    SECOND: tl.constexpr, TANGENT: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
    UNROLL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """target = factor * (W source) + addend (+ bias by row); if SECOND, its slot 1 = factor2 * (W source)."""
    position, row, live = tile_rows(order, n_rows, row_tiles, ROWS)
    samples, inside = tile_samples(batch, row_tiles, BATCH)
    mask = live[:, None] & inside[None, :]
    acc, _ = sums(
        position, row, live, samples, inside, row_ptr, col, values, count, depth, source, row_stride, sample_stride,
        tangent, TANGENT, DENSE, ROWS, BATCH, UNROLL, PRECISION,
    )  # fmt: skip
    out = places(target, row, target_row, samples, target_sample)
    if SECOND:
        other = acc
        if factor2 is not None:
            at = row
            if factor2_row is not None:
                at = tl.load(factor2_row + row, mask=live, other=0)
            other = other * tl.load(places(factor2, at, factor2_stride, samples, 1), mask=mask, other=0.0)
        tl.store(out + target_tangent, other, mask=mask)
    if factor is not None:
        at = row
        if factor_row is not None:
            at = tl.load(factor_row + row, mask=live, other=0)
        acc = acc * tl.load(places(factor, at, factor_stride, samples, 1), mask=mask, other=0.0)
    if addend is not None:
        acc += tl.load(places(addend, row, addend_stride, samples, 1), mask=mask, other=0.0)
    if bias is not None:
        acc += tl.load(bias + row, mask=live, other=0.0)[:, None]
    tl.store(out, acc, mask=mask)


@jit(_FLAT)
def gradient(
    entry_row, entry_col, n_entries, entry_tiles, left, left_row, left_sample, right, right_row, right_sample, batch,
    padded, chunk, left_tangent, right_tangent, out, out_split, TANGENT: tl.constexpr, ADD: tl.constexpr,
    ENTRIES: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    inner_products(
        entry_row, entry_col, n_entries, entry_tiles, left, left_row, left_sample, right, right_row, right_sample, batch,
        padded, chunk, left_tangent, right_tangent, out, out_split, TANGENT, ADD, ENTRIES, BATCH,
    )  # fmt: skip


@jit(_FLAT)
def dense_gradient(
    rows, n_rows, row_tiles, columns, n_columns, column_tiles, entries, width, left, left_row, left_sample, right,
    right_row, right_sample, batch, padded, chunk, left_tangent, right_tangent, out, out_split,
    TANGENT: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    outer_products(
        rows, n_rows, row_tiles, columns, n_columns, column_tiles, entries, width, left, left_row, left_sample, right,
        right_row, right_sample, batch, padded, chunk, left_tangent, right_tangent, out, out_split,
        TANGENT, ADD, ROWS, COLUMNS, BATCH, PRECISION,
    )  # fmt: skip


@jit(_FLAT)
def add_splits(sums, splits, n_splits, n, n_lasting, N: tl.constexpr):
    """sums[n] (double) of the gradients, from splits [n_splits, n], in order: the first n_lasting are added up, the others
    belong to this evaluation alone."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    live = at < n
    total = tl.zeros([N], dtype=tl.float64)
    place = splits + at
    split = 0
    while split < n_splits:
        total += tl.load(place, mask=live, other=0.0).to(tl.float64)
        place += n
        split += 1
    total += tl.load(sums + at, mask=at < n_lasting, other=0.0)
    tl.store(sums + at, total, mask=live)


@jit(_FLAT)
def path_gradient(entry, gate, scale, sums, out, n, N: tl.constexpr):
    """out[path] (double) += scale[gate] * the gradient of the path's entry."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    live = at < n
    of_entry = tl.load(sums + tl.load(entry + at, mask=live, other=0), mask=live, other=0.0)
    g = tl.load(scale + tl.load(gate + at, mask=live, other=0), mask=live, other=0.0).to(tl.float64)
    tl.store(out + at, tl.load(out + at, mask=live, other=0.0) + g * of_entry, mask=live)


@jit(_FLAT)
def gate_gradient(gate_ptr, path, entry, constant, sums, out, ADD: tl.constexpr, N: tl.constexpr):
    """out[gate] (double) = sum over the gate's paths of constant * the gradient of the path's entry; a gate per program."""
    gate = tl.program_id(0)
    at = tl.load(gate_ptr + gate)
    end = tl.load(gate_ptr + gate + 1)
    total = tl.zeros([N], dtype=tl.float64)
    while at < end:
        lane = at + tl.arange(0, N)
        here = lane < end
        p = tl.load(path + lane, mask=here, other=0)
        of_entry = tl.load(sums + tl.load(entry + p, mask=here, other=0), mask=here, other=0.0)
        total += tl.load(constant + p, mask=here, other=0.0).to(tl.float64) * of_entry
        at += N
    answer = tl.sum(total, axis=0)
    if ADD:
        answer += tl.load(out + gate)
    tl.store(out + gate, answer)


@jit(_FLAT)
def modulation_gradient(
    sums, shift_at, gate_at, of_gate, time, scale, bias, gated, shifted, gate_slope, shift_slope, out, n,
    N: tl.constexpr,
):  # fmt: skip
    """Adds an evaluation's sums to the gradients of all modulations, out [6, n] in double: of bias, gate slope and
    offset, shift slope and offset, and the term of time's. shift_at, gate_at: where a row's sums are, or -1. of_gate: what
    the path sums owe to the gate."""
    at = tl.program_id(0) * N + tl.arange(0, N)
    where_shift = tl.load(shift_at + at, mask=at < n, other=-1)
    where_gate = tl.load(gate_at + at, mask=at < n, other=-1)
    live = (at < n) & (where_shift >= 0)
    t = tl.load(time).to(tl.float64)
    u = tl.load(sums + where_shift, mask=live, other=0.0)  # s * (cotangent of z)
    s = tl.load(scale + at, mask=live, other=1.0).to(tl.float64)
    tl.store(out + at, tl.load(out + at, mask=live, other=0.0) + u, mask=live)
    has_gate = live & (tl.load(gated + at, mask=live, other=0) != 0)
    gate = tl.load(sums + where_gate, mask=has_gate, other=0.0)
    gate += tl.load(bias + at, mask=has_gate, other=0.0).to(tl.float64) * u
    gate += tl.load(of_gate + at, mask=has_gate, other=0.0) * s
    logit = gate * (1.0 - s)
    place = out + n + at
    tl.store(place, tl.load(place, mask=has_gate, other=0.0) + t * logit, mask=has_gate)
    place += n
    tl.store(place, tl.load(place, mask=has_gate, other=0.0) + logit, mask=has_gate)
    has_shift = live & (tl.load(shifted + at, mask=live, other=0) != 0)
    z = tl.where(has_shift, u / s, 0.0)  # an adjoint's gates are kept from zero
    place += n
    tl.store(place, tl.load(place, mask=has_shift, other=0.0) + t * z, mask=has_shift)
    place += n
    tl.store(place, tl.load(place, mask=has_shift, other=0.0) + z, mask=has_shift)
    place += n
    of_time = tl.where(has_gate, logit * tl.load(gate_slope + at, mask=has_gate, other=0.0).to(tl.float64), 0.0)
    of_time += z * tl.load(shift_slope + at, mask=has_shift, other=0.0).to(tl.float64)
    tl.store(place, tl.load(place, mask=live, other=0.0) + of_time, mask=live)


@jit(_OF_ROWS)
def affine(
    order, n_rows, row_tiles, row_ptr, col, values, count, depth, source, row_stride, sample_stride, tangent, batch,
    target, target_stride, target_tangent, scale, shift, seed, seed_stride, weight, weight_stride, partial,
    partial_stride,
    ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr, STORE: tl.constexpr,
    TANGENT: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, UNROLL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """target = act(scale * (W source) + shift), and of the slope what STORE says (engines/program.py): in slot 1 of the
    target, or summed up over this tile's rows into row `tile` of partial."""
    position, row, live = tile_rows(order, n_rows, row_tiles, ROWS)
    samples, inside = tile_samples(batch, row_tiles, BATCH)
    mask = live[:, None] & inside[None, :]
    acc, acc_tangent = sums(
        position, row, live, samples, inside, row_ptr, col, values, count, depth, source, row_stride, sample_stride,
        tangent, TANGENT, DENSE, ROWS, BATCH, UNROLL, PRECISION,
    )  # fmt: skip
    # row vectors of a graph may be absent: one and zero
    by_row = tl.zeros([ROWS, 1], dtype=values.dtype.element_ty) + 1.0
    if scale is not None:
        by_row = tl.load(scale + row, mask=live, other=0.0)[:, None]
    z = acc * by_row
    if shift is not None:
        z += tl.load(shift + row, mask=live, other=0.0)[:, None]
    h, slope, _ = activate(z, ACTIVATION, A, B)
    out = places(target, row, target_stride, samples, 1)
    tl.store(out, h, mask=mask)
    if STORE != 0:
        if STORE >= 4:  # TANGENT, TANGENT_REDUCE
            moved = slope * (by_row * acc_tangent)
        else:
            moved = slope * by_row
            if STORE >= 2:  # SEED, SEED_REDUCE
                moved = moved * tl.load(places(seed, row, seed_stride, samples, 1), mask=mask, other=0.0)
        if STORE == 3 or STORE == 5:
            if weight is not None:
                moved = moved * tl.load(places(weight, row, weight_stride, samples, 1), mask=mask, other=0.0)
            total = tl.sum(tl.where(mask, moved, 0.0), axis=0)
            tile = (tl.program_id(0) % row_tiles).to(tl.int64)
            tl.store(partial + tile * partial_stride + samples, total, mask=inside)
        else:
            tl.store(out + target_tangent, moved, mask=mask)


@jit(_OF_ROWS)
def reduction(
    order, n_rows, row_tiles, row_ptr, col, values, count, depth, source, row_stride, sample_stride, tangent, batch,
    factor, factor_row, factor_stride, factor2, factor2_row, factor2_stride, coefficient, partial, partial_stride,
    TANGENT: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, UNROLL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Row `tile` of partial = coefficient * factor * factor2 * (W source), summed over this tile's rows."""
    position, row, live = tile_rows(order, n_rows, row_tiles, ROWS)
    samples, inside = tile_samples(batch, row_tiles, BATCH)
    mask = live[:, None] & inside[None, :]
    term, _ = sums(
        position, row, live, samples, inside, row_ptr, col, values, count, depth, source, row_stride, sample_stride,
        tangent, TANGENT, DENSE, ROWS, BATCH, UNROLL, PRECISION,
    )  # fmt: skip
    if factor is not None:
        at = row
        if factor_row is not None:
            at = tl.load(factor_row + row, mask=live, other=0)
        term = term * tl.load(places(factor, at, factor_stride, samples, 1), mask=mask, other=0.0)
    if factor2 is not None:
        at = row
        if factor2_row is not None:
            at = tl.load(factor2_row + row, mask=live, other=0)
        term = term * tl.load(places(factor2, at, factor2_stride, samples, 1), mask=mask, other=0.0)
    if coefficient is not None:
        term = term * tl.load(coefficient + row, mask=live, other=0.0)[:, None]
    total = tl.sum(tl.where(mask, term, 0.0), axis=0)
    tile = (tl.program_id(0) % row_tiles).to(tl.int64)
    tl.store(partial + tile * partial_stride + samples, total, mask=inside)


@jit(_OF_ROWS)
def keep(
    order, n_rows, row_tiles, row_ptr, col, values, count, depth, source, row_stride, sample_stride, tangent, batch,
    target, target_stride, target_tangent, scale, shift, kept, kept_stride, kept_slot,
    ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SLOPES: tl.constexpr, CURVATURE: tl.constexpr,
    RAW: tl.constexpr,
    TANGENT: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, UNROLL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """An affine that keeps, in successive slots: d = scale act'; with CURVATURE c = scale^2 act'', or with a tangent q
    e = c q (both only if SLOPES); with RAW r = W source."""
    position, row, live = tile_rows(order, n_rows, row_tiles, ROWS)
    samples, inside = tile_samples(batch, row_tiles, BATCH)
    mask = live[:, None] & inside[None, :]
    acc, acc_tangent = sums(
        position, row, live, samples, inside, row_ptr, col, values, count, depth, source, row_stride, sample_stride,
        tangent, TANGENT, DENSE, ROWS, BATCH, UNROLL, PRECISION,
    )  # fmt: skip
    by_row = tl.load(scale + row, mask=live, other=0.0)[:, None]
    z = acc * by_row + tl.load(shift + row, mask=live, other=0.0)[:, None]
    h, d, bend = activate(z, ACTIVATION, A, B)
    d = d * by_row
    out = places(target, row, target_stride, samples, 1)
    tl.store(out, h, mask=mask)
    if TANGENT:
        tl.store(out + target_tangent, d * acc_tangent, mask=mask)
    if kept is not None:
        place = places(kept, row, kept_stride, samples, 1)
        if SLOPES:
            tl.store(place, d, mask=mask)
            place += kept_slot
            if CURVATURE:
                bend = bend * (by_row * by_row)
                if TANGENT:
                    bend = bend * acc_tangent
                tl.store(place, bend, mask=mask)
                place += kept_slot
        if RAW:
            tl.store(place, acc, mask=mask)


@jit(_OF_ROWS)
def pull(
    order, n_rows, row_tiles, row_ptr, col, values, count, depth, source, row_stride, sample_stride, tangent, batch,
    target, target_stride, target_slot, scale, addend, addend_stride, addend_tangent, kept, kept_stride, kept_slot,
    value, value_stride, value_tangent, slope_cotangent, slope_cotangent_stride,
    SLOPE_FROM: tl.constexpr, CURVATURE: tl.constexpr, RAW: tl.constexpr,
    TANGENT: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, UNROLL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The adjoint of a keep. With hbar = W source (+ addend) and dbar the cotangent of d: target = d hbar + c dbar; with
    tangents d hbar + e pbar, and slot 1 = d pbar. With RAW, the term of the gate's gradient in the next slot.
    SLOPE_FROM: 0 what was kept; else d and e follow from the value: 1 identity, 2 tanh, 3 sigmoid."""
    position, row, live = tile_rows(order, n_rows, row_tiles, ROWS)
    samples, inside = tile_samples(batch, row_tiles, BATCH)
    mask = live[:, None] & inside[None, :]
    hbar, pbar = sums(
        position, row, live, samples, inside, row_ptr, col, values, count, depth, source, row_stride, sample_stride,
        tangent, TANGENT, DENSE, ROWS, BATCH, UNROLL, PRECISION,
    )  # fmt: skip
    if addend is not None:
        more = places(addend, row, addend_stride, samples, 1)
        hbar += tl.load(more, mask=mask, other=0.0)
        if TANGENT:
            pbar += tl.load(more + addend_tangent, mask=mask, other=0.0)
    raw_slot = 0
    if SLOPE_FROM == 0:
        place = places(kept, row, kept_stride, samples, 1)
        d = tl.load(place, mask=mask, other=0.0)
        if TANGENT:
            e = tl.load(place + kept_slot, mask=mask, other=0.0)
        raw_slot = 1
        if CURVATURE:
            raw_slot = 2
    else:
        by_row = tl.load(scale + row, mask=live, other=0.0)[:, None]
        place = places(value, row, value_stride, samples, 1)
        if SLOPE_FROM == 1:
            d = by_row + tl.zeros_like(hbar)
            e = tl.zeros_like(hbar)
        else:
            h = tl.load(place, mask=mask, other=0.0)
            if SLOPE_FROM == 2:
                d = by_row * (1.0 - h * h)
                e = (-2.0 * by_row) * h
            else:
                d = by_row * (h * (1.0 - h))
                e = by_row * (1.0 - (h + h))
            if TANGENT:
                e = e * tl.load(place + value_tangent, mask=mask, other=0.0)
    u = hbar * d
    out = places(target, row, target_stride, samples, 1)
    after = out + target_slot
    if TANGENT:
        u += pbar * e
        tl.store(after, pbar * d, mask=mask)
        after += target_slot
    if slope_cotangent is not None:  # never with tangents or slopes that follow from the value
        dbar = tl.load(places(slope_cotangent, row, slope_cotangent_stride, samples, 1), mask=mask, other=0.0)
        u += dbar * tl.load(places(kept, row, kept_stride, samples, 1) + kept_slot, mask=mask, other=0.0)
    tl.store(out, u, mask=mask)
    if RAW:
        r = tl.load(places(kept, row, kept_stride, samples, 1) + raw_slot * kept_slot, mask=mask, other=0.0)
        gate = u * r
        if TANGENT:
            tangents = places(value, row, value_stride, samples, 1) + value_tangent
            gate += pbar * tl.load(tangents, mask=mask, other=0.0)
        elif slope_cotangent is not None:
            gate += dbar * d
        tl.store(after, gate, mask=mask)


@jit(_FLAT)
def modulate(
    times, bias, gated, gate_slope, gate_offset, shift_slope, shift_offset, scale, shift, n, n_tiles, FLOOR: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """scale and shift [stages, n] of every row of every layer at the times of the stages: s = sigmoid(slope t + offset)
    where gated, else 1; s b + c. FLOOR: an adjoint's gates are at least so large, because it divides by them."""
    stage = tl.program_id(0) // n_tiles
    at = (tl.program_id(0) % n_tiles) * N + tl.arange(0, N)
    live = at < n
    t = tl.load(times + stage)
    s, _, _ = sigmoid(
        tl.load(gate_slope + at, mask=live, other=0.0) * t + tl.load(gate_offset + at, mask=live, other=0.0)
    )
    if FLOOR > 0.0:
        s = tl.where(s < FLOOR, FLOOR, s)
    s = tl.where(tl.load(gated + at, mask=live, other=0) != 0, s, 1.0)
    c = tl.load(shift_slope + at, mask=live, other=0.0) * t + tl.load(shift_offset + at, mask=live, other=0.0)
    place = stage.to(tl.int64) * n + at
    tl.store(scale + place, s, mask=live)
    tl.store(shift + place, s * tl.load(bias + at, mask=live, other=0.0) + c, mask=live)


@jit(_FLAT)
def gated_values(
    path_ptr, constant, gate, scale, scale_stride, values, n_entries, entry_tiles, N: tl.constexpr
):  # fmt: skip
    """values[stage][entry] = sum over the entry's paths of constant * scale[stage][gate], in their order."""
    stage = (tl.program_id(0) // entry_tiles).to(tl.int64)
    entry = (tl.program_id(0) % entry_tiles) * N + tl.arange(0, N)
    live = entry < n_entries
    path = tl.load(path_ptr + entry, mask=live, other=0)
    end = tl.load(path_ptr + entry + 1, mask=live, other=0)
    total = tl.zeros([N], dtype=values.dtype.element_ty)
    longest = tl.max(end - path, axis=0)
    step = 0
    while step < longest:
        here = path < end
        g = tl.load(scale + stage * scale_stride + tl.load(gate + path, mask=here, other=0), mask=here, other=0.0)
        total += tl.load(constant + path, mask=here, other=0.0) * g
        path += 1
        step += 1
    tl.store(values + stage * n_entries + entry, total, mask=live)
