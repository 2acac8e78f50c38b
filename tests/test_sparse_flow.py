"""The SparseFlow loop: what each cycle is, what it is compared with, and that nothing is lost when it is stopped."""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from cpu_cases import isolated_environment
from torch import nn
from typer.testing import CliRunner

import sparseflow_kernels as sfk
from sparseflow_kernels import data
from sparseflow_kernels.cli.main import app
from sparseflow_kernels.data.dataset import Dataset
from sparseflow_kernels.flows import ContinuousFlow, mlp_field, toy_field
from sparseflow_kernels.pruning import KEEP_RATIOS, copy_module, dense_size, prune_neurons_, prune_weights_, size
from sparseflow_kernels.pruning.masks import effective_parameters
from sparseflow_kernels.training import (
    PRESETS,
    CheckpointError,
    NonFiniteLossError,
    TrainingSettings,
    checkpoint,
    evaluate_nll,
    live_size,
    load_checkpoint,
    prune_cycle_,
    sparse_flow,
    train,
)
from sparseflow_kernels.training import jobs as job_module

KEEPS = (0.7, 0.4)
RUN = {"epochs": 2, "batch": 64, "lr": 0.02, "seed": 2}
TORCH = {**RUN, "engine": None}


def make_flow(seed=0, shape="l2_h16", **settings):
    torch.manual_seed(seed)
    return ContinuousFlow(toy_field(shape), **{"rtol": 1e-3, "atol": 1e-3, **settings})


def small_set():
    return data.load("gaussians", n=40)


def values(flow):
    return {name: tensor for name, tensor in effective_parameters(flow)}


def same(one, other):
    one, other = values(one), values(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------------------------- the cycles


@pytest.mark.parametrize("method", ["weights", "neurons"])
def test_cycles_are_train_prune_retrain(method):
    sets = small_set()
    cycles = list(sparse_flow(make_flow(), sets, KEEPS, method=method, control=True, **TORCH))
    assert [(cycle.index, cycle.keep) for cycle in cycles] == [(0, 1.0), (1, 0.7), (2, 0.4)]
    sizes = [cycle.size for cycle in cycles]
    assert sizes == [size(cycle.flow) for cycle in cycles] and all(c.live_size <= c.size for c in cycles)
    assert all(s <= keep * sizes[0] for s, keep in zip(sizes, (1.0, *KEEPS)))

    by_hand, unpruned = make_flow(), None
    settings = {name: RUN[name] for name in ("epochs", "batch", "lr")}
    for index, keep in enumerate((1.0, *KEEPS)):
        if index:
            (prune_weights_ if method == "weights" else prune_neurons_)(by_hand, keep)
            train(unpruned, sets, seed=(2, index), **settings)
        train(by_hand, sets, seed=(2, index), **settings)  # a new optimizer, the weights as they are
        unpruned = unpruned or copy_module(by_hand)
        assert same(by_hand, cycles[index].flow) and same(unpruned, cycles[index].control_flow)
        assert cycles[index].nll == evaluate_nll(by_hand, sets.val)
        assert cycles[index].control_nll == evaluate_nll(unpruned, sets.val)
    assert size(cycles[-1].control_flow) == dense_size(by_hand)
    alone = list(sparse_flow(make_flow(), sets, KEEPS, method="none", **TORCH))
    assert same(alone[-1].flow, cycles[-1].control_flow) and alone[-1].size == dense_size(by_hand)


def test_the_compiled_flow_trains_to_what_the_module_does():
    """float64: the same loop through torch, and through the compiled flow of the remaining weights."""
    sets = small_set()
    sets = dataclasses.replace(sets, train=sets.train[:128].double(), val=sets.val.double())
    run = {"epochs": 2, "batch": 64, "lr": 0.01, "weight_decay": 1e-2, "clip": 1.0}

    def flow():
        torch.manual_seed(1)
        field = mlp_field(2, (8, 8), "concatsquash", "tanh")
        return ContinuousFlow(field, rtol=1e-6, atol=1e-6, train_end_time=True, divergence="hutchinson").double()

    torch_cycles, own = (list(sparse_flow(flow(), sets, (0.6, 0.3), engine=engine, **run)) for engine in (None, "auto"))
    for one, other in zip(torch_cycles, own, strict=True):
        assert one.live_size == one.size == other.size  # else a dead bias decays on one side only
        for name, a in values(one.flow).items():
            b = values(other.flow)[name]
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6) and torch.equal(a == 0, b == 0)
        assert other.nll == pytest.approx(one.nll, abs=1e-6)
        assert [h["nll"] for h in other.history] == pytest.approx([h["nll"] for h in one.history], abs=1e-6)


def test_compiled_training_never_trains_what_the_module_does_not_have():
    class NoBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 6, bias=False), nn.Linear(6, 2, bias=False)

        def forward(self, t, y):
            return self.last(torch.tanh(self.first(y)))

    field = NoBias()
    field.first.weight.requires_grad_(False)
    nn.utils.prune.random_unstructured(field.last, "weight", amount=0.5)
    flow = ContinuousFlow(field, rtol=1e-3, atol=1e-3)
    before = {name: tensor.clone() for name, tensor in values(flow).items()}
    train(flow, small_set(), engine="auto", steps=3, batch=64, lr=0.1, weight_decay=0.5)
    after = values(flow)
    assert torch.equal(after["vector_fields.0.first.weight"], before["vector_fields.0.first.weight"])
    pruned = before["vector_fields.0.last.weight"] == 0
    assert torch.equal(after["vector_fields.0.last.weight"] == 0, pruned)
    assert not torch.allclose(after["vector_fields.0.last.weight"], before["vector_fields.0.last.weight"])


def test_a_constant_folded_into_an_entry_that_is_not_trained_is_trained_as_the_module_trains_it():
    trained = {}
    for engine in (None, "auto"):
        flow = make_flow()
        first, last = (layer.linear for layer in flow.vector_fields[0].layers)
        with_inputs = torch.arange(16).unsqueeze(1).expand(16, 2) > 0  # all but neuron 0
        nn.utils.prune.custom_from_mask(first, "weight", with_inputs)
        nn.utils.prune.custom_from_mask(last, "bias", torch.tensor([0.0, 1.0]))
        train(flow, small_set(), engine=engine, steps=3, batch=64, lr=0.1, weight_decay=0.5)
        trained[engine] = values(flow)
        assert trained[engine]["vector_fields.0.layers.1.linear.bias"][0] == 0
    for name, value in trained[None].items():
        torch.testing.assert_close(trained["auto"][name], value, rtol=1e-3, atol=1e-4)


def test_masks_nest_and_dead_parameters_do_not_grow_back():
    before = None
    for cycle in sparse_flow(make_flow(), small_set(), (0.6, 0.3, 0.15), weight_decay=0.1, **RUN):
        alive = {name: tensor != 0 for name, tensor in values(cycle.flow).items()}
        if before is not None:
            assert all(bool((before[name] | ~alive[name]).all()) for name in alive)
        before = alive
        if cycle.index:
            dead_neurons = ~alive["vector_fields.0.layers.1.linear.weight"].any(0)
            assert bool(dead_neurons.any())
            assert not bool(alive["vector_fields.0.layers.0.linear.bias"][dead_neurons].any())
            assert not bool(alive["vector_fields.0.layers.0.linear.weight"][dead_neurons].any())


@pytest.mark.parametrize("schedule", ["toy", "miniboone"])
def test_sizes_of_a_whole_schedule_are_met(schedule):
    """Weights move between prunings, as retraining moves them."""
    flow, generator = make_flow(shape="l4_h64"), torch.Generator().manual_seed(0)
    total = dense_size(flow)
    for keep in KEEP_RATIOS[schedule]:
        prune_cycle_(flow, keep, "weights", "simplify")
        assert abs(size(flow) - keep * total) <= max(3, 0.005 * keep * total)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3, generator=generator))


def test_dead_parameters_can_be_found_by_the_papers_propagation():
    flow, sets = make_flow(shape="l4_h64"), data.load("gaussians", n=400)
    total = dense_size(flow)
    prune_cycle_(flow, 0.05, "weights", "propagate", sets)
    assert abs(size(flow) - 0.05 * total) <= 0.01 * total * 0.05 + 3
    exact = copy_module(flow)
    prune_weights_(exact, 1.0)  # takes out what nobody reads, and finds hardly anything left
    assert size(flow) - size(exact) <= 3
    structured = make_flow()
    prune_cycle_(structured, 0.5, "neurons", "propagate", sets)
    assert abs(size(structured) - 0.5 * dense_size(structured)) <= 5  # a neuron


def test_retraining_can_differ_and_the_seed_decides():
    sets = small_set()
    cycles = list(sparse_flow(make_flow(), sets, (0.5,), retrain={"epochs": 3, "milestones": (1,)}, **TORCH))
    assert [len(cycle.history) for cycle in cycles] == [2, 3]
    other = list(sparse_flow(make_flow(), sets, (0.5,), **{**TORCH, "seed": 3}))
    assert not same(cycles[0].flow, other[0].flow)


def test_milestones_and_best_epoch():
    settings = TrainingSettings(epochs=4, lr=0.1, milestones=(2, 3))
    assert [settings.learning_rate(epoch, 0, 9) for epoch in range(4)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert settings.changed(lr_end=0.01).milestones == () and settings.changed(steps=5).epochs is None
    flow = make_flow()
    history = train(flow, small_set(), epochs=4, batch=64, lr=0.3, select="best")
    scores = [entry["val_nll"] for entry in history]
    assert evaluate_nll(flow, small_set().val) == pytest.approx(min(scores), abs=1e-6)
    assert min(scores) != scores[-1]  # else "last" would pass, too


class Breaking(nn.Module):
    """A field that gives NaN in eval mode once its offset has been trained beyond a limit."""

    def __init__(self, limit):
        super().__init__()
        self.offset, self.limit = nn.Parameter(torch.zeros(2)), limit

    def forward(self, t, y):
        broken = not self.training and float(self.offset.detach().abs().max()) > self.limit
        return -y + self.offset * (math.nan if broken else 1.0)


def test_an_epoch_that_is_not_finite_is_never_the_best():
    sets = Dataset("shifted", torch.full((64, 2), 5.0) + torch.randn(64, 2), torch.zeros(8, 2), torch.zeros(8, 2))
    run = {"epochs": 3, "batch": 64, "lr": 0.1, "optimizer": "adam", "select": "best"}
    flow = ContinuousFlow(Breaking(0.15), method="rk4")
    history = train(flow, sets, **run)
    assert [math.isfinite(entry["val_nll"]) for entry in history] == [True, False, False]
    assert float(flow.vector_fields[0].offset.detach().abs().max()) == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(NonFiniteLossError, match="none of the 3 epochs had a finite validation NLL"):
        train(ContinuousFlow(Breaking(0.01), method="rk4"), sets, **run)


def test_the_end_time_is_trained_and_its_gradient_is_right():
    sets = small_set()
    flow = make_flow(train_end_time=True)
    before = float(flow.sqrt_end_time[0].detach())
    (cycle,) = sparse_flow(flow, sets, (), **RUN)
    assert abs(float(flow.sqrt_end_time[0].detach()) - before) > 1e-3
    assert float(cycle.flow.sqrt_end_time[0].detach()) == float(flow.sqrt_end_time[0].detach())
    precise = make_flow(train_end_time=True, rtol=1e-10, atol=1e-10).double()
    x, h = sets.val[:5].double(), 1e-5
    for trained in (precise, precise.compile()):
        (end,) = trained.sqrt_end_time
        (gradient,) = torch.autograd.grad(trained.log_prob(x).mean(), end)
        with torch.no_grad():
            sides = []
            for move in (h, -2 * h):
                end += move
                sides.append(float(trained.log_prob(x).mean()))
            end += h
        assert float(gradient) == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-5)
        assert abs(float(gradient)) > 1e-3


def test_bad_arguments():
    flow, sets = make_flow(), small_set()
    for arguments, word in [
        ({"keeps": (0.5, 0.8)}, "keeps must be numbers in"),
        ({"keeps": "cifar"}, "keeps must be one of toy"),
        ({"method": "filters"}, "method must be one of weights, neurons, none; got 'filters'"),
        ({"dead": "yes"}, "dead must be 'simplify'"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"retrain": {"lr": -1}}, "lr must be above 0"),
    ]:
        with pytest.raises(ValueError, match=word):
            sfk.sparse_flow(flow, sets, **{"epochs": 1, **arguments})
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        sfk.sparse_flow(flow, sets, epoch=1)


def test_presets_are_the_experiments():
    facts = {name: (len(p.keep_ratios), p.repetitions, p.training.epochs) for name, p in PRESETS.items()}
    assert facts == {
        "gaussians": (29, 3, 100), "gaussians_spiral": (29, 3, 100), "spirals2": (29, 3, 100), "power": (8, 1, 100),
        "gas": (8, 1, 30), "hepmass": (12, 1, 400), "miniboone": (16, 3, 400), "bsds300": (8, 1, 100),
        "moons": (29, 3, 50), "concentric": (29, 3, 50), "spirals": (29, 3, 100),
        "mnist": (12, 1, 50), "cifar10": (12, 1, 50), "digits": (12, 1, 60),
    }
    assert dense_size(PRESETS["gaussians"].flow("l2_h128")) == 642 and dense_size(PRESETS["spirals2"].flow()) == 8642
    assert dense_size(PRESETS["power"].flow()) == 43_325
    assert PRESETS["gaussians"].flow("cnf_l2_h128").divergence == "exact"
    assert PRESETS["gaussians"].flow().divergence == "hutchinson" and PRESETS["gaussians"].flow().noise == "gaussian"
    assert PRESETS["spirals2"].flow("cnf_l4_h64").rtol == 1e-4
    power = PRESETS["power"]
    structured = power.flow()
    prune_cycle_(structured, 0.1, "neurons", "simplify", **power.prune_options("neurons"))
    assert 0.995 * 4332 < size(structured) <= 4332 and power.prune_options("weights") == {"min_neurons": 1}
    hepmass = PRESETS["hepmass"]
    retraining = hepmass.training.changed(**hepmass.retrain)
    assert (retraining.epochs, retraining.milestones, retraining.batch) == (300, (250, 295), 10_000)
    with pytest.raises(ValueError, match="net must look like"):
        PRESETS["gaussians"].flow("mlp")


# ---------------------------------------------------------------------------------------------------- being interrupted


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from test_sparse_flow import *
from sparseflow_kernels.training import checkpoint

writes = 0
if {where!r} == "writing":
    whole = checkpoint.save_file
    def save_file(tensors, path, metadata):
        global writes
        writes += 1
        whole(tensors, path, metadata)
        if writes == 2:
            os.truncate(path, 300)
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save_file = save_file

def progress(facts):
    if {where!r} == "a step" and facts["cycle"] == 1 and facts["epoch"] == 2 and facts["step"] % 2:
        os.kill(os.getpid(), signal.SIGKILL)

flow = make_flow(seed=9, divergence="hutchinson")
list(sparse_flow(flow, small_set(), KEEPS, control=True, folder={folder!r}, progress=progress, **RUN))
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    for where in ("a step", "writing"):
        script = KILLED.format(where=where, folder=str(tmp_path))
        command = [sys.executable, "-P", "-c", script]  # -P: no other copy of the package from the working directory
        environment = isolated_environment(OMP_NUM_THREADS="1")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (tmp_path / "cycle_01.running.safetensors").exists()
    assert not (tmp_path / "cycle_01.safetensors").exists() and len(list(tmp_path.glob(".*"))) == 1  # the part written
    make = {"divergence": "hutchinson"}
    straight = list(sparse_flow(make_flow(seed=9, **make), small_set(), KEEPS, control=True, **RUN))
    resumed = list(sparse_flow(make_flow(seed=1, **make), small_set(), KEEPS, control=True, folder=tmp_path, **RUN))
    assert [cycle.resumed for cycle in resumed] == [True, False, False]
    for one, other in zip(straight, resumed, strict=True):
        assert same(one.flow, other.flow) and same(one.control_flow, other.control_flow)
        for figure in ("size", "live_size", "nll", "nfe", "control_nll"):
            assert getattr(one, figure) == getattr(other, figure)
        assert [h["nll"] for h in one.history] == [h["nll"] for h in other.history]
    names = {path.name.removesuffix(".safetensors") for path in tmp_path.iterdir()}
    assert names == {"cycle_00", "cycle_01", "cycle_02", "cycle_01_control", "cycle_02_control"}


class Stop(Exception):
    pass


def stop_at(cycle, epoch):
    def progress(facts):
        if (facts["cycle"], facts["epoch"]) == (cycle, epoch):
            raise Stop

    return progress


def stopped_run(folder, cycle=1, epoch=2, **settings):
    with pytest.raises(Stop):
        progress = stop_at(cycle, epoch)
        list(sparse_flow(make_flow(), small_set(), KEEPS, folder=folder, progress=progress, **TORCH, **settings))


def test_every_optimizer_resumes_in_the_middle_of_a_cycle(tmp_path):
    for name in ("adam", "adamw", "sgd"):
        settings = {"optimizer": name, "select": "best", "lr_end": 1e-3, "clip": 0.5}
        stopped_run(tmp_path / name, **settings)
        resumed = list(sparse_flow(make_flow(4), small_set(), KEEPS, folder=tmp_path / name, **TORCH, **settings))
        straight = list(sparse_flow(make_flow(), small_set(), KEEPS, **TORCH, **settings))
        assert all(same(a.flow, b.flow) for a, b in zip(straight, resumed, strict=True))


def test_a_longer_schedule_continues_a_shorter_one(tmp_path):
    sets = small_set()
    list(sparse_flow(make_flow(), sets, (0.7,), folder=tmp_path, **TORCH))
    longer = list(sparse_flow(make_flow(), sets, KEEPS, folder=tmp_path, **TORCH))
    assert [cycle.resumed for cycle in longer] == [True, True, False]
    with pytest.raises(CheckpointError, match=r"another run \(differing: keeps\)"):
        list(sparse_flow(make_flow(), sets, (0.6,), folder=tmp_path, **TORCH))


def test_foreign_and_damaged_checkpoints_are_refused_and_left_alone(tmp_path):
    sets = small_set()
    stopped_run(tmp_path)
    contents = {path: path.read_bytes() for path in tmp_path.iterdir()}
    running = tmp_path / "cycle_01.running.safetensors"
    assert set(contents) == {tmp_path / "cycle_00.safetensors", running}

    def refused(word, **changes):
        flow = make_flow()
        before = copy_module(flow)
        with pytest.raises(CheckpointError, match=word):
            list(sparse_flow(flow, changes.pop("sets", sets), KEEPS, folder=tmp_path, **{**TORCH, **changes}))
        return same(before, flow)

    assert refused(r"differing: settings", lr=0.5)
    assert refused(r"differing: seed", seed=7)
    assert refused(r"differing: data", sets=data.load("gaussians", n=41))
    assert refused(r"differing: engine", engine="reference")
    refused(r"differing: method", method="neurons")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == contents

    whole = contents[running]
    for damage, word in [
        (whole[: len(whole) // 2], "is not a readable checkpoint"),
        (b"", "is not a readable checkpoint"),
        (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "is damaged: its sha256"),
    ]:
        running.write_bytes(damage)
        refused(word)
        assert running.read_bytes() == damage
    running.write_bytes(whole)
    cycles = sparse_flow(make_flow(), sets, KEEPS, folder=tmp_path, **TORCH)
    assert [cycle.resumed for cycle in cycles] == [True, False, False]


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    writer, calls = checkpoint.save_file, []

    def fills_up(tensors, path, metadata):
        calls.append(path)
        writer(tensors, path, metadata)
        if len(calls) == 5:  # cycle 0: two epochs and the end; cycle 1: its first epoch, and now its second
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", fills_up)
    with pytest.raises(OSError, match="No space left on device"):
        list(sparse_flow(make_flow(), small_set(), KEEPS, folder=tmp_path, **TORCH))
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"cycle_00.safetensors", "cycle_01.running.safetensors"}
    resumed = list(sparse_flow(make_flow(5), small_set(), KEEPS, folder=tmp_path, **TORCH))
    straight = list(sparse_flow(make_flow(), small_set(), KEEPS, **TORCH))
    assert all(same(a.flow, b.flow) for a, b in zip(straight, resumed, strict=True))


# ----------------------------------------------------------------------------------------------------- the command line


NET = ["--net", "cnf_l2_h16"]
TINY = [*NET, "--rows", "300", "--eval-rows", "100", "--epochs", "2", "--batch", "100", "--tolerance", "1e-3"]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def test_train_then_prune_from_the_command_line(tmp_path):
    printed = run("train", "gaussians", *TINY, "--folder", tmp_path)
    dense = tmp_path / "seed_0" / "dense" / "cycle_00.safetensors"
    assert str(dense) in printed and "no model can go below 1.132" in " ".join(printed.split())
    assert "from its checkpoint" in run("train", "gaussians", *TINY, "--folder", tmp_path)
    printed = run("prune", tmp_path, "--keep", "0.5,0.2", "--retrain", 1, "--out", tmp_path / "pruned")
    assert "keep 0.5, retrained" in printed and "41" in printed
    flow = PRESETS["gaussians"].flow("cnf_l2_h16")
    facts = load_checkpoint(tmp_path / "pruned" / "pruned_weights_0.5.safetensors", flow)
    assert size(flow) == dense_size(flow) // 2 and facts["keep"] == 0.5
    assert "41" in run("prune", tmp_path / "pruned" / "pruned_weights_0.5.safetensors", "--keep", "0.25")
    assert "holds no checkpoint" in run("prune", tmp_path / "seed_0", "--keep", "0.5", code=1)
    assert "differing: settings" in run("train", "gaussians", *TINY, "--lr", "1", "--folder", tmp_path, code=1)


def test_sweep_writes_results_and_resumes(tmp_path, monkeypatch):
    arguments = ["sweep", "gaussians", *TINY, "--keeps", "0.5,0.2", "--repetitions", 2, "--method", "weights,neurons",
                 "--folder", tmp_path]  # fmt: skip
    whole = job_module.sparse_flow

    def interrupted(*positional, **named):
        for cycle in whole(*positional, **named):
            yield cycle
            if named["method"] == "neurons":
                raise KeyboardInterrupt

    monkeypatch.setattr(job_module, "sparse_flow", interrupted)
    printed = run(*arguments, code=130)
    assert "run the same command again" in printed and "seed 0, weights: keep 0.2 done" in printed
    monkeypatch.undo()
    printed = run(*arguments)
    assert "seed 0, weights: keep 0.2 done: " in printed and ", from its checkpoint" in printed
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["floor"] == 1.132 and not document["failed"]
    rows = {(row["seed"], row["method"], row["cycle"]): row for row in document["rows"]}
    assert len(rows) == len(document["rows"]) == 2 * 3 * 3
    for (seed, method, cycle), row in rows.items():
        assert math.isfinite(row["test_nll"]) and row["nfe"] > 0 and row["step_seconds"] > 0
        bound = {"none": 82, "weights": row["keep"] * 82, "neurons": 1.2 * row["keep"] * 82}[method]  # whole neurons
        assert row["size"] == 82 if method == "none" else row["size"] <= bound
        assert row["live_size"] <= row["size"]
        if cycle == 0:  # one dense net per seed
            assert row["test_nll"] == rows[seed, "weights", 0]["test_nll"]
    assert rows[0, "none", 0]["test_nll"] != rows[1, "none", 0]["test_nll"]
    assert re.search(r"weights\s+0\.5\s+41", printed) and "+-" in printed


def test_jobs_run_in_processes_and_a_failure_is_told(tmp_path):
    first = job_module.Job(
        "gaussians", str(tmp_path), net="cnf_l2_h16", rows=200, eval_rows=50, tolerance=1e-3, engine="reference",
        settings={"epochs": 1, "batch": 100},
    )  # fmt: skip
    broken = dataclasses.replace(first, seed=1, data="no_such_data")
    seen = []
    failed = job_module.run_jobs([first, broken], 2, lambda job, facts: seen.append((job.name, "finished" in facts)))
    assert list(failed) == ["seed 1, dense"] and "ValueError: name must be one of" in failed["seed 1, dense"]
    assert ("seed 0, dense", True) in seen
    (row,) = json.loads((first.own_folder / "results.json").read_text())
    again = dataclasses.replace(first, folder=str(tmp_path / "here"))
    (here,) = job_module.run_job(again)
    assert here["test_nll"] == row["test_nll"]  # of a process of its own, or not


@pytest.mark.parametrize("arguments, word", [
    (["train", "cifar"], "preset must be one of gaussians"),
    (["train", "gas", "--data", "no.npz"], "no.npz does not exist"),
    (["train", "gaussians", "--net", "resnet"], "net must look like"),
    (["train", "gaussians", "--epochs", "0"], "epochs must be a whole number >= 1"),
    (["train", "gaussians", "--engine", "warp"], "engine"),
    (["sweep", "gaussians", "--keeps", "0.5,x"], "keep ratios must be numbers"),
    (["sweep", "gaussians", "--keeps", "1.5"], "must lie in (0, 1)"),
    (["sweep", "gaussians", "--method", "filters"], "--method must be"),
    (["prune", "nowhere", "--keep", "0.5"], "nowhere does not exist"),
])  # fmt: skip
def test_commands_refuse_bad_arguments(arguments, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert word in run(*arguments, code=1)
    assert not list(tmp_path.iterdir())


def test_rows_can_come_from_a_file(tmp_path):
    import numpy as np

    generator = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", **{part: generator.normal(size=(60, 2)) for part in ("train", "val", "test")})
    printed = run("train", "gaussians", *NET, "--epochs", 1, "--data", tmp_path / "mine.npz", "--folder", tmp_path)
    assert "82 parameters" in printed
    np.savez(tmp_path / "bad.npz", train=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="has no array test, val"):
        job_module.load_rows(str(tmp_path / "bad.npz"))


def test_another_data_set_in_the_same_folder_is_said_in_words(tmp_path):
    import numpy as np

    def write(seed):
        rows = np.random.default_rng(seed).normal(size=(60, 2))
        np.savez(tmp_path / "mine.npz", train=rows, val=rows, test=rows)

    write(0)
    train_it = ["train", "gaussians", *NET, "--epochs", 1, "--folder", tmp_path / "run"]
    run(*train_it, "--data", tmp_path / "mine.npz")
    assert "data was '" in run(*train_it, "--data", "moons", code=1)
    write(1)
    for arguments in ([*train_it, "--data", tmp_path / "mine.npz"], ["prune", tmp_path / "run", "--keep", "0.5"]):
        printed = run(*arguments, code=1)
        assert "it was trained on other data, 60 + 60 rows of mine (sha256 " in printed and printed.count("\n") == 1
    with pytest.raises(ValueError, match=r"training rows must be \[n, 2\], got \[60, 3\]"):
        train(make_flow(), torch.zeros(60, 3), steps=1)
    sets = small_set()
    sets.val[3, 0] = math.inf
    with pytest.raises(ValueError, match=r"validation rows has NaN or infinite entries in 1 of 24 rows: 3"):
        train(make_flow(), sets, steps=1)


def test_a_first_run_that_failed_leaves_the_folder_to_the_next(tmp_path, monkeypatch):
    def fails(*arguments, **named):
        raise NonFiniteLossError("10 training steps in a row failed")

    arguments = ["train", "gaussians", *TINY, "--folder", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "sparse_flow", fails)
        assert "error: 10 training steps in a row failed" in run(*arguments, "--lr", "1", code=1)
    run(*arguments)
    refused = run(*arguments, "--lr", "1", code=1)  # now it holds a run
    assert "holds another run (differing: settings): lr was None and is now 1.0; choose another folder" in refused


def test_damaged_files_of_a_run_are_named_with_what_to_delete(tmp_path):
    arguments = ["train", "gaussians", *TINY, "--folder", tmp_path]
    printed = run(*arguments)
    own = tmp_path / "seed_0" / "dense"
    whole = (own / "run.json").read_text()
    for damage in (b"", b"\xff\x00", whole[:50].encode(), b"[]", b"{}", b'{"keeps": 3}'):
        (own / "run.json").write_bytes(damage)
        for command in (arguments, ["prune", tmp_path, "--keep", "0.5"]):
            refused = run(*command, code=1)
            assert f"error: {own / 'run.json'} is " in refused and "; delete it, and run the" in refused
    (own / "run.json").unlink()
    run(*arguments)
    assert (own / "run.json").read_text() == whole
    for damage in (b"", b"\xff\x00", b"{}", b'[{"cycle": 0}]', b"[[]]"):  # measured again, on the checkpoints
        (own / "results.json").write_bytes(damage)
        (table,) = [line for line in run(*arguments).splitlines() if "done: " in line]
        assert table.split(", test NLL")[1].split(",")[0] in printed
    (own / "cycle_00.safetensors").write_bytes(b"")
    refused = run(*arguments, code=1)
    assert f"{own / 'cycle_00.safetensors'} is not a readable checkpoint" in refused and "delete it" in refused


def test_pruning_does_not_write_into_the_folder_of_another_run(tmp_path):
    for seed in (0, 1):
        run("train", "gaussians", *TINY, "--seed", seed, "--folder", tmp_path / str(seed))
    other = tmp_path / "1" / "seed_1" / "dense"
    before = {path: path.read_bytes() for path in other.iterdir()}
    assert "holds another run" in run("prune", tmp_path / "0", "--keep", "0.5", "--out", other, code=1)
    assert before == {path: path.read_bytes() for path in other.iterdir()}


def test_live_size_counts_what_is_left_after_simplify():
    flow = make_flow()
    assert live_size(flow) == size(flow) == 82
    with torch.no_grad():
        flow.vector_fields[0].layers[1].linear.weight[:, :4] = 0  # four neurons that nobody reads
    assert live_size(flow) == size(flow) - 4 * 3
