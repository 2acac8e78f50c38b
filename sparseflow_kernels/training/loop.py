"""Maximum likelihood training: of a flow, or of a classifier on its labels.

Training runs on the compiled flow: its parameters are the weights that remain, so forward, backward and optimizer cost
what they cost. Without an engine the flow itself is trained, through torch; masks need no care there either, as a
masked parameter is parametrised as original * mask and its pruned entries have no gradient.

All randomness of an epoch (order of rows, Hutchinson noise) follows from the seed and the number of the epoch, so a
checkpoint needs no generator states.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..flows import NeuralODE
from ..flows.classifier import check_labels
from ..pruning import copy_module
from ..solution import GradientError
from .checkpoint import CheckpointError, load_module_state, read_state, write_state
from .direct import DirectGradient
from .distributed import agree, broadcast_, on_rank_0, rank, sum_gradients_, world_size
from .evaluation import evaluate_or_nan
from .flat import FlatParameters
from .identity import check_identity, fingerprint, plain, solver_settings
from .lock import locked_file
from .rows import Data, as_dataset, batch_of, check_rows
from .settings import OPTIMIZERS, TrainingSettings

Progress = Callable[[dict[str, Any]], None]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """A finished epoch, as `on_epoch` is told of it.

    epoch, epochs: its number, counted from 1, and of how many.
    metrics: the numbers of its entry in the history that are known: nll, nfe, val_nll (with select="best"), skipped,
        step_seconds, seconds, epoch.
    flow: what is trained, the compiled flow where there is an engine; may be evaluated, sampled and saved, not changed.
    cycle, keep, control: of `sparse_flow`, which cycle this is, its keep ratio, and whether it is the control's.
    """

    epoch: int
    epochs: int
    metrics: dict[str, float]
    flow: NeuralODE
    cycle: int = 0
    keep: float = 1.0
    control: bool = False


OnEpoch = Callable[[Epoch], object]


class NonFiniteLossError(RuntimeError):
    """Too many training steps in a row failed, or no epoch had a finite validation NLL."""


def train(
    flow: NeuralODE,
    data: Data,
    *,
    engine: str | None = None,
    seed: int | Sequence[int] = 0,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    on_epoch: OnEpoch | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Minimise the flow's mean negative log-likelihood in place; returns the history, one dict per epoch.

    flow: a ContinuousFlow, or a NeuralClassifier, whose likelihood is that of the labels (cross-entropy).
    data: rows [n, dim], as a tensor, a numpy array, or a dataset or DataLoader of torch's (read once, `as_dataset`;
        a loader's batch_size is the `batch`); a pair of these, (training rows, validation rows); or a Dataset (its
        `train` rows, and for select="best" its `val` rows), which a classifier needs, with labels. They are converted
        to the flow's dtype and device.
    engine: None trains the flow as it is, compiled or not; a name ("auto", "cpu", "reference") trains
        `flow.compile(engine)`, whose optimizer state is of the remaining weights only, and copies the result back.
        Weight decay then acts on the compiled field's parameters: a constant that simplify folded into a bias decays
        with it, dead parameters do not.
    seed: of the order of rows and of the Hutchinson noise; torch's global generator is left as it was.
    checkpoint: a file written after every epoch. If it is there already, training goes on from it, and comes to the
        same parameters, bit for bit, as if it had never stopped (same number of threads).
    progress: called with each step's {"epoch", "epochs", "step", "steps", "nll", "nfe", "step_seconds", "lr"}.
    on_epoch: called after each epoch with an `Epoch`, on rank 0; where it returns True, the training ends there. What
        it raises ends it too, and this epoch is not in the checkpoint.
    settings: those of `TrainingSettings`: epochs or steps, batch, lr, ...

    Every epoch is also a line at level INFO of the logger "sparseflow_kernels.training".

    With torch.distributed initialised each rank takes its share of every batch and gradients are summed, so that a step
    is that of one process with the whole batch, up to each rank's own step sizes and noise. Rank 0 writes checkpoints.

    Another process that trains with the same checkpoint file is refused with FolderInUseError.

    History entries: epoch, nll (mean over the epoch's good steps), nfe (mean per step, None if not known), skipped,
    step_seconds (median), seconds; with select="best" also val_nll. Raises ValueError for bad arguments,
    NonFiniteLossError as `max_failures` and `select` say (the flow is then left as it was, or without engine as after
    the last good step), CheckpointError for a checkpoint that is damaged or of another run, OSError if one cannot be
    written.
    """
    made = TrainingSettings(**{**batch_of(data), **settings})
    with locked_file(checkpoint):
        return fit(flow, data, made, engine, seed, checkpoint, progress, on_epoch=on_epoch)


def fit(
    flow: NeuralODE,
    data: Data,
    settings: TrainingSettings,
    engine: str | None,
    seed: int | Sequence[int],
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    run: dict[str, Any] | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[dict[str, Any]]:
    """`train` with settings made; `run` says more about what a checkpoint must be of."""
    if not isinstance(data, Tensor):
        data = as_dataset(data)
    rows, validation = (data.train, data.val) if isinstance(data, Dataset) else (data, None)
    if len(rows) == 0:
        raise ValueError("data has no rows to train on")
    check_rows(rows, "data's training rows", flow.dim)
    if validation is not None and len(validation):
        check_rows(validation, "data's validation rows", flow.dim)
    if settings.select == "best" and (validation is None or len(validation) == 0):
        raise ValueError("select='best' needs data with validation rows: give a Dataset that has them")
    labels = [getattr(data, f"{part}_labels", None) if flow.supervised else None for part in ("train", "val")]
    if flow.supervised:
        check_labels(labels[0], len(rows), flow.dim)
    path = None if checkpoint is None else Path(checkpoint)
    identity = {
        "settings": plain(dataclasses.asdict(settings)),
        "engine": engine,
        "seed": plain(seed),
        "data": fingerprint(data, flow.supervised),
        "flow": solver_settings(flow),
        **plain(run or {}),
    }
    training = None
    if path is not None and agree(path.exists()):
        training = _Training.resumed(path, identity, flow, rows, validation, settings, engine, seed, labels)
    if training is None:
        training = _Training(flow, rows, validation, settings, engine, seed, labels)
    was_training = flow.training
    try:
        with torch.random.fork_rng(devices=[training.device] if training.device.type == "cuda" else []):
            while training.step < training.total:
                training.run_epoch(progress)
                training.tell(on_epoch)
                if path is not None and rank() == 0:
                    write_state(path, *training.state(identity))
        training.finish()
    finally:
        flow.train(was_training)
    return training.history


class _Training:
    """A training that can stop after any epoch. `flow` keeps the values it started from until the end, unless it is
    the model itself."""

    def __init__(
        self,
        flow: NeuralODE,
        rows: Tensor,
        validation: Tensor | None,
        settings: TrainingSettings,
        engine: str | None,
        seed: int | Sequence[int],
        labels: Sequence[Tensor | None] = (None, None),
    ) -> None:
        """labels: of the rows and of the validation rows, for a classifier."""
        self.settings, self.flow, self.validation = settings, flow, validation
        self.seeds = tuple(seed) if isinstance(seed, Sequence) else (seed,)
        broadcast_(flow.state_dict().values())
        self.model = flow if engine is None else flow.compile(engine)
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("the flow has no parameter that requires a gradient")
        # In the order of names: that of registration depends on when masks came, and the norm's rounding on the order.
        self.names = sorted(named)
        self.parameters = [named[name] for name in self.names]
        self.device = self.parameters[0].device
        self.rows = rows.to(self.parameters[0])
        self.labels, self.validation_labels = (None if known is None else known.to(self.device) for known in labels)
        self.batch = n = min(settings.batch, len(rows))
        rest = len(rows) % n
        self.per_epoch = max(1, len(rows) // n + (0 < rest and rest >= (n + 1) // 2))
        self.total = settings.steps if settings.steps is not None else settings.epochs * self.per_epoch
        # A sparse flow has many small parameters. Those of a compiled copy, which is ours, are made one: a step is then
        # one call and not one per parameter; others are stepped fused. Ranks add their gradients up one by one.
        self.ranks = world_size()
        single = engine is not None and self.ranks == 1 and FlatParameters.fit(self.parameters)
        self.flat = FlatParameters(self.parameters) if single else None
        self.direct = DirectGradient.of(self.model) if single else None
        self.optimizer = OPTIMIZERS[settings.optimizer](
            self.parameters if self.flat is None else [self.flat.tensor], lr=settings.lr,
            weight_decay=settings.weight_decay, fused=True,
        )  # fmt: skip
        self._take_step = optimizer_step(self.optimizer)
        self.step = self.failures = 0
        self.history: list[dict[str, Any]] = []
        self.best: tuple[float, dict[str, Tensor]] | None = None

    # ------------------------------------------------------------------------------------------------------- an epoch

    def run_epoch(self, progress: Progress | None) -> None:
        epoch = len(self.history)
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(_mix(*self.seeds, epoch, 0)))
        order = order.to(self.device)
        noise = _mix(*self.seeds, epoch, 1 + rank())  # Hutchinson's: each rank's own
        if self.device.type == "cpu":  # torch.manual_seed would ask every kind of device, which takes as long as steps
            torch.default_generator.manual_seed(noise)
        else:
            torch.manual_seed(noise)
        started, nlls, nfes, times, skipped = time.perf_counter(), [], [], [], 0
        self.model.train()
        for index in range(min(self.per_epoch, self.total - self.step)):
            began = time.perf_counter()
            lr = self.settings.learning_rate(epoch, self.step, self.total)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            chosen = order[index * self.batch : (index + 1) * self.batch]
            nll, nfe, problem = self._gradient(
                self.rows[chosen], None if self.labels is None else self.labels[chosen]
            )
            self.step += 1
            if problem:
                self.failures, skipped = self.failures + 1, skipped + 1
                self._forget_gradient()
                if self.failures >= self.settings.max_failures:
                    raise NonFiniteLossError(
                        f"{self.failures} training steps in a row failed, the last, step {self.step}, because "
                        f"{problem}; lower lr, set clip, or loosen the flow's rtol and atol"
                    )
            else:
                self.failures = 0
                self._take_step()
                nlls.append(nll)
                times.append(time.perf_counter() - began)
                if nfe is not None:
                    nfes.append(nfe)
            if progress is not None:
                progress({
                    "epoch": epoch + 1, "epochs": math.ceil(self.total / self.per_epoch), "step": self.step,
                    "steps": self.total, "nll": nll, "nfe": nfe, "step_seconds": time.perf_counter() - began, "lr": lr,
                })  # fmt: skip
        entry = {
            "epoch": epoch + 1,
            "nll": sum(nlls) / len(nlls) if nlls else math.nan,
            "nfe": sum(nfes) / len(nfes) if nfes else None,
            "skipped": skipped,
            "step_seconds": statistics.median(times) if times else None,
        }
        if self.settings.select == "best":
            entry["val_nll"] = nll = evaluate_or_nan(self.model, self.validation, self.validation_labels).nll
            if math.isfinite(nll) and (self.best is None or nll < self.best[0]):
                self.best = (nll, {name: tensor.detach().clone() for name, tensor in self._selected().items()})
        self.history.append({**entry, "seconds": time.perf_counter() - started})

    def tell(self, on_epoch: OnEpoch | None) -> None:
        """Log the last epoch and call the hook, which may end the training."""
        entry = self.history[-1]
        metrics = {name: value for name, value in entry.items() if value is not None}
        epochs = math.ceil(self.total / self.per_epoch)
        if rank() == 0:
            told = ", ".join(f"{name} {value:.5g}" for name, value in metrics.items() if name != "epoch")
            _log.info("epoch %d of %d: %s", entry["epoch"], epochs, told)
        if on_epoch is None:
            return
        answer: list[object] = []
        on_rank_0(lambda: answer.append(on_epoch(Epoch(entry["epoch"], epochs, metrics, self.model))))
        if agree(bool(answer and answer[0] is True)):
            self.total = self.step

    def _gradient(self, x: Tensor, labels: Tensor | None = None) -> tuple[float, float | None, str]:
        """(loss, nfe, ""), gradients in place; or (NaN or loss, nfe, what was wrong). Alike on every rank."""
        self._forget_gradient()
        share, told, problem, value, nfe = x, labels, "", 0.0, None
        if self.ranks > 1:
            share = x.tensor_split(self.ranks)[rank()]
            told = None if labels is None else labels.tensor_split(self.ranks)[rank()]
        try:
            if self.direct is not None:
                value, nfe = self.direct(x, labels)
                problem = "" if math.isfinite(value) else f"the loss is {value}"
            elif len(share):
                loss = self.model.row_nll(share, told).sum() / len(x)
                value = float(loss.detach())
                if math.isfinite(value):
                    loss.backward()
                    nfe = self.model.stats.nfe if self.model.stats is not None else None
                else:
                    problem = f"the loss is {value}"
        except AssertionError as error:  # SolverError, and torchdiffeq's own word for a solve that cannot go on
            value, problem = math.nan, f"the solve failed: {error}"
        except GradientError as error:
            problem = str(error)
        if problem and self.ranks > 1:
            self._forget_gradient()
        value, failed = sum_gradients_(self.parameters, [value if math.isfinite(value) else 0.0, float(bool(problem))])
        if failed:
            return math.nan, nfe, problem or f"{failed:.0f} of {self.ranks} ranks could not compute theirs"
        if self.flat is not None:
            total_norm = torch.linalg.vector_norm(self.flat.tensor.grad)
        else:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            total_norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        norm = float(total_norm)
        if not math.isfinite(norm):
            return value, nfe, f"the gradient's norm is {norm}"
        if self.settings.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.clip, total_norm)
        return value, nfe, ""

    def _selected(self) -> dict[str, Tensor]:
        """What the best epoch is remembered by: parameters, and the running estimates of norms."""
        running = {name: buffer for name, buffer in self.model.named_buffers() if name.startswith("norms.")}
        return dict(zip(self.names, self.parameters)) | running

    def _forget_gradient(self) -> None:
        if self.flat is not None:
            self.flat.tensor.grad.zero_()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Write the result into the flow."""
        if self.settings.select == "best":
            if self.best is None:
                raise NonFiniteLossError(
                    f"none of the {len(self.history)} epochs had a finite validation NLL; lower lr, or set clip"
                )
            for name, tensor in self._selected().items():
                tensor.copy_(self.best[1][name])
        if self.model is not self.flow:
            self.model.copy_to(self.flow)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def state(self, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) from which `resumed` goes on."""
        tensors = {f"flow/{name}": tensor for name, tensor in self.flow.state_dict().items()}
        if self.model is not self.flow:
            tensors |= {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parts in zip(self.names, self._optimizer_state()):
            tensors |= {f"optimizer/{key}/{name}": value for key, value in parts.items() if isinstance(value, Tensor)}
        if self.best is not None:
            tensors |= {f"best/{name}": tensor for name, tensor in self.best[1].items()}
        facts = {
            "training": identity, "step": self.step, "total": self.total, "failures": self.failures,
            "history": self.history, "best": None if self.best is None else self.best[0],
        }  # fmt: skip
        return tensors, facts

    def _optimizer_state(self) -> list[dict[str, Any]]:
        """By parameter."""
        if self.flat is None:
            return [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        parts: list[dict[str, Any]] = [{} for _ in self.parameters]
        for key, value in self.optimizer.state.get(self.flat.tensor, {}).items():
            whole = isinstance(value, Tensor) and value.shape == self.flat.tensor.shape
            values = self.flat.split(value) if whole else [value] * len(parts)
            for part, one in zip(parts, values):
                part[key] = one
        return parts

    def _load_optimizer_state(self, tensors: dict[str, Tensor]) -> None:
        """tensors: by "key/parameter's name"."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            state.setdefault(self.names.index(name), {})[kind] = tensor
        if self.flat is not None and state:
            shapes = self.flat.shapes
            kinds = {kind: [state[number][kind] for number in range(len(self.names))] for kind in state[0]}
            state = {0: {
                kind: torch.cat([part.reshape(-1) for part in parts])
                if [part.shape for part in parts] == shapes and kind != "step" else parts[0]
                for kind, parts in kinds.items()
            }}  # fmt: skip
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    @classmethod
    def resumed(
        cls,
        path: Path,
        identity: dict[str, Any],
        flow: NeuralODE,
        rows: Tensor,
        validation: Tensor | None,
        settings: TrainingSettings,
        engine: str | None,
        seed: int | Sequence[int],
        labels: Sequence[Tensor | None] = (None, None),
    ) -> "_Training":
        """The training whose state is in `path`; `flow` becomes what it was at that training's start. Raises
        CheckpointError, and leaves the flow alone, where it is of another one."""
        tensors, facts = read_state(path)
        check_identity(path, facts.get("training"), identity)

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}

        trial = copy_module(flow)  # what does not fit must not touch the flow
        load_module_state(trial, part("flow"), str(path))
        if engine is not None:
            compiled, given = trial.compile(engine).state_dict(), part("model")
            digests = {name for name in compiled if name.endswith("_extra_state")} - given.keys()  # new since 0.1.0
            if {n: t.shape for n, t in compiled.items() if n not in digests} != {n: t.shape for n, t in given.items()}:
                raise CheckpointError(
                    f"{path} holds another compiled flow than this version of the package makes of its module; delete "
                    "it to train this cycle anew"
                )
        load_module_state(flow, part("flow"), str(path))
        training = cls(flow, rows, validation, settings, engine, seed, labels)
        if engine is not None:
            training.model.load_state_dict(part("model"))
        training._load_optimizer_state(part("optimizer"))
        training.step, training.failures, training.history = facts["step"], facts["failures"], facts["history"]
        training.total = facts.get("total", training.total)  # smaller where on_epoch ended it; 0.1.0 did not write it
        if facts["best"] is not None:
            training.best = (facts["best"], {name: t.to(training.device) for name, t in part("best").items()})
        return training


def optimizer_step(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """optimizer.step() without the wrappers that torch puts around it, for profilers and hooks, which take as long as
    the step of a small net."""
    plain_step = inspect.unwrap(type(optimizer).step)

    def step() -> None:
        with torch.no_grad():
            plain_step(optimizer)

    return step


def _mix(*numbers: int) -> int:
    """One 64-bit seed of several whole numbers >= 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
