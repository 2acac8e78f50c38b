"""Pictures: benchmark curves and two-dimensional densities. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Sequence

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .bench import Row


def _figure(columns: int, rows: int, width: float, height: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is needed for pictures: pip install 'sparseflow_kernels[demo]'") from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_bench(rows: "Sequence[Row]", path: str | Path, unit: str = "solve") -> Path:
    """Time of a unit (a solve, a training step) against the keep ratio, one panel per field, one line per contender,
    the floor dashed."""
    fields = list(dict.fromkeys(row.field for row in rows))
    columns = 2 if len(fields) == 4 else min(3, len(fields))
    figure, axes = _figure(columns, -(-len(fields) // columns), 3.4 if columns > 1 else 5.0, 3.0)
    lines = {}
    for axis, field in zip(axes.flat, fields):
        here = [row for row in rows if row.field == field and row.median is not None]
        for name in dict.fromkeys(row.contender for row in here):
            line = sorted((row.keep, row.median * 1e3) for row in here if row.contender == name)
            style = {"linewidth": 2.5, "zorder": 3} if name == "sparseflow" else {"linewidth": 1.2}
            (lines[name],) = axis.plot(*zip(*line), marker="o", markersize=3, **style)
        floor = sorted((row.keep, row.floor * 1e3) for row in here if row.contender == "sparseflow" and row.floor)
        if floor:
            (lines["floor of sparseflow's arithmetic"],) = axis.plot(*zip(*floor), "k--", linewidth=1)
        axis.set(xscale="log", yscale="log", title=field)
        keeps = sorted({row.keep for row in here})
        axis.set_xticks(keeps, [f"{keep:g}" for keep in keeps], fontsize=8)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(fields):]:
        axis.axis("off")
    figure.supxlabel("keep ratio", fontsize=10)
    figure.supylabel(f"ms per {unit}", fontsize=10)
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=columns + 1, fontsize=8)
    return _save(figure, path)


def plot_densities(
    densities: "dict[str, Callable[[Tensor], Tensor]]", samples: dict[str, Tensor], data: Tensor, path: str | Path,
    title: str = "data", extent: float = 4.0, resolution: int = 160,
) -> Path:
    """Data, then the density of every 2-D model over its samples.

    densities: title -> log_prob([n, 2]) -> [n].  samples: title -> [n, 2], same titles.  data: [n, 2], with its title;
    below it as many of its points as the models have samples. Axes span [-extent, extent]; one scale of colours, by the
    square root, so that what is a tenth as dense is seen; the models' are evaluated on resolution x resolution points.
    """
    figure, axes = _figure(1 + len(densities), 2, 2.5, 2.6)
    from matplotlib.colors import PowerNorm

    line = torch.linspace(-extent, extent, resolution, dtype=data.dtype)
    grid = torch.cartesian_prod(line, line)
    bins = min(80, max(16, math.isqrt(len(data)) // 2))
    found = torch.histogramdd(data, [bins, bins], range=[-extent, extent] * 2, density=True).hist
    shown = {"origin": "lower", "extent": [-extent, extent] * 2, "cmap": "Blues"}
    shown["norm"] = PowerNorm(0.5, vmin=0.0, vmax=float(found.max()))
    axes[0][0].imshow(found.T.numpy(), **shown)
    count = min(len(data), *map(len, samples.values()))
    axes[0][0].set_title(title, fontsize=9)
    dots = {"s": 4 if count < 1000 else 1, "linewidths": 0, "alpha": 0.6, "color": "#08306b"}
    axes[1][0].scatter(*data[:count].T.numpy(), **dots)
    axes[1][0].set_title(f"{count} points of it", fontsize=9)
    for column, (name, log_prob) in enumerate(densities.items(), 1):
        density = log_prob(grid).exp().reshape(resolution, resolution).T
        axes[0][column].imshow(density.numpy(), **shown)
        axes[0][column].set_title(name, fontsize=9)
        axes[1][column].scatter(*samples[name][:count].T.numpy(), **dots)
        axes[1][column].set_title(f"{count} samples", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], aspect="equal", xlim=(-extent, extent), ylim=(-extent, extent))
    return _save(figure, path)


def _save(figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
