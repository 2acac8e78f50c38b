"""`sparseflow demo`: train, prune, retrain and compile two small flows; pictures of one, figures of the other.

Retraining is training: a pruned flow has had more steps than the dense one it came from. So a copy of the dense flow is
trained on, unpruned, beside it for as many steps more, and the pruned flow is compared with that control.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Callable

import torch
import typer
from torch import Tensor

from .. import data
from ..analysis.bench import interleaved, processor
from ..analysis.peers import BASELINE, OURS, one_thread
from ..analysis.plots import plot_densities
from ..analysis.problems import FieldSpec, Problem
from ..build_info import build_info
from ..data.dataset import Dataset
from ..files import write_json
from ..flows import ContinuousFlow, mlp_field
from ..pruning import copy_module, remove_masks_, size
from ..training import Cycle, evaluate_nll, sparse_flow
from ..training.lock import locked_folder
from .console import progress, say, show_table, stoppable
from .options import OFF


TRAINING_TOLERANCE = 1e-3
CONTROL = "dense, trained on"


@dataclass(frozen=True)
class Plan:
    """Sizes of one part of the demo; steps are training steps per cycle, lr falls to a tenth within each, rows bound
    training and test rows.

    Training solves at TRAINING_TOLERANCE, which is enough for a gradient; what is reported is solved at 1e-5.
    """

    hidden: tuple[int, ...]
    keeps: tuple[float, ...]
    steps: int
    batch: int
    lr: float
    rows: int
    test_rows: int


PICTURES = Plan((64, 64, 64), (0.3, 0.1), 250, 512, 1e-2, 20_000, 4_000)
FIGURES = Plan((256, 256), (0.3, 0.1), 100, 300, 5e-3, 100_000, 1_000)
QUICK_PICTURES = Plan((16, 16), (0.5,), 4, 64, 5e-3, 500, 200)
QUICK_FIGURES = Plan((24, 24), (0.5,), 3, 32, 2e-3, 2_000, 40)


@dataclass(frozen=True)
class Trained:
    """A flow of the demo, as it was trained. keep: 1.0 for the dense ones.  steps: of training, all cycles together."""

    name: str
    keep: float
    steps: int
    flow: ContinuousFlow

    def compiled(self) -> ContinuousFlow:
        flow = self.flow.compile().eval().requires_grad_(False)
        flow.rtol = flow.atol = 1e-5
        return flow

    def record(self, nll: float) -> dict:
        return {
            "name": self.name, "keep": self.keep, "steps": self.steps, "parameters": size(self.flow), "nll": nll,
        }


def demo(
    out: Annotated[Path, typer.Option(help="folder for pictures, figures and checkpoints")] = Path("demo_output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="tiny sizes, seconds: shows that everything runs", show_default=OFF)
    ] = False,
) -> None:
    """Sparse flows from end to end, in some minutes. Run it again after an interruption: finished cycles are kept."""
    with locked_folder(out), stoppable(f"every finished epoch is in {out}"):
        _demo(out, quick)


def _demo(out: Path, quick: bool) -> None:
    checkpoints = out / "checkpoints" / ("quick" if quick else "full")
    picture = out / "densities.png"
    pictures = _pictures(QUICK_PICTURES if quick else PICTURES, checkpoints / "gaussians", picture, quick)
    figures = _figures(QUICK_FIGURES if quick else FIGURES, checkpoints / "photos", quick)
    write_json(out / "demo.json", {
        "machine": {"processor": processor()}, "build": build_info(), "quick": quick,
        "pictures": pictures, "figures": figures,
    })  # fmt: skip
    say(f"wrote {picture} and {out / 'demo.json'}")


def _trained(flow: ContinuousFlow, rows: Dataset, plan: Plan, folder: Path) -> list[Trained]:
    """The dense flow, the pruned ones, and the control; one progress display over all the training."""
    rows = replace(rows, val=rows.val[: plan.test_rows // 4])
    cycles: list[Cycle] = []
    with progress(f"training on {rows.name}", plan.steps * (1 + 2 * len(plan.keeps))) as update:

        def on_step(facts: dict) -> None:
            before = max(0, 2 * facts["cycle"] - 1 + facts["control"])
            what = CONTROL if facts["control"] else _name(facts["keep"])
            update(plan.steps * before + facts["step"], f"{what}, nll {facts['nll']:.3f}")

        for cycle in sparse_flow(
            flow, rows, plan.keeps, folder=folder, prune_options={"of": "weights"}, control=True, progress=on_step,
            steps=plan.steps, batch=plan.batch, lr=plan.lr, lr_end=plan.lr / 10, clip=10.0,
        ):  # fmt: skip
            cycles.append(cycle)
            if cycle.resumed:
                update(plan.steps * (1 + 2 * cycle.index), f"{_name(cycle.keep)} was trained before")
    trained = [Trained(_name(cycle.keep), cycle.keep, plan.steps * (1 + cycle.index), cycle.flow) for cycle in cycles]
    return [*trained, Trained(CONTROL, 1.0, plan.steps * len(cycles), cycles[-1].control_flow)]


def _name(keep: float) -> str:
    return "dense" if keep == 1 else f"keep {keep:g}"


def _flow(dim: int, plan: Plan, **settings) -> ContinuousFlow:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = mlp_field(dim, plan.hidden, "concatsquash", "tanh")
        return ContinuousFlow(field, dim, rtol=TRAINING_TOLERANCE, atol=TRAINING_TOLERANCE, **settings)


# ------------------------------------------------------------------------------------------------ pictures: 2-d density


def _pictures(plan: Plan, folder: Path, path: Path, quick: bool) -> list[dict]:
    rows = data.load("gaussians", n=plan.rows)
    trained = _trained(_flow(2, plan), rows, plan, folder)
    test = rows.test[torch.randperm(len(rows.test), generator=torch.Generator().manual_seed(0))[: plan.test_rows]]
    flows = {one.name: one.compiled() for one in trained}
    records = [one.record(evaluate_nll(flows[one.name], test)) for one in trained]
    show_table(
        f"gaussians (2-d): test NLL in nats; the data's entropy, which no model can beat, is {rows.floor:.3f}",
        ("flow", "training steps", "parameters", "NLL"),
        [(r["name"], str(r["steps"]), str(r["parameters"]), f"{r['nll']:.3f}") for r in records],
    )
    shown = {
        f"{r['name']}: {r['parameters']} parameters\nNLL {r['nll']:.3f} after {r['steps']} steps": flows[r["name"]]
        for r in records if r["name"] != CONTROL
    }
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = {name: flow.sample(plan.test_rows) for name, flow in shown.items()}
        densities: dict[str, Callable[[Tensor], Tensor]] = {name: flow.log_prob for name, flow in shown.items()}
        plot_densities(
            densities, samples, rows.train, path, f"data\nentropy {rows.floor:.3f} nats", extent=2.4,
            resolution=24 if quick else 160,
        )
    return records


# ------------------------------------------------------------------------------------- figures: 63-d photograph patches


def _whitened(rows: Dataset) -> tuple[Dataset, float]:
    """The rows with mean 0 and covariance 1 (symmetric whitening by the training rows), and log|det| of that map: an
    NLL of the whitened rows less it is one of the rows."""
    mean = rows.train.double().mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(rows.train.double().T))
    whiten = (axes / variances.sqrt()) @ axes.T

    def apply(part: Tensor) -> Tensor:
        return ((part.double() - mean) @ whiten).float()

    white = replace(rows, train=apply(rows.train), val=apply(rows.val), test=apply(rows.test))
    return white, -0.5 * float(variances.log().sum())


def _figures(plan: Plan, folder: Path, quick: bool) -> dict:
    rows, log_det = _whitened(data.load("photos", rows=plan.rows))
    flow = _flow(rows.dim, plan, divergence="hutchinson", noise="rademacher", eval_divergence="exact")
    trained = _trained(flow, rows, plan, folder)
    test = rows.test[: plan.test_rows]
    normal = torch.distributions.Normal(0.0, 1.0)
    gaussian = -float(normal.log_prob(test).sum(1).mean()) - log_det
    records = {one.name: one.record(evaluate_nll(one.compiled(), test, batch=500) - log_det) for one in trained}
    show_table(
        "photograph patches (63-d): test NLL in nats, exact trace; grey levels from 0 to 1",
        ("model", "training steps", "parameters", "NLL"),
        [
            ("Gaussian of the same covariance", "", str(rows.dim * (rows.dim + 3) // 2), f"{gaussian:.1f}"),
            *((r["name"], str(r["steps"]), str(r["parameters"]), f"{r['nll']:.1f}") for r in records.values()),
        ],
    )
    say("")

    pruned, control = trained[-2:]
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    outcomes: dict[tuple[str, str], Any] = {}
    with one_thread():
        for one in (control, pruned):
            problem = _problem(one, plan, test)
            for contender in (BASELINE, OURS):
                run = runs[one.name, contender.name] = contender.prepare(problem)
                outcomes[one.name, contender.name] = run()
        times = interleaved(runs, seconds=1.0 if quick else 20.0, most=2 if quick else 15)
    base = times[control.name, BASELINE.name]
    base_nfe = outcomes[control.name, BASELINE.name].nfe
    solves = []
    for (name, solver), taken in times.items():
        nfe = outcomes[name, solver].nfe
        ratio = statistics.median(b / a for a, b in zip(taken, base))
        solves.append({
            "solver": solver, **records[name], "nfe": nfe, "median_seconds": statistics.median(taken),
            "best_seconds": min(taken), "ratio": ratio, "ratio_per_evaluation": ratio * nfe / base_nfe,
        })
    show_table(
        f"a solve of {len(test)} patches with Hutchinson's divergence: dopri5, tolerance 1e-5, float32, one core",
        ("solver", "flow", "parameters", "NLL", "NFE", "ms/solve", "ratio", "ratio/NFE"),
        [
            (
                s["solver"], s["name"], str(s["parameters"]), f"{s['nll']:.1f}", str(s["nfe"]),
                f"{s['median_seconds'] * 1e3:.1f}", f"{s['ratio']:.1f}", f"{s['ratio_per_evaluation']:.1f}",
            )
            for s in solves
        ],
    )
    for name in (control.name, pruned.name):
        theirs, ours = outcomes[name, BASELINE.name], outcomes[name, OURS.name]
        say(f"{name}: the two solvers' end states differ by at most {float((theirs.x - ours.x).abs().max()):.1e}")
    return {"gaussian_nll": gaussian, "flows": list(records.values()), "solves": solves}


def _problem(one: Trained, plan: Plan, test: Tensor) -> Problem:
    """The trained field as a benchmark problem: masks baked in, test rows, fixed noise."""
    module = remove_masks_(copy_module(one.flow.vector_fields[0])).requires_grad_(False)
    spec = FieldSpec("photos", test.shape[1], plan.hidden, "concatsquash", "tanh", len(test), "hutchinson", 1.0)
    noise = torch.randint(0, 2, test.shape, generator=torch.Generator().manual_seed(0)).to(test.dtype) * 2 - 1
    return Problem(spec, one.keep, module, test, noise)
