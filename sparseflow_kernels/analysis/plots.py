"""Pictures: benchmark curves and two-dimensional densities. matplotlib is imported when a picture is drawn."""

from __future__ import annotations

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


def plot_bench(rows: "Sequence[Row]", path: str | Path) -> Path:
    """Time of a whole solve against the keep ratio, one panel per field, one line per contender, the floor dashed."""
    fields = list(dict.fromkeys(row.field for row in rows))
    figure, axes = _figure(len(fields), 1, 4.2, 3.6)
    for axis, field in zip(axes[0], fields):
        here = [row for row in rows if row.field == field and row.median is not None]
        for name in dict.fromkeys(row.contender for row in here):
            line = sorted((row.keep, row.median * 1e3) for row in here if row.contender == name)
            axis.plot(*zip(*line), marker="o", markersize=3, label=name, linewidth=2 if name == "sparseflow" else 1)
        floor = sorted((row.keep, row.floor * 1e3) for row in here if row.contender == "sparseflow" and row.floor)
        if floor:
            axis.plot(*zip(*floor), "k--", linewidth=1, label="floor")
        axis.set(xscale="log", yscale="log", title=field, xlabel="keep ratio", ylabel="ms per solve")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=7)
    return _save(figure, path)


def plot_densities(
    densities: "dict[str, Callable[[Tensor], Tensor]]", samples: dict[str, Tensor], data: Tensor, path: str | Path,
    extent: float = 4.0, resolution: int = 160,
) -> Path:
    """Data, then the density of every 2-D model over its samples.

    densities: name -> log_prob([n, 2]) -> [n].  samples: name -> [n, 2], same names.  data: [n, 2].  Axes span
    [-extent, extent]; the density is evaluated on resolution x resolution points.
    """
    line = torch.linspace(-extent, extent, resolution)
    grid = torch.cartesian_prod(line, line)
    window = {"range": [[-extent, extent]] * 2, "bins": 100}
    figure, axes = _figure(1 + len(densities), 2, 3.2, 3.2)
    axes[0][0].hist2d(*data.T.numpy(), **window)
    axes[0][0].set_title("data")
    axes[1][0].axis("off")
    for column, (name, log_prob) in enumerate(densities.items(), 1):
        density = log_prob(grid).exp().reshape(resolution, resolution).T
        axes[0][column].imshow(density.numpy(), origin="lower", extent=[-extent, extent] * 2)
        axes[0][column].set_title(f"{name}: density")
        axes[1][column].hist2d(*samples[name].T.numpy(), **window)
        axes[1][column].set_title(f"{name}: samples")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], aspect="equal")
    return _save(figure, path)


def _save(figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
