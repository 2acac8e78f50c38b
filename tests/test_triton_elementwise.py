"""The triton kernels' activations, slopes and curvatures against the package's table in double precision."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_cases import DEVICE, F32, F64

from sparseflow_kernels.activations import ACTIVATIONS
from sparseflow_kernels.engines.triton.elementwise import activate

PARAMS = {"softplus": [(1.0, 20.0), (2.5, 3.0)], "elu": [(1.0,), (1.67,)]}
CASES = [(name, params) for name in ACTIVATIONS for params in PARAMS.get(name, [()])]


@triton.jit
def _activate(
    z, h, slope, curvature, n, ACTIVATION: tl.constexpr, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr
):
    at = tl.program_id(0) * N + tl.arange(0, N)
    value, first, second = activate(tl.load(z + at, mask=at < n, other=0.0), ACTIVATION, A, B)
    tl.store(h + at, value, mask=at < n)
    tl.store(slope + at, first, mask=at < n)
    tl.store(curvature + at, second, mask=at < n)


def run(z, name, params):
    a, b = (*params, 1.0, 1.0)[:2]
    out = [torch.empty_like(z) for _ in range(3)]
    grid = (triton.cdiv(len(z), 1024),)
    _activate[grid](z, *out, len(z), ACTIVATION=ACTIVATIONS[name].number, A=a, B=b, N=1024)
    return out


def points(dtype):
    sizes = torch.logspace(-12, 1.3, 1500, dtype=F64)
    z = torch.cat([torch.linspace(-25, 25, 2001, dtype=F64), sizes, -sizes, torch.tensor([0.0, 60.0, -60.0, 90.0, -90.0])])
    return z.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name,params", CASES)
def test_values_slopes_and_curvatures(name, params, dtype):
    z, rule = points(dtype), ACTIVATIONS[name]
    if name == "softplus":
        z = z[(z * params[0] - params[1]).abs() > 1e-4]  # which side of the threshold it is depends on the rounding
    parts = zip(("value", "slope", "curvature"), run(z, name, params), (rule.value, rule.first, rule.second))
    for part, got, function in parts:
        want = function(z.double(), *params)
        if name == "softplus" and part == "value":  # torch's own loses digits of small results
            x = z.double() * params[0]
            want = torch.where(x > params[1], z.double(), torch.log1p(torch.exp(x)) / params[0])
        if name == "gelu" and part == "value":  # so does torch's gelu
            want = 0.5 * z.double() * torch.special.erfc(-z.double() / 2**0.5)
        # small numbers keep their digits, but for differences of larger ones, in torch as here
        small = part == "curvature" or dtype == F64 or name == "sin" or (part == "slope" and name in ("tanh", "silu", "gelu"))
        error = ((got.double() - want) / want.abs().clamp(min=1.0 if small else 2.0**-100)).abs().max().item()
        # beta z is rounded, in torch as here; so is the square in the density's exponent
        ulps = 100 if params == (2.5, 3.0) or name == "gelu" else 12 if part == "curvature" else 6
        bound = 1e-14 if dtype == F64 else ulps * 2.0**-24
        assert error <= bound, f"{part}: {error:.3e}"


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name,params", CASES)
def test_extremes_and_not_a_number(name, params, dtype):
    big = 1e30 if dtype == F32 else 1e200
    z = torch.tensor([torch.nan, torch.inf, -torch.inf, big, -big, 1000.0, -1000.0], dtype=dtype, device=DEVICE)
    value, slope, _ = run(z, name, params)
    assert value[0].isnan()
    if name in ("tanh", "sigmoid", "softplus", "relu", "elu", "identity"):
        rule = ACTIVATIONS[name]
        torch.testing.assert_close(value[1:], rule.value(z[1:], *params))
        torch.testing.assert_close(slope[1:], rule.first(z[1:], *params))
