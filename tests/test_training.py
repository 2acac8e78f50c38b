"""Training: it learns, repeats by seed, respects masks, survives bad steps, and resumes."""

import math

import pytest
import torch
from torch import nn

from sparseflow_kernels.data.dataset import Dataset
from sparseflow_kernels.flows import ContinuousFlow, NeuralClassifier, mlp_field, multiscale_flow, toy_field
from sparseflow_kernels.pruning import copy_module, dense_size, prune_neurons_, prune_weights_, size
from sparseflow_kernels.solution import GradientError
from sparseflow_kernels.training import (
    CheckpointError,
    NonFiniteLossError,
    evaluate_nll,
    load_checkpoint,
    save_checkpoint,
    train,
)
from sparseflow_kernels.training.direct import DirectGradient

torch.set_num_threads(1)


def make_flow(seed=0, **settings):
    torch.manual_seed(seed)
    return ContinuousFlow(toy_field("l2_h16"), rtol=1e-3, atol=1e-3, **settings)


def rows(n=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.4 * torch.randn(n, 2, generator=generator) + torch.tensor([1.0, -0.5])


FAST = {"batch": 128, "lr": 0.05}


def test_training_lowers_the_nll_to_near_the_entropy():
    flow, seen = make_flow(), []
    before = evaluate_nll(flow, rows(seed=1))
    history = train(flow, rows(), steps=60, progress=seen.append, **FAST)
    after = evaluate_nll(flow, rows(seed=1))
    entropy = 1 + math.log(2 * math.pi) + 2 * math.log(0.4)
    assert before > entropy + 0.5 and after < entropy + 0.15
    assert len(seen) == 60 and seen[-1]["step"] == seen[-1]["steps"] == 60 and seen[-1]["nfe"] > 0
    assert len(history) == 30 and history[-1]["nll"] < history[0]["nll"] and history[-1]["skipped"] == 0
    assert all(entry["nfe"] > 0 and entry["seconds"] > 0 for entry in history)


def test_same_seed_same_run_and_the_global_generator_is_left_alone():
    flows = [make_flow(divergence="hutchinson") for _ in range(3)]
    torch.manual_seed(77)
    state = torch.get_rng_state()
    for flow, seed in zip(flows, (4, 4, 5)):
        train(flow, rows(), epochs=2, seed=seed, **FAST)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)  # where the global generator stands must not matter
        state = torch.get_rng_state()
    a, b, c = ([p.detach() for p in flow.parameters()] for flow in flows)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not all(torch.equal(x, y) for x, y in zip(a, c))


def test_pruned_entries_stay_pruned_and_live_ones_learn():
    flow = make_flow()
    prune_weights_(flow, 0.5)
    reached = size(flow)
    before = copy_module(flow)
    train(flow, rows(), steps=4, weight_decay=0.1, **FAST)
    assert size(flow) == reached == dense_size(flow) // 2
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), flow.parameters())]
    assert all(moved)


def test_evaluation_is_exact_whatever_the_flow_trains_with():
    hutchinson, exact = make_flow(divergence="hutchinson"), make_flow()
    x = rows(50)
    value = evaluate_nll(hutchinson, x, batch=50)
    assert value == pytest.approx(evaluate_nll(exact, x, batch=50), abs=1e-6)
    assert hutchinson.training and hutchinson.eval_divergence is None
    torch.manual_seed(0)
    assert evaluate_nll(hutchinson, x, exact=False) != pytest.approx(value, abs=1e-6)
    with pytest.raises(ValueError, match="no rows"):
        evaluate_nll(exact, x[:0])


class Sometimes(nn.Module):
    """A field that is not finite at chosen calls."""

    def __init__(self, bad):
        super().__init__()
        self.field, self.bad, self.solves = mlp_field(2, (8,), layer="ignore"), bad, -1

    def forward(self, t, y):
        if float(t.detach()) == 0.0:
            self.solves += 1
        return self.field(t, y) * (math.nan if self.bad(self.solves) else 1.0)


class Root(nn.Module):
    """A field whose value is finite where its gradient is not."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, t, y):
        return -y + self.offset.clamp(min=0).sqrt()


def test_bad_steps_are_skipped_and_too_many_raise():
    torch.manual_seed(0)
    flow = ContinuousFlow(Sometimes(lambda solve: solve in (1, 3)), method="rk4")
    history = train(flow, rows(), steps=6, **FAST)
    assert sum(entry["skipped"] for entry in history) == 2
    assert all(bool(torch.isfinite(p).all()) for p in flow.parameters())
    torch.manual_seed(0)
    flow = ContinuousFlow(Sometimes(lambda solve: solve >= 2), method="rk4")
    with pytest.raises(
        NonFiniteLossError, match="3 training steps in a row failed, the last, step 5, because the loss is nan"
    ):
        train(flow, rows(), steps=20, max_failures=3, **FAST)
    assert all(bool(torch.isfinite(p).all()) for p in flow.parameters())
    flow = ContinuousFlow(Root(), method="rk4")
    with pytest.raises(NonFiniteLossError, match="because the gradient's norm is"):
        train(flow, rows(), steps=2, max_failures=1, **FAST)
    flow = ContinuousFlow(Sometimes(lambda solve: True))  # an adaptive solve gives up by itself
    with pytest.raises(NonFiniteLossError, match="the solve failed: underflow in dt"):
        train(flow, rows(), steps=20, max_failures=1, **FAST)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_no_numbers_are_named(bad):
    spoiled = rows().clone()
    spoiled[[3, 17], 1] = bad
    flow = make_flow()
    before = [p.detach().clone() for p in flow.parameters()]
    words = rf"has NaN or infinite entries in 2 of {len(spoiled)} rows: 3, 17"
    with pytest.raises(ValueError, match=f"^data's training rows {words}"):
        train(flow, spoiled, steps=2, **FAST)
    with pytest.raises(ValueError, match=f"^x {words}"):
        evaluate_nll(flow, spoiled, batch=2)
    for part in ("train", "val", "test"):
        with pytest.raises(ValueError, match=f"^data set 'mine': {part} {words}"):
            Dataset("mine", **{**dict.fromkeys(("train", "val", "test"), rows()), part: spoiled})
    assert all(map(torch.equal, before, flow.parameters()))


def test_a_gradient_that_raises_is_a_bad_step():
    flow, calls = make_flow(), []

    def hook(grad):
        calls.append(grad)
        if len(calls) == 2:
            raise GradientError("the gradient is not finite", "Mend it.", 3, 0.5, 0.1, [7], 9)

    flow.vector_fields[0].layers[0].linear.bias.register_hook(hook)
    assert train(flow, rows(), steps=2, **FAST)[0]["skipped"] == 1
    calls.clear()
    with pytest.raises(NonFiniteLossError, match=r"in step 3 of 9 \(t = 0.5, dt = 0.1\), 1 row\(s\) of the batch: 7"):
        calls.append(None)
        train(flow, rows(), steps=2, max_failures=1, **FAST)


def test_train_goes_on_from_its_checkpoint(tmp_path):
    path, whole, stopped = tmp_path / "run.safetensors", make_flow(), make_flow()
    train(whole, rows(), epochs=3, engine="auto", **FAST)

    def stop(facts):
        if facts["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, rows(), epochs=3, engine="auto", checkpoint=path, progress=stop, **FAST)
    resumed = make_flow(seed=5)
    history = train(resumed, rows(), epochs=3, engine="auto", checkpoint=path, **FAST)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters())) and len(history) == 3
    before = resumed.state_dict()
    with pytest.raises(CheckpointError, match=r"another run \(differing: flow\)"):
        train(ContinuousFlow(toy_field("l2_h16"), rtol=1e-4), rows(), epochs=3, engine="auto", checkpoint=path, **FAST)
    assert all(torch.equal(before[name], tensor) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize("model", ["hutchinson", "exact", "chain of two", "rk4", "classifier", "end times", "images"])
@pytest.mark.parametrize("prune", [prune_weights_, prune_neurons_])
def test_the_direct_gradient_is_autograds(model, prune):
    torch.manual_seed(0)
    fields = [toy_field("l3_h8", "tanh") for _ in range(2 if model == "chain of two" else 1)]
    settings = {"rtol": 1e-5, "atol": 1e-5}
    if model == "rk4":
        settings |= {"method": "rk4", "options": {"step_size": 0.1}}
    x, labels = rows(64), torch.arange(64) % 2
    if model == "end times":
        fields, settings = [*fields, toy_field("l3_h8")], settings | {"train_end_time": True}
    if model == "classifier":
        flow = NeuralClassifier(fields, **settings)
    elif model == "images":  # fields before and behind a squeeze, and of what is left when half of it is done
        settings |= {"blocks": 1, "levels": 5, "alpha": 0.05, "flip": True, "train_end_time": True, "scales": 2}
        flow, x = multiscale_flow((1, 4, 4), (4, 3), **settings), torch.randint(5, (64, 16)).float()
    else:
        flow = ContinuousFlow(fields, divergence="exact" if model == "exact" else "hutchinson", **settings)
    prune(flow, 0.5)  # leaves constants that are folded, made anew from parameters at every step
    compiled = flow.compile("cpu").train()
    torch.manual_seed(3)
    loss = compiled.row_nll(x, labels).mean()
    loss.backward()
    expected = [p.grad.clone() for p in compiled.parameters()]
    for p in compiled.parameters():
        p.grad.zero_()
    torch.manual_seed(3)
    value, nfe = DirectGradient.of(compiled)(x, labels)
    assert value == pytest.approx(loss.item(), abs=1e-5) and nfe == compiled.stats.nfe
    for p, gradient in zip(compiled.parameters(), expected):
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-6)


def test_what_only_autograd_can_differentiate_is_left_to_it():
    field = toy_field("l2_h4")
    assert DirectGradient.of(ContinuousFlow(field)) is None  # not compiled
    moving = {"train_end_time": True, "method": "rk4", "options": {"step_size": 0.1}}
    others = moving, {"gradient": "adjoint"}, {"penalties": {"kinetic": 1.0}}, {"batch_norm": 0.0}
    for settings in others:
        assert DirectGradient.of(ContinuousFlow(field, **settings).compile("cpu")) is None, settings
    assert DirectGradient.of(ContinuousFlow(field).compile("reference")) is None
    hooked = ContinuousFlow(field).compile("cpu")
    hooked.vector_fields[0].register_forward_hook(lambda part, inputs, output: None)
    assert DirectGradient.of(hooked) is None

    class Own(ContinuousFlow):
        def row_nll(self, x, labels=None):
            return super().row_nll(x) + 1.0

    assert DirectGradient.of(Own(field).compile("cpu")) is None


def test_a_classifier_learns_its_labels_and_goes_on_from_its_checkpoint(tmp_path):
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 0] > x[:, 1] ** 2 - 0.5).long()
    data = Dataset("parabola", x, x[:0], x[:0], train_labels=labels)
    settings = {"batch": 100, "lr": 0.05, "optimizer": "adam", "weight_decay": 1e-4, "engine": "auto"}

    def made():
        torch.manual_seed(0)
        return NeuralClassifier(toy_field("l2_h16", "tanh"), rtol=1e-4, atol=1e-4)

    whole, parts, path = made(), made(), tmp_path / "c.safetensors"
    history = train(whole, data, epochs=20, **settings)
    assert (whole.predict(x) == labels).float().mean() > 0.9 and history[-1]["nll"] < 0.5 * history[0]["nll"]
    assert evaluate_nll(whole, x, labels) == pytest.approx(whole.row_nll(x, labels).mean().item(), rel=1e-4)

    def stop(facts):
        if facts["epoch"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, data, epochs=20, checkpoint=path, progress=stop, **settings)
    train(parts, data, epochs=20, checkpoint=path, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    for bad, word in ((None, "the data has none"), (labels.float(), "int64"), (labels + 1, "they go from 1 to 2")):
        with pytest.raises(ValueError, match=word):
            train(made(), Dataset("bad", x, x[:0], x[:0], train_labels=bad), epochs=1, **settings)


def test_clipping_bounds_the_step():
    flow = make_flow()
    before = [p.detach().clone() for p in flow.parameters()]
    train(flow, rows(), steps=1, optimizer="sgd", lr=1.0, weight_decay=0.0, clip=1e-3, batch=256)
    moved = math.sqrt(sum(float((p.detach() - b).square().sum()) for p, b in zip(flow.parameters(), before)))
    assert moved == pytest.approx(1e-3, rel=0.01)


def test_learning_rate_falls_geometrically(monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def watched(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    train(make_flow(), rows(), steps=3, lr=0.04, lr_end=0.01, optimizer="sgd")
    assert rates == pytest.approx([0.04, 0.02, 0.01])


def test_bad_arguments():
    flow = make_flow()
    with pytest.raises(ValueError, match="exactly one of epochs and steps"):
        train(flow, rows())
    with pytest.raises(ValueError, match="batch must be a whole number"):
        train(flow, rows(), steps=1, batch=0)
    with pytest.raises(ValueError, match="lr_end must be None, or above 0"):
        train(flow, rows(), steps=1, lr=0.1, lr_end=0.2)
    with pytest.raises(ValueError, match="optimizer must be one of"):
        train(flow, rows(), steps=1, optimizer="lion")
    with pytest.raises(ValueError, match="milestones must be whole numbers of epochs that rise"):
        train(flow, rows(), epochs=9, milestones=(5, 3))
    with pytest.raises(ValueError, match="milestones or lr_end, not both"):
        train(flow, rows(), epochs=9, milestones=(5,), lr_end=1e-4)
    with pytest.raises(ValueError, match="select='best' needs data with validation rows"):
        train(flow, rows(), epochs=1, select="best")


# ----------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_brings_masks_to_a_dense_flow(tmp_path):
    flow = make_flow(train_end_time=True)
    prune_weights_(flow, 0.4)
    train(flow, rows(), steps=2, **FAST)
    save_checkpoint(tmp_path / "a.safetensors", flow, {"keep": 0.4, "note": "ü"})
    other = make_flow(seed=3, train_end_time=True)
    assert load_checkpoint(tmp_path / "a.safetensors", other) == {"keep": 0.4, "note": "ü"}
    assert size(other) == size(flow)
    x = rows(20)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    train(other, rows(), steps=1, **FAST)
    assert size(other) == size(flow)


def test_foreign_and_broken_checkpoints_are_refused_and_change_nothing(tmp_path):
    flow, path = make_flow(), tmp_path / "a.safetensors"
    before = [p.detach().clone() for p in flow.parameters()]
    save_checkpoint(path, ContinuousFlow(toy_field("l2_h8")))
    with pytest.raises(CheckpointError, match="not of this module"):
        load_checkpoint(path, flow)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path, flow)
    pruned = make_flow()
    save_checkpoint(path, pruned)
    prune_weights_(pruned, 0.5)
    with pytest.raises(CheckpointError, match="not of this module"):
        load_checkpoint(path, pruned)
    assert all(torch.equal(p, b) for p, b in zip(flow.parameters(), before))
