"""`sparseflow demo`: train, prune, retrain and compile two small flows; pictures of one, figures of the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import data
from ..analysis.bench import interleaved, processor
from ..analysis.peers import BASELINE, OURS, one_thread
from ..analysis.plots import plot_densities
from ..analysis.problems import FieldSpec, Problem
from ..build_info import build_info
from ..data.cache import atomic_write
from ..data.dataset import Dataset
from ..flows import ContinuousFlow, mlp_field
from ..pruning import copy_module, dense_size, remove_masks_
from ..training import CheckpointError, Cycle, evaluate_nll, train_prune_retrain
from .console import fail, progress, say, show_table


TRAINING_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Plan:
    """Sizes of one part of the demo; steps are training steps per cycle, rows bound training and test rows.

    Training solves at TRAINING_TOLERANCE, which is enough for a gradient; what is reported is solved at 1e-5.
    """

    hidden: tuple[int, ...]
    keeps: tuple[float, ...]
    steps: int
    batch: int
    lr: float
    rows: int
    test_rows: int


PICTURES = Plan((64, 64, 64), (0.3, 0.1), 250, 512, 5e-3, 20_000, 4_000)
FIGURES = Plan((256, 256), (0.1,), 250, 500, 5e-3, 100_000, 1_000)
QUICK_PICTURES = Plan((16, 16), (0.5,), 4, 64, 5e-3, 500, 200)
QUICK_FIGURES = Plan((24, 24), (0.2,), 3, 32, 2e-3, 2_000, 40)


def demo(
    out: Annotated[Path, typer.Option(help="folder for pictures, figures and checkpoints")] = Path("demo_output"),
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes, seconds: shows that everything runs, nothing more")] = False,
) -> None:
    """Sparse flows from end to end, in some minutes. Run it again after an interruption: finished cycles are kept."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = out / "checkpoints" / ("quick" if quick else "full")
    try:
        pictures = _pictures(QUICK_PICTURES if quick else PICTURES, checkpoints / "gaussians", out / "densities.png", quick)
        figures = _figures(QUICK_FIGURES if quick else FIGURES, checkpoints / "photos", quick)
    except (CheckpointError, ImportError) as error:
        raise fail(str(error)) from error
    document = {
        "machine": {"processor": processor()}, "build": build_info(), "quick": quick,
        "pictures": pictures, "figures": figures,
    }
    with atomic_write(out / "demo.json") as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")
    say(f"wrote {out / 'densities.png'} and {out / 'demo.json'}")


def _cycles(flow: ContinuousFlow, rows: Dataset, plan: Plan, folder: Path, **options) -> list[Cycle]:
    """Every cycle of train, prune, retrain, with one progress display over all of them."""
    cycles: list[Cycle] = []
    total = plan.steps * (1 + len(plan.keeps))
    with progress(f"training on {rows.name}", total) as update:

        def on_step(facts: dict) -> None:
            update(len(cycles) * plan.steps + facts["step"], f"cycle {len(cycles)}, nll {facts['nll']:.3f}")

        runs = train_prune_retrain(
            flow, rows, plan.keeps, folder=folder, steps=plan.steps, batch=plan.batch, lr=plan.lr, clip=10.0,
            progress=on_step, **options,
        )
        for cycle in runs:
            cycles.append(cycle)
            if cycle.resumed:
                update(len(cycles) * plan.steps, f"keep {cycle.keep:g} was trained before")
    return cycles


def _flow(dim: int, plan: Plan, layer: str, activation: str, **settings) -> ContinuousFlow:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = mlp_field(dim, plan.hidden, layer, activation)
        return ContinuousFlow(field, dim, rtol=TRAINING_TOLERANCE, atol=TRAINING_TOLERANCE, **settings)


def _compiled(cycle: Cycle) -> ContinuousFlow:
    flow = cycle.flow.compile().eval().requires_grad_(False)
    flow.rtol = flow.atol = 1e-5
    return flow


def _pictures(plan: Plan, folder: Path, path: Path, quick: bool) -> list[dict]:
    rows = data.load("gaussians", n=plan.rows)
    flow = _flow(2, plan, "concatsquash", "tanh")
    cycles = _cycles(flow, rows, plan, folder, prune_options={"of": "weights"})
    test = rows.test[: plan.test_rows]
    compiled = {("dense" if cycle.keep == 1 else f"keep {cycle.keep:g}"): _compiled(cycle) for cycle in cycles}
    records = [
        {"name": name, "keep": cycle.keep, "parameters": cycle.size, "nll": evaluate_nll(flow, test)}
        for (name, flow), cycle in zip(compiled.items(), cycles)
    ]
    show_table(
        f"gaussians (2-d), test NLL in nats{_floor(rows)}",
        ("flow", "parameters", "NLL"),
        [(r["name"], str(r["parameters"]), f"{r['nll']:.3f}") for r in records],
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = {name: flow.sample(plan.test_rows) for name, flow in compiled.items()}
        densities = {name: flow.log_prob for name, flow in compiled.items()}
        plot_densities(densities, samples, rows.train, path, extent=2.6, resolution=24 if quick else 160)
    return records


def _floor(rows: Dataset) -> str:
    return "" if rows.floor is None else f" (no model can reach less than {rows.floor:.3f})"


def _figures(plan: Plan, folder: Path, quick: bool) -> list[dict]:
    rows = data.load("photos", rows=plan.rows)
    flow = _flow(rows.dim, plan, "concatsquash", "softplus", divergence="hutchinson", noise="rademacher", eval_divergence="exact")
    dense, pruned = _cycles(flow, rows, plan, folder, prune_options={"of": "weights"})
    test = rows.test[: plan.test_rows]
    nll = {cycle.keep: evaluate_nll(_compiled(cycle), test, batch=500) for cycle in (dense, pruned)}

    problems = {cycle.keep: _problem(cycle, plan, test) for cycle in (dense, pruned)}
    contenders = (("torchdiffeq, dense", dense, BASELINE), ("torchdiffeq, pruned", pruned, BASELINE), ("sparseflow, pruned", pruned, OURS))
    with one_thread():
        runs = {name: contender.prepare(problems[cycle.keep]) for name, cycle, contender in contenders}
        outcomes = {name: run() for name, run in runs.items()}
        times = interleaved(runs, seconds=1.0 if quick else 20.0, most=2 if quick else 15)
    base = sorted(times["torchdiffeq, dense"])
    records = []
    for name, cycle, _ in contenders:
        seconds = sorted(times[name])
        records.append({
            "name": name, "keep": cycle.keep, "parameters": cycle.size, "dense_parameters": dense_size(dense.flow),
            "nll": nll[cycle.keep], "nfe": outcomes[name].nfe, "median_seconds": seconds[len(seconds) // 2],
            "best_seconds": seconds[0], "ratio": base[len(base) // 2] / seconds[len(seconds) // 2],
        })
    difference = (outcomes["torchdiffeq, pruned"].x - outcomes["sparseflow, pruned"].x).abs().max()
    show_table(
        f"photo patches (63-d): test NLL in nats; a solve with Hutchinson's divergence of {len(test)} samples on one core",
        ("solve", "parameters", "NLL", "NFE", "ms/solve", "ratio"),
        [
            (r["name"], str(r["parameters"]), f"{r['nll']:.2f}", str(r["nfe"]), f"{r['median_seconds'] * 1e3:.1f}", f"{r['ratio']:.1f}")
            for r in records
        ],
    )
    say(f"largest difference of the pruned flow's end states between the two solvers: {difference:.1e}")
    return records


def _problem(cycle: Cycle, plan: Plan, test: torch.Tensor) -> Problem:
    """The trained field as a benchmark problem: masks baked in, test rows, fixed noise."""
    module = remove_masks_(copy_module(cycle.flow.vector_fields[0])).requires_grad_(False)
    spec = FieldSpec("photos", test.shape[1], plan.hidden, "concatsquash", "softplus", len(test), "hutchinson", 1.0)
    noise = torch.randint(0, 2, test.shape, generator=torch.Generator().manual_seed(0)).to(test.dtype) * 2 - 1
    return Problem(spec, cycle.keep, module, test, noise)
