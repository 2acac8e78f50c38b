"""Who multiplies: the native products of one layer, packed once for its pattern, on the CPU or by Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..field import Pattern
from ..threads import get_num_threads

BACKENDS = ("auto", "cpu", "triton", "torch")
CPU_CLASSES = {torch.float32: "SparseLinearF32", torch.float64: "SparseLinearF64"}
REMEDY = 'or ask for torch\'s own product with backend="torch"'


def native(layer: str) -> Any:
    """The CPU extension. layer: the name of the class that asks."""
    try:
        from .. import _cpu
    except ImportError as error:
        raise RuntimeError(
            f"{layer}: the CPU extension is not built ({error}); install the package with pip, which compiles it, {REMEDY}"
        ) from error
    return _cpu


class CpuMatrix:
    """The native products of one layer; the same calls as `engines.triton.matrix.TritonMatrix`."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._native: dict[torch.dtype, Any] = {}

    def _of(self, dtype: torch.dtype) -> Any:
        if dtype not in self._native:
            _cpu = native("SparseLinear")
            rows, cols = self._pattern.shape
            if rows + cols + 2 > _cpu.MOST_ROWS or self._pattern.nnz > _cpu.MOST_ENTRIES:
                raise ValueError(
                    f"SparseLinear: {cols} and {rows} features with {self._pattern.nnz} weights are more than 32-bit "
                    f"offsets reach ({_cpu.MOST_ROWS} features, {_cpu.MOST_ENTRIES} weights); prune it, {REMEDY}"
                )
            row_ptr, col = (index.to(torch.int32).numpy() for index in (self._pattern.row_ptr, self._pattern.col))
            self._native[dtype] = getattr(_cpu, CPU_CLASSES[dtype])(rows, cols, row_ptr, col)
        return self._native[dtype]

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return self._multiply(False, x, values, bias)

    def backward_input(self, grad: Tensor, values: Tensor) -> Tensor:
        return self._multiply(True, grad, values, None)

    def _multiply(self, transposed: bool, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        native = self._of(x.dtype)
        x, values, bias = x.contiguous(), values.contiguous(), None if bias is None else bias.contiguous()
        out = x.new_empty(len(x), self._pattern.shape[1 if transposed else 0])
        native.multiply(
            transposed, values.data_ptr(), x.data_ptr(), len(x), 0 if bias is None else bias.data_ptr(),
            get_num_threads(), out.data_ptr(),
        )  # fmt: skip
        return out

    def backward_values(self, grad: Tensor, x: Tensor) -> Tensor:
        grad, x = grad.contiguous(), x.contiguous()
        sums = x.new_empty(self._pattern.nnz)
        self._of(x.dtype).gradient(grad.data_ptr(), x.data_ptr(), len(x), get_num_threads(), sums.data_ptr())
        return sums


def _triton_matrix(pattern: Pattern, device: torch.device) -> Any:
    try:
        from ..engines.triton.matrix import TritonMatrix
        from ..engines.triton.operator import interpreted
    except ImportError as error:
        raise RuntimeError(
            f"SparseLinear: tensors on {device} need the package triton, which cannot be imported ({error}); install "
            f'it with "pip install triton", {REMEDY}'
        ) from error
    if device.type != "cuda" and not interpreted():
        raise RuntimeError(
            f'SparseLinear: backend="triton" needs tensors on a CUDA device, not on {device}: call .cuda(), {REMEDY} '
            "(on the CPU it runs in Triton's interpreter, for tests, where TRITON_INTERPRET=1 is set)"
        )
    return TritonMatrix(pattern, device)


def rows_of(row_ptr: Tensor, col: Tensor) -> Tensor:
    """int64 [nnz]: the row of every entry."""
    return torch.repeat_interleave(row_ptr.diff(), output_size=col.shape[0])


class Where(NamedTuple):
    """The arguments that say which layer an operation belongs to."""

    row_ptr: Tensor
    col: Tensor
    in_features: int
    backend: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_ptr.shape[0] - 1, self.in_features


class Packed:
    """What is made of the index tensors of one layer: its pattern, and what the engines pack of it."""

    def __init__(self, where: Any) -> None:
        self.pattern = Pattern(where.shape, where.row_ptr.cpu(), where.col.cpu())
        self.stamp = _stamp(where.row_ptr, where.col)
        self.kept: dict[tuple, Any] = {}

    def matrix(self, backend: str, device: torch.device) -> Any:
        """Raises RuntimeError where the backend cannot run here."""
        found = self.kept.get((backend, device))
        if found is None:
            found = self.kept[backend, device] = self._make(backend, device)
        return found

    def _make(self, backend: str, device: torch.device) -> Any:
        if backend == "triton" or (backend == "auto" and device.type == "cuda"):
            return _triton_matrix(self.pattern, device)
        if device.type == "cpu":
            return CpuMatrix(self.pattern)
        what = "there are kernels for the CPU and for CUDA"
        if backend == "cpu":
            what = 'backend="cpu" needs tensors on the CPU'
        raise RuntimeError(f"SparseLinear: {what}, the tensors are on {device}: call .cpu(), {REMEDY}")


def _stamp(row_ptr: Tensor, col: Tensor) -> tuple:
    """Equal as long as the same index tensors hold the same numbers."""
    if col.is_inference() or row_ptr.is_inference():  # they count no versions
        return row_ptr.data_ptr(), col.data_ptr()
    return row_ptr._version, col._version, col.data_ptr()


_packed = WeakTensorKeyDictionary()  # a layer's row_ptr -> Packed


def packed_of(where: Any) -> Packed:
    """where: a NamedTuple with row_ptr, col and the shape of the pattern."""
    known = _packed.get(where.row_ptr)
    if known is None or known.stamp != _stamp(where.row_ptr, where.col):
        known = _packed[where.row_ptr] = Packed(where)
    return known
