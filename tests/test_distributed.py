"""Data-parallel training: two processes take the steps that one would take."""

import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from cpu_cases import isolated_environment
from torch import nn

from sparseflow_kernels.flows import ContinuousFlow, mlp_field
from sparseflow_kernels.pruning import prune_weights_
from sparseflow_kernels.training import NonFiniteLossError, sparse_flow, train
from sparseflow_kernels.data.dataset import Dataset

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")

LOOP = {"epochs": 1, "batch": 16, "lr": 0.01, "clip": 5.0}


def make_flow(method="rk4", tolerance=1e-9):
    torch.manual_seed(0)
    options = {"step_size": 0.25} if method == "rk4" else None
    field = mlp_field(2, (8, 8), "concatsquash", "tanh")
    flow = ContinuousFlow(field, method=method, options=options, rtol=tolerance, atol=tolerance, train_end_time=True)
    return prune_weights_(flow.double(), 0.5)


def rows(n=37):  # an odd number: the ranks' shares differ, and so does the last batch
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.5 + 1


def sets():
    return Dataset("here", rows(), rows(10), rows(10))


class Poisoned(nn.Module):
    """Not finite where the state starts beyond 90: one rank meets such a row, the other does not."""

    def __init__(self):
        super().__init__()
        self.field = mlp_field(2, (4,), layer="ignore")

    def forward(self, t, y):
        return self.field(t, y) * torch.where(y.abs().amax() > 90, math.nan, 1.0)


def poisoned_rows():
    x = rows(16).float()
    x[3] = 99.0
    return x


def gradients_of_ddp(flow, x, share):
    wrapped = nn.parallel.DistributedDataParallel(flow)
    (-wrapped(x[share]).mean()).backward()
    return {name: p.grad for name, p in flow.named_parameters() if p.grad is not None}


def results(folder):
    """What one process and each of two compute alike."""
    found = {}
    for method in ("rk4", "dopri5"):
        flow = make_flow(method)
        history = train(flow, rows(), engine="auto", epochs=1, optimizer="sgd", lr=0.1, batch=19)
        found[f"{method} nll"] = [entry["nll"] for entry in history]
        found[method] = flow.state_dict()
    poisoned = ContinuousFlow(Poisoned(), method="rk4")
    found["skipped"] = [h["skipped"] for h in train(poisoned, poisoned_rows(), epochs=2, batch=8)]
    found["poisoned"] = poisoned.state_dict()
    try:
        train(poisoned, poisoned_rows()[3:4].repeat(4, 1), epochs=4, max_failures=3)
    except NonFiniteLossError as error:
        found["error"] = str(error)[:40]
    cycles = list(sparse_flow(make_flow(), sets(), (0.4,), folder=folder, control=True, **LOOP))
    found["cycles"] = {f"{c.index} {name}": t for c in cycles for name, t in c.flow.state_dict().items()}
    found["sizes"] = [c.size for c in cycles]
    return found


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = results(folder / "cycles")
    again = list(sparse_flow(make_flow(), sets(), (0.4,), folder=folder / "cycles", control=True, **LOOP))
    found["resumed"] = [cycle.resumed for cycle in again]
    found["ddp"] = gradients_of_ddp(make_flow().compile(), rows(8), slice(4 * rank, 4 * rank + 4))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def close(one, other):
    assert one.keys() == other.keys()
    return all(torch.allclose(one[name], other[name], rtol=1e-6, atol=1e-6) for name in one)


def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(worker, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("rk4", "dopri5", "poisoned", "cycles"):  # all ranks hold the same bits
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    alone = results(tmp_path / "alone")
    for part in ("rk4", "dopri5", "cycles"):
        assert close(first[part], alone[part]), part
    assert not close(alone["rk4"], make_flow().state_dict())
    for method in ("rk4", "dopri5"):
        assert first[f"{method} nll"] == pytest.approx(alone[f"{method} nll"], abs=1e-6)
    assert first["skipped"] == second["skipped"] == alone["skipped"] == [1, 1]  # both ranks, though one could go on
    assert close(first["poisoned"], alone["poisoned"])
    assert first["error"] == second["error"] == alone["error"] == "3 training steps in a row failed, the las"[:40]
    assert first["sizes"] == second["sizes"] == alone["sizes"]
    assert first["resumed"] == second["resumed"] == [True, True]
    flow = make_flow().compile()
    (-flow(rows(8)).mean()).backward()
    assert close(first["ddp"], {name: p.grad for name, p in flow.named_parameters() if p.grad is not None})


def test_torchrun_trains_from_the_command_line(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "sparseflow_kernels", "train", "gaussians", "--net", "cnf_l2_h8", "--rows", "64", "--eval-rows", "20",
        "--epochs", "1", "--batch", "32", "--folder", str(tmp_path),
    ]  # fmt: skip
    environment = isolated_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("dense done") == done.stdout.count("checkpoint: ") == 1  # one process speaks
    assert (tmp_path / "seed_0" / "dense" / "cycle_00.safetensors").exists()
