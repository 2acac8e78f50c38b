"""The products of a sparse linear layer:

sparseflow::linear, sparseflow::spmm_transposed, sparseflow::sddmm
"""

from __future__ import annotations

import math

from torch import Tensor

from .bilinear import Kind, differentiable
from .packed import Where, packed_of, rows_of

# x [..., in], grad [..., out], values [nnz], bias [out]


def _flat(x: Tensor) -> Tensor:
    """[..., features] -> [batch, features]."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _run_linear(x: Tensor, values: Tensor, bias: Tensor | None, where: Where) -> Tensor:
    """x W' + bias: [..., out]."""
    matrix = packed_of(where).matrix(where.backend, x.device)
    return matrix.forward(_flat(x), values, bias).view(*x.shape[:-1], where.shape[0])


def _run_transposed(grad: Tensor, values: Tensor, where: Where) -> Tensor:
    """grad W: [..., in]."""
    matrix = packed_of(where).matrix(where.backend, grad.device)
    return matrix.backward_input(_flat(grad), values).view(*grad.shape[:-1], where.in_features)


def _run_sddmm(grad: Tensor, x: Tensor, where: Where) -> Tensor:
    """grad' x at the entries of the pattern, summed over all other axes: [nnz]."""
    matrix = packed_of(where).matrix(where.backend, x.device)
    return matrix.backward_values(_flat(grad), _flat(x))


def _by_sample(grad: Tensor, x: Tensor, dims: tuple, where: Where) -> Tensor | None:
    """Gradients by the sample have nothing to sum up."""
    if math.prod((x if dims[1] is not None else grad).shape[1:-1]) != 1:
        return None
    row, col = rows_of(where.row_ptr, where.col), where.col
    items = (grad if dims[0] is not None else x).shape[0]
    return (grad.index_select(-1, row) * x.index_select(-1, col)).reshape(items, -1)


product = differentiable(Kind(
    name="SparseLinear", where=Where, linear=_run_linear, transposed=_run_transposed, gradient=_run_sddmm,
    names=("linear", "spmm_transposed", "sddmm"), schema="Tensor row_ptr, Tensor col, int in_features, str backend",
    of_bias=lambda grad: _flat(grad).sum(0),
    with_bias=lambda y, bias: y + bias,
    shape_of=lambda x, where: (*x.shape[:-1], where.shape[0]),
    shape_back=lambda grad, where: (*grad.shape[:-1], where.in_features),
    by_sample=_by_sample,
))  # fmt: skip
