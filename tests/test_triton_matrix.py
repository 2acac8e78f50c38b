"""One sparse matrix on the device against dense torch."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, F32, F64, INTERPRETED

from sparseflow_kernels.engines.triton import forms
from sparseflow_kernels.engines.triton.forms import Tile
from sparseflow_kernels.engines.triton.matrix import TritonMatrix
from sparseflow_kernels.field import Pattern


def case(shape, density, dtype, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pattern = Pattern.from_mask(torch.rand(*shape, generator=generator) < density)
    normal = lambda *size: torch.randn(*size, generator=generator, dtype=F64).to(DEVICE, dtype)  # noqa: E731
    return pattern, normal(pattern.nnz), normal(batch, shape[1]), normal(shape[0]), normal(batch, shape[0])


def check(matrix, pattern, values, x, bias, grad, bound):
    weight, scale = pattern.dense(values.double()), max(1, pattern.shape[1]) ** 0.5
    x64, grad64 = x.double(), grad.double()
    row, col = pattern.row.to(DEVICE), pattern.col.to(DEVICE)

    def near(got, want):
        assert got.dtype == x.dtype and got.shape == want.shape and got.device == x.device
        if want.numel():
            assert (got.double() - want).abs().max() <= bound * scale * want.abs().max().clamp(min=1.0)

    near(matrix.forward(x, values, bias), x64 @ weight.T + bias.double())
    near(matrix.forward(x, values), x64 @ weight.T)
    near(matrix.backward_input(grad, values), grad64 @ weight)
    near(matrix.backward_values(grad, x), (grad64.T @ x64)[row, col])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("density", [0.0, 0.25, 1.0])
def test_products_and_gradients(density, form, dtype):
    pattern, *rest = case((19, 23), density, dtype, 37)
    check(TritonMatrix(pattern, DEVICE, form), pattern, *rest, {F32: 1e-6, F64: 1e-14}[dtype])


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 32, 33])
def test_batches_around_a_tile(batch):
    pattern, *rest = case((7, 5), 0.5, F64, batch, seed=batch)
    check(TritonMatrix(pattern, DEVICE), pattern, *rest, 1e-14)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_narrow_shapes(shape):
    pattern, *rest = case(shape, 0.7, F64, 6)
    check(TritonMatrix(pattern, DEVICE), pattern, *rest, 1e-14)


def test_empty_rows_and_columns_and_any_strides():
    mask = torch.zeros(9, 8, dtype=torch.bool)
    mask[2, 3] = mask[2, 7] = mask[8, 0] = True
    pattern = Pattern.from_mask(mask)
    _, _, x, bias, grad = case((9, 8), 1.0, F64, 13)
    values = torch.randn(3, dtype=F64).to(DEVICE)
    matrix = TritonMatrix(pattern, DEVICE)
    check(matrix, pattern, values, x, bias, grad, 1e-14)
    minor = x.T.contiguous().T  # batch-minor
    wide = torch.zeros(26, 16, dtype=F64, device=DEVICE)
    wide[::2, ::2] = x
    for view in (minor, wide[::2, ::2]):
        torch.testing.assert_close(matrix.forward(view, values, bias), matrix.forward(x, values, bias), rtol=0, atol=0)
        torch.testing.assert_close(matrix.backward_values(grad, view), matrix.backward_values(grad, x), rtol=0, atol=0)


def test_samples_in_several_splits_are_summed_up_in_order(monkeypatch):
    pattern, *rest = case((6, 5), 0.8, F64, 150)
    matrix = TritonMatrix(pattern, DEVICE)
    check(matrix, pattern, *rest, 1e-14)
    _, x, _, grad = rest
    assert torch.equal(matrix.backward_values(grad, x), matrix.backward_values(grad, x))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has tiles of its own")
@pytest.mark.parametrize("tile", [Tile(1, 16, 4, 1), Tile(4, 32, 3, 1)])
def test_bits_do_not_depend_on_the_tile(tile, monkeypatch):
    pattern, values, x, bias, _ = case((11, 9), 0.5, F32, 33)
    want = TritonMatrix(pattern, DEVICE, "sparse").forward(x, values, bias)
    monkeypatch.setitem(forms.INTERPRETED, "sparse", tile)
    assert torch.equal(TritonMatrix(pattern, DEVICE, "sparse").forward(x, values, bias), want)


def test_infinite_states_stay_in_their_rows():
    pattern = Pattern.from_mask(torch.eye(5, dtype=torch.bool))
    x = torch.ones(4, 5, dtype=F64, device=DEVICE)
    x[2, 0] = torch.inf
    out = TritonMatrix(pattern, DEVICE, "sparse").forward(x, torch.ones(5, dtype=F64, device=DEVICE))
    assert torch.equal(out, x)


def test_what_does_not_fit_is_named():
    pattern, values, x, bias, grad = case((4, 3), 1.0, F32, 5)
    matrix = TritonMatrix(pattern, DEVICE)
    for call, name in (
        (lambda: matrix.forward(x[:, :2], values), r"x must be \[batch, 3\]"),
        (lambda: matrix.forward(x, values[:5]), r"values must be \[12\]"),
        (lambda: matrix.forward(x, values.double()), "values must be .*float32.*float64"),
        (lambda: matrix.forward(x, values, bias[:1]), r"bias must be \[4\]"),
        (lambda: matrix.backward_input(x, values), r"grad must be \[batch, 4\]"),
        (lambda: matrix.backward_values(grad, x[:2]), r"x must be \[5, 3\]"),
        (lambda: matrix.forward(x.half(), values), "float32 and float64"),
        (lambda: TritonMatrix(pattern, DEVICE, "blocked").forward(x, values), "'blocked' is not a form"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    assert matrix.forward(x[:0], values).shape == (0, 4)
