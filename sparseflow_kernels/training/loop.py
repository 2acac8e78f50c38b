"""Maximum likelihood training of a flow, and the cycle of train, prune, retrain (Sparse Flows, arXiv 2106.12718).

Masks need no care here: a masked parameter is parametrised as original * mask, so its pruned entries have no gradient.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..flows import ContinuousFlow
from ..pruning import KEEP_RATIOS, copy_module, prune_neurons_, prune_weights_, size
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint

Progress = Callable[[dict[str, Any]], None]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class NonFiniteLossError(RuntimeError):
    """Training met too many steps in a row whose loss or gradient was not finite, or whose solve failed."""


def train(
    flow: ContinuousFlow,
    data: Dataset | Tensor,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch: int = 1024,
    lr: float = 5e-3,
    lr_end: float | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 1e-5,
    clip: float | None = None,
    seed: int = 0,
    max_failures: int = 10,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Minimise the flow's mean negative log-likelihood in place; returns the history, one dict per epoch.

    data: a Dataset (its `train` rows), or rows [n, dim]. They are converted to the flow's dtype and device.
    epochs or steps: how long, exactly one of the two. An epoch goes through the rows in random order in batches of
        `batch`; a last batch of less than half of that is left out (unless it is the only one).
    optimizer: "adamw", "adam" or "sgd" with `lr` and `weight_decay`; a new one each call, as the paper's retraining.
    lr_end: the learning rate falls geometrically from lr at the first step to this at the last; None: it stays.
    clip: largest norm of the gradient, None for no clipping.
    seed: of the order of rows and of the Hutchinson noise; torch's global generator is left as it was.
    max_failures: a step with a non-finite loss or gradient, or a failed solve, is skipped and counted; that many in a
        row raise NonFiniteLossError. The flow's parameters are then those of the last good step.
    progress: called with each step's {"epoch", "step", "steps", "nll", "nfe"}.

    History entries: epoch, nll (mean over the epoch's good steps), nfe (mean per step, None if not known), skipped,
    seconds. Raises ValueError for bad arguments.
    """
    rows = data.train if isinstance(data, Dataset) else data
    if (epochs is None) == (steps is None):
        raise ValueError("give exactly one of epochs and steps")
    for name, value in (("epochs", epochs), ("steps", steps), ("batch", batch), ("max_failures", max_failures)):
        if value is not None and (int(value) != value or value < 1):
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if lr_end is not None and not 0 < lr_end <= lr:
        raise ValueError(f"lr_end must be None, or above 0 and at most lr ({lr!r}); got {lr_end!r}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {optimizer!r}")
    if len(rows) == 0:
        raise ValueError("data has no rows to train on")
    parameters = [p for p in flow.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("the flow has no parameter that requires a gradient")
    rows = rows.to(parameters[0])
    batch = min(batch, len(rows))
    per_epoch = max(1, len(rows) // batch + (len(rows) % batch >= (batch + 1) // 2 and len(rows) % batch > 0))
    total = steps if steps is not None else epochs * per_epoch
    update = OPTIMIZERS[optimizer](parameters, lr=lr, weight_decay=weight_decay)

    history: list[dict[str, Any]] = []
    was_training, failures, step = flow.training, 0, 0
    order_generator = torch.Generator().manual_seed(seed)
    devices = [rows.device] if rows.device.type == "cuda" else []
    flow.train()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            while step < total:
                started, nlls, nfes, skipped = time.perf_counter(), [], [], 0
                order = torch.randperm(len(rows), generator=order_generator)
                for index in range(min(per_epoch, total - step)):
                    x = rows[order[index * batch : (index + 1) * batch].to(rows.device)]
                    step += 1
                    if lr_end is not None:
                        for group in update.param_groups:
                            group["lr"] = lr * (lr_end / lr) ** ((step - 1) / max(1, total - 1))
                    nll, problem = _gradient(flow, x, update, parameters, clip)
                    if problem:
                        failures, skipped = failures + 1, skipped + 1
                        update.zero_grad(set_to_none=True)
                        if failures >= max_failures:
                            raise NonFiniteLossError(
                                f"{failures} training steps in a row failed, the last, step {step}, because {problem}; "
                                "lower lr, set clip, or loosen the flow's rtol and atol"
                            )
                    else:
                        failures = 0
                        update.step()
                        nlls.append(nll)
                        if flow.stats is not None:
                            nfes.append(flow.stats.nfe)
                    if progress is not None:
                        nfe = flow.stats.nfe if flow.stats is not None else None
                        progress({"epoch": len(history) + 1, "step": step, "steps": total, "nll": nll, "nfe": nfe})
                history.append(
                    {
                        "epoch": len(history) + 1,
                        "nll": sum(nlls) / len(nlls) if nlls else math.nan,
                        "nfe": sum(nfes) / len(nfes) if nfes else None,
                        "skipped": skipped,
                        "seconds": time.perf_counter() - started,
                    }
                )
    finally:
        flow.train(was_training)
    return history


def _gradient(
    flow: ContinuousFlow, x: Tensor, update: torch.optim.Optimizer, parameters: list[Tensor], clip: float | None
) -> tuple[float, str]:
    """(loss, ""), gradients in place; or (NaN or loss, what was wrong)."""
    update.zero_grad(set_to_none=True)
    try:
        loss = -flow.log_prob(x).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            return value, f"the loss is {value}"
        loss.backward()
    except AssertionError as error:  # torchdiffeq's and our solver's word for a solve that cannot go on
        return math.nan, f"the solve failed: {error}"
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if not math.isfinite(norm):
        return value, f"the gradient's norm is {norm}"
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, torch.tensor(norm))
    return value, ""


@torch.no_grad()
def evaluate_nll(flow: ContinuousFlow, x: Tensor, *, exact: bool = True, batch: int = 4096) -> float:
    """Mean negative log-likelihood in nats of rows x [n, dim], solved in batches.

    exact: with the exact divergence whatever the flow trains with; False: as the flow does it in eval mode (one
    Hutchinson draw per batch, from torch's global generator, is a noisy estimate).
    The result is NaN or infinite if the model's density is; nothing is hidden. Raises ValueError for no rows.
    """
    if len(x) == 0:
        raise ValueError("x has no rows to evaluate")
    like = next(flow.parameters())
    was_training, was_divergence = flow.training, flow.eval_divergence
    flow.eval()
    if exact:
        flow.eval_divergence = "exact"
    try:
        total = sum(float(flow.log_prob(part.to(like)).double().sum()) for part in x.split(batch))
    finally:
        flow.train(was_training)
        flow.eval_divergence = was_divergence
    return -total / len(x)


# ------------------------------------------------------------------------------------------- train, prune, retrain


@dataclass
class Cycle:
    """One finished cycle. keep: the target, 1.0 for the dense one.  flow: a copy of the trained flow, independent of
    what follows.  size, nll (val rows), history: of that flow.  resumed: read from a checkpoint, not trained now."""

    index: int
    keep: float
    flow: ContinuousFlow
    size: int
    nll: float
    history: list[dict[str, Any]]
    resumed: bool = False


def train_prune_retrain(
    flow: ContinuousFlow,
    data: Dataset,
    keeps: str | Sequence[float] = "toy",
    *,
    method: str = "weights",
    prune_options: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    **training: Any,
) -> Iterator[Cycle]:
    """Train `flow` dense, then prune to each keep ratio and retrain with the same settings and a new optimizer; yields
    a Cycle after each. Weights are never rewound and pruned entries never return. `flow` is trained in place.

    keeps: a name of `KEEP_RATIOS`, or ratios in (0, 1) that fall.  method: "weights" (WT) or "neurons" (FT).
    prune_options: for `prune_weights_` or `prune_neurons_`.  training: for `train`; cycle i uses seed + i.
    folder: where each cycle's checkpoint goes, atomically; a later call with the same arguments continues after the
        last finished cycle. A folder of another run raises CheckpointError.

    Raises ValueError for bad arguments when called (nothing has run then).
    """
    ratios = tuple(KEEP_RATIOS[keeps]) if isinstance(keeps, str) and keeps in KEEP_RATIOS else keeps
    if isinstance(ratios, str):
        raise ValueError(f"keeps must be one of {', '.join(KEEP_RATIOS)}, or numbers; got {keeps!r}")
    ratios = tuple(float(keep) for keep in ratios)
    if any(not 0 < keep < 1 for keep in ratios) or any(a <= b for a, b in zip(ratios, ratios[1:])):
        raise ValueError(f"keeps must be numbers in (0, 1) that fall; got {ratios}")
    if method not in ("weights", "neurons"):
        raise ValueError(f"method must be 'weights' or 'neurons', got {method!r}")
    prune = prune_weights_ if method == "weights" else prune_neurons_
    run = {
        "method": method,
        "keeps": list(ratios),
        "prune_options": _plain(prune_options or {}),
        "seed": seed,
        "training": _plain({name: value for name, value in training.items() if name != "progress"}),
        "data": data.name,
    }
    return _cycles(flow, data, ratios, prune, dict(prune_options or {}), folder, seed, training, run)


def _cycles(flow, data, ratios, prune, prune_options, folder, seed, training, run) -> Iterator[Cycle]:
    for index, keep in enumerate((1.0, *ratios)):
        path = None if folder is None else Path(folder) / f"cycle_{index:02d}.safetensors"
        if path is not None and path.exists():
            facts = _resume(path, flow, run, index)
            yield Cycle(index, keep, copy_module(flow), facts["size"], facts["nll"], facts["history"], resumed=True)
            continue
        if index > 0:
            prune(flow, keep, **prune_options)
        history = train(flow, data, seed=seed + index, **training)
        nll = evaluate_nll(flow, data.val)
        cycle = Cycle(index, keep, copy_module(flow), size(flow), nll, history)
        if path is not None:
            facts = {"run": run, "index": index, "size": cycle.size, "nll": nll, "history": history}
            save_checkpoint(path, flow, facts)
        yield cycle


def _resume(path: Path, flow: ContinuousFlow, run: dict[str, Any], index: int) -> dict[str, Any]:
    before = copy_module(flow)
    facts = load_checkpoint(path, before)  # on a copy: a foreign checkpoint must not touch the flow
    found = facts.get("run", {})
    if found != run or facts.get("index") != index:
        differing = sorted(name for name in run.keys() | found.keys() if run.get(name) != found.get(name))
        raise CheckpointError(
            f"{path} is of another run (differing: {', '.join(differing) or 'index'}); choose another folder, or "
            "delete it to start anew"
        )
    load_checkpoint(path, flow)
    return facts


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as they come back from JSON, so that they compare equal."""
    return {
        name: value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)
        for name, value in sorted(options.items())
    }
