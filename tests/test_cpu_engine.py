"""The CPU engine's evaluations: against the reference engine, and bit for bit against themselves."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from cpu_cases import Wave, in_a_process_of_its_own, isolated_environment, states, threads  # noqa: F401
from random_fields import random_field

from sparseflow_kernels import divergence
from sparseflow_kernels.activations import ACTIVATIONS
from sparseflow_kernels.divergence import DivergencePlan
from sparseflow_kernels.engines.cpu import CpuEngine
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Activation, LinearShift, SigmoidGate, TimeFunction, VectorField

_cpu = pytest.importorskip("sparseflow_kernels._cpu")
F32, F64 = torch.float32, torch.float64
T = 0.375  # exact in float32
PARAMS = {"softplus": [(1.0, 20.0), (2.5, 3.0)], "elu": [(1.0,), (1.67,)]}


def any_field(seed: int) -> VectorField:
    """Everything a field may have, by chance: depth 0 to 5, unequal widths, empty rows, columns and whole layers, one
    neuron, gates and shifts of every kind on any layer, every activation with parameters."""
    rng = random.Random(seed)
    depth = seed % 6
    dim = rng.choice([1, 2, 3, 6])
    sizes = [dim, *(rng.choice([1, 2, 5, 9, 17, 33]) for _ in range(depth)), dim]
    density = rng.choice([0.02, 0.1, 0.3, 0.6, 1.0])
    field = random_field(sizes, density, seed=seed)
    layers = []
    modulated = rng.choice(["nothing", "output", "all but output", "some"])
    for number, layer in enumerate(field.layers):
        out, last = layer.out_features, number == depth
        generator = torch.Generator().manual_seed(1000 * seed + number)
        normal = lambda: torch.randn(out, generator=generator, dtype=F64)  # noqa: E731
        gated = {"nothing": False, "output": last, "all but output": not last, "some": rng.random() < 0.6}[modulated]
        gate = shift = None
        if gated:
            rows = torch.arange(out).flip(0) + 3
            gate = TimeFunction(Wave(out + 3, seed), rows) if rng.random() < 0.3 else SigmoidGate(normal(), normal())
        if rng.random() < 0.5:
            shift = TimeFunction(Wave(out, seed + 7)) if rng.random() < 0.3 else LinearShift(normal(), normal())
        name = rng.choice(list(ACTIVATIONS))
        activation = Activation() if last else Activation(name, rng.choice(PARAMS.get(name, [()])))
        if name in ("square", "cube") and number:  # powers of powers leave no digits to compare
            activation = Activation("tanh") if not last else activation
        layers.append(replace(layer, gate=gate, shift=shift, activation=activation))
    return VectorField(layers)


def forms(field: VectorField, seed: int = 0) -> dict[str, DivergencePlan]:
    """A plan for every form of the divergence that fits the field's depth, and Hutchinson."""
    patterns = [layer.pattern for layer in field.layers]
    depth = len(patterns) - 1
    found = {"hutchinson": divergence.plan(field, "hutchinson"), "chosen": divergence.plan(field, "exact")}
    if depth == 2:
        limit, divergence.PATH_LIMIT = divergence.PATH_LIMIT, -1
        try:
            found["direct"] = divergence.plan(field, "exact")
        finally:
            divergence.PATH_LIMIT = limit
        assert found["direct"].form.matrix.direct is not None and found["chosen"].form.matrix.direct is None
    if depth == 3:
        form = divergence._plan_paths(patterns, divergence._count_paths(patterns))
        found["paths"] = DivergencePlan("exact", form, {}, "")
    if depth >= 3:
        found["columns"] = DivergencePlan("exact", divergence._plan_columns(patterns)[0], {}, "")
    return found


# ------------------------------------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("seed", range(120))
def test_core_float64_agrees_with_the_reference(seed):
    field = any_field(seed)
    x, noise = states(23, field.dim, seed=seed)
    wanted = ReferenceEngine(field).evaluate(T, x)
    scale = 1e-12 * max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(CpuEngine(field).evaluate(T, x), wanted, rtol=1e-12, atol=scale)
    for name, plan in forms(field).items():
        engine, reference = CpuEngine(field, plan), ReferenceEngine(field, plan)
        dx, trace = engine.evaluate_with_divergence(T, x, noise if plan.kind == "hutchinson" else None)
        dx_wanted, trace_wanted = reference.evaluate_with_divergence(T, x, noise)
        assert dx.shape == x.shape and trace.shape == (len(x),), name
        torch.testing.assert_close(dx, dx_wanted, rtol=1e-12, atol=scale, msg=lambda m: f"{name}: {m}")
        bound = 1e-12 * max(1.0, trace_wanted.abs().max().item())
        torch.testing.assert_close(trace, trace_wanted, rtol=1e-12, atol=bound, msg=lambda m: f"{name}: {m}")


def test_the_random_fields_cover_what_they_should():
    fields = [any_field(seed) for seed in range(120)]
    layers = [layer for field in fields for layer in field.layers]
    assert {len(field.layers) for field in fields} == set(range(1, 7))
    assert {layer.activation.name for layer in layers} == set(ACTIVATIONS)
    assert {type(layer.gate) for layer in layers} == {type(None), SigmoidGate, TimeFunction}
    assert {type(layer.shift) for layer in layers} == {type(None), LinearShift, TimeFunction}
    assert any(layer.pattern.nnz == 0 for layer in layers) and any(layer.pattern.density == 1.0 for layer in layers)
    assert any(layer.out_features == 1 for layer in layers) and any(layer.in_features == 1 for layer in layers)
    lengths = [layer.pattern.row_ptr.diff() for layer in layers if layer.pattern.nnz]
    assert any(bool((row == 0).any()) for row in lengths)
    kinds = {name for field in fields for name in forms(field)}
    assert kinds == {"hutchinson", "chosen", "direct", "paths", "columns"}
    assert any(field.layers[-1].gate is None and any(layer.gate for layer in field.layers) for field in fields)


def compare_errors(fields, tag: str, floor: float = 2.0**-25) -> None:
    """RMS over fields and samples of the float32 error against float64, in units of the largest output: ours may be at
    most twice that of the reference engine in float32, and `floor`."""
    ours, torchs = {}, {}
    for seed, field in enumerate(fields):
        exact = field.map_tensors(torch.Tensor.double)
        x, noise = states(64, field.dim, F32, seed)
        for plan in forms(field).values():
            given = noise if plan.kind == "hutchinson" else None
            wanted = ReferenceEngine(exact, plan).evaluate_with_divergence(T, x.double(), noise.double())
            found = CpuEngine(field, plan).evaluate_with_divergence(T, x, given)
            by_torch = ReferenceEngine(field, plan).evaluate_with_divergence(T, x, noise)
            for part, w, f, r in zip(("f", f"trace, {plan.kind}"), wanted, found, by_torch):
                scale = w.abs().max().clamp(min=1.0)
                ours.setdefault(part, []).append(((f - w) / scale).square().mean())
                torchs.setdefault(part, []).append(((r - w) / scale).square().mean())
    ratios = {}
    for part in ours:
        mine, theirs = (torch.stack(errors[part]).mean().sqrt().item() for errors in (ours, torchs))
        print(f"{tag} {part}: {mine:.2e} ours, {theirs:.2e} torch's, ratio {mine / theirs:.2f}")
        ratios[part] = (mine - floor) / theirs
    assert max(ratios.values()) <= 2, ratios


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_core_float32_errs_at_most_twice_as_much_as_torch(activation):
    params = PARAMS.get(activation, [()])
    compare_errors((
        random_field([4, *((24, 31), (40,), (19, 23, 17))[seed % 3], 4], (0.2, 0.5, 1.0)[seed % 3],
                     activation=Activation(activation, params[seed % len(params)]), gate=seed % 2 == 0,
                     shift=seed % 4 < 2, seed=seed, dtype=F32)
        for seed in range(30)
    ), activation)  # fmt: skip


@pytest.mark.parametrize("sizes,density", [((21, 210, 210, 21), 0.1), ((8, 700, 700, 8), 0.05), ((16, 2000, 16), 0.5)])
def test_float32_of_wide_fields_errs_at_most_twice_as_much_as_torch(sizes, density):
    """Sums of many rows and of long rows, which torch takes in several parts."""
    fields = (random_field(sizes, density, activation=name, gate=True, seed=seed, dtype=F32)
              for seed, name in enumerate(("tanh", "softplus", "tanh")))  # fmt: skip
    compare_errors(fields, str(sizes), floor=2.0**-24)


@pytest.mark.parametrize("isa", [isa for isa in _cpu.isas() if isa != _cpu.isa()])
def test_every_instruction_set(isa):
    """The tests named core and bits, once more with the other kernels this machine can run."""
    command = [sys.executable, "-P", "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", "core or bits", __file__]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = isolated_environment(SPARSEFLOW_ISA=isa)
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "passed" in result.stdout and "skipped" not in result.stdout


def test_unknown_instruction_set_is_refused():
    result = in_a_process_of_its_own("from sparseflow_kernels import _cpu; _cpu.isa()", SPARSEFLOW_ISA="mmx")
    assert result.returncode == 1 and "SPARSEFLOW_ISA is 'mmx'" in result.stderr and "baseline" in result.stderr


# -------------------------------------------------------------------------------------------------------------- bits


def bit_fields(dtype) -> dict[str, VectorField]:
    """Small, deep, and wide enough for the columns to be taken in several blocks; dense and very sparse."""
    options = dict(gate=True, shift=True, dtype=dtype)
    return {
        "toy": random_field((2, 64, 64, 64, 2), 0.15, activation="tanh", seed=1, **options),
        "wide": random_field((5, 960, 901, 5), 0.1, activation="softplus", seed=2, output_gate=False, **options),
        "wide, sparse": random_field((7, 1500, 930, 7), 0.02, activation="tanh", seed=3, **options),
        "wide, dense": random_field((3, 120, 950, 3), 1.0, activation="silu", seed=4, **options),
    }


def runs(field: VectorField) -> list[tuple[str, CpuEngine]]:
    engines = [("f", CpuEngine(field))]
    for kind in ("exact", "hutchinson"):
        engines.append((kind, CpuEngine(field, divergence.plan(field, kind))))
    return engines


def evaluate(engine: CpuEngine, x, noise):
    if engine.plan is None:
        return (engine.evaluate(T, x),)
    return engine.evaluate_with_divergence(T, x, noise if engine.plan.kind == "hutchinson" else None)


def assert_equal(found, wanted, *what):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other), what


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", ["toy", "wide", "wide, sparse", "wide, dense"])
def test_bits_depend_on_nothing_but_the_sample(name, dtype, threads):  # noqa: F811
    field = bit_fields(dtype)[name]
    for kind, engine in runs(field):
        widths = engine.program.widths()
        assert widths == sorted(widths) and len(set(widths)) == len(widths)
        x, noise = states(2 * widths[-1] + 3, field.dim, dtype, seed=9)
        engine.program.force_width(0)
        threads(1)
        wanted = evaluate(engine, x, noise)
        generator = torch.Generator().manual_seed(1)
        for index, width in enumerate(widths):
            engine.program.force_width(index)
            for count in (1, 2, 4) if index in (0, len(widths) - 1) else (1, 2):
                threads(count)
                assert_equal(evaluate(engine, x, noise), wanted, kind, "width", width, "threads", count)
            threads(1)
            for batch in (1, width - 1, width, width + 1, 2 * width + 3):
                first = int(torch.randint(len(x) - batch + 1, (1,), generator=generator))
                part = slice(first, first + batch)
                found = evaluate(engine, x[part], noise[part])
                assert_equal(found, [w[part] for w in wanted], kind, "batch", width, batch)
        order = torch.randperm(len(x), generator=generator)
        engine.program.force_width(-1)
        assert_equal(evaluate(engine, x[order], noise[order]), [w[order] for w in wanted], kind, "order")


@pytest.mark.parametrize("seed", range(0, 60, 5))
def test_bits_of_odd_fields_are_the_same_at_every_width(seed):
    for dtype in (F32, F64):
        field = any_field(seed).map_tensors(lambda tensor: tensor.to(dtype))
        x, noise = states(7, field.dim, dtype)
        for name, plan in forms(field).items():
            engine = CpuEngine(field, plan)
            given = noise if plan.kind == "hutchinson" else None
            found = []
            for index in range(len(engine.program.widths())):
                engine.program.force_width(index)
                found.append(engine.evaluate_with_divergence(T, x, given))
            for other in found[1:]:
                assert_equal(other, found[0], name, dtype)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_bits_of_f_do_not_depend_on_the_divergence(dtype):
    """The same rows and the same order of sums, whatever runs beside them."""
    field = bit_fields(dtype)["toy"]
    x, noise = states(33, field.dim, dtype)
    outputs = [evaluate(engine, x, noise)[0] for _, engine in runs(field)]
    for one in outputs[1:]:
        torch.testing.assert_close(one, outputs[0], rtol=0, atol=2e-6 if dtype == F32 else 1e-14)


# -------------------------------------------------------------------------------------------------------- robustness


def test_empty_batch_views_and_strides():
    field = random_field((3, 8, 3), 0.6)
    plan = divergence.plan(field, "hutchinson")
    engine = CpuEngine(field, plan)
    empty = torch.zeros(0, 3, dtype=F64)
    dx, trace = engine.evaluate_with_divergence(T, empty, empty)
    assert dx.shape == (0, 3) and trace.shape == (0,)
    assert CpuEngine(field).evaluate(T, empty).shape == (0, 3)
    x, noise = states(20, 3)
    wanted = engine.evaluate_with_divergence(T, x, noise)
    views = [x.T.contiguous().T, torch.stack([x, x], 1)[:, 1], torch.cat([x, x], 1)[:, :3]]
    for view in views:
        assert not view.is_contiguous()
        assert_equal(engine.evaluate_with_divergence(T, view, noise.T.contiguous().T), wanted)
    assert_equal(engine.evaluate_with_divergence(T, x.requires_grad_(), noise), wanted)
    assert_equal(engine.evaluate_with_divergence(torch.tensor(T), x, noise), wanted)


@pytest.mark.parametrize(
    "y", [torch.zeros(4, 2, dtype=F64), torch.zeros(3, dtype=F64), torch.zeros(2, 2, 3, dtype=F64), torch.zeros(4, 3),
          torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3, dtype=F64, device="meta")],
)  # fmt: skip
def test_wrong_states_are_refused(y):
    field = random_field((3, 8, 3), 0.6)
    with pytest.raises(ValueError, match=r"y must be \[batch, 3\], torch.float64 on cpu"):
        CpuEngine(field).evaluate(T, y)
    engine = CpuEngine(field, divergence.plan(field, "hutchinson"))
    with pytest.raises(ValueError, match=r"x must be \[batch, 3\]"):
        engine.evaluate_with_divergence(T, y, torch.ones(4, 3, dtype=F64))
    with pytest.raises(ValueError, match="noise must"):
        engine.evaluate_with_divergence(T, torch.ones(4, 3, dtype=F64), y)


MISSING = """
field = random_field((3, 8, 3), 0.6)
x = torch.ones(50_000, 3, dtype=torch.float64)
hutchinson, none = CpuEngine(field, divergence.plan(field, "hutchinson")), CpuEngine(field)
for what, call in {
    "no noise": lambda: hutchinson.evaluate_with_divergence(0.5, x),
    "short noise": lambda: hutchinson.evaluate_with_divergence(0.5, x, x[:1]),
    "no plan": lambda: none.evaluate_with_divergence(0.5, x),
}.items():
    try:
        call()
        print(what, "was accepted")
    except ValueError as error:
        print(what, "was refused:", error)
torch.testing.assert_close(hutchinson.evaluate(0.5, x), none.evaluate(0.5, x))
print("evaluate needs no noise")
"""


def test_missing_and_short_noise_are_refused():
    result = in_a_process_of_its_own(MISSING)
    assert result.returncode == 0, (result.returncode, result.stdout, result.stderr[-500:])
    lines = result.stdout.splitlines()
    assert "accepted" not in result.stdout and lines[-1] == "evaluate needs no noise" and len(lines) == 4, lines


def test_unsupported_fields_say_why():
    field = random_field((3, 8, 3), 0.6)
    half = field.map_tensors(torch.Tensor.half)
    assert "float32 and float64" in CpuEngine.unsupported(half)
    assert "on the CPU" in CpuEngine.unsupported(field.map_tensors(lambda tensor: tensor.to("meta")))
    assert CpuEngine.unsupported(field) is None
    with pytest.raises(ValueError, match="engine 'cpu': .*float32 and float64"):
        CpuEngine(half)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_bad_row_stays_alone(value):
    field = random_field((3, 40, 30, 3), 0.3, activation="softplus", gate=True)
    for kind in ("exact", "hutchinson"):
        engine = CpuEngine(field, divergence.plan(field, kind))
        x, noise = states(67, 3)
        noise = noise if kind == "hutchinson" else None
        wanted = engine.evaluate_with_divergence(T, x, noise)
        for row in (0, 13, 66):
            bad = x.clone()
            bad[row, 1] = value
            good = torch.arange(67) != row
            found = engine.evaluate_with_divergence(T, bad, noise)
            assert_equal([f[good] for f in found], [w[good] for w in wanted])
            if value != value:
                assert found[0][row].isnan().any()
            assert_equal(engine.evaluate_with_divergence(T, x, noise), wanted, "nothing is left behind")


def test_functions_of_time_are_checked_and_their_errors_arrive():
    layer = random_field((3, 3), 1.0).layers[0]

    def engine(function):
        return CpuEngine(VectorField([replace(layer, gate=TimeFunction(function))]))

    x, _ = states(5, 3)
    with pytest.raises(RuntimeError, match="wrong length"):
        engine(lambda t: torch.ones(2, dtype=F64)).evaluate(T, x)

    def broken(t):
        raise KeyError("no such time")

    with pytest.raises(KeyError, match="no such time"):
        engine(broken).evaluate(T, x)


# --------------------------------------------------------------------------------------------- programs out of range


def good_program(builder: str = "BuilderF64", **changed):
    """[3] -> [4] -> [3] with a second slot, a reduction, a gated and an external matrix; one thing may be wrong."""
    b = getattr(_cpu, builder)()
    value = lambda name, default: changed.get(name, default)  # noqa: E731
    ints = lambda *x: np.array(x, np.int32)  # noqa: E731
    floats = lambda n: np.linspace(-1.0, 1.0, n)  # noqa: E731
    b.matrix(*value("shape", (4, 3)), value("row_ptr", ints(0, 2, 2, 3, 5)), value("col", ints(0, 2, 1, 0, 1)),
             floats(value("nnz", 5)))
    b.matrix(3, 4, ints(0, 1, 2, 4), ints(0, 1, 2, 3), floats(4))
    b.gated_matrix(1, 4, ints(0, 3), ints(0, 1, 3), value("entry", ints(0, 1, 2)), value("gate", ints(0, 2, 1)),
                   floats(value("paths", 3)), value("gate_modulation", 1))
    rows = value("product_rows", 1)
    b.external_matrix(rows, 4, ints(0, *[2] * rows), ints(1, 2), value("external", 0))
    b.modulation(floats(value("n0", 4)))
    b.modulation(floats(3), gate_slope=floats(value("slope", 3)), gate_offset=floats(value("offset", 3)),
                 shift_slope=floats(value("shift", 3)), shift_offset=floats(3),
                 external_shift=value("external_shift", -1))
    x = b.buffer(value("x_rows", 3))
    h = b.buffer(value("h_rows", 4), value("h_slots", 2))
    f = b.buffer(value("f_rows", 3))
    product = b.buffer(4)
    assert (x, h, f, product) == (0, 1, 2, 3)
    b.affine(value("matrix", 0), value("source", (x, 0)), value("target", (h, 0)), value("modulation", 0),
             value("activation", 1), 1.0, 1.0, value("store", 1), value("seed", (-1, 0)), value("weight", (-1, 0)))
    b.affine(1, (h, value("slot", 0)), (f, 0), 1, 0, 1.0, 1.0, value("last_store", 0))
    if "product_target" in changed or "factor" in changed or "prologue" in changed:
        b.product(value("product_matrix", 0), (x, 0), value("product_target", (product, 0)),
                  value("factor", (-1, 0)), factor_row=value("product_factor_row", None),
                  prologue=value("prologue", False))
    b.reduction(2, (h, 1))
    b.reduction(3, value("reduction_source", (h, 1)), value("factor1", (-1, 0)), value("factor2", (-1, 0)),
                factor_row=value("factor_row", None), factor2_row=value("factor2_row", None),
                coefficient_matrix=value("coefficient", -1))
    b.roles(value("dim", 3), value("divergence", True), value("input", x), value("output", f), value("noise", -1),
            value("ones", -1), value("externals", 1))
    return b.compile()


ints = lambda *x: np.array(x, np.int32)  # noqa: E731
BAD_PROGRAMS = {
    "column too large": (dict(col=ints(0, 3, 1, 0, 1)), "column 3 is outside"),
    "column negative": (dict(col=ints(0, -1, 1, 0, 1)), "column -1 is outside"),
    "row pointers short": (dict(row_ptr=ints(0, 2, 2, 5)), "row pointers do not fit"),
    "row pointers empty": (dict(row_ptr=ints()), "row pointers do not fit"),
    "row pointers end early": (dict(row_ptr=ints(0, 2, 2, 3, 4)), "row pointers do not fit"),
    "row pointers start late": (dict(row_ptr=ints(1, 2, 2, 3, 5)), "row pointers do not fit"),
    "columns descend": (dict(col=ints(2, 0, 1, 0, 1)), "the columns of a row must ascend"),
    "column twice": (dict(col=ints(0, 2, 1, 1, 1)), "the columns of a row must ascend"),
    "row pointers decrease": (dict(row_ptr=ints(0, 4, 2, 3, 5)), "row pointers decrease"),
    "row pointers leave": (dict(row_ptr=ints(0, 900, 2, 3, 5)), "row pointers decrease"),
    "too few values": (dict(nnz=4), "4 values for 5 entries"),
    "negative rows": (dict(shape=(-1, 3), row_ptr=ints(), col=ints(), nnz=0), "row pointers"),
    "negative columns": (dict(shape=(4, -3)), "row pointers|outside"),
    "path entry": (dict(entry=ints(0, 1, 3)), "path entry 3"),
    "path entries descend": (dict(entry=ints(0, 2, 1)), "path entries must ascend"),
    "path gate": (dict(gate=ints(0, 3, 1)), "path gate 3"),
    "path constants": (dict(paths=2), "path arrays of different lengths"),
    "gate modulation": (dict(gate_modulation=2), "no such gate"),
    "external matrix": (dict(external=1), "no such external"),
    "external shift": (dict(external_shift=1), "no such external"),
    "gate lengths": (dict(slope=2), "modulation 1: arrays of different lengths"),
    "gate lengths, 2": (dict(offset=4), "modulation 1: arrays of different lengths"),
    "shift lengths": (dict(shift=2), "modulation 1: arrays of different lengths"),
    "slots": (dict(h_slots=4), "one to three slots"),
    "no slots": (dict(h_slots=0), "one to three slots"),
    "negative buffer": (dict(h_rows=-1), "rows >= 0"),
    "too wide": (dict(h_rows=5_000_000), "too wide"),
    "too wide to count": (dict(h_rows=2**31 - 1), "too wide"),
    "no input": (dict(input=-1), "no input buffer"),
    "no such input": (dict(input=4), "no input buffer"),
    "input size": (dict(dim=4), "input buffer has the wrong size"),
    "no output": (dict(output=9), "no output buffer"),
    "output size": (dict(output=1), "output buffer has the wrong size"),
    "noise": (dict(noise=7), "no noise buffer"),
    "noise size": (dict(noise=3), "noise buffer has the wrong size"),
    "ones size": (dict(ones=3), "ones buffer has the wrong size"),
    "no such matrix": (dict(matrix=4), "no such matrix"),
    "no such matrix, 2": (dict(matrix=-1), "no such matrix"),
    "source buffer": (dict(source=(8, 0)), "no such source buffer"),
    "source absent": (dict(source=(-1, 0)), "no such source buffer"),
    "source slot": (dict(source=(0, 1)), "no such source slot"),
    "source slot, 2": (dict(source=(0, -1)), "no such source slot"),
    "source size": (dict(shape=(4, 5)), "the source has fewer rows"),
    "target buffer": (dict(target=(8, 0)), "no such target buffer"),
    "target slot": (dict(target=(1, 1)), "an affine target starts at slot 0"),
    "target size": (dict(h_rows=3), "target buffer has too few rows"),
    "source is target": (dict(target=(0, 0), shape=(3, 3), row_ptr=ints(0, 2, 3, 5), n0=3, store=0), "must differ"),
    "modulation": (dict(modulation=2), "modulation does not fit"),
    "modulation size": (dict(modulation=1), "modulation does not fit"),
    "bias size": (dict(n0=3), "modulation does not fit"),
    "activation": (dict(activation=11), "unknown activation"),
    "activation, 2": (dict(activation=-1), "unknown activation"),
    "store": (dict(store=6), "unknown store"),
    "store, 2": (dict(store=-1), "unknown store"),
    "tangent of a plain source": (dict(store=4), "carries no tangent"),
    "slope without a slot": (dict(last_store=1), "the target needs two slots"),
    "tangent without a slot": (dict(last_store=4), "the target needs two slots"),
    "seed absent": (dict(store=2), "no such seed buffer"),
    "seed size": (dict(store=2, seed=(2, 0)), "seed buffer has too few rows"),
    "weight absent": (dict(store=3, seed=(3, 0)), "no such weight buffer"),
    "seed nobody reads": (dict(seed=(9, 0)), "no such seed buffer"),
    "weight nobody reads": (dict(weight=(1, 2)), "no such weight slot"),
    "weight size": (dict(store=3, seed=(3, 0), weight=(0, 0)), "weight buffer has too few rows"),
    "product target size": (dict(product_target=(2, 0)), "target buffer has too few rows"),
    "product factor": (dict(factor=(9, 0)), "no such factor buffer"),
    "product factor size": (dict(factor=(0, 0)), "factor buffer has too few rows"),
    "product factor rows": (dict(factor=(0, 0), product_factor_row=ints(0, 1, 2)), "one factor row per matrix row"),
    "product factor row": (dict(factor=(0, 0), product_factor_row=ints(0, 1, 2, 3)), "factor row 3"),
    "prologue": (dict(prologue=True, product_matrix=2, product_target=(3, 0)), "columns|constant matrices"),
    "reduction source": (dict(reduction_source=(0, 0)), "the source has fewer rows"),
    "reduction source slot": (dict(reduction_source=(1, 2)), "no such source slot"),
    "factor row": (dict(factor1=(1, 0), factor_row=ints(4)), "factor row 4"),
    "factor row negative": (dict(factor1=(1, 0), factor_row=ints(-1)), "factor row -1"),
    "factor rows": (dict(factor1=(1, 0), factor_row=ints(0, 1)), "one factor row per matrix row"),
    "factor2 row": (dict(factor2=(1, 1), factor2_row=ints(4)), "factor2 row 4"),
    "factor2 slot": (dict(factor2=(0, 1)), "no such factor2 slot"),
    "coefficient": (dict(coefficient=4), "one coefficient per matrix row"),
    "coefficient size": (dict(coefficient=1), "one coefficient per matrix row"),
    "coefficient not a row": (dict(coefficient=1, product_rows=4), "one coefficient per matrix row"),
    "reduction without divergence": (dict(divergence=False), "a reduction needs a program with divergence"),
}  # fmt: skip


@pytest.mark.parametrize("builder", ["BuilderF32", "BuilderF64"])
def test_the_good_program_is_good(builder):
    program = good_program(builder)
    assert len(program.widths()) == len(program.tile_seconds.__self__.widths())
    for wrong in (-2, len(program.widths())):
        with pytest.raises(ValueError, match="no such width"):
            program.force_width(wrong)


@pytest.mark.parametrize("what", BAD_PROGRAMS)
def test_programs_out_of_range_are_refused(what):
    changed, message = BAD_PROGRAMS[what]
    for builder in ("BuilderF32", "BuilderF64"):
        with pytest.raises(ValueError, match=message):
            good_program(builder, **changed)
