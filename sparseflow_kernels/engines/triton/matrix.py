"""A sparse matrix by itself, for a layer that is used apart from a compiled field (`SparseLinear`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...field import Pattern
from . import forms, kernels
from .launching import ceil_div, interpreted
from .operator import Operator, WeightGradient

SPLITS = 16  # places the samples of a weight gradient are summed up in, at most


class TritonMatrix:
    """Products of one pattern, on one device, with values that are given at each call. float32 and float64; batches are
    [batch, features] with any strides. All results are repeatable bit for bit.

    form: "auto", "sparse" or "dense" (`forms.choose_form`); None reads SPARSEFLOW_TRITON_FORM.

    Raises ValueError for tensors of another shape, dtype or device.
    """

    def __init__(self, pattern: Pattern, device: torch.device | str, form: str | None = None) -> None:
        self.pattern, self.device, self.form = pattern, torch.device(device), form
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._operators: dict[tuple[torch.dtype, bool], Operator] = {}
        self._gradients: dict[torch.dtype, WeightGradient] = {}

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W' + bias: x [batch, in], values [nnz], bias [out] or None -> [batch, out]."""
        self._check(x=(x, (None, self.pattern.shape[1])), values=(values, (self.pattern.nnz,)))
        if bias is not None:
            self._check(values=(values, (self.pattern.nnz,)), bias=(bias, (self.pattern.shape[0],)))
        return self._product(x, values, bias, transposed=False)

    def backward_input(self, grad: Tensor, values: Tensor) -> Tensor:
        """grad W: grad [batch, out], values [nnz] -> [batch, in]."""
        self._check(grad=(grad, (None, self.pattern.shape[0])), values=(values, (self.pattern.nnz,)))
        return self._product(grad, values, None, transposed=True)

    def backward_values(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient of the values: grad [batch, out], x [batch, in] -> [nnz], sums over the batch of grad times x."""
        pattern = self.pattern
        self._check(grad=(grad, (None, pattern.shape[0])), x=(x, (len(grad), pattern.shape[1])))
        batch, nnz = len(grad), pattern.nnz
        if batch == 0 or nnz == 0:
            return grad.new_zeros(nnz)
        if grad.dtype not in self._gradients:
            form = forms.choose_form(pattern, grad.dtype, self.form)
            self._gradients[grad.dtype] = WeightGradient(pattern, form.name == "dense", self.device, grad.dtype)
        chunk = forms.chunk(batch, SPLITS, interpreted())
        splits = grad.new_empty(ceil_div(batch, chunk), nnz)
        left, right = ((part.detach(), part.stride(1), part.stride(0), 0) for part in (grad, x))
        with self._guard():
            self._gradients[grad.dtype].launch(left, right, batch, batch, chunk, splits, nnz)
            return splits[0] if len(splits) == 1 else splits.sum(0)

    def _product(self, x: Tensor, values: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        operator = self._operator(x.dtype, transposed)
        out = x.new_empty(len(x), operator.rows)
        if out.numel() == 0:
            return out
        x, values = x.detach(), values.detach()
        with self._guard():
            operator.launch(
                kernels.product, len(x), (x, x.stride(1), x.stride(0), 0),
                (out, 1, operator.rows, 0, bias, *(None, None, 0), *(None, 0), *(None, None, 0)),
                values=operator.packed(values), SECOND=False,
            )  # fmt: skip
        return out

    def _operator(self, dtype: torch.dtype, transposed: bool) -> Operator:
        key = (dtype, transposed)
        if key not in self._operators:
            form = forms.choose_form(self.pattern, dtype, self.form)
            self._operators[key] = Operator(self.pattern, form, self.device, dtype, transposed, fixed=False)
        return self._operators[key]

    def _guard(self):
        return torch.cuda.device(self.device if self.device.type == "cuda" else -1)

    def _check(self, **tensors: tuple[Tensor, tuple[int | None, ...]]) -> None:
        """The kernels read raw memory: nothing unchecked gets past this line."""
        dtype = next(iter(tensors.values()))[0].dtype
        if dtype not in forms.PRECISION:
            raise ValueError(f"the triton kernels compute in float32 and float64, not {dtype}")
        for name, (tensor, shape) in tensors.items():
            fits = tensor.dim() == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape))
            if not fits or tensor.dtype != dtype or tensor.device != self.device:
                wanted = ", ".join("batch" if n is None else str(n) for n in shape)
                raise ValueError(
                    f"{name} must be [{wanted}], {dtype} on {self.device}, "
                    f"not {list(tensor.shape)}, {tensor.dtype} on {tensor.device}"
                )
