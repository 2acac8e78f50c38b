"""What one of the paper's experiments will cost on this machine, from a few training steps of its untrained net."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Sequence

import torch

from ..flows import ImageFlow
from ..training import train
from ..data.dataset import Dataset
from .paper_experiments import Experiment, total_steps

# A trained field takes more evaluations a solve than an untrained one, and a pruned net less time an evaluation. Over
# whole runs of 29 prune ratios with their control a step took so many times as long as the untrained net's.
GROWTH = 2.0
_WORK_OF_IMAGES = 3e9  # the same with the numbers of an image, as a weight is used at every pixel
_WORK = 2e7  # weights times rows of a step that is timed, at most; what is timed on fewer rows is scaled up


def step_seconds(experiment: Experiment) -> float:
    """Of a training step of the untrained net on rows of a standard normal, of images on grey levels at random, in time of the processor, which other work
    on the machine is not in: the median of some steps after the first, which makes its programs."""
    flow, settings = experiment.flow(), experiment.training()[0]
    weights = sum(parameter.numel() for parameter in flow.parameters())
    batch = int(min(settings.batch, max(32, _WORK / weights)))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(batch, flow.dim, generator=generator)
    if isinstance(flow, ImageFlow):
        batch = int(min(settings.batch, max(8, _WORK_OF_IMAGES / (weights * flow.dim))))
        rows = torch.randint(flow.levels, (batch, flow.dim), generator=generator).float()
    labels = torch.arange(batch) % flow.dim
    data = Dataset("rows", rows, rows[:0], rows[:0], train_labels=labels)
    steps = 4 if experiment.of_images else 4 if weights > 100_000 else 20
    made = dataclasses.replace(settings, batch=batch, epochs=None, steps=steps, milestones=(), select="last")
    ends = []
    train(
        flow, data, engine="auto", progress=lambda facts: ends.append(time.process_time()), **dataclasses.asdict(made)
    )
    return statistics.median(after - before for before, after in zip(ends, ends[1:])) * settings.batch / batch


def expected_hours(runs: Sequence[Experiment], rows: dict[str, int]) -> float:
    """Core-hours of training of all runs together. rows: training rows by data set."""
    timed: dict[tuple, float] = {}
    total = 0.0
    began = time.monotonic()
    for one in runs:
        net = (one.preset, one.net, one.variant, one.stand_in)
        if net not in timed and (not timed or time.monotonic() - began < 60):
            timed[net] = step_seconds(one)
        seconds = timed.get(net, statistics.mean(timed.values()))
        total += GROWTH * seconds * total_steps([one], rows)[one.name]
    shared = sum(total_steps(runs, rows).values()) / max(1, sum(total_steps([one], rows)[one.name] for one in runs))
    return total * shared / 3600
