"""The experiments of Sparse Flows (arXiv 2106.12718) as data: nets, training, retraining, keep ratios, repetitions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..flows import (
    TABULAR, ContinuousFlow, NeuralClassifier, NeuralODE, image_flow, tabular_flow, toy_field,
)  # fmt: skip
from ..pruning import KEEP_RATIOS
from .settings import TrainingSettings


@dataclass(frozen=True)
class Preset:
    """One experiment.

    data: name of its data set, as `data.load` has it, or would have.  nets: name -> settings of the ContinuousFlow that
    are not the default; the first is the main one.  training: of the dense net.  retrain: settings that differ
    afterwards.  keeps: name in KEEP_RATIOS.  repetitions: independently trained nets.  fold: `prune_neurons_`'s; with
    gates, "auto" leaves a pruned neuron its time parameters and outgoing weights, and the smaller sizes cannot be met.
    classifies: the net is a NeuralClassifier of the data's labels, not a density.  image: which of `flows.IMAGES` the
    net is; None for others.
    """

    data: str
    nets: dict[str, dict[str, Any]]
    training: TrainingSettings
    retrain: dict[str, Any] = field(default_factory=dict)
    keeps: str = "toy"
    repetitions: int = 1
    fold: str = "auto"
    classifies: bool = False
    image: str | None = None

    def prune_options(self, method: str) -> dict[str, Any]:
        """For `sparse_flow` with that method. A neuron stays connected in every layer: a global ranking of weights
        empties the middle layers of deep thin nets (l8_h10) and convolutions of images, which then move nothing."""
        return {"fold": self.fold} if method == "neurons" else {"min_neurons": 1}

    @property
    def keep_ratios(self) -> tuple[float, ...]:
        return KEEP_RATIOS[self.keeps]

    def flow(self, net: str | None = None, **settings: Any) -> NeuralODE:
        """A new flow or classifier, drawn from torch's global generator.

        net: one of `nets`, None for the first. For toys also any other "[ffjord_|cnf_]lL_hH[_activation]": "ffjord"
            trains with Hutchinson's trace and Gaussian noise, "cnf" with the exact one; for classifiers any other
            "lL_hH[_activation]"; for images "hH", H channels between the convolutions.
        settings: the model's, over the experiment's. Raises ValueError for an unknown net.
        """
        net = next(iter(self.nets)) if net is None else net
        settings = {**self.nets.get(net, {}), **settings}
        if self.data in TABULAR:
            if net not in self.nets:
                raise ValueError(f"net must be one of {', '.join(self.nets)}; got {net!r}")
            return tabular_flow(self.data, **settings)
        if self.image is not None:
            width = re.fullmatch(r"h([1-9]\d*)", net)
            if width is None and net not in self.nets:
                raise ValueError(f"net must be {', '.join(self.nets)}, or look like 'h16'; got {net!r}")
            return image_flow(self.image, **(({"hidden": (int(width[1]),) * 3} if width else {}) | settings))
        match = re.fullmatch(r"(?:(ffjord|cnf)_)?(l\d+_h\d+)(?:_([a-z]+))?", net)
        if self.classifies:
            if match is None or match[1] is not None:
                raise ValueError(f"net must look like 'l2_h64' or 'l2_h64_relu', the net of a classifier; got {net!r}")
            tolerance = {"rtol": 1e-4, "atol": 1e-4}
            return NeuralClassifier(toy_field(match[2], match[3] or "tanh"), 2, **(tolerance | settings))
        if match is None:
            raise ValueError(f"net must look like 'l4_h64', 'cnf_l2_h128' or 'ffjord_l4_h64_tanh'; got {net!r}")
        trace = {"divergence": "exact"} if match[1] == "cnf" else {
            "divergence": "hutchinson", "noise": "gaussian", "eval_divergence": "exact"
        }
        return ContinuousFlow(toy_field(match[2], match[3] or "sigmoid"), 2, **(trace | settings))


def _toy(name: str, nets: dict[str, dict[str, Any]], lr: float, weight_decay: float) -> Preset:
    training = TrainingSettings(epochs=100, batch=1024, lr=lr, optimizer="adamw", weight_decay=weight_decay)
    return Preset(name, nets, training, keeps="toy", repetitions=3)


def _classifier(name: str, nets: tuple[str, ...], epochs: int, weight_decay: float) -> Preset:
    training = TrainingSettings(epochs=epochs, batch=128, lr=0.01, optimizer="adam", weight_decay=weight_decay)
    return Preset(name, {net: {} for net in nets}, training, keeps="toy", repetitions=3, classifies=True)


def _tabular(
    name: str, epochs: int, batch: int, milestones: tuple[int, ...], repetitions: int = 1, retrain: dict | None = None
) -> Preset:
    training = TrainingSettings(
        epochs=epochs, batch=batch, lr=1e-3, milestones=milestones, optimizer="adam", weight_decay=1e-6, select="best"
    )
    return Preset(name, {"ffjord": {}}, training, retrain or {}, keeps=name, repetitions=repetitions, fold="drop")


def _images(
    name: str, data: str, epochs: int = 50, milestone: int = 45, lr: float = 1e-3, batch: int = 200,
    retrain: dict | None = None,
) -> Preset:
    training = TrainingSettings(
        epochs=epochs, batch=batch, lr=lr, milestones=(milestone,), optimizer="adam", weight_decay=0.0, select="best"
    )
    return Preset(data, {"ffjord": {}}, training, retrain or {}, keeps="images", fold="drop", image=name)


PRESETS: dict[str, Preset] = {
    "gaussians": _toy("gaussians", {"ffjord_l4_h64": {}, "ffjord_l2_h128": {}, "cnf_l2_h128": {}}, 5e-3, 1e-5),
    "gaussians_spiral": _toy("gaussians_spiral", {"ffjord_l4_h64": {}, "cnf_l4_h64": {}}, 0.05, 0.01),
    "spirals2": _toy("spirals2", {"ffjord_l4_h64": {}, "cnf_l4_h64": {"rtol": 1e-4, "atol": 1e-4}}, 0.05, 1e-6),
    "moons": _classifier("moons", ("l2_h64", "l2_h128", "l2_h32", "l2_h3"), 50, 1e-4),
    "concentric": _classifier("concentric", ("l2_h64", "l2_h128"), 50, 1e-5),
    "spirals": _classifier("spirals", ("l2_h64",), 100, 1e-5),
    "power": _tabular("power", 100, 10_000, (90, 97)),
    "gas": _tabular("gas", 30, 1000, (25, 28)),
    "hepmass": _tabular("hepmass", 400, 10_000, (325, 375), retrain={"epochs": 300, "milestones": (250, 295)}),
    "miniboone": _tabular("miniboone", 400, 1000, (300, 350), repetitions=3),
    "bsds300": _tabular("bsds300", 100, 10_000, (96, 99)),
    "mnist": _images("mnist", "mnist"),
    "cifar10": _images("cifar10", "cifar10"),
    "digits": _images("digits", "digits_images", 60, 50, 5e-3, 100, {"epochs": 15, "milestones": (12,)}),
}
"""By name. lr falls to a tenth at each milestone; toys keep the last epoch, nets of tables and images the best by
validation. digits is ours, a small one; all others are the paper's."""
