"""Vector math of the CPU kernels over all magnitudes of floats, for every instruction set this machine can run.

float32 is held against float64 formulas, measured in units of the last place (ULP) of the exact value; float64 against
torch's own float64.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparseflow_kernels.activations import ACTIVATIONS

_cpu = pytest.importorskip("sparseflow_kernels._cpu")
ISAS = _cpu.isas()
NAMES = list(ACTIVATIONS)
STRIDE, DENSE_STRIDE = 4093, 257  # primes: every 4093rd of all float32 patterns, every 257th between 2^-14 and 2^8


@pytest.fixture(scope="module")
def sweep() -> np.ndarray:
    """float32: patterns over all exponents, densely where the functions bend, and the neighbours of special values."""
    return make_sweep()


def make_sweep() -> np.ndarray:
    patterns = np.arange(0, 1 << 32, STRIDE, dtype=np.uint64).astype(np.uint32)
    low, high = (np.float32(x).view(np.uint32) for x in (2.0**-14, 2.0**8))
    dense = np.arange(low, high, DENSE_STRIDE, dtype=np.uint32)
    special = np.array(
        [0.0, 1e-45, 1.17549435e-38, 1e-6, 0.5, 1.0, 2.0, 8.66, 9.01, 9.02, 20.0, 87.3, 88.0, 88.72, 89.0, 103.97,
         104.0, 105.0, 8192.0, 3.4028235e38, *(2.0**k for k in range(-149, 128)), *(np.pi / 2 * k for k in range(1, 64))],
        dtype=np.float32,
    ).view(np.uint32)  # fmt: skip
    near = (special[:, None].astype(np.int64) + np.arange(-40, 41)).ravel()
    near = near[(near >= 0) & (near < 0x7F800000)].astype(np.uint32)
    positive = np.concatenate([dense, near])
    x = np.concatenate([patterns, positive, positive | np.uint32(1 << 31)]).view(np.float32)
    return x[np.isfinite(x)]


def native32(name: str, z: np.ndarray, isa: str, a: float = 1.0, b: float = 20.0) -> tuple[np.ndarray, np.ndarray]:
    return _cpu.activation_f32(ACTIVATIONS[name].number, a, b, z, isa)


_known: dict = {}  # what `exact` said of the sweep, the same for every instruction set


def exact(name: str, z: np.ndarray, *params: float) -> tuple[np.ndarray, np.ndarray]:
    """(value, slope) in float64 by formulas that keep their relative accuracy in the tails."""
    key = (name, params, id(z))
    if key not in _known:
        _known.clear()
        _known[key] = (z, _exact(name, z, *params))  # holding z keeps its id its own
    return _known[key][1]


def _exact(name: str, z: np.ndarray, *params: float) -> tuple[np.ndarray, np.ndarray]:
    x = torch.from_numpy(z.astype(np.float64))
    rule = ACTIVATIONS[name]
    if name == "softplus":
        beta, threshold = params or (1.0, 20.0)
        value = torch.where(beta * x > threshold, x, torch.log1p(torch.exp((beta * x).clamp(max=700.0))) / beta)
        return value.numpy(), rule.first(x, beta, threshold).numpy()
    if name == "tanh":
        return torch.tanh(x).numpy(), (1.0 / torch.cosh(x.clamp(-300, 300)).square()).numpy()
    if name == "gelu":
        return (0.5 * x * torch.special.erfc(-(0.5**0.5) * x)).numpy(), rule.first(x).numpy()
    return rule.value(x, *(params or rule.defaults)).numpy(), rule.first(x, *(params or rule.defaults)).numpy()


def ulps(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """|found - wanted| in units of the last place of wanted, as float32. Where wanted overflows, so must found."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = wanted.astype(np.float32)
        unit = np.spacing(np.abs(rounded)).astype(np.float64)
        error = np.abs(found.astype(np.float64) - wanted) / unit
        return np.where(np.isinf(rounded), np.where(found == rounded, 0.0, np.inf), error)


def worst(name: str, error: np.ndarray, z: np.ndarray) -> float:
    at = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    print(f"{name}: {error[at]:.3g} at {z[at]!r}")
    return float(error[at])


# name -> largest error of the value in ULP, and where that is asked for
VALUE_ULPS = {
    "identity": (0, None), "relu": (0, None), "square": (1, None), "cube": (2, None),
    "tanh": (5, None), "softplus": (5, None), "elu": (8, None),
    # below, sigmoid is denormal or zero, as torch's is
    "sigmoid": (5, lambda x: x > -87.0), "silu": (8, lambda x: x > -87.0),
    "sin": (4, lambda x: np.abs(x) <= 8192.0),
    "gelu": (12, lambda x: x > -5.0),  # below, the rounding of x^2 is an error of so many ULP behind an exponential
}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_value_ulps(name, isa, sweep):
    limit, where = VALUE_ULPS[name]
    found, _ = native32(name, sweep, isa)
    wanted, _ = exact(name, sweep)
    error = ulps(found, wanted)
    if name == "sin":  # an error of 1e-7 is fine next to the zeros, where an ULP is tiny
        error[np.abs(found - wanted) <= 1e-7] = 0.0
    if where is not None:
        outside = ~where(sweep)
        assert np.abs(found[outside] - wanted[outside]).max() <= 1e-6
        error[outside] = 0.0
    assert worst(f"{name} {isa}", error, sweep) <= limit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_slope_error(name, isa, sweep):
    """Absolute error 3e-7 for bounded slopes (tanh's, 1 - h^2, doubles the 5 ULP that h may be off); the slopes of sigmoid and softplus keep their relative accuracy too."""
    _, found = native32(name, sweep, isa)
    _, wanted = exact(name, sweep)
    if name in ("identity", "relu", "square", "cube"):
        assert worst(f"{name}' {isa} ulp", ulps(found, wanted), sweep) <= 2
        return
    assert worst(f"{name}' {isa} absolute", np.abs(found - wanted), sweep) <= (6e-7 if name == "tanh" else 3e-7)
    if name in ("sigmoid", "softplus"):
        normal = wanted > 1.2e-38
        assert worst(f"{name}' {isa} ulp", np.where(normal, ulps(found, wanted), 0.0), sweep) <= 8


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "name,params", [("softplus", (2.5, 11.0)), ("softplus", (0.25, 30.0)), ("elu", (1.67,)), ("elu", (0.3,))]
)
def test_parameters(name, params, isa, sweep):
    a, b = (*params, 1.0)[:2]
    a, b = float(np.float32(a)), float(np.float32(b))
    found, slope = native32(name, sweep, isa, a, b)
    wanted, wanted_slope = exact(name, sweep, *(a, b)[: len(params)])
    beta_z = np.abs(sweep * np.float64(a)) if name == "softplus" else np.zeros_like(sweep, dtype=np.float64)
    if name == "softplus":  # rounding of beta * z may fall on the other side of the threshold
        clear = np.abs(sweep * np.float64(a) - b) > 1e-4
    else:
        clear = slice(None)
    found, slope, wanted, wanted_slope, beta_z, z = (
        part[clear] for part in (found, slope, wanted, wanted_slope, beta_z, sweep)
    )
    # a rounded product beta * z is an error of that many ULP behind an exponential
    assert worst(f"{name}{params} {isa}", ulps(found, wanted) / (8 + np.minimum(beta_z, 110.0)), z) <= 1
    assert worst(f"{name}'{params} {isa}", np.abs(slope - wanted_slope), z) <= 5e-7


@pytest.mark.parametrize("isa", ISAS)
def test_softplus_is_the_identity_above_its_threshold(isa):
    z = np.nextafter(np.float32(20.0), np.float32(30.0)) + np.linspace(0, 1e4, 1001, dtype=np.float32)
    value, slope = native32("softplus", z, isa)
    assert np.array_equal(value, z) and np.array_equal(slope, np.ones_like(z))


LIMITS = {  # value and slope at +inf, value and slope at -inf; None: not asked for (torch's own are NaN)
    "identity": (np.inf, 1.0, -np.inf, 1.0), "tanh": (1.0, 0.0, -1.0, 0.0), "sigmoid": (1.0, 0.0, 0.0, 0.0),
    "softplus": (np.inf, 1.0, 0.0, 0.0), "relu": (np.inf, 1.0, 0.0, 0.0), "elu": (np.inf, 1.0, -1.0, 0.0),
    "silu": (np.inf, None, None, None), "sin": (np.nan, np.nan, np.nan, np.nan),
    "square": (np.inf, np.inf, np.inf, -np.inf), "cube": (np.inf, np.inf, -np.inf, np.inf),
    "gelu": (np.inf, 1.0, None, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("native", ["activation_f32", "activation_f64"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_nan_propagates_and_infinity_gives_the_limit(name, isa, native):
    run, dtype = getattr(_cpu, native), np.float32 if native.endswith("f32") else np.float64
    number = ACTIVATIONS[name].number
    for lanes in (1, 5, 16, 37):  # whole vectors and the rest
        value, slope = run(number, 1.0, 20.0, np.full(lanes, np.nan, dtype), isa)
        assert np.isnan(value).all()
        # a step function's slope may stay what it is at NaN: the value carries it
        assert name in ("identity", "relu") or np.isnan(slope).all()
    with np.errstate(invalid="ignore"):
        payloads = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32).astype(dtype)
    assert np.isnan(run(number, 1.0, 20.0, payloads, isa)[0]).all()

    value, slope = run(number, 1.0, 20.0, np.array([np.inf, -np.inf], dtype), isa)
    for got, wanted in zip((value[0], slope[0], value[1], slope[1]), LIMITS[name]):
        if wanted is not None:
            assert got == pytest.approx(wanted, abs=3e-7, nan_ok=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_rest_of_a_vector_has_the_same_bits(name, isa):
    z = np.linspace(-30, 30, 67, dtype=np.float32)
    whole = native32(name, z, isa)
    for start, stop in ((0, 1), (1, 4), (3, 20), (5, 67), (66, 67)):
        part = native32(name, z[start:stop].copy(), isa)
        assert np.array_equal(part[0], whole[0][start:stop]) and np.array_equal(part[1], whole[1][start:stop])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus", "elu", "silu"])
def test_monotone_within_rounding(name, isa):
    """Neighbouring floats may not jump back by more than the error bound: no seams between branches."""
    for centre in (-87.4, -20.0, -9.02, -0.35, 0.0, 0.35, 9.02, 20.0):
        spacing = np.spacing(np.float32(max(abs(centre), 1e-3)))
        z = np.float32(centre) + np.arange(-3000, 3000, dtype=np.float32) * spacing
        value = native32(name, z, isa)[0].astype(np.float64)
        back = np.maximum(value[:-1] - value[1:], 0.0)
        if name == "silu" and centre < -1.0:  # decreasing there
            back = np.maximum(value[1:] - value[:-1], 0.0)
        assert (back <= 8 * np.spacing(np.abs(value[:-1]).astype(np.float32))).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_float64(name, isa):
    generator = np.random.default_rng(0)
    z = np.concatenate([
        np.linspace(-40, 40, 200_001), generator.standard_normal(50_000), [0.0, -0.0, 1e-300, -1e-300, 5e-324],
        np.exp(generator.uniform(np.log(1e-12), np.log(700.0), 100_000)), -np.exp(generator.uniform(-27, 6.5, 100_000)),
    ])  # fmt: skip
    if name == "softplus":
        z = z[np.abs(z - 20.0) > 1e-9]
    value, slope = _cpu.activation_f64(ACTIVATIONS[name].number, 1.0, 20.0, z, isa)
    wanted, wanted_slope = exact(name, z)
    scale, slope_scale = np.abs(wanted) + 1e-300, np.abs(wanted_slope) + 1e-300
    if name == "sin":
        scale = slope_scale = 1.0
    if name in ("tanh", "elu", "silu", "gelu"):  # slopes are differences there
        slope_scale = np.maximum(slope_scale, 1.0)
    assert worst(f"{name} {isa}", np.abs(value - wanted) / scale, z) <= 1e-14
    assert worst(f"{name}' {isa}", np.abs(slope - wanted_slope) / slope_scale, z) <= 1e-14


@pytest.mark.parametrize("isa", ISAS)
def test_sin_float64_far_out(isa):
    z = np.concatenate([np.linspace(-(2.0**20), 2.0**20, 100_001), [2.0**40, -(2.0**60), 1e300]])
    value, slope = _cpu.activation_f64(ACTIVATIONS["sin"].number, 1.0, 1.0, z, isa)
    assert np.abs(value - np.sin(z)).max() <= 1e-14 and np.abs(slope - np.cos(z)).max() <= 1e-14


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown id"):
        _cpu.activation_f32(len(NAMES), 1.0, 1.0, np.zeros(3, np.float32), "")
    with pytest.raises(ValueError, match="no kernels for 'mmx'"):
        _cpu.activation_f32(0, 1.0, 1.0, np.zeros(3, np.float32), "mmx")
