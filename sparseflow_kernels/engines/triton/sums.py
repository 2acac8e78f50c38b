"""The two products every kernel is made of: rows of (sparse matrix) x (batch), and inner products over the batch.

A kernel's tile is ROWS rows of the matrix by BATCH samples. Buffers are reached through strides, in elements, so that
batch-minor ([row][slot][sample]) and batch-major ([sample][row]) memory both work; offsets are 64-bit. Loops whose bounds
are loaded are `while` loops: Triton 3.6's interpreter cannot run them as ranges.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(order, n_rows, row_tiles, ROWS: tl.constexpr):
    """(position among all rows, row, is there one) of this program's tile of rows; rows of like length are neighbours.
    Programs are numbered in one dimension, the only one without a low limit; neighbours read the same samples."""
    position = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    live = position < n_rows
    return position, tl.load(order + position, mask=live, other=0), live


@triton.jit
def tile_samples(batch, row_tiles, BATCH: tl.constexpr):
    """(samples, which of them exist) of this program's tile."""
    samples = (tl.program_id(0) // row_tiles) * BATCH + tl.arange(0, BATCH)
    return samples, samples < batch


@triton.jit
def places(base, row, row_stride, samples, sample_stride):
    """Addresses [ROWS, BATCH] of these rows of a buffer."""
    return base + row.to(tl.int64)[:, None] * row_stride + samples.to(tl.int64)[None, :] * sample_stride


@triton.jit
def sparse_sums(
    row, live, samples, inside, row_ptr, col, values, source, row_stride, sample_stride, tangent,
    TANGENT: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """W source [ROWS, BATCH], and with TANGENT the same of what lies `tangent` elements behind the source. Every row is one
    chain of multiply-adds in column order, so its bits do not depend on the tile."""
    start = tl.load(row_ptr + row, mask=live, other=0)
    end = tl.load(row_ptr + row + 1, mask=live, other=0)
    longest = tl.max(end - start, axis=0)
    acc = tl.zeros([ROWS, BATCH], dtype=values.dtype.element_ty)
    acc_tangent = tl.zeros([ROWS, BATCH], dtype=values.dtype.element_ty)
    step = 0
    while step < longest:
        for ahead in tl.static_range(UNROLL):
            at = start + (step + ahead)
            here = at < end
            weight = tl.load(values + at, mask=here, other=0.0)
            column = tl.load(col + at, mask=here, other=0)
            place = places(source, column, row_stride, samples, sample_stride)
            # entries beyond the end of a row are not multiplied by zero but not read: a state may be infinite
            mask = here[:, None] & inside[None, :]
            acc += weight[:, None] * tl.load(place, mask=mask, other=0.0)
            if TANGENT:
                acc_tangent += weight[:, None] * tl.load(place + tangent, mask=mask, other=0.0)
        step += UNROLL
    return acc, acc_tangent


@triton.jit
def dense_sums(
    position, samples, inside, weights, columns, count, depth, source, row_stride, sample_stride, tangent,
    TANGENT: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As sparse_sums, by matrix instructions over `weights` [positions, depth], whose columns are the `count` used ones."""
    acc = tl.zeros([ROWS, BATCH], dtype=weights.dtype.element_ty)
    acc_tangent = tl.zeros([ROWS, BATCH], dtype=weights.dtype.element_ty)
    # the loads of the next two steps are on their way during the products of one; longer steps run out of registers
    for step in tl.range(0, count, DEPTH, num_stages=3):
        k = step + tl.arange(0, DEPTH)
        here = k < count
        weight = tl.load(weights + position.to(tl.int64)[:, None] * depth + k[None, :])  # padded with zeros
        column = tl.load(columns + k, mask=here, other=0)
        place = places(source, column, row_stride, samples, sample_stride)
        mask = here[:, None] & inside[None, :]
        read = tl.load(place, mask=mask, other=0.0)
        acc = tl.dot(weight, read, acc, input_precision=PRECISION, out_dtype=weights.dtype.element_ty)
        if TANGENT:
            read = tl.load(place + tangent, mask=mask, other=0.0)
            acc_tangent = tl.dot(
                weight, read, acc_tangent, input_precision=PRECISION, out_dtype=weights.dtype.element_ty
            )
    return acc, acc_tangent


@triton.jit
def sums(
    position, row, live, samples, inside, row_ptr, col, values, count, depth, source, row_stride, sample_stride, tangent,
    TANGENT: tl.constexpr, DENSE: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, UNROLL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W source by the matrix's form: with DENSE, `values` are the compacted weights, `col` the columns used, and UNROLL the
    columns of a step."""
    if DENSE:
        acc, acc_tangent = dense_sums(
            position, samples, inside, values, col, count, depth, source, row_stride, sample_stride, tangent,
            TANGENT, ROWS, BATCH, UNROLL, PRECISION,
        )  # fmt: skip
    else:
        acc, acc_tangent = sparse_sums(
            row, live, samples, inside, row_ptr, col, values, source, row_stride, sample_stride, tangent,
            TANGENT, ROWS, BATCH, UNROLL,
        )  # fmt: skip
    return acc, acc_tangent


@triton.jit
def inner_products(
    entry_row, entry_col, n_entries, entry_tiles, left, left_row, left_sample, right, right_row, right_sample, batch,
    padded, chunk, left_tangent, right_tangent, out, out_split, TANGENT: tl.constexpr, ADD: tl.constexpr,
    ENTRIES: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """out[split][entry] = sum over the split's samples of left[row] right[column], at the entries of a pattern: the
    gradient of a matrix's values. A split is `chunk` samples, a multiple of BATCH; every lane of a tile sums up its samples
    in order, then the lanes are summed. Samples from `batch` to `padded` may be read but do not count."""
    entry = (tl.program_id(0) % entry_tiles) * ENTRIES + tl.arange(0, ENTRIES)
    split = tl.program_id(0) // entry_tiles
    live = entry < n_entries
    row = tl.load(entry_row + entry, mask=live, other=0)
    column = tl.load(entry_col + entry, mask=live, other=0)
    acc = tl.zeros([ENTRIES, BATCH], dtype=left.dtype.element_ty)
    step = split * chunk
    last = tl.minimum(step + chunk, batch)
    while step < last:
        samples = step + tl.arange(0, BATCH)
        mask = live[:, None] & (samples < padded)[None, :]
        x = places(left, row, left_row, samples, left_sample)
        y = places(right, column, right_row, samples, right_sample)
        term = tl.load(x, mask=mask, other=0.0) * tl.load(y, mask=mask, other=0.0)
        if TANGENT:
            term += tl.load(x + left_tangent, mask=mask, other=0.0) * tl.load(y + right_tangent, mask=mask, other=0.0)
        acc += tl.where((samples < batch)[None, :], term, 0.0)
        step += BATCH
    place = out + split.to(tl.int64) * out_split + entry
    total = tl.sum(acc, axis=1)
    if ADD:
        total += tl.load(place, mask=live, other=0.0)
    tl.store(place, total, mask=live)


@triton.jit
def outer_products(
    rows, n_rows, row_tiles, columns, n_columns, column_tiles, entries, width, left, left_row, left_sample, right,
    right_row, right_sample, batch, padded, chunk, left_tangent, right_tangent, out, out_split,
    TANGENT: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As inner_products, by matrix instructions: all products of some used rows and columns, of which those are stored that
    are in the pattern. entries [.., width]: the entry of a used row and column, -1 where there is none."""
    i = (tl.program_id(0) % row_tiles) * ROWS + tl.arange(0, ROWS)
    rest = tl.program_id(0) // row_tiles
    j = (rest % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    split = rest // column_tiles
    row = tl.load(rows + i, mask=i < n_rows, other=0)
    column = tl.load(columns + j, mask=j < n_columns, other=0)
    acc = tl.zeros([ROWS, COLUMNS], dtype=left.dtype.element_ty)
    step = split * chunk
    last = tl.minimum(step + chunk, batch)
    while step < last:
        samples = step + tl.arange(0, BATCH)
        counts = (samples < batch)[None, :]
        mask_x = (i < n_rows)[:, None] & (samples < padded)[None, :]
        mask_y = (j < n_columns)[:, None] & (samples < padded)[None, :]
        place_x = places(left, row, left_row, samples, left_sample)
        place_y = places(right, column, right_row, samples, right_sample)
        x = tl.where(counts, tl.load(place_x, mask=mask_x, other=0.0), 0.0)
        y = tl.where(counts, tl.load(place_y, mask=mask_y, other=0.0), 0.0)
        acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION, out_dtype=left.dtype.element_ty)
        if TANGENT:
            x = tl.where(counts, tl.load(place_x + left_tangent, mask=mask_x, other=0.0), 0.0)
            y = tl.where(counts, tl.load(place_y + right_tangent, mask=mask_y, other=0.0), 0.0)
            acc = tl.dot(x, tl.trans(y), acc, input_precision=PRECISION, out_dtype=left.dtype.element_ty)
        step += BATCH
    entry = tl.load(entries + i.to(tl.int64)[:, None] * width + j[None, :])
    place = out + split.to(tl.int64) * out_split + entry
    if ADD:
        acc += tl.load(place, mask=entry >= 0, other=0.0)
    tl.store(place, acc, mask=entry >= 0)
