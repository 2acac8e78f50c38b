"""What training takes for its data, and what it tells of its epochs."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparseflow_kernels as sfk
from sparseflow_kernels.data.dataset import Dataset
from sparseflow_kernels.flows import ContinuousFlow, mlp_field
from sparseflow_kernels.training import evaluate_nll, train

torch.set_num_threads(1)
ROWS, HELD = torch.randn(96, 2, generator=torch.Generator().manual_seed(0)), torch.randn(32, 2)
FAST = {"epochs": 2, "batch": 32, "lr": 0.05}


def make_flow():
    torch.manual_seed(0)
    return ContinuousFlow(mlp_field(2, (8,)), dim=2, rtol=1e-3, atol=1e-3)


def trained(data, **settings):
    flow = make_flow()
    history = train(flow, data, **{**FAST, **settings})
    return history, [p.detach().clone() for p in flow.parameters()]


@pytest.mark.parametrize("data", [
    ROWS.numpy(), ROWS.numpy().astype(np.float64), Dataset("d", ROWS, ROWS[:0], ROWS[:0]), TensorDataset(ROWS),
    TensorDataset(ROWS, torch.arange(96)), DataLoader(TensorDataset(ROWS), batch_size=32), (ROWS.numpy(), HELD),
])  # fmt: skip
def test_the_same_rows_train_alike_however_they_come(data):
    history, parameters = trained(data)
    expected, ours = trained(ROWS)
    assert [entry["nll"] for entry in history] == [entry["nll"] for entry in expected]
    assert all(torch.equal(a, b) for a, b in zip(parameters, ours))


def test_a_loaders_batch_size_is_the_batch():
    loader = DataLoader(TensorDataset(ROWS), batch_size=48)
    steps = []
    train(make_flow(), loader, epochs=1, progress=steps.append)
    assert len(steps) == 2
    assert len(trained(loader, batch=24, epochs=1)[0]) == 1


def test_a_pair_holds_the_validation_rows():
    history, _ = trained((ROWS, HELD), select="best")
    assert all(np.isfinite(entry["val_nll"]) for entry in history)
    for cycle in sfk.sparse_flow(make_flow(), (ROWS.numpy(), HELD.numpy()), (0.5,), **FAST):
        assert cycle.nll == pytest.approx(evaluate_nll(cycle.flow, HELD), abs=1e-5)
    (cycle,) = sfk.sparse_flow(make_flow(), ROWS, (), **FAST)
    assert np.isnan(cycle.nll)


@pytest.mark.parametrize("data, error, says", [
    ([1.0, 2.0, 3.0], TypeError, r"data: must be rows \[n, dim\].*DataLoader.*got list"),
    ("moons", TypeError, "got str"),
    (np.array([["a", "b"]]), ValueError, "numpy's <U1 is no number"),
    (np.zeros((4, 2, 2)), ValueError, r"one row a sample, got \[4, 2, 2\]; flatten"),
    (DataLoader([{"x": 1.0}]), TypeError, "data: gives dict; it must give rows"),
    ((ROWS, [1]), TypeError, "data's validation rows: must be"),
    (np.full((4, 2), np.nan), ValueError, "rows"),
    (np.zeros((4, 3)), ValueError, r"training rows must be \[n, 2\]"),
])  # fmt: skip
def test_other_data_are_refused_by_what_they_are(data, error, says):
    for call in (lambda: train(make_flow(), data, **FAST), lambda: list(sfk.sparse_flow(make_flow(), data, (), **FAST))):
        with pytest.raises(error, match=says):
            call()


def test_on_epoch_sees_every_epoch_and_ends_the_training(tmp_path):
    seen = []

    def stop_at_third(epoch):
        seen.append(epoch)
        epoch.flow.eval().sample(3)  # draws and modes of a hook are its own
        return epoch.epoch == 3

    path = tmp_path / "run.safetensors"
    flow = make_flow()
    settings = {**FAST, "epochs": 6, "engine": "auto"}
    history = train(flow, ROWS, on_epoch=stop_at_third, checkpoint=path, **settings)
    assert [e.epoch for e in seen] == [1, 2, 3] and all(e.epochs == 6 for e in seen)
    assert [e.metrics["nll"] for e in seen] == [entry["nll"] for entry in history]
    assert all(isinstance(value, (int, float)) for e in seen for value in e.metrics.values())
    plain, _ = trained(ROWS, engine="auto", epochs=3)
    assert [entry["nll"] for entry in plain] == [entry["nll"] for entry in history]
    again = train(make_flow(), ROWS, checkpoint=path, **settings)  # it ended, and is not taken up again
    assert again == history


def test_errors_of_on_epoch_end_the_training_before_that_epoch_is_kept(tmp_path):
    def fail(epoch):
        if epoch.epoch == 2:
            raise RuntimeError("disk full")

    path = tmp_path / "run.safetensors"
    with pytest.raises(RuntimeError, match="disk full"):
        train(make_flow(), ROWS, on_epoch=fail, checkpoint=path, **{**FAST, "epochs": 3})
    seen = []
    history = train(make_flow(), ROWS, on_epoch=lambda e: seen.append(e.epoch), checkpoint=path, **{**FAST, "epochs": 3})
    assert seen == [2, 3] and len(history) == 3


def test_the_loop_says_which_cycle_an_epoch_is_of():
    seen = []
    list(sfk.sparse_flow(
        make_flow(), ROWS, (0.5,), control=True, on_epoch=lambda e: seen.append((e.cycle, e.keep, e.control, e.epoch)),
        **FAST,
    ))  # fmt: skip
    assert seen == [
        (0, 1.0, False, 1), (0, 1.0, False, 2), (1, 0.5, False, 1), (1, 0.5, False, 2), (1, 1.0, True, 1), (1, 1.0, True, 2),
    ]  # fmt: skip


def test_epochs_are_logged_and_not_printed(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="sparseflow_kernels.training"):
        history, _ = trained(ROWS)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and lines[1].startswith(f"epoch 2 of 2: nll {history[1]['nll']:.5g}, nfe ")
    assert capsys.readouterr() == ("", "")


class Torchdyn(nn.Module):
    """torchdyn's convention: arguments of a call in a dictionary, and evaluations counted."""

    def __init__(self):
        super().__init__()
        self.net, self.nfe = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), 0.0

    def forward(self, t, x, args={}):  # noqa: B006 - as it is written there
        self.nfe += 1
        return self.net(x) * args.get("scale", 1.0)


def test_forwards_with_torchdyns_arguments_compile():
    module = Torchdyn()
    field = sfk.compile(module)
    torch.testing.assert_close(field(0.0, ROWS), module(torch.tensor(0.0), ROWS))
    t = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(sfk.odeint(field, ROWS, t), sfk.odeint(module, ROWS, t), rtol=1e-5, atol=1e-5)
