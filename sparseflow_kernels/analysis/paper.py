"""The Sparse Flows experiments (arXiv 2106.12718): which runs there are, and running one.

A run trains one net densely, prunes and retrains it down a list of keep ratios, and trains an unpruned control beside
it (`sparse_flow`). After every cycle it writes what it found into `results/<name>.json`, whole or not at all, and what
pictures need into `pictures/<name>/`; checkpoints are in `checkpoints/<name>/`, so that a later call goes on from them.

Size is the paper's: non-zero entries over all parameters; prune ratio = 1 - keep ratio. All NLLs are of the test rows,
by the exact trace, in nats.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import numpy
import torch
from torch import Tensor

from .. import data
from ..build_info import build_info
from ..files import DamagedFileError, atomic_write, read_json, write_json
from ..data.dataset import Dataset
from ..flows import ContinuousFlow
from ..odeint import solve
from ..pruning import copy_module
from ..training import PRESETS, Cycle, NonFiniteLossError, TrainingSettings, sparse_flow
from ..training.settings import OPTIMIZERS
from .bench import processor
from .hessian import TRACE_PRODUCTS, LossHessian, curvature, exact_curvature
from .modes import REPEATS, SAMPLES, Modes, mode_coverage

Progress = Callable[[dict[str, Any]], None]

_FORMAT = "sparseflow-paper-1"


# ------------------------------------------------------------------------------------------------------ the experiments


@dataclass(frozen=True)
class Analysis:
    """How much is measured.

    test_rows: of the test and of the validation rows, None for all.  samples, repeats: of the mode analysis.
    hessian_rows: of the training rows, None for the paper's tenth.  hessian_steps, hessian_probes: of Lanczos.
    resolution: of a density's picture, points a side; 0 for no pictures.  torch_steps: of dense torch, to be timed.
    """


    test_rows: int | None = None
    samples: int = SAMPLES
    repeats: int = REPEATS
    hessian_rows: int | None = None
    hessian_steps: int = 100
    hessian_probes: int = 3
    resolution: int = 120
    torch_steps: int = 50


@dataclass(frozen=True)
class Experiment:
    """One run of the loop on a preset of `training.PRESETS`.

    net: as `Preset.flow` has it: "ffjord_l2_h128" trains with Hutchinson's trace, "cnf_l2_h128" with the exact one.
    settings, retraining: what differs from the preset's `TrainingSettings`, and in retraining from those.
    tolerance: rtol and atol, None for the preset's.
    """

    preset: str
    net: str
    method: str
    seed: int
    keeps: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    retraining: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = None
    analysis: Analysis = Analysis()

    @property
    def title(self) -> str:
        """What runs of several seeds share."""
        return f"{self.preset} {self.net} {self.method}"

    @property
    def name(self) -> str:
        return f"{self.title.replace(' ', '-')}-seed{self.seed}"

    @property
    def dataset(self) -> str:
        return PRESETS[self.preset].data

    def flow(self) -> ContinuousFlow:
        """The flow before training, drawn with this experiment's seed; in eval mode its trace is exact."""
        settings: dict[str, Any] = {"eval_divergence": "exact"}
        if self.tolerance is not None:
            settings |= {"rtol": self.tolerance, "atol": self.tolerance}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return PRESETS[self.preset].flow(self.net, **settings)

    def training(self) -> tuple[TrainingSettings, dict[str, Any]]:
        """(of the dense flow, what differs in retraining)."""
        preset = PRESETS[self.preset]
        again = {name: value for name, value in preset.retrain.items() if name not in self.settings}
        return preset.training.changed(**self.settings), again | self.retraining

    def steps(self, rows: int, cycle: int) -> int:
        """Steps of one training, the dense one in cycle 0, on so many rows."""
        dense, again = self.training()
        settings = dense.changed(**again) if cycle else dense
        if settings.steps is not None:
            return settings.steps
        batch = min(settings.batch, rows)
        return settings.epochs * max(1, (rows + batch // 2) // batch)  # a last batch below half is left out

    def steps_through(self, rows: int, cycles: int | None = None) -> int:
        """Steps of the dense training and so many cycles (None: all) with their control."""
        return self.steps(rows, 0) + 2 * (len(self.keeps) if cycles is None else cycles) * self.steps(rows, 1)


TOYS = ("gaussians", "gaussians_spiral", "spirals2")
_WITHOUT_MODES = ("spirals2",)  # the means of two spiral arms are no modes


@dataclass(frozen=True)
class Quick:
    """One line of the quick run: epochs of the dense training and of each retraining."""

    preset: str
    net: str
    keeps: tuple[float, ...]
    epochs: int
    retraining_epochs: int


# Chosen for about 12 minutes on two cores, from the time of a training step per evaluation of the field: l2_h128 takes
# 0.25 ms dense (NFE 40 to 60), l4_h64 1.25 ms (NFE 100 to 150, by its large learning rate), pruned ones half of it.
# The costly lines come first, so that two processes end at about the same time.
QUICK_TOYS = (
    Quick("gaussians_spiral", "ffjord_l4_h64", (0.8, 0.6, 0.4, 0.2, 0.1), 80, 20),
    Quick("spirals2", "ffjord_l4_h64", (0.8, 0.6, 0.4, 0.2, 0.1), 60, 12),
    Quick("gaussians", "ffjord_l2_h128", (0.8, 0.6, 0.4, 0.3, 0.2, 0.1), 100, 60),
    Quick("gaussians", "cnf_l2_h128", (0.8, 0.6, 0.4, 0.3, 0.2, 0.1), 100, 50),
)
QUICK_ANALYSIS = Analysis(
    samples=5000, repeats=3, hessian_rows=512, hessian_steps=40, hessian_probes=2, resolution=80
)


def toy_experiments(
    quick: bool = False,
    *,
    names: Sequence[str] | None = None,
    nets: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    keeps: Sequence[float] | None = None,
    seeds: int | None = None,
) -> list[Experiment]:
    """The toy runs. What is None is the paper's: its three densities and their main nets, both methods, 29 keep
    ratios, 3 seeds; with `quick`, the lines of QUICK_TOYS, by weights and one seed (other nets than in it as its first
    line of the density)."""
    found = []
    for name in dict.fromkeys(line.preset for line in QUICK_TOYS):
        if names is not None and name not in names:
            continue
        preset, lines = PRESETS[name], {line.net: line for line in QUICK_TOYS if line.preset == name}
        for net in nets or (lines if quick else preset.nets):
            line = lines.get(net, next(iter(lines.values())))
            analysis, short = (QUICK_ANALYSIS if quick else Analysis()), {}
            if name in _WITHOUT_MODES:
                analysis = dataclasses.replace(analysis, repeats=0)
            if quick:
                short = {"settings": {"epochs": line.epochs}, "retraining": {"epochs": line.retraining_epochs}}
            ratios = keeps if keeps is not None else line.keeps if quick else preset.keep_ratios
            found += [
                Experiment(name, net, method, seed, tuple(ratios), analysis=analysis, **short)
                for method in methods or (("weights",) if quick else ("weights", "neurons"))
                for seed in range(seeds or (1 if quick else preset.repetitions))
            ]
    return sorted(found, key=lambda one: one.seed)


def power_experiments(
    quick: bool = False, *, methods: Sequence[str] | None = None, keeps: Sequence[float] | None = None,
    seeds: int | None = None,
) -> list[Experiment]:  # fmt: skip
    """The POWER runs by the paper's settings; with `quick` some hundred steps at batch 1000 and tolerance 1e-5, judged
    on 10,000 test rows."""
    preset = PRESETS["power"]
    short: dict[str, Any] = {"analysis": Analysis(repeats=0, resolution=0, torch_steps=5)}
    if quick:
        short = {
            "settings": {"steps": 400, "batch": 1000, "milestones": (), "select": "last"}, "retraining": {"steps": 200},
            "tolerance": 1e-5,
            "analysis": dataclasses.replace(
                QUICK_ANALYSIS, repeats=0, resolution=0, test_rows=10_000, torch_steps=10, hessian_probes=1
            ),
        }  # fmt: skip
    ratios = tuple(keeps if keeps is not None else (0.53, 0.23, 0.1) if quick else preset.keep_ratios)
    return [
        Experiment("power", next(iter(preset.nets)), method, seed, ratios, **short)
        for method in methods or (("weights",) if quick else ("weights", "neurons"))
        for seed in range(seeds or preset.repetitions)
    ]


# ------------------------------------------------------------------------------------------------------------- one run


class ResultError(ValueError):
    """A file of results cannot be read, or is of another run."""


def result_path(folder: str | Path, experiment: Experiment) -> Path:
    return Path(folder) / "results" / f"{experiment.name}.json"


def picture_path(folder: str | Path, name: str, cycle: int) -> Path:
    """name: the experiment's.  cycle: its index."""
    return Path(folder) / "pictures" / name / f"cycle_{cycle:02d}.npz"


def run(
    experiment: Experiment, folder: str | Path, *, hessian: bool = False, engine: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run `experiment`, or what is missing of it, and return its document (which `results/` holds too).

    hessian: also the curvature of the loss at every cycle, of the pruned flow and of the control.
    progress: called with each training step's facts (`sparse_flow`), and after every cycle with {"analysis": its keep
        ratio in words, "done": training steps up to there, the control's included}.

    A training that fails for good (NonFiniteLossError) ends the run; `stopped` in the document says why. Raises
    ResultError or CheckpointError for a folder of another run, FileNotFoundError for data that must be fetched first.
    """
    folder = Path(folder)
    rows, most = data.load(experiment.dataset), experiment.analysis.test_rows
    rows = dataclasses.replace(rows, val=rows.val[:most], test=rows.test[:most])
    settings, again = experiment.training()
    document = _begin(experiment, folder, rows)
    known = {record["index"]: record for record in document["cycles"]}
    measure = _Measure(experiment, rows, hessian)
    cycles = sparse_flow(
        experiment.flow(), rows, experiment.keeps, method=experiment.method, control=True, engine=engine,
        folder=folder / "checkpoints" / experiment.name, seed=experiment.seed, progress=progress,
        retrain=again, **dataclasses.asdict(settings),
    )  # fmt: skip
    document["stopped"] = None
    try:
        for cycle in cycles:
            if progress is not None:
                done = experiment.steps_through(len(rows.train), cycle.index)
                progress({"analysis": f"keep {cycle.keep:.3g}", "done": done})
            if cycle.index == 0:
                measure.dense = measure.log_probs(cycle.flow)
                if document["torch"] is None:
                    document["torch"] = dense_in_torch(experiment, cycle.flow, rows)
            if not cycle.resumed:  # what an earlier run found from here on is of other flows
                known = {index: record for index, record in known.items() if index < cycle.index}
            known[cycle.index] = _plain(measure.cycle(cycle, known.get(cycle.index)))
            pictures = picture_path(folder, experiment.name, cycle.index)
            if experiment.analysis.resolution and not (cycle.resumed and pictures.exists()):
                draw = _pictures(cycle.flow, rows, experiment)
                with atomic_write(pictures) as temporary:
                    numpy.savez_compressed(temporary, **draw)
            document["cycles"] = [known[index] for index in sorted(known)]
            _write(result_path(folder, experiment), document)
        document["finished"] = True
    except NonFiniteLossError as error:
        document["stopped"] = str(error)
    _write(result_path(folder, experiment), document)
    return _plain(document)


def _begin(experiment: Experiment, folder: Path, rows: Dataset) -> dict[str, Any]:
    """The document so far, or a new one."""
    settings, again = experiment.training()
    flow = experiment.flow()
    document = {
        "format": _FORMAT, "name": experiment.name, "title": experiment.title,
        "experiment": _plain(dataclasses.asdict(experiment)),
        "entropy": rows.floor, "machine": {"processor": processor()}, "build": build_info(),
        "training": dataclasses.asdict(settings), "retraining": again, "tolerance": [flow.rtol, flow.atol],
        "torch": None, "finished": False, "stopped": None, "cycles": [],
    }  # fmt: skip
    found = earlier(experiment, folder)
    if found is not None:
        kept = [one for one in found["cycles"] if one["index"] == 0 or _kept(one, experiment.keeps)]
        document |= {"torch": found["torch"], "cycles": kept}
    return document


def earlier(experiment: Experiment, folder: str | Path) -> dict[str, Any] | None:
    """What an earlier call found, None if there was none. Raises ResultError if the folder has another run of that
    name; other keep ratios do not make it another one."""
    path, identity = result_path(folder, experiment), _plain(dataclasses.asdict(experiment))
    if not path.exists():
        return None
    found = read_result(path)
    differing = [key for key in identity if key != "keeps" and found["experiment"].get(key) != identity[key]]
    if differing and found["cycles"]:  # one that failed before its first cycle is overwritten
        raise ResultError(
            f"{path} is of another run (differing: {', '.join(differing)}); choose another folder, or delete it and "
            "the checkpoints of that name to start anew"
        )
    return found


def _kept(record: dict[str, Any], keeps: Sequence[float]) -> bool:
    return record["index"] <= len(keeps) and record["keep"] == keeps[record["index"] - 1]


def _plain(value: Any) -> Any:
    """As JSON has it; NaN and infinity, which it has not, become None."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: Path, document: dict[str, Any]) -> None:
    write_json(path, _plain(document))


def read_result(path: str | Path) -> dict[str, Any]:
    """The document at `path`; None stands in it where a figure was not finite. Raises ResultError for other files."""
    remedy = "delete it: it is measured again on the checkpoints, without training, when the command is run again"
    try:
        found = read_json(Path(path), remedy)
        if found["format"] != _FORMAT:
            raise ValueError(f"its format is {found['format']!r}")
        found["experiment"].items(), found["torch"], [(one["index"], one["keep"]) for one in found["cycles"]]
    except DamagedFileError as error:
        raise ResultError(str(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{path} is not a result of `sparseflow paper` ({error!r}); {remedy}") from error
    return found


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """All documents of a folder, by name. A file with a dot before its name is what a killed process was writing."""
    return [read_result(path) for path in sorted((Path(folder) / "results").glob("[!.]*.json"))]


class _Measure:
    """What is measured of every flow of a run."""

    def __init__(self, experiment: Experiment, rows: Dataset, hessian: bool) -> None:
        self.experiment, self.analysis, self.hessian = experiment, experiment.analysis, hessian
        self.test = rows.test
        self.modes = None
        if self.analysis.repeats and rows.train_labels is not None:
            self.modes = Modes.of(rows.train, rows.train_labels)
        self.dense: Tensor | None = None  # log-densities of the test rows
        generator = torch.Generator().manual_seed(experiment.seed)
        count = self.analysis.hessian_rows or len(rows.train) // 10
        self.hessian_rows = rows.train[torch.randperm(len(rows.train), generator=generator)[:count]]
        self.train_rows = len(rows.train)

    def log_probs(self, flow: ContinuousFlow) -> Tensor:
        """float64 [n], NaN if the solve fails."""
        return self._log_probs(flow.compile().eval())[0]

    @torch.no_grad()
    def _log_probs(self, compiled: ContinuousFlow) -> tuple[Tensor, float | None]:
        found, nfes = [], []
        try:
            for part in self.test.split(4096):
                found.append(compiled.log_prob(part).double())
                nfes.append(compiled.stats.nfe)
        except AssertionError:  # a solve that cannot go on
            return torch.full((len(self.test),), math.nan, dtype=torch.float64), None
        return torch.cat(found), statistics.mean(nfes)

    def cycle(self, cycle: Cycle, record: dict[str, Any] | None) -> dict[str, Any]:
        """The record of a cycle; what `record` has already is kept."""
        record = dict(record or {})
        if "nll" not in record:
            steps = self.experiment.steps(self.train_rows, cycle.index)
            own, log_probs = self._flow(cycle.flow)
            record |= {
                "index": cycle.index, "keep": cycle.keep, "prune_ratio": 1 - cycle.keep, "size": cycle.size,
                "live_size": cycle.live_size, "nll_validation": cycle.nll, **own, "steps": steps,
                "seconds": cycle.seconds, "step_seconds": cycle.step_seconds,
                "training_nfe": _mean(entry["nfe"] for entry in cycle.history),
                "skipped_steps": sum(entry["skipped"] for entry in cycle.history),
                "versus_dense": _difference(log_probs, self.dense), "control": None, "versus_control": None,
                "hessian": None,
            }  # fmt: skip
            if cycle.index and cycle.control_flow is not None:
                other, control = self._flow(cycle.control_flow)
                record["control"] = other | {
                    "nll_validation": cycle.control_nll, "step_seconds": cycle.control_step_seconds,
                    "seconds": sum(entry["seconds"] for entry in cycle.control_history or []),
                    "training_nfe": _mean(entry["nfe"] for entry in cycle.control_history or []), "hessian": None,
                }  # fmt: skip
                record["versus_control"] = _difference(log_probs, control)
        if self.hessian and record["hessian"] is None:
            record["hessian"] = self._hessian(cycle.flow)
            if record["control"] is not None:
                record["control"] = record["control"] | {"hessian": self._hessian(cycle.control_flow)}
        return record

    def _flow(self, flow: ContinuousFlow) -> tuple[dict[str, Any], Tensor]:
        compiled = flow.compile().eval()
        log_probs, nfe = self._log_probs(compiled)
        coverage = None
        if self.modes is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.experiment.seed)
                try:
                    coverage = dataclasses.asdict(mode_coverage(
                        compiled.sample, self.modes, samples=self.analysis.samples, repeats=self.analysis.repeats
                    ))  # fmt: skip
                except AssertionError:  # a solve that cannot go on
                    pass
        return {"nll": -float(log_probs.mean()), "nfe": nfe, "modes": coverage}, log_probs

    def _hessian(self, flow: ContinuousFlow) -> dict[str, Any] | None:
        hessian = LossHessian(flow, self.hessian_rows)
        steps, probes = self.analysis.hessian_steps, self.analysis.hessian_probes
        try:
            if hessian.size <= steps * probes + TRACE_PRODUCTS:  # the whole matrix costs no more products
                return dataclasses.asdict(exact_curvature(hessian.dense()))
            return dataclasses.asdict(curvature(hessian, steps=steps, probes=probes, seed=self.experiment.seed))
        except AssertionError:  # a solve that cannot go on
            return None


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.mean(found) if found else None


def _difference(log_probs: Tensor, other: Tensor) -> dict[str, float]:
    """NLL less the other's over the same rows, and the standard error of that mean over rows."""
    difference = other - log_probs
    return {"nats": float(difference.mean()), "error": float(difference.std() / math.sqrt(len(difference)))}


def extent(rows: Tensor) -> float:
    """Half the side of a square about 0 that has the rows in it, with a margin."""
    return math.ceil(11 * float(rows.abs().quantile(0.999))) / 10


@torch.no_grad()
def _pictures(flow: ContinuousFlow, rows: Dataset, experiment: Experiment) -> dict[str, numpy.ndarray]:
    """density [y, x] over the square of `extent`, samples [n, 2], trajectories [times, n, 2] from base to data (of a
    single field); empty where a solve failed."""
    compiled = flow.compile().eval()
    side, resolution = extent(rows.train), experiment.analysis.resolution
    line = torch.linspace(-side, side, resolution, dtype=rows.train.dtype)
    found: dict[str, numpy.ndarray] = {"extent": numpy.array(side)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        times = torch.linspace(compiled.t1, compiled.t0, 25)
        parts: dict[str, Callable[[], Tensor]] = {
            "density": lambda: compiled.log_prob(torch.cartesian_prod(line, line)).exp().view(resolution, -1).T,
            "samples": lambda: compiled.sample(4000),
            "trajectories": lambda: solve(
                compiled.vector_fields[0], torch.randn(300, 2, dtype=rows.train.dtype), times, rtol=compiled.rtol,
                atol=compiled.atol,
            ).ys,
        }
        for name, draw in parts.items():
            try:
                found[name] = draw().float().numpy()
            except AssertionError:
                found[name] = numpy.zeros(0, numpy.float32)
    return found


def dense_in_torch(experiment: Experiment, flow: ContinuousFlow, rows: Dataset) -> dict[str, Any]:
    """The time of a training step of the trained dense flow in torch: plain modules, torchdiffeq, the same batch and
    tolerance, one thread; direct or adjoint gradient, whichever is quicker."""
    settings, generator = experiment.training()[0], torch.Generator().manual_seed(experiment.seed)

    def timed(gradient: str, steps: int) -> tuple[list[float], float | None]:
        dense = copy_module(flow).train()
        dense.gradient = gradient
        make = OPTIMIZERS[settings.optimizer]
        optimizer = make(dense.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        times, nfes = [], []
        for _ in range(steps):
            x = rows.train[torch.randint(len(rows.train), (settings.batch,), generator=generator)]
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            (-dense.log_prob(x).mean()).backward()
            optimizer.step()
            times.append(time.perf_counter() - began)
            if dense.stats is not None:
                nfes.append(dense.stats.nfe)
        return times, _mean(nfes)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        first = {gradient: min(timed(gradient, 3)[0]) for gradient in ("discrete", "adjoint")}
        quicker = min(first, key=first.__getitem__)
        nfe = timed("discrete", 1)[1]
        times = timed(quicker, experiment.analysis.torch_steps + 1)[0][1:]  # the first one fetches its memory
    return {
        "gradient": {"discrete": "direct", "adjoint": "adjoint"}[quicker], "measured_steps": len(times),
        "step_seconds": statistics.median(times), "nfe": nfe,
    }  # fmt: skip
