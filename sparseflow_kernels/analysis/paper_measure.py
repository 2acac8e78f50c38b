"""What is measured of every model of a run of the paper's experiments: test scores, modes, curvature, pictures, and the
time of dense torch."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import Any, Callable, Iterable

import numpy
import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..flows import ContinuousFlow, ImageFlow, NeuralClassifier, NeuralODE
from ..odeint import solve
from ..pruning import copy_module
from ..training import Cycle
from ..training.settings import OPTIMIZERS
from .hessian import TRACE_PRODUCTS, LossHessian, curvature, exact_curvature
from .modes import Modes, mode_coverage
from .paper_experiments import Experiment

DYNAMICS_ROWS = 256


class Measure:
    """What is measured of every flow of a run."""

    def __init__(self, experiment: Experiment, rows: Dataset, hessian: bool) -> None:
        self.experiment, self.analysis = experiment, experiment.analysis
        self.hessian = hessian and not experiment.of_images
        self.test, self.labels = rows.test, rows.test_labels
        self.modes = None
        if self.analysis.repeats and not experiment.classifies and rows.train_labels is not None:
            self.modes = Modes.of(rows.train, rows.train_labels)
        self.dense: Tensor | None = None  # its `scores`
        generator = torch.Generator().manual_seed(experiment.seed)
        count = self.analysis.hessian_rows or len(rows.train) // 10
        chosen = torch.randperm(len(rows.train), generator=generator)[:count]
        self.hessian_rows = rows.train[chosen], rows.train_labels[chosen] if experiment.classifies else None
        self.train_rows = len(rows.train)

    def scores(self, model: NeuralODE) -> Tensor:
        """Log-likelihoods of the test rows (of their labels), float64 [n], NaN if the solve fails."""
        return self._scores(model.compile().eval())[0]

    def _scores(self, compiled: NeuralODE) -> tuple[Tensor, float | None]:
        if not self.experiment.of_images:
            return self._scored(compiled)
        with torch.random.fork_rng(devices=[]):  # every model meets the same noise
            torch.manual_seed(self.experiment.seed)
            draws = [self._scored(compiled) for _ in range(self.analysis.draws)]
        return torch.stack([scores for scores, _ in draws]).mean(0), _mean(nfe for _, nfe in draws)

    @torch.no_grad()
    def _scored(self, compiled: NeuralODE) -> tuple[Tensor, float | None]:
        found, nfes = [], []
        try:
            for start in range(0, len(self.test), compiled.evaluation_rows):
                part = slice(start, start + compiled.evaluation_rows)
                told = self.labels[part] if compiled.supervised else None
                found.append(-compiled.row_nll(self.test[part], told).double())
                if compiled.stats is not None:
                    nfes.append(compiled.stats.nfe)
        except AssertionError:  # a solve that cannot go on
            return torch.full((len(self.test),), math.nan, dtype=torch.float64), None
        return torch.cat(found), _mean(nfes)

    def cycle(self, cycle: Cycle, record: dict[str, Any] | None) -> dict[str, Any]:
        """The record of a cycle; what `record` has already is kept."""
        record = dict(record or {})
        if "nll" not in record:
            steps = self.experiment.steps(self.train_rows, cycle.index)
            own, scores = self._model(cycle.flow)
            record |= {
                "index": cycle.index, "keep": cycle.keep, "prune_ratio": 1 - cycle.keep, "size": cycle.size,
                "live_size": cycle.live_size, "nll_validation": cycle.nll, **own, "steps": steps,
                "seconds": cycle.seconds, "step_seconds": cycle.step_seconds,
                "training_nfe": _mean(entry["nfe"] for entry in cycle.history),
                "skipped_steps": sum(entry["skipped"] for entry in cycle.history),
                "versus_dense": _difference(scores, self.dense), "control": None, "versus_control": None,
                "hessian": None,
            }  # fmt: skip
            if cycle.index and cycle.control_flow is not None:
                other, control = self._model(cycle.control_flow)
                record["control"] = other | {
                    "nll_validation": cycle.control_nll, "step_seconds": cycle.control_step_seconds,
                    "seconds": sum(entry["seconds"] for entry in cycle.control_history or []),
                    "training_nfe": _mean(entry["nfe"] for entry in cycle.control_history or []), "hessian": None,
                }  # fmt: skip
                record["versus_control"] = _difference(scores, control)
        if self.experiment.of_images:
            record["dynamics"] = None  # Jacobians of images are too large
        elif "dynamics" not in record:  # results of earlier versions have none
            record["dynamics"] = dynamics(cycle.flow, self.test[:DYNAMICS_ROWS])
            if record["control"] is not None:
                of_control = dynamics(cycle.control_flow, self.test[:DYNAMICS_ROWS])
                record["control"] = record["control"] | {"dynamics": of_control}
        if self.hessian and record["hessian"] is None:
            record["hessian"] = self._hessian(cycle.flow)
            if record["control"] is not None:
                record["control"] = record["control"] | {"hessian": self._hessian(cycle.control_flow)}
        return record

    def _model(self, model: NeuralODE) -> tuple[dict[str, Any], Tensor]:
        compiled = model.compile().eval()
        scores, nfe = self._scores(compiled)
        if isinstance(compiled, NeuralClassifier):
            found = {"nll": -float(scores.mean()), "nfe": nfe, "modes": None}
            return found | self._classification(compiled), scores
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
        return {"nll": -float(scores.mean()), "nfe": nfe, "modes": coverage}, scores

    def _classification(self, compiled: NeuralClassifier) -> dict[str, float | None]:
        """Top-1 error and Matthews correlation on the test rows; None if the solve fails."""
        try:
            predicted = compiled.predict(self.test)
        except AssertionError:  # a solve that cannot go on
            return {"error": None, "matthews": None}
        wrong = (predicted != self.labels).double().mean()
        return {"error": float(wrong), "matthews": matthews_correlation(predicted, self.labels, compiled.dim)}

    def _hessian(self, flow: NeuralODE) -> dict[str, Any] | None:
        hessian = LossHessian(flow, *self.hessian_rows)
        steps, probes = self.analysis.hessian_steps, self.analysis.hessian_probes
        try:
            if hessian.size <= steps * probes + TRACE_PRODUCTS:  # the whole matrix costs no more products
                return dataclasses.asdict(exact_curvature(hessian.dense()))
            return dataclasses.asdict(curvature(hessian, steps=steps, probes=probes, seed=self.experiment.seed))
        except AssertionError:  # a solve that cannot go on
            return None


def dynamics(model: NeuralODE, rows: Tensor) -> dict[str, float] | None:
    """How stiff the trained dynamics are, over a solve of these rows without the log-density: the least and the mean
    step size, and a lower bound of the fields' Lipschitz constant, the largest spectral norm of df/dx at both ends of
    every row's trajectory. None if a solve fails."""
    compiled, stats, norms = model.compile().eval(), [], []
    x = rows
    try:
        for index, field in enumerate(model.vector_fields):
            times = compiled._times(index, x).detach()
            for end in range(2):
                norms.append(float(torch.linalg.matrix_norm(_jacobian(field, times[end], x), 2).max()))
                if end == 0:
                    with torch.no_grad():
                        x = compiled._solve(compiled.vector_fields[index], x, times, stats)
    except AssertionError:  # a solve that cannot go on
        return None
    sizes = torch.cat([one.steps[:, 1].abs() for one in stats])
    return {"lipschitz": max(norms), "least_step": float(sizes.min()), "mean_step": float(sizes.mean())}


def _jacobian(field: torch.nn.Module, t: Tensor, x: Tensor) -> Tensor:
    """[n, dim, dim] of a module that treats its rows independently."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        f = field(t, x)
        if not f.requires_grad:
            return x.new_zeros(*x.shape, x.shape[1])
        rows = [torch.autograd.grad(f[:, m].sum(), x, retain_graph=True, materialize_grads=True, allow_unused=True)[0]
                for m in range(x.shape[1])]  # fmt: skip
    return torch.stack(rows, 1)


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.mean(found) if found else None


def _difference(scores: Tensor, other: Tensor) -> dict[str, float]:
    """NLL (-scores) less the other's over the same rows, and the standard error of that mean over rows."""
    difference = other - scores
    return {"nats": float(difference.mean()), "error": float(difference.std() / math.sqrt(len(difference)))}


def extent(rows: Tensor) -> float:
    """Half the side of a square about 0 that has the rows in it, with a margin."""
    return math.ceil(11 * float(rows.abs().quantile(0.999))) / 10


def matthews_correlation(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Matthews' correlation coefficient of classes, int64 [n] each, in Gorodkin's form for any number of them; 0 where
    one side is a single class, and it is not defined."""
    confusion = torch.zeros(classes, classes, dtype=torch.float64)
    confusion.index_put_((labels, predicted), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    true, told, n = confusion.sum(1), confusion.sum(0), confusion.sum()
    covariance = confusion.trace() * n - true @ told
    spread = (n * n - told @ told) * (n * n - true @ true)
    return float(covariance / spread.sqrt()) if spread > 0 else 0.0


def pictures_of(model: NeuralODE, rows: Dataset, experiment: Experiment) -> dict[str, numpy.ndarray]:
    """The arrays of a model's picture: `_of_flow`, `_of_images`, or `_of_classifier`."""
    if experiment.of_images:
        return _of_images(model, rows, experiment)
    return _of_classifier(model, rows, experiment) if model.supervised else _of_flow(model, rows, experiment)


@torch.no_grad()
def _of_classifier(model: NeuralClassifier, rows: Dataset, experiment: Experiment) -> dict[str, numpy.ndarray]:
    """probability [y, x] of class 1 over the square of `extent`, vectors [y, x, 2] of the field at t0 on a coarser
    grid, points [n, 2] and labels [n] of test rows, ends [n, 2] to which the field carries them; empty where a solve
    failed."""
    compiled = model.compile().eval()
    side, resolution = extent(rows.train), experiment.analysis.resolution
    line, coarse = (torch.linspace(-side, side, n, dtype=rows.train.dtype) for n in (resolution, 17))
    points = rows.test[:: max(1, len(rows.test) // 256)]
    field = compiled.vector_fields[0]
    parts: dict[str, Callable[[], Tensor]] = {
        "probability": lambda: compiled(torch.cartesian_prod(line, line)).softmax(1)[:, 1].view(resolution, -1).T,
        "vectors": lambda: field(compiled.t0, torch.cartesian_prod(coarse, coarse)).view(17, 17, 2).transpose(0, 1),
        "ends": lambda: compiled(points),
    }
    labels = rows.test_labels[:: max(1, len(rows.test) // 256)]
    found = {"extent": numpy.array(side), "points": points.numpy(), "labels": labels.numpy()}
    return found | {name: _or_empty(draw) for name, draw in parts.items()}


@torch.no_grad()
def _of_images(flow: ImageFlow, rows: Dataset, experiment: Experiment) -> dict[str, numpy.ndarray]:
    """samples, and data of the test set: uint8 [resolution^2, height, width, channels], and levels. The same seed draws
    samples of every flow."""
    count = experiment.analysis.resolution**2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        samples = _or_empty(lambda: flow.compile().eval().sample(count).movedim(1, 3))
    data = rows.test[:count].view(-1, *flow.shape).movedim(1, 3).numpy()
    return {
        "samples": samples.astype(numpy.uint8), "data": data.astype(numpy.uint8), "levels": numpy.array(flow.levels),
    }  # fmt: skip


def _or_empty(draw: Callable[[], Tensor]) -> numpy.ndarray:
    try:
        return draw().float().numpy()
    except AssertionError:  # a solve that cannot go on
        return numpy.zeros(0, numpy.float32)


@torch.no_grad()
def _of_flow(flow: ContinuousFlow, rows: Dataset, experiment: Experiment) -> dict[str, numpy.ndarray]:
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
        return found | {name: _or_empty(draw) for name, draw in parts.items()}


def dense_in_torch(experiment: Experiment, flow: NeuralODE, rows: Dataset) -> dict[str, Any]:
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
            chosen = torch.randint(len(rows.train), (settings.batch,), generator=generator)
            x, labels = rows.train[chosen], rows.train_labels[chosen] if dense.supervised else None
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            dense.row_nll(x, labels).mean().backward()
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
