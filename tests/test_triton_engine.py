"""The triton engine's evaluations against the reference engine, and what it says of input it cannot take."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest
import torch
from cpu_cases import states
from random_fields import random_field
from test_cpu_engine import any_field, forms
from triton_cases import DEVICE, F32, F64, INTERPRETED, close, on_device

from sparseflow_kernels import divergence
from sparseflow_kernels.activations import ACTIVATIONS
from sparseflow_kernels.engines import triton as triton_engine
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.engines.triton import TritonEngine, operator, tuning
from sparseflow_kernels.engines.triton import forms as triton_forms
from sparseflow_kernels.engines.triton.forms import Tile, choose_form
from sparseflow_kernels.field import Pattern, TimeFunction, VectorField

T = 0.375  # exact in float32


def given(batch, dim, dtype=F64, seed=0):
    return (tensor.to(DEVICE) for tensor in states(batch, dim, dtype, seed))


def compare(field, batch=23, seed=0, form=None, only=None):
    field = on_device(field)
    x, noise = given(batch, field.dim, seed=seed)
    close(TritonEngine(field, form=form).evaluate(T, x), ReferenceEngine(field).evaluate(T, x), what="f")
    for name, plan in forms(field).items():
        if only is not None and name not in only:
            continue
        probe = noise if plan.kind == "hutchinson" else None
        got = TritonEngine(field, plan, form).evaluate_with_divergence(T, x, probe)
        want = ReferenceEngine(field, plan).evaluate_with_divergence(T, x, noise)
        for one, other, part in zip(got, want, ("f", "trace")):
            close(one, other, what=f"{part}, {name}")


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 6, 8, 9, 14, 21])
def test_fields_of_all_kinds(seed):
    compare(any_field(seed), seed=seed)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_gates_and_shifts_on_every_layer(depth, form):
    sizes = [3, *(7, 6, 5)[:depth], 3]
    compare(random_field(sizes, 0.6, gate=True, shift=True, seed=depth), batch=17, form=form)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_with_both_divergences(activation):
    field = random_field([2, 5, 4, 2], 0.8, activation=activation, shift=True)
    compare(field, batch=9, only=("hutchinson", "chosen"))


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 33])
def test_batches_around_a_tile(batch):
    compare(random_field([2, 5, 2], 0.8, gate=True), batch=batch, only=("hutchinson", "chosen"))


def test_empty_matrices_rows_and_columns():
    field = random_field([4, 6, 5, 4], 0.15, shift=True, seed=3)
    lengths = [layer.pattern.row_ptr.diff() for layer in field.layers]
    assert any(bool((row == 0).any()) for row in lengths)
    compare(field)
    compare(random_field([3, 5, 3], 0.0, gate=True))
    compare(random_field([3, 5, 3], 0.0), form="dense")


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has tiles of its own")
def test_more_rows_and_samples_than_a_tile(monkeypatch):
    monkeypatch.setitem(triton_forms.INTERPRETED, "sparse", Tile(2, 16, 3, 1))
    compare(random_field([3, 7, 6, 3], 0.6, gate=True), batch=35, only=("chosen",))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has a clock of its own")
def test_the_clock_may_choose_tiles_and_changes_no_bit(monkeypatch):
    field = random_field([3, 6, 5, 3], 0.6)
    plan = divergence.plan(field, "hutchinson")
    x, noise = given(20, 3)
    want = TritonEngine(field, plan).evaluate_with_divergence(T, x, noise)
    slow, fast = Tile(16, 32, 1, 1), Tile(2, 16, 2, 1)
    ran = []

    def seconds(run):
        run()
        ran.append(run)
        return 1.0 / len(ran)  # the later, the faster

    monkeypatch.setattr(tuning, "wanted", lambda device: True)
    monkeypatch.setattr(tuning, "seconds", seconds)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(operator.forms, "tiles", lambda form, *_: (slow, fast))
    engine = TritonEngine(field, plan)
    got = engine.evaluate_with_divergence(T, x, noise)
    tuned = {key[0].__name__: tile for one in engine.program.operators.values() for key, tile in one.tuned.items()}
    assert tuned == {"affine": fast, "product": fast} and torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    count = len(ran)
    TritonEngine(field, plan).evaluate(T, x)
    assert len(ran) == count  # the choice is kept


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_float32_errs_at_most_twice_as_much_as_torch(form):
    ours, torchs = {}, {}
    for seed, activation in enumerate(["tanh", "softplus", "sigmoid"]):
        given_field = dict(activation=activation, gate=True, shift=True, seed=seed, dtype=F32)
        field = on_device(random_field([6, 24, 20, 6], 0.4, **given_field))
        exact = field.map_tensors(torch.Tensor.double)
        x, noise = given(64, 6, F32, seed)
        for kind in ("exact", "hutchinson"):
            plan = divergence.plan(field, kind)
            wanted = ReferenceEngine(exact, plan).evaluate_with_divergence(T, x.double(), noise.double())
            found = TritonEngine(field, plan, form).evaluate_with_divergence(T, x, noise)
            by_torch = ReferenceEngine(field, plan).evaluate_with_divergence(T, x, noise)
            for part, w, f, r in zip(("f", f"trace, {kind}"), wanted, found, by_torch):
                scale = w.abs().max().clamp(min=1.0)
                ours.setdefault(part, []).append(((f - w) / scale).square().mean())
                torchs.setdefault(part, []).append(((r - w) / scale).square().mean())
    for part, errors in ours.items():
        mine, theirs = (torch.stack(e).mean().sqrt().item() for e in (errors, torchs[part]))
        assert mine <= 2 * theirs + 2.0**-25, f"{part}: {mine:.2e}, torch's {theirs:.2e}"


def test_time_may_be_a_number_or_a_tensor_anywhere_and_views_do():
    field = on_device(random_field([3, 5, 3], 0.7, gate=True))
    engine, (x, _) = TritonEngine(field), given(9, 3)
    want = engine.evaluate(T, x)
    for t in (torch.tensor(T), torch.tensor(T, dtype=F64, device=DEVICE), torch.tensor([T], device=DEVICE)):
        assert torch.equal(engine.evaluate(t, x), want)
    wide = torch.zeros(18, 6, dtype=F64, device=DEVICE)
    wide[::2, ::2] = x
    assert torch.equal(engine.evaluate(T, wide[::2, ::2]), want)
    assert engine.evaluate(T, x[:0]).shape == (0, 3)


def test_update_takes_new_values_where_the_patterns_are_the_same():
    field = on_device(random_field([3, 6, 5, 3], 0.6, gate=True, shift=True))
    other = field.map_tensors(lambda tensor: tensor * 1.5 - 0.25)
    (x, noise) = given(9, 3)
    for form in ("sparse", "dense"):
        for kind in ("exact", "hutchinson"):
            plan = divergence.plan(field, kind)
            engine = TritonEngine(field, plan, form)
            engine.evaluate_with_divergence(T, x, noise)
            assert engine.update(other) and engine.stamp == 1
            got, want = (e.evaluate_with_divergence(T, x, noise) for e in (engine, ReferenceEngine(other, plan)))
            close(got[0], want[0]), close(got[1], want[1])
    assert not engine.update(on_device(random_field([3, 6, 5, 3], 0.6, gate=True, shift=True)))
    assert not engine.update(field.map_tensors(torch.Tensor.float))


def test_what_is_kept_outlives_inference_mode():
    field = on_device(random_field([3, 5, 3], 0.7, gate=True))
    x, _ = given(9, 3)
    with torch.inference_mode():
        engine = TritonEngine(field)
        want = engine.evaluate(T, x.clone())
    assert torch.equal(engine.evaluate(T, x), want) and engine.update(field)
    with torch.enable_grad():
        assert not engine.evaluate(T, x.requires_grad_()).requires_grad


def test_forms_are_chosen_by_density_and_explained(monkeypatch):
    thin, full = (Pattern.from_mask(torch.rand(400, 500) < density) for density in (0.02, 0.9))
    small = Pattern.from_mask(torch.ones(3, 50, dtype=torch.bool))
    assert choose_form(thin, F32).name == "sparse" and choose_form(full, F32).name == "dense"
    assert choose_form(small, F32).name == "sparse" and choose_form(full, F32, fixed=False).name == "sparse"
    assert choose_form(thin, F32, "dense").name == "dense"
    lines = TritonEngine(on_device(random_field([3, 20, 20, 3], 1.0))).describe()
    assert [line.split()[0] + line.split()[1] for line in lines] == ["layer0", "layer1", "layer2"]
    assert "dense, density 1" in lines[1] and "sparse" in lines[0]
    monkeypatch.setenv("SPARSEFLOW_TRITON_FORM", "sparse")
    lines = TritonEngine(on_device(random_field([3, 20, 20, 3], 1.0))).describe()
    assert "SPARSEFLOW_TRITON_FORM" in lines[1] and "sparse" in lines[1]
    monkeypatch.setenv("SPARSEFLOW_TRITON_FORM", "thick")
    with pytest.raises(ValueError, match="'thick' is not a form; known are auto, sparse, dense"):
        TritonEngine(on_device(random_field([3, 20, 20, 3], 1.0)))


def test_wrong_input_is_refused(monkeypatch):
    field = on_device(random_field([3, 5, 3], 0.7))
    x, noise = given(4, 3)
    engine = TritonEngine(field)
    for y in (x[:, :2], x[0], x.float(), x.to("meta")):
        with pytest.raises(ValueError, match=r"y must be \[batch, 3\], torch.float64 on"):
            engine.evaluate(T, y)
    with pytest.raises(ValueError, match="without a divergence"):
        engine.evaluate_with_divergence(T, x)
    hutchinson = TritonEngine(field, divergence.plan(field, "hutchinson"))
    with pytest.raises(ValueError, match="noise is missing"):
        hutchinson.evaluate_with_divergence(T, x)
    with pytest.raises(ValueError, match="noise must have the state's shape"):
        hutchinson.evaluate_with_divergence(T, x, noise[:2])
    assert "float16" in TritonEngine.unsupported(field.map_tensors(torch.Tensor.half))
    with pytest.raises(ValueError, match="engine 'triton': .*float16"):
        TritonEngine(field.map_tensors(torch.Tensor.half))
    monkeypatch.setattr(triton_engine.engine, "_no_triton", lambda: "triton is 3.2.0; install 3.6 or later")
    assert "3.6" in TritonEngine.unsupported(field)
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "on a GPU" in TritonEngine.unsupported(field.map_tensors(torch.Tensor.cpu))


@pytest.mark.skipif(not hasattr(os, "fork") or not INTERPRETED, reason="a child of a process that uses CUDA cannot")
def test_a_fork_leaves_no_engine_locked():
    engine = TritonEngine(on_device(random_field([2, 5, 2], 0.8)))
    held, over = threading.Event(), threading.Event()

    def hold():
        with engine._lock:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        held.wait()
        child = os.fork()
        if child == 0:
            os._exit(0 if engine._lock._lock.acquire(timeout=20) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not engine._lock._lock.acquire(blocking=False)  # the parent's is another thread's, as before
    finally:
        over.set()
        thread.join()


def test_a_function_of_time_that_runs_the_engine_is_told_so():
    """The workspace is one call's at a time."""
    field, box = on_device(random_field((2, 5, 2), density=0.8, seed=3)), {}
    gate = torch.tensor([0.5, 0.25], dtype=field.dtype, device=DEVICE)

    def function(t):
        if "x" in box:
            box["engine"].evaluate(0.1, box["x"])
        return gate

    field = VectorField([*field.layers[:-1], replace(field.layers[-1], gate=TimeFunction(function))])
    engine = box["engine"] = TritonEngine(field)
    x = states(3, 2)[0].to(DEVICE, field.dtype)
    before = engine.evaluate(0.3, x)
    box["x"] = x
    with pytest.raises(RuntimeError, match="a function of time may not run the same compiled field"):
        engine.evaluate(0.3, x)
    del box["x"]
    assert torch.equal(engine.evaluate(0.3, x), before)
