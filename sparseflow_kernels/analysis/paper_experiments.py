"""The Sparse Flows experiments (arXiv 2106.12718) as data: every study of the paper by name, and the runs it is made
of.

A run is one net, trained densely, pruned by one method down a list of keep ratios, and retrained; a study is all runs
of a table or a sweep. Nothing is trained here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Sequence

import torch

from .. import data
from ..data.dataset import Dataset
from ..flows import NeuralODE
from ..training import PRESETS, TrainingSettings
from .modes import REPEATS, SAMPLES


@dataclass(frozen=True)
class Analysis:
    """How much is measured.

    test_rows: of the test and of the validation rows, None for all.  samples, repeats: of the mode analysis.
    hessian_rows: of the training rows, None for the paper's tenth.  hessian_steps, hessian_probes: of Lanczos.
    resolution: of a picture, points a side, of images, samples a side; 0 for no pictures.  torch_steps: of dense torch,
    to be timed; 0 for none.  draws: of the noise of a test, of images, whose trace is estimated: means over so many.
    """

    test_rows: int | None = None
    samples: int = SAMPLES
    repeats: int = REPEATS
    hessian_rows: int | None = None
    hessian_steps: int = 100
    hessian_probes: int = 3
    resolution: int = 120
    torch_steps: int = 50
    draws: int = 1


@dataclass(frozen=True)
class Experiment:
    """One run of the loop on a preset of `training.PRESETS`.

    net: as `Preset.flow` has it: "ffjord_l2_h128" trains with Hutchinson's trace, "cnf_l2_h128" with the exact one.
    settings, retraining: what differs from the preset's `TrainingSettings`, and in retraining from those.
    tolerance: rtol and atol, None for the preset's.  model: further settings of the model.  variant: the word for those
    and for `settings`, in names.  stand_in: the data set that stands for the preset's own, None for its own.
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
    model: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    stand_in: str | None = None

    @property
    def dense_title(self) -> str:
        """What runs of several seeds and methods share."""
        on = f"on {self.stand_in}" if self.stand_in else ""
        return " ".join(part for part in (self.preset, on, self.net, self.variant) if part)

    @property
    def title(self) -> str:
        """What runs of several seeds share."""
        return f"{self.dense_title} {self.method}"

    @property
    def name(self) -> str:
        return f"{self.title.replace(' ', '-')}-seed{self.seed}"

    @property
    def unpruned_name(self) -> str:
        """Of the dense training and its control, which runs by other methods share."""
        return f"{self.dense_title.replace(' ', '-')}-seed{self.seed}"

    @property
    def dataset(self) -> str:
        return self.stand_in or PRESETS[self.preset].data

    @property
    def classifies(self) -> bool:
        return PRESETS[self.preset].classifies

    @property
    def of_images(self) -> bool:
        return PRESETS[self.preset].image is not None

    def rows(self) -> Dataset:
        """Its data, with no more validation and test rows than are used. Raises FileNotFoundError for data that must be
        fetched first."""
        rows, most = data.load(self.dataset), self.analysis.test_rows
        labels = {f"{part}_labels": getattr(rows, f"{part}_labels") for part in ("val", "test")}
        cut = {name: None if kept is None else kept[:most] for name, kept in labels.items()}
        return dataclasses.replace(rows, val=rows.val[:most], test=rows.test[:most], **cut)

    def flow(self) -> NeuralODE:
        """The model before training, drawn with this experiment's seed; a flow's trace is exact in eval mode, but for
        images."""
        settings: dict[str, Any] = {} if self.classifies or self.of_images else {"eval_divergence": "exact"}
        if self.tolerance is not None:
            settings |= {"rtol": self.tolerance, "atol": self.tolerance}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return PRESETS[self.preset].flow(self.net, **(settings | self.model))

    @property
    def prune_options(self) -> dict[str, Any]:
        """Gated neurons go with their time parameters, or the tables' smaller sizes cannot be met; nothing else differs
        from the defaults: as in the paper, a global ranking of weights may empty a layer."""
        fold = PRESETS[self.preset].fold
        return {"fold": fold} if self.method == "neurons" and fold != "auto" else {}

    def training(self) -> tuple[TrainingSettings, dict[str, Any]]:
        """(of the dense model, what differs in retraining)."""
        preset = PRESETS[self.preset]
        again = {name: value for name, value in preset.retrain.items() if name not in self.settings}
        if "steps" in self.settings or "epochs" in self.settings:
            again.pop("epochs", None)
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


def total_steps(runs: Sequence[Experiment], rows: dict[str, int]) -> dict[str, int]:
    """name -> training steps of that run, where runs before it have not trained its dense net and control already.
    rows: training rows by data set."""
    found: dict[str, int] = {}
    unpruned: dict[str, int] = {}  # cycles whose control is trained
    for one in runs:
        n = rows[one.dataset]
        known = unpruned.get(one.unpruned_name)
        own = len(one.keeps) * one.steps(n, 1)
        more = max(0, len(one.keeps) - (known or 0)) * one.steps(n, 1) + (one.steps(n, 0) if known is None else 0)
        unpruned[one.unpruned_name] = max(known or 0, len(one.keeps))
        found[one.name] = own + more
    return found


# --------------------------------------------------------------------------------------------------------- the studies


@dataclass(frozen=True)
class Variant:
    """One line of a sweep: a net, and what differs in training and in the model; label: the word for that."""

    net: str
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table or a sweep of the paper.

    about: for people, a line.  variants: its nets.  pruned: False for dense training alone.  stand_in: data that may
    stand for the preset's own where that is not at hand.
    """

    name: str
    about: str
    preset: str
    variants: tuple[Variant, ...]
    pruned: bool = True
    stand_in: str | None = None

    @property
    def classifies(self) -> bool:
        return PRESETS[self.preset].classifies

    def runs(
        self, quick: bool = False, *, nets: Sequence[str] | None = None, methods: Sequence[str] | None = None,
        keeps: Sequence[float] | None = None, seeds: int | None = None, stand_in: bool = False,
    ) -> list[Experiment]:  # fmt: skip
        """Its runs; what is None is the paper's: both methods, its keep ratios, its repetitions. quick: the short form
        (`QUICK`), by weights and one seed. stand_in: on the data that stand in."""
        preset = PRESETS[self.preset]
        if stand_in and self.stand_in is None:
            raise ValueError(f"{self.name} runs on data of its own; nothing stands in for them")
        on = self.stand_in if stand_in else None
        variants = self.variants if nets is None else tuple(Variant(net) for net in nets)
        if quick and nets is None:
            variants = tuple(v for v in variants if v.label or v.net in QUICK_NETS.get(self.name, (v.net,)))
        found = []
        for variant in variants:
            short = QUICK.get((self.preset, variant.net)) or QUICK.get((self.preset, ""))
            changes = _full(self.preset) if not quick else short.changes(self.preset)
            ratios = keeps if keeps is not None else preset.keep_ratios if not quick else short.keeps
            if not self.pruned:
                ratios = ()
            changes["settings"] = {**changes.get("settings", {}), **variant.settings}
            for method in (methods or (("weights",) if quick else ("weights", "neurons"))) if ratios else ("weights",):
                found += [
                    Experiment(
                        self.preset, variant.net, method, seed, tuple(ratios), model=variant.model,
                        variant=variant.label, stand_in=on, **changes,
                    )
                    for seed in range(seeds or (1 if quick else preset.repetitions))
                ]  # fmt: skip
        # Runs that share a dense net and a control lie together.
        order = {name: i for i, name in enumerate(dict.fromkeys(one.unpruned_name for one in found))}
        return sorted(found, key=lambda one: (one.seed, order[one.unpruned_name]))


TOYS = ("gaussians", "gaussians_spiral", "spirals2")
CLASSIFIED = ("moons", "concentric", "spirals")
TABULAR_STAND_INS = {"gas": "mixture8", "hepmass": "mixture21", "miniboone": "mixture43", "bsds300": "photos"}
TABULAR = ("power", *TABULAR_STAND_INS)
IMAGES = ("mnist", "cifar10", "digits")
_WITHOUT_MODES = ("spirals2", *TABULAR, *IMAGES)  # the means of two spiral arms are no modes, and tables have no classes


def _full(preset: str) -> dict[str, Any]:
    analysis = Analysis()
    if preset in _WITHOUT_MODES or preset in CLASSIFIED:
        analysis = dataclasses.replace(analysis, repeats=0)
    if preset in TABULAR:
        analysis = dataclasses.replace(analysis, resolution=0, torch_steps=5)
    if preset in IMAGES:
        analysis = dataclasses.replace(analysis, resolution=6, torch_steps=3, draws=12)
    return {"analysis": analysis}


@dataclass(frozen=True)
class Quick:
    """The short form of a study's runs. length, retraining: of the dense training and of each retraining, in `unit`s.
    batch: None for the preset's; where it is given, `tolerance` is rtol and atol, and the last epoch is kept."""

    keeps: tuple[float, ...]
    length: int
    retraining: int
    unit: str = "epochs"
    batch: int | None = None
    tolerance: float = 1e-5

    def changes(self, preset: str) -> dict[str, Any]:
        """What differs in an Experiment."""
        repeats = 0 if preset in _WITHOUT_MODES or preset in CLASSIFIED else QUICK_ANALYSIS.repeats
        analysis = dataclasses.replace(QUICK_ANALYSIS, repeats=repeats)
        if preset in IMAGES:
            analysis = dataclasses.replace(analysis, resolution=5, torch_steps=1, draws=3)
        settings: dict[str, Any] = {self.unit: self.length}
        if self.batch is None:
            return {"settings": settings, "retraining": {self.unit: self.retraining}, "analysis": analysis}
        return {
            "settings": settings | {"batch": self.batch, "milestones": (), "select": "last"},
            "retraining": {self.unit: self.retraining}, "tolerance": self.tolerance,
            "analysis": dataclasses.replace(
                analysis, resolution=analysis.resolution if preset in IMAGES else 0, test_rows=10 * self.batch, torch_steps=2 if self.batch < 1000 else 10,
                hessian_probes=1,
            ),
        }  # fmt: skip


QUICK_ANALYSIS = Analysis(
    samples=5000, repeats=3, hessian_rows=512, hessian_steps=40, hessian_probes=2, resolution=80
)
_FIVE = (0.8, 0.6, 0.4, 0.2, 0.1)
_EIGHT = (0.8, 0.6, 0.45, 0.33, 0.25, 0.2, 0.15, 0.1)
# The toys' were chosen for about 12 minutes on two cores; the tables' lengths fall as their nets grow.
QUICK: dict[tuple[str, str], Quick] = {
    ("gaussians_spiral", ""): Quick(_FIVE, 80, 20),
    ("spirals2", ""): Quick(_FIVE, 60, 12),
    ("gaussians", ""): Quick((0.8, 0.6, 0.4, 0.3, 0.2, 0.1), 100, 60),
    ("gaussians", "cnf_l2_h128"): Quick((0.8, 0.6, 0.4, 0.3, 0.2, 0.1), 100, 50),
    ("moons", ""): Quick(_EIGHT, 50, 50),
    ("concentric", ""): Quick(_EIGHT, 50, 50),
    ("spirals", ""): Quick(_EIGHT, 100, 60),
    ("power", ""): Quick((0.53, 0.23, 0.1), 400, 200, "steps", 1000),
    ("gas", ""): Quick((0.53, 0.23, 0.1), 100, 50, "steps", 500),
    ("hepmass", ""): Quick((0.483, 0.227, 0.107), 60, 30, "steps", 200),
    ("miniboone", ""): Quick((0.483, 0.227, 0.107), 60, 30, "steps", 200),
    ("bsds300", ""): Quick((0.304, 0.1), 10, 5, "steps", 50),
    ("digits", ""): Quick((0.5, 0.2, 0.1, 0.05), 60, 15),
    ("mnist", ""): Quick((0.3, 0.1), 4, 2, "steps", 16, 1e-3),
    ("mnist", "h16"): Quick((0.4, 0.2, 0.1), 120, 40, "steps", 32, 1e-3),
    ("cifar10", ""): Quick((0.3, 0.1), 2, 1, "steps", 8, 1e-3),
}
"""By preset and net; "" for the preset's other nets."""
QUICK_NETS = {
    "gaussians": ("ffjord_l2_h128", "cnf_l2_h128"), "gaussians_spiral": ("ffjord_l4_h64",),
    "spirals2": ("ffjord_l4_h64",), "moons": ("l2_h64",), "concentric": ("l2_h64",),
}  # fmt: skip


def _solvers(net: str, euler_points: int) -> tuple[Variant, ...]:
    """dopri5, rk4 on 20 points, and euler, each with the adjoint's and with the discrete gradient."""
    methods = {
        "dopri5": {"method": "dopri5"}, "rk4": {"method": "rk4", "options": {"step_size": 1.0 / 19.0}},
        "euler": {"method": "euler", "options": {"step_size": 1.0 / (euler_points - 1)}},
    }  # fmt: skip
    return tuple(
        Variant(net, f"{name} {gradient}", model={**settings, "gradient": gradient})
        for name, settings in methods.items() for gradient in ("discrete", "adjoint")
    )  # fmt: skip


def _grid(net: str) -> tuple[Variant, ...]:
    """The optimizer's: three learning rates, four weight decays (those that the main nets train with)."""
    return tuple(
        Variant(net, f"lr{lr:g} wd{decay:g}", settings={"lr": lr, "weight_decay": decay})
        for lr in (0.05, 0.01, 0.005) for decay in (1e-2, 1e-4, 1e-5, 1e-6)
    )  # fmt: skip


_DEPTHS = {
    "gaussians": ("about 700 parameters", ("l8_h10", "l6_h12", "l4_h17", "l3_h23", "l2_h128")),
    "gaussians_spiral": ("about 2,100 parameters", ("l8_h18", "l6_h22", "l4_h30", "l3_h43", "l2_h400")),
    "spirals2": ("about 8,600 parameters", ("l8_h37", "l6_h45", "l4_h64", "l3_h90", "l2_h1700")),
}
_ACTIVATIONS = ("sigmoid", "softplus", "tanh", "relu")


def _studies() -> dict[str, Study]:
    def plain(nets: Sequence[str]) -> tuple[Variant, ...]:
        return tuple(Variant(net) for net in nets)

    found = [Study(name, "2-D density, main nets", name, plain(PRESETS[name].nets)) for name in TOYS]
    found += [Study(name, "2-D classification, main nets", name, plain(PRESETS[name].nets)) for name in CLASSIFIED]
    found += [
        Study(
            name, "table of rows, FFJORD's net", name, plain(PRESETS[name].nets), stand_in=TABULAR_STAND_INS.get(name)
        )
        for name in TABULAR
    ]
    found += [
        Study("mnist", "images 28x28, FFJORD's multiscale net", "mnist", plain(("ffjord",)), stand_in="fashion_mnist"),
        Study("mnist-small", "the same with 16 channels for 64", "mnist", plain(("h16",)), stand_in="fashion_mnist"),
        Study("cifar10", "images 3x32x32, FFJORD's multiscale net", "cifar10", plain(("ffjord",)),
              stand_in="photo_crops"),
        Study("digits", "images 8x8, a small multiscale net", "digits", plain(("ffjord",))),
    ]
    for name in TOYS:
        found += [
            Study(f"{name}-sizes", "sweep: size of the net", name,
                  plain([f"ffjord_{net}" for net in ("l4_h64", "l8_h64", "l2_h128", "l2_h64")])),
            Study(f"{name}-depth", f"sweep: depth against width, {_DEPTHS[name][0]}", name,
                  plain([f"ffjord_{net}" for net in _DEPTHS[name][1]])),
            Study(f"{name}-activations", "sweep: activation", name,
                  plain([f"ffjord_l4_h64_{act}" for act in _ACTIVATIONS])),
            Study(f"{name}-solvers", "sweep: solver x gradient", name, _solvers("ffjord_l4_h64", 100)),
            Study(f"{name}-optimizers", "sweep: learning rate x weight decay, dense", name, _grid("ffjord_l4_h64"),
                  pruned=False),
        ]  # fmt: skip
    for name in CLASSIFIED:
        found += [
            Study(f"{name}-sizes", "sweep: size of the net", name,
                  plain(("l2_h32", "l2_h64", "l2_h128", "l4_h32", "l4_h128"))),
            Study(f"{name}-activations", "sweep: activation", name, plain([f"l2_h64_{act}" for act in _ACTIVATIONS])),
            Study(f"{name}-solvers", "sweep: solver x gradient", name, _solvers("l4_h32", 80)),
            Study(f"{name}-optimizers", "sweep: learning rate x weight decay", name, _grid("l2_h64")),
        ]  # fmt: skip
    return {study.name: study for study in found}


STUDIES: dict[str, Study] = _studies()
"""Every experiment of the paper by name, and smaller ones of its kind for images."""


def toy_experiments(quick: bool = False, *, names: Sequence[str] | None = None, **choice: Any) -> list[Experiment]:
    """The runs of the three densities (`Study.runs`), the costly data sets first, so that processes end together."""
    order = ("gaussians_spiral", "spirals2", "gaussians")
    found = [one for name in order if names is None or name in names for one in STUDIES[name].runs(quick, **choice)]
    return sorted(found, key=lambda one: one.seed)
