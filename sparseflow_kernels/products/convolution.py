"""The products of a sparse convolution of two axes:

sparseflow::convolution, sparseflow::convolution_transposed, sparseflow::convolution_gradient
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..field import Pattern
from ..threads import get_num_threads
from .bilinear import Kind, differentiable
from .packed import REMEDY, native, packed_of

CPU_CLASSES = {torch.float32: "SparseConvolutionF32", torch.float64: "SparseConvolutionF64"}


class Where(NamedTuple):
    """The arguments that say which layer an operation belongs to, and the size of its images. Pairs are (height, width).

    row_ptr, col: the pattern of the weight [out, in / groups * taps].  padding: zeros (above, below, left, right).
    """

    row_ptr: Tensor
    col: Tensor
    in_channels: int
    groups: int
    source: list[int]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    backend: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_ptr.shape[0] - 1, self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def target(self) -> tuple[int, int]:
        """The size of the result's images."""
        return tuple(
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, k, s, d, before, after in zip(
                self.source, self.kernel, self.stride, self.dilation, self.padding[::2], self.padding[1::2]
            )
        )


class CpuConvolution:
    """The native products of one layer for images of one size."""

    def __init__(self, pattern: Pattern, where: Where) -> None:
        taps = where.kernel[0] * where.kernel[1]
        out, inner = pattern.shape
        group = pattern.row // max(1, out // where.groups)
        self.row_ptr, self.col = pattern.row_ptr, pattern.col + group * inner  # columns (channel, tap) of all channels
        self.shape = out, where.in_channels
        before = where.padding[0], where.padding[2]
        self.window = tuple(
            tuple(map(int, pair)) for pair in
            (where.source, where.target, where.kernel, where.stride, before, where.dilation)
        )  # fmt: skip
        self.nnz, self._native = pattern.nnz, {}
        largest = max(out * math.prod(where.target), where.in_channels * math.prod(where.source))
        if largest >= native("SparseConv2d").MOST_ROWS or where.in_channels * taps > 2**31 - 1:
            raise ValueError(
                f"SparseConv2d: images of {list(where.source)} pixels with {where.in_channels} channels in and {out} out "
                f"are more than 32-bit offsets reach ({native('SparseConv2d').MOST_ROWS} pixels of all channels); cut them "
                f"up, {REMEDY}"
            )

    def _of(self, dtype: torch.dtype) -> Any:
        if dtype not in self._native:
            row_ptr, col = (index.to(torch.int32).numpy() for index in (self.row_ptr, self.col))
            self._native[dtype] = getattr(native("SparseConv2d"), CPU_CLASSES[dtype])(*self.shape, row_ptr, col, self.window)
        return self._native[dtype]

    def multiply(self, transposed: bool, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        x, values, bias = x.contiguous(), values.contiguous(), None if bias is None else bias.contiguous()
        out = x.new_empty(len(x), self.shape[1 if transposed else 0], *self.window[0 if transposed else 1])
        if out.numel():
            self._of(x.dtype).multiply(
                transposed, values.data_ptr(), x.data_ptr(), len(x), 0 if bias is None else bias.data_ptr(),
                get_num_threads(), out.data_ptr(),
            )  # fmt: skip
        return out

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        grad, x = grad.contiguous(), x.contiguous()
        sums = x.new_empty(self.nnz)
        self._of(x.dtype).gradient(grad.data_ptr(), x.data_ptr(), len(x), get_num_threads(), sums.data_ptr())
        return sums


def _kernels(where: Where, device: torch.device) -> CpuConvolution:
    if device.type != "cpu":
        raise RuntimeError(
            f"SparseConv2d: there are kernels for the CPU alone, the tensors are on {device}: call .cpu(), {REMEDY}"
        )
    packed = packed_of(where)
    key = where[2:-1] if isinstance(where.source, tuple) else tuple(
        tuple(part) if isinstance(part, list) else part for part in where[2:-1]
    )  # fmt: skip
    found = packed.kept.get(key)
    if found is None:
        if len(packed.kept) >= 8:  # sizes of images used last
            del packed.kept[next(iter(packed.kept))]
        found = packed.kept[key] = CpuConvolution(packed.pattern, where)
    return found


# x [..., in, height, width], grad [..., out, height, width], values [nnz], bias [out]


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _shape_of(x: Tensor, where: Where) -> tuple[int, ...]:
    return (*x.shape[:-3], where.shape[0], *where.target)


def _shape_back(grad: Tensor, where: Where) -> tuple[int, ...]:
    return (*grad.shape[:-3], where.in_channels, *where.source)


def _run_linear(x: Tensor, values: Tensor, bias: Tensor | None, where: Where) -> Tensor:
    return _kernels(where, x.device).multiply(False, _flat(x), values, bias).view(_shape_of(x, where))


def _run_transposed(grad: Tensor, values: Tensor, where: Where) -> Tensor:
    return _kernels(where, grad.device).multiply(True, _flat(grad), values, None).view(_shape_back(grad, where))


def _run_gradient(grad: Tensor, x: Tensor, where: Where) -> Tensor:
    """Summed over all images: [nnz]."""
    return _kernels(where, x.device).gradient(_flat(grad), _flat(x))


product = differentiable(Kind(
    name="SparseConv2d", where=Where, linear=_run_linear, transposed=_run_transposed, gradient=_run_gradient,
    names=("convolution", "convolution_transposed", "convolution_gradient"),
    schema="Tensor row_ptr, Tensor col, int in_channels, int groups, SymInt[] source, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, str backend",
    of_bias=lambda grad: _flat(grad).sum((0, 2, 3)),
    with_bias=lambda y, bias: y + bias[:, None, None],
    shape_of=_shape_of, shape_back=_shape_back,
    by_sample=lambda grad, x, dims, where: None,
))  # fmt: skip
