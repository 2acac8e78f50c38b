"""The CUDA engine's evaluations: against the reference engine, in every launch shape, and asked for what it cannot do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_cases import (  # noqa: F401
    DEVICE, F32, F64, NATIVE, ON_GPU, T, TestedEngine, close, dense_above, engine_on, field_of, kernels_field, on_device,
    poison, same_bits, states,
)  # fmt: skip
from test_cpu_engine import PARAMS, forms

from sparseflow_kernels import divergence
from sparseflow_kernels.activations import ACTIVATIONS
from sparseflow_kernels.engines.cuda import CudaEngine, DeviceError
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Activation, Layer, Pattern, SigmoidGate, TimeFunction, VectorField

# Rows sparse, rows dense where more than a third is there, rows dense wherever they can be.
DENSITIES = (2.0, 0.37, 0.0)
FIELDS = 60


def evaluate(engine, x, noise):
    if engine.plan is None:
        return (engine.evaluate(T, x),)
    return engine.evaluate_with_divergence(T, x, noise if engine.plan.kind == "hutchinson" else None)


def multiplied_out(field, plan) -> bool:
    """The divergence has more paths than are listed, and its weights change with the output gate: PyTorch's to compute."""
    form = None if plan is None else plan.form
    return isinstance(form, divergence.PairsForm) and form.matrix.direct is not None and field.layers[-1].gate is not None


def compare(engine, field, x, noise, bound=1e-12, what=""):
    wanted = evaluate(ReferenceEngine(field, engine.plan), x, noise)
    for part, got, want in zip(("f", "trace")[: len(wanted)], evaluate(engine, x, noise), wanted, strict=True):
        close(got, want, bound, f"{part}, {what}")


# ------------------------------------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("seed", range(FIELDS))
def test_float64_agrees_with_the_reference(seed, dense_above):  # noqa: F811
    """Depths 0 to 5, every form of the divergence, empty rows, columns and layers, everything that any_field has."""
    dense_above(DENSITIES[seed % 3])
    field = kernels_field(seed)
    x, noise = states(9, field.dim, seed=seed)
    for name, plan in {"none": None, **forms(field)}.items():
        if multiplied_out(field, plan):
            with pytest.raises(ValueError, match="too many paths"):
                TestedEngine(field, plan)
        else:
            compare(TestedEngine(field, plan), field, x, noise, what=name)


def test_the_random_fields_cover_what_they_should():
    fields = [kernels_field(seed) for seed in range(FIELDS)]
    layers = [layer for field in fields for layer in field.layers]
    assert {len(field.layers) for field in fields} == set(range(1, 7))
    assert {layer.activation.name for layer in layers} == set(ACTIVATIONS)
    assert {type(layer.gate) for layer in layers} == {type(None), SigmoidGate}
    assert any(layer.pattern.nnz == 0 for layer in layers) and any(layer.pattern.density == 1.0 for layer in layers)
    assert any(bool((layer.pattern.row_ptr.diff() == 0).any()) for layer in layers if layer.pattern.nnz)
    assert {name for field in fields for name in forms(field)} == {"hutchinson", "chosen", "direct", "paths", "columns"}
    chosen = {type(plan.form).__name__ for field in fields for plan in forms(field).values()}
    assert chosen >= {"NoHiddenForm", "DiagonalForm", "PairsForm", "PathsForm", "ColumnsForm", "HutchinsonForm"}
    assert any(field.layers[-1].gate is not None for field in fields)
    assert any(field.layers[-1].gate is None and any(layer.gate for layer in field.layers) for field in fields)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_errs_at_most_twice_as_much_as_torch(activation):
    """RMS over fields and samples of the error against float64, in units of the largest output."""
    params, floor = PARAMS.get(activation, [()]), 2.0**-25
    ours, torchs = {}, {}
    for seed in range(6):
        field = field_of(
            [4, *((24, 31), (40,), (19, 23, 17))[seed % 3], 4], F32, density=(0.2, 0.5, 1.0)[seed % 3],
            activation=Activation(activation, params[seed % len(params)]), gate=seed % 2 == 0, shift=seed % 4 < 2, seed=seed,
        )  # fmt: skip
        exact = field.map_tensors(torch.Tensor.double)
        x, noise = states(70, field.dim, F32, seed)
        for plan in forms(field).values():
            if multiplied_out(field, plan):
                continue
            wanted = evaluate(ReferenceEngine(exact, plan), x.double(), noise.double())
            found = evaluate(TestedEngine(field, plan), x, noise)
            by_torch = evaluate(ReferenceEngine(field, plan), x, noise)
            for part, w, f, r in zip(("f", f"trace, {plan.kind}"), wanted, found, by_torch):
                scale = w.abs().max().clamp(min=1.0)
                ours.setdefault(part, []).append(((f - w) / scale).square().mean())
                torchs.setdefault(part, []).append(((r - w) / scale).square().mean())
    for part in ours:
        mine, theirs = (torch.stack(errors[part]).mean().sqrt().item() for errors in (ours, torchs))
        assert mine <= 2 * theirs + floor, (part, mine, theirs)


# --------------------------------------------------------------------------------------------------------- launch shapes

# What stays in shared memory: everything; not the weights, which come in pieces; not what is large.
PLACES = {"shared": {}, "streamed": {"shared_per_block": 50_000}, "global": {"shared_per_block": 15_000}}


def wide_field(dtype):
    return field_of((4, 150 if dtype == F64 else 220, 80, 4), dtype, density=0.3, activation="softplus")


def shapes(engine, batch=100, control="shared", stages=1, kind="forward"):
    return engine.candidates(batch, stages, kind, control)


def in_every_shape(engine):
    """(tile size, threads, function of a batch size that makes the engine run such batches so), shape by shape."""
    for control in ("shared", "per_sample"):
        for plan in shapes(engine, control=control):
            def use(batch, control=control, shape=plan.shape):
                engine.use(next(p for p in shapes(engine, batch, control) if p.shape == shape), batch, 1)

            yield plan, use


@pytest.mark.parametrize("dense", DENSITIES[:2])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("place", PLACES)
def test_every_launch_shape(place, dtype, dense, dense_above):  # noqa: F811
    """Batches of one sample, of a tile less one and plus one, and of several tiles to a block."""
    dense_above(dense)
    field = wide_field(dtype) if place == "streamed" else field_of((4, 30, 17, 4), dtype, density=0.3 if dense > 1 else 0.5)
    seen = set()
    for kind in ("exact", "hutchinson"):
        engine = engine_on(multiprocessors=2, **PLACES[place])(field, divergence.plan(field, kind))
        for plan, use in in_every_shape(engine):
            assert plan.shared_bytes <= engine._limits["shared_per_block"]
            if {"shared": False, "streamed": plan.resident, "global": plan.work_in_shared and not plan.global_bytes}[place]:
                continue
            seen.add((plan.work_in_shared, plan.resident))
            tile, _, _, threads = plan.shape
            several = tile * (2 * (2048 // threads if ON_GPU else 1) + 1) + 1
            for batch in {several} if place == "streamed" else {1, tile - 1, tile + 1, several} - {0}:
                use(batch)
                x, noise = states(batch, 4, dtype)
                compare(engine, field, x, noise, 1e-5 if dtype == F32 else 1e-12, f"{plan.shape}, batch {batch}")
    assert seen >= {"shared": {(True, True)}, "streamed": {(True, False), (False, False)}, "global": {(False, True)}}[place]


def test_the_candidates_are_of_every_sort():
    field = wide_field(F32)
    engine = TestedEngine(field, divergence.plan(field, "hutchinson"))
    for control in ("shared", "per_tile", "per_sample"):
        plans = shapes(engine, 1000, control)
        assert [plan.cycles for plan in plans] == sorted(plan.cycles for plan in plans)
        assert {plan.shape[0] == 1 for plan in plans} == {control == "per_sample"}
        assert all(plan.tiles == -(-1000 // plan.shape[0]) for plan in plans)
        assert all(word in plan.reason for plan in plans for word in ("samples to a tile", "threads", "shared memory"))
    assert {plan.shape[1] for plan in shapes(engine)} == {4}
    double = TestedEngine(field.map_tensors(torch.Tensor.double))
    assert {plan.shape[1] for plan in shapes(double)} == {1}


def test_a_shape_of_ones_own(monkeypatch):
    engine = TestedEngine(field_of())
    wanted = shapes(engine)[-1].shape
    monkeypatch.setenv("SPARSEFLOW_CUDA_SHAPE", ",".join(map(str, wanted)))
    assert engine.plan_for(100, 1)[0].shape == wanted
    text = "\n".join(engine.describe(100))
    assert "100 samples" in text and engine.plan_for(100, 7)[0].reason in text


# ------------------------------------------------------------------------------------------------------------------ bits


def seeds(monkeypatch):
    """Orders in which the shim runs threads; a GPU has its own."""
    for seed in (0, 1, 77):
        monkeypatch.setenv("SPARSEFLOW_SHIM_SEED", str(seed))
        yield seed


@pytest.mark.parametrize("dtype", [F32, F64])
def test_bits_depend_on_nothing_but_the_sample(dtype, monkeypatch):
    field = field_of((4, 40, 33, 4), dtype)
    x, noise = states(70, 4, dtype)
    order = torch.randperm(70)
    for kind in (None, "exact", "hutchinson"):
        engine = TestedEngine(field, kind and divergence.plan(field, kind))
        shape = None
        wanted = None
        for _ in seeds(monkeypatch):
            for rows in (slice(None), order, slice(13, 40), slice(3, 4)):
                part, probe = x[rows], noise[rows]
                plan = next(p for p in shapes(engine, len(part)) if p.shape == (shape or p.shape))
                shape = plan.shape
                engine.use(plan, len(part), 1)
                found = evaluate(engine, part, probe)
                wanted = wanted or found
                same_bits(found, [w[rows] for w in wanted], kind, rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_bad_row_stays_alone(value):
    """Neither its tile's others, nor the tiles its block takes next, nor the next launch notice."""
    field = field_of((3, 40, 30, 3), activation="softplus")
    for kind in ("exact", "hutchinson"):
        engine = engine_on(multiprocessors=1)(field, divergence.plan(field, kind))
        shape = next(plan for plan in shapes(engine, 67) if plan.shape[0] == 8)
        engine.use(shape, 67, 1)
        x, noise = states(67, 3)
        wanted = evaluate(engine, x, noise)
        for row in (0, 13):
            bad = x.clone()
            bad[row, 1] = value
            good = torch.arange(67, device=DEVICE) != row
            found = evaluate(engine, bad, noise)
            same_bits([f[good] for f in found], [w[good] for w in wanted], kind, row)
            if value != value:
                assert found[0][row].isnan().any()
            same_bits(evaluate(engine, x, noise), wanted, "nothing is left behind")


# -------------------------------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("sizes", [(3, 3), (3, 7, 3), (3, 7, 6, 3), (3, 5, 6, 5, 3), (2, 3, 4, 4, 3, 2)])
def test_new_values_are_taken_over(sizes, kind, dense_above):  # noqa: F811
    for dense in DENSITIES[:2]:
        dense_above(dense)
        field = field_of(sizes)
        engine = TestedEngine(field, kind and divergence.plan(field, kind))
        x, noise = states(9, field.dim)
        evaluate(engine, x, noise)
        memory = engine._image("forward").memory.data_ptr()
        generator = torch.Generator().manual_seed(3)
        for stamp in (1, 2):
            field = field.map_tensors(lambda tensor: tensor + torch.randn(tensor.shape, generator=generator, dtype=F64).to(DEVICE))
            assert engine.update(field) and engine.stamp == stamp
            compare(engine, field, x, noise)
        assert engine._image("forward").memory.data_ptr() == memory


def test_another_pattern_or_dtype_needs_a_new_engine():
    field = field_of()
    engine = TestedEngine(field)
    assert not engine.update(field_of(seed=6)) and not engine.update(field.map_tensors(torch.Tensor.float))
    assert engine.stamp == 0


# ------------------------------------------------------------------------------------------------------------ robustness


def test_empty_batch_views_and_times():
    field = field_of((3, 8, 3))
    engine = TestedEngine(field, divergence.plan(field, "hutchinson"))
    empty = torch.zeros(0, 3, dtype=F64, device=DEVICE)
    dx, trace = engine.evaluate_with_divergence(T, empty, empty)
    assert dx.shape == (0, 3) and trace.shape == (0,)
    x, noise = states(20, 3)
    wanted = engine.evaluate_with_divergence(T, x, noise)
    for view in (x.T.contiguous().T, torch.stack([x, x], 1)[:, 1], torch.cat([x, x], 1)[:, :3]):
        assert not view.is_contiguous()
        same_bits(engine.evaluate_with_divergence(T, view, noise.T.contiguous().T), wanted)
    same_bits(engine.evaluate_with_divergence(T, x.clone().requires_grad_(), noise), wanted)
    for time in (torch.tensor(T), torch.tensor(T, dtype=F64, device=DEVICE), torch.tensor([T], device=DEVICE)):
        same_bits(engine.evaluate_with_divergence(time, x, noise), wanted)
    same_bits(engine.evaluate(T, x), wanted[0])


WRONG = {
    "columns": lambda x: x[:, :2], "vector": lambda x: x[0], "three dimensions": lambda x: x[None], "dtype": lambda x: x.float(),
    "integers": lambda x: x.long(), "device": lambda x: x.to("meta"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_states_are_refused(what):
    field = field_of((3, 8, 3))
    plain, hutchinson = TestedEngine(field), TestedEngine(field, divergence.plan(field, "hutchinson"))
    x, noise = states(4, 3)
    bad = WRONG[what](x)
    message = rf"must be \[batch, 3\], torch.float64 on {DEVICE}"
    with pytest.raises(ValueError, match="y " + message):
        plain.evaluate(T, bad)
    with pytest.raises(ValueError, match="x " + message):
        hutchinson.evaluate_with_divergence(T, bad, noise)
    with pytest.raises(ValueError, match="noise " + message):
        hutchinson.evaluate_with_divergence(T, x, bad)


def test_missing_and_short_noise_are_refused():
    field = field_of((3, 8, 3))
    hutchinson = TestedEngine(field, divergence.plan(field, "hutchinson"))
    x, noise = states(4, 3)
    with pytest.raises(ValueError, match="noise is missing"):
        hutchinson.evaluate_with_divergence(T, x)
    with pytest.raises(ValueError, match=r"noise must have the state's shape \[4, 3\], not \[3, 3\]"):
        hutchinson.evaluate_with_divergence(T, x, noise[:3])
    with pytest.raises(ValueError, match="packed without a divergence"):
        TestedEngine(field).evaluate_with_divergence(T, x)


def test_unsupported_fields_say_why():
    field = field_of((3, 8, 3))
    assert TestedEngine.unsupported(field) is None
    assert "float32 and float64, not torch.float16" in TestedEngine.unsupported(field.map_tensors(torch.Tensor.half))
    assert "on meta" in TestedEngine.unsupported(field.map_tensors(lambda tensor: tensor.to("meta")))
    gated = VectorField([replace(field.layers[0], gate=TimeFunction(torch.sin)), field.layers[1]])
    shifted = VectorField([replace(field.layers[0], shift=TimeFunction(torch.sin)), field.layers[1]])
    for one in (gated, shifted):
        assert "'layer0' has a function of time" in TestedEngine.unsupported(one)
        with pytest.raises(ValueError, match="engine 'cuda': layer 'layer0' has a function of time"):
            TestedEngine(one)
    mask = torch.zeros(0x10000, 1, dtype=torch.bool)
    mask[0, 0] = True
    one, zeros = torch.ones(1, dtype=F64), torch.zeros(0x10000, dtype=F64)
    tanh = Activation("tanh")
    layers = [Layer(Pattern.from_mask(mask), one, zeros, activation=tanh, name="a"), Layer(Pattern.from_mask(mask.T), one, zeros[:1])]
    assert "'a' is wider than 65535" in TestedEngine.unsupported(on_device(VectorField(layers)))


class Broken:
    """A module that finds no device, or one that is too old."""

    def __init__(self, **found) -> None:
        self.found = found

    def probe(self) -> dict:
        return self.found


def engine_of(native, error=None) -> type[CudaEngine]:
    class Found(CudaEngine):
        device_type = DEVICE.type

        @staticmethod
        def native():
            if error is not None:
                raise error
            return native

    return Found


def test_what_is_wrong_with_a_machine_is_said():
    field = field_of()
    none = engine_of(None, ImportError("No module named 'sparseflow_kernels._cuda'"))
    assert "the CUDA extension is not built (No module named" in none.unsupported(field)
    error = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
    no_driver = engine_of(Broken(runtime=13000, driver=0, code=35, error=error, devices=[]))
    message = no_driver.unsupported(field)
    assert "no NVIDIA driver was found" in message and error in message and "install one" in message
    with pytest.raises(ValueError, match="engine 'cuda': no NVIDIA driver was found"):
        no_driver(field)
    old_driver = engine_of(Broken(runtime=13000, driver=12080, code=35, error=error, devices=[])).unsupported(field)
    assert "too old: it knows CUDA 12.8, the module was built with CUDA 13.0" in old_driver
    assert "install a driver for CUDA 13.0" in old_driver
    missing = engine_of(Broken(runtime=13000, driver=13000, code=0, error="", devices=[])).unsupported(field)
    assert "the driver (CUDA 13.0) shows no device" in missing
    old = {"name": "an old one", "major": 7, "minor": 5}
    message = engine_of(Broken(runtime=13000, driver=13000, code=0, error="", devices=[old])).unsupported(field)
    assert "need compute capability 8.0" in message and "found: an old one (compute capability 7.5)" in message
    new = {"name": "a new one", "major": 9, "minor": 0}
    two = engine_of(Broken(runtime=13000, driver=13000, code=0, error="", devices=[new, old]))
    assert two.unsupported(field) is None  # the first is the field's


def test_too_little_shared_memory_is_said():
    field = field_of()
    engine = engine_on(shared_per_block=2000)(field)
    x, _ = states(5, 3)
    with pytest.raises(DeviceError, match=r"no launch shape fits this field on .* \(2000 bytes of shared memory a block\); use engine='triton'"):
        engine.evaluate(T, x)


@pytest.mark.skipif(ON_GPU, reason="what a launch's failure says is tested without breaking a device")
def test_a_launch_that_fails_is_said_and_the_next_one_works(monkeypatch):
    engine = TestedEngine(field_of())
    x, _ = states(5, 3)
    wanted = engine.evaluate(T, x)
    monkeypatch.setenv("SPARSEFLOW_SHIM_SEED", "many")  # the shim refuses it
    with pytest.raises((DeviceError, ValueError), match="SPARSEFLOW_SHIM_SEED"):
        engine.evaluate(T, x)
    monkeypatch.delenv("SPARSEFLOW_SHIM_SEED")
    same_bits(engine.evaluate(T, x), wanted)
