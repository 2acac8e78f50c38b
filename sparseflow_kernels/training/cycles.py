"""The SparseFlow loop: train, prune, retrain (Sparse Flows, arXiv 2106.12718, algorithm 1), with its control."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Iterator, Sequence, TypeVar

import torch

from ..data.dataset import Dataset
from ..field import UnsupportedFieldError
from ..flows import NeuralODE
from ..pruning import (
    KEEP_RATIOS,
    check_can_be_pruned,
    copy_module,
    prune_neurons_,
    prune_weights_,
    prune_with_propagation_,
    size,
)
from .checkpoint import load_checkpoint, read_state, save_checkpoint
from .distributed import agree, broadcast_, rank
from .evaluation import evaluate_or_nan
from .lock import locked_folder
from .identity import check_identity, fingerprint, plain, solver_settings
from .loop import OnEpoch, Progress, fit
from .rows import Data, as_dataset, batch_of
from .settings import TrainingSettings

_Model = TypeVar("_Model", bound=NeuralODE)

METHODS = ("weights", "neurons", "none")
DEAD = ("simplify", "propagate", None)


@dataclass
class Cycle(Generic[_Model]):
    """One finished cycle of the loop.

    index: 0 for the dense one.  keep: the target keep ratio, 1.0 for the dense one.
    flow: a copy of the trained flow with its masks, independent of what follows.
    size: non-zero entries over all its parameters (the paper's size).  live_size: those that are left when the field is
        simplified, exactly; None where it cannot be compiled.
    nll: of the validation rows, exact trace, nats; NaN if it cannot be computed.  nfe: evaluations of that solve.
    history: one entry per epoch, as `train` returns it.  step_seconds: median over epochs of a training step's time.
        seconds: of this cycle's training, its control's not included.
    control_*: the same of the unpruned control, None without one. In cycle 0 the control is the dense flow itself.
    resumed: read from a checkpoint, not trained now.
    """

    index: int
    keep: float
    flow: _Model
    size: int
    live_size: int | None
    nll: float
    nfe: float | None
    history: list[dict[str, Any]]
    step_seconds: float | None
    seconds: float
    control_flow: _Model | None = None
    control_nll: float | None = None
    control_nfe: float | None = None
    control_history: list[dict[str, Any]] | None = None
    control_step_seconds: float | None = None
    resumed: bool = False


def sparse_flow(
    flow: _Model,
    data: Data,
    keeps: str | Sequence[float] = "toy",
    *,
    method: str = "weights",
    dead: str | None = "simplify",
    prune_options: dict[str, Any] | None = None,
    control: bool = False,
    retrain: dict[str, Any] | None = None,
    engine: str | None = "auto",
    folder: str | Path | None = None,
    unpruned: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
    **training: Any,
) -> Iterator[Cycle[_Model]]:
    """Train `flow` dense, then prune to each keep ratio and retrain, with a new optimizer and the schedule from its
    start; yields a Cycle after each. Weights are never rewound and pruned entries never return. `flow` is trained in
    place.

    data: as in `train`. Without validation rows a cycle's nll is NaN, and dead="propagate" is refused.
    keeps: a name of `KEEP_RATIOS`, or ratios in (0, 1) that fall, relative to the dense number of all parameters; none
        for dense training alone.
    method: "weights" (WT, global magnitude), "neurons" (FT, whole neurons by l1 norm), or "none": retrain as often, and
        prune nothing, which is the control on its own.
    dead: "simplify": parameters that nobody reads are removed without data, and the size is met with them gone;
        "propagate": the paper's way, what has no gradient on some validation rows goes (`prune_with_propagation_`);
        None: dead parameters stay and count.
    prune_options: further ones for `prune_weights_` or `prune_neurons_`.
    control: train, beside every cycle, a copy of the dense flow that is never pruned for as many further epochs, with
        the same seed and schedule. Part of what retraining gains is just more training: this tells how much.
    retrain: settings that differ in retraining.
    engine: which engine trains the compiled flow ("auto", "cpu", "reference"); None trains the module through torch.
    folder: checkpoints, one file per finished cycle and one for the running epoch. A later call with the same arguments
        (keeps may be longer) goes on from there and comes to the same parameters bit for bit (same number of threads).
    unpruned: another folder for the checkpoints of the dense flow and of the control, which calls that differ by what
        they prune (method, dead, prune_options) may share: these are then trained once.
    seed: of the order of rows and the noise; cycle i draws from (seed, i).
    progress: called with each step's facts as in `train`, and "cycle", "keep", "control".
    on_epoch: as in `train`; where it returns True, this cycle's training ends, and the next cycle begins.
    training: `TrainingSettings`: epochs or steps, batch, lr, optimizer, weight_decay, milestones, ...

    With torch.distributed initialised every rank must call this with the same arguments (see `train`); `folder` must be
    one that all ranks see.

    Raises ValueError for bad arguments, CheckpointError for a folder of another run, and FolderInUseError for one that
    another process trains in, when called or when the first cycle starts (the flow is unchanged then);
    NonFiniteLossError and OSError as `train` does.
    """
    ratios = KEEP_RATIOS.get(keeps) if isinstance(keeps, str) else tuple(float(keep) for keep in keeps)
    if ratios is None:
        raise ValueError(f"keeps must be one of {', '.join(KEEP_RATIOS)}, or numbers; got {keeps!r}")
    if any(not 0 < keep < 1 for keep in ratios) or any(a <= b for a, b in zip(ratios, ratios[1:])):
        raise ValueError(f"keeps must be numbers in (0, 1) that fall; got {ratios}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if dead not in DEAD:
        raise ValueError(f"dead must be 'simplify', 'propagate' or None, got {dead!r}")
    if method != "none" and ratios:
        check_can_be_pruned(flow, (prune_options or {}).get("layers"))
    settings = TrainingSettings(**{**batch_of(data), **training})
    rows = as_dataset(data)
    if dead == "propagate" and len(rows.val) < 2:
        raise ValueError("dead='propagate' needs data with validation rows")
    loop = _Loop(
        flow, rows, ratios, method, dead, dict(prune_options or {}), control, settings,
        settings.changed(**(retrain or {})), engine, None if folder is None else Path(folder),
        None if unpruned is None else Path(unpruned), seed, progress, on_epoch,
    )  # fmt: skip
    return loop.cycles()


def prune_cycle_(
    flow: NeuralODE, keep: float, method: str, dead: str | None, data: Dataset | None = None, **options: Any
) -> None:
    """One pruning of the loop: `flow` in place to the keep ratio, dead parameters as `dead` says (`sparse_flow`)."""
    if method == "none":
        return
    if dead == "propagate":
        held_out = data.val[: min(_HELD_OUT, len(data.val) // 2)]
        prune_with_propagation_(flow, keep, held_out, method, **options)
    elif method == "weights":
        prune_weights_(flow, keep, **{"remove_dead": dead == "simplify", **options})
    else:
        prune_neurons_(flow, keep, **options)
        if dead == "simplify":  # nothing goes by magnitude at 1.0
            prune_weights_(flow, 1.0, layers=options.get("layers"))


_HELD_OUT = 146  # the paper's number of points for its toy nets


def live_size(flow: NeuralODE) -> int | None:
    """Non-zero parameters of the flow after exact simplification; None where it cannot be compiled."""
    try:
        compiled = flow.compile("reference")
    except UnsupportedFieldError:
        return None
    return sum(int(torch.count_nonzero(p)) for p in compiled.parameters())


@dataclass
class _Loop:
    flow: NeuralODE
    data: Dataset
    ratios: tuple[float, ...]
    method: str
    dead: str | None
    prune_options: dict[str, Any]
    control: bool
    settings: TrainingSettings
    retraining: TrainingSettings
    engine: str | None
    folder: Path | None
    unpruned: Path | None
    seed: int
    progress: Progress | None
    on_epoch: OnEpoch | None

    def cycles(self) -> Iterator[Cycle]:
        with locked_folder(self.folder), locked_folder(self.unpruned):
            yield from self._cycles()

    def _cycles(self) -> Iterator[Cycle]:
        identity = {
            "settings": plain(dataclasses.asdict(self.settings)),
            "engine": self.engine,
            "seed": self.seed,
            "data": fingerprint(self.data, self.flow.supervised),
            "flow": solver_settings(self.flow),
        }
        pruning = {"method": self.method, "dead": self.dead, "prune_options": plain(self.prune_options)}
        retraining = plain(dataclasses.asdict(self.retraining))
        broadcast_(self.flow.state_dict().values())
        unpruned = None
        for index, keep in enumerate((1.0, *self.ratios)):
            unpruned_run = {"cycle": index, **identity} | ({"retraining": retraining} if index else {})
            run = unpruned_run | ({**pruning, "keeps": list(self.ratios[:index])} if index else {})
            pruned = self.method != "none"
            facts, resumed = self._cycle(self.flow, index, keep, run if pruned else unpruned_run)
            cycle = Cycle(index, keep, copy_module(self.flow), resumed=resumed, **facts)
            if self.control:
                if index == 0:
                    unpruned, other = copy_module(self.flow), facts
                else:
                    other, _ = self._cycle(unpruned, index, 1.0, unpruned_run, control=True)
                cycle.control_flow = copy_module(unpruned)
                cycle.control_nll, cycle.control_nfe = other["nll"], other["nfe"]
                cycle.control_history, cycle.control_step_seconds = other["history"], other["step_seconds"]
            yield cycle

    def _cycle(
        self, flow: NeuralODE, index: int, keep: float, run: dict[str, Any], control: bool = False
    ) -> tuple[dict[str, Any], bool]:
        """Bring `flow` from the cycle before to the end of this one: (facts of a Cycle, whether from a checkpoint)."""
        name = f"cycle_{index:02d}" + ("_control" if control else "")
        folder = self.unpruned if self.unpruned is not None and (index == 0 or control) else self.folder
        path = None if folder is None else folder / f"{name}.safetensors"
        running = None if path is None else path.with_name(f"{name}.running.safetensors")
        if path is not None and agree(path.exists()):
            _, facts = read_state(path)
            check_identity(path, facts.get("run"), run)
            load_checkpoint(path, flow)
            _remove_stale(path, running)
            return {key: value for key, value in facts.items() if key != "run"}, True
        if keep < 1 and not (running is not None and agree(running.exists())):
            prune_cycle_(flow, keep, self.method, self.dead, self.data, **self.prune_options)
        history = fit(
            flow, self.data, self.retraining if index else self.settings, self.engine, (self.seed, index), running,
            self._tell(index, keep, control), run, self._hook(index, keep, control),
        )  # fmt: skip
        facts = self._measure(flow, history)
        if path is not None and rank() == 0:
            save_checkpoint(path, flow, {"run": run, **facts})
            _remove_stale(path, running)
        return facts, False

    def _measure(self, flow: NeuralODE, history: list[dict[str, Any]]) -> dict[str, Any]:
        evaluated = None
        if len(self.data.val):
            model = flow if self.engine is None else flow.compile(self.engine)
            evaluated = evaluate_or_nan(model, self.data.val, self.data.val_labels if flow.supervised else None)
        steps = [entry["step_seconds"] for entry in history if entry["step_seconds"] is not None]
        return {
            "size": size(flow),
            "live_size": live_size(flow),
            "nll": evaluated.nll if evaluated else float("nan"),
            "nfe": evaluated.nfe if evaluated else None,
            "history": history,
            "step_seconds": statistics.median(steps) if steps else None,
            "seconds": sum(entry["seconds"] for entry in history),
        }

    def _hook(self, index: int, keep: float, control: bool) -> OnEpoch | None:
        if self.on_epoch is None:
            return None
        return lambda epoch: self.on_epoch(dataclasses.replace(epoch, cycle=index, keep=keep, control=control))

    def _tell(self, index: int, keep: float, control: bool) -> Progress | None:
        if self.progress is None:
            return None
        return lambda facts: self.progress({**facts, "cycle": index, "keep": keep, "control": control})


def _remove_stale(path: Path, running: Path) -> None:
    """What a process that was killed while it wrote, or between two files, left beside the finished cycle at `path`."""
    for stale in (running, *path.parent.glob(f".{path.stem}.*")) if rank() == 0 else ():
        with contextlib.suppress(OSError):  # a folder that is only read
            stale.unlink(missing_ok=True)
