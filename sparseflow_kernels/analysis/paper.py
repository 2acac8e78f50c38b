"""Running one of the paper's experiments (`paper_experiments`), and what it writes.

A run trains one net densely, prunes and retrains it down a list of keep ratios, and trains an unpruned control beside
it (`sparse_flow`). After every cycle it writes what it found into `results/<name>.json`, whole or not at all, and what
pictures need into `pictures/<name>/`; checkpoints are in `checkpoints/`, so that a later call goes on from them.

Size is the paper's: non-zero entries over all parameters; prune ratio = 1 - keep ratio. All NLLs are of the test rows,
by the exact trace, in nats; of a classifier, of the labels of the test rows (cross-entropy); of images, per image of
whole grey levels (a bound by uniform dequantisation), with the trace estimated by Hutchinson's probes.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy

from ..build_info import build_info
from ..data.dataset import Dataset
from ..files import DamagedFileError, atomic_write, read_json, write_json
from ..training import NonFiniteLossError, sparse_flow
from ..training.cycles import METHODS
from .bench import processor
from .paper_experiments import Experiment
from .paper_measure import Measure, dense_in_torch, pictures_of

Progress = Callable[[dict[str, Any]], None]

_FORMAT = "sparseflow-paper-1"


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

    The dense net and its control are trained once for runs that differ by their method alone, in
    `checkpoints/<unpruned_name>`.

    hessian: also the curvature of the loss at every cycle, of the pruned flow and of the control.
    progress: called with each training step's facts (`sparse_flow`), and after every cycle with {"analysis": its keep
        ratio in words, "done": training steps up to there, the control's included}.

    A training that fails for good (NonFiniteLossError) ends the run; `stopped` in the document says why. Raises
    ResultError or CheckpointError for a folder of another run, FileNotFoundError for data that must be fetched first.
    """
    folder, rows = Path(folder), experiment.rows()
    settings, again = experiment.training()
    document = _begin(experiment, folder, rows)
    known = {record["index"]: record for record in document["cycles"]}
    measure = Measure(experiment, rows, hessian)
    cycles = sparse_flow(
        experiment.flow(), rows, experiment.keeps, method=experiment.method, control=True, engine=engine,
        prune_options=experiment.prune_options,
        folder=folder / "checkpoints" / experiment.name, unpruned=folder / "checkpoints" / experiment.unpruned_name,
        seed=experiment.seed, progress=progress, retrain=again, **dataclasses.asdict(settings),
    )  # fmt: skip
    document["stopped"] = None
    try:
        for cycle in cycles:
            if progress is not None:
                done = experiment.steps_through(len(rows.train), cycle.index)
                progress({"analysis": f"keep {cycle.keep:.3g}", "done": done})
            if cycle.index == 0:
                measure.dense = measure.scores(cycle.flow)
                if document["torch"] is None and experiment.analysis.torch_steps:
                    document["torch"] = dense_in_torch(experiment, cycle.flow, rows)
            if not cycle.resumed:  # what an earlier run found from here on is of other flows
                known = {index: record for index, record in known.items() if index < cycle.index}
            known[cycle.index] = _plain(measure.cycle(cycle, known.get(cycle.index)))
            pictures = picture_path(folder, experiment.name, cycle.index)
            if experiment.analysis.resolution and not (cycle.resumed and pictures.exists()):
                draw = pictures_of(cycle.flow, rows, experiment)
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
        "kind": "classification" if flow.supervised else "images" if experiment.of_images else "density",
        "dim": flow.dim, "entropy": rows.floor,
        "machine": {"processor": processor()}, "build": build_info(),
        "training": dataclasses.asdict(settings), "retraining": again, "tolerance": [flow.rtol, flow.atol],
        "torch": None, "finished": False, "stopped": None, "cycles": [],
    }  # fmt: skip
    for method in METHODS:  # the dense net is the same
        sibling = result_path(folder, dataclasses.replace(experiment, method=method))
        if document["torch"] is None and sibling.exists():
            document["torch"] = read_result(sibling)["torch"]
    found = earlier(experiment, folder)
    if found is not None:
        kept = [one for one in found["cycles"] if one["index"] == 0 or _kept(one, experiment.keeps)]
        document |= {"torch": found["torch"] or document["torch"], "cycles": kept}
    return document


def earlier(experiment: Experiment, folder: str | Path) -> dict[str, Any] | None:
    """What an earlier call found, None if there was none. Raises ResultError if the folder has another run of that
    name; other keep ratios do not make it another one."""
    path, identity = result_path(folder, experiment), _plain(dataclasses.asdict(experiment))
    of_old = {"model": {}, "variant": "", "stand_in": None}  # which earlier versions did not write
    if not path.exists():
        return None
    found = read_result(path)
    theirs = of_old | found["experiment"]
    differing = [key for key in identity if key != "keeps" and theirs.get(key) != identity[key]]
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
