"""Pictures of the paper's experiments, from what `analysis.paper` wrote: nothing is trained or solved here."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy

from ..files import read_arrays
from .paper import picture_path
from .paper_report import CLAIMED_KEEP, at_threshold, by_title, in_bits, is_classification, is_of_images
from .plots import _figure, _save

Documents = Sequence[dict[str, Any]]
Get = Callable[[dict[str, Any]], float | None]

PRUNED, CONTROL, TORCH = "tab:blue", "tab:orange", "tab:red"
MOST_COLUMNS = 6
PATHS = 80  # that are drawn: with more of them none can be followed


def draw(documents: Documents, folder: str | Path) -> list[Path]:
    """Every picture of the documents, into `folder`/plots; their paths."""
    folder = Path(folder)
    documents = [document for document in documents if document["cycles"]]
    if not documents:
        return []
    plots = folder / "plots"
    drawn = [plot_score(documents, plots / "nll.png"), plot_cost(documents, plots / "cost.png")]
    if all(map(is_classification, documents)):
        drawn.append(plot_score(documents, plots / "error.png", "error"))
    if any(record["modes"] for document in documents for record in document["cycles"]):
        drawn.append(plot_modes(documents, plots / "modes.png"))
    if any(record["hessian"] for document in documents for record in document["cycles"]):
        drawn.append(plot_hessian(documents, plots / "hessian.png"))
    for document in documents:
        picture = plot_flows(document, folder, plots / f"{document['name']}.png")
        drawn += [picture] if picture is not None else []
    return drawn


def _series(documents: Documents, get: Get) -> list[tuple[float, float, float, float]]:
    """(prune ratio, mean, least, most) over the seeds; records that lack the figure are left out."""
    by_ratio: dict[float, list[float]] = {}
    for document in documents:
        for record in document["cycles"]:
            try:
                value = get(record)
            except (KeyError, TypeError):  # the control has no size of its own, some data no modes
                continue
            if value is not None:
                by_ratio.setdefault(record["prune_ratio"], []).append(value)
    return [(ratio, statistics.mean(v), min(v), max(v)) for ratio, v in sorted(by_ratio.items())]


def _line(axis, documents: Documents, get: Get, label: str, color: str) -> dict:
    series = _series(documents, get)
    if not series:
        return {}
    ratios, means, least, most = zip(*series)
    (line,) = axis.plot(ratios, means, color=color, marker="o", markersize=3, linewidth=1.4)
    axis.fill_between(ratios, least, most, color=color, alpha=0.2, linewidth=0)
    return {label: line}


def _control(get: Get) -> Get:
    """Of the control; of the dense flow itself in cycle 0."""
    return lambda record: get(record["control"] if record["index"] else record)


def _legend(figure, lines: dict, columns: int) -> None:
    across = min(len(lines), 2 * columns - 1)
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=across, fontsize=8)


def plot_score(documents: Documents, path: str | Path, score: str = "nll") -> Path:
    """Test NLL (or `score` "error", of classifiers) against prune ratio, one panel per experiment, mean and range over
    seeds, the entropy drawn in. An NLL that collapses beyond a prune ratio of 0.8 is cut off."""
    groups, lines = by_title(documents), {}
    images = score == "nll" and all(map(is_of_images, documents))
    rows = -(-len(groups) // 3)
    columns = -(-len(groups) // rows)
    figure, axes = _figure(columns, rows, 3.8, 3.1)
    for axis, (title, here) in zip(axes.flat, groups.items()):
        get = (lambda r, one=here[0]: in_bits(one, r["nll"])) if images else (lambda r: r[score])
        lines |= _line(axis, here, get, "pruned", PRUNED)
        lines |= _line(axis, here, _control(get), "unpruned control, as many epochs", CONTROL)
        seen = [one for each in (get, _control(get)) for one in _series(here, each)]
        dense = [one[1] for one in seen if one[0] == 0]
        bottom = min((one[2] for one in seen), default=0.0)
        shown = [one[3] for one in seen if score == "error" or one[0] <= 1 - CLAIMED_KEEP + 1e-9]
        top = max(shown, default=bottom + 1.0)
        if dense:
            lines["dense, where both started"] = axis.axhline(dense[0], color="gray", linestyle=":", linewidth=1)
        if here[0]["entropy"] is not None and score == "nll":
            bottom = min(bottom, here[0]["entropy"])
            lines["entropy of the data"] = axis.axhline(here[0]["entropy"], color="black", linestyle="--", linewidth=1)
        margin = 0.08 * (top - bottom) + 1e-3
        axis.set_ylim(bottom - margin, top + 3 * margin)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    _blank(axes, len(groups))
    figure.supxlabel("prune ratio", fontsize=10)
    label = "test bits/dim" if images else "test NLL, nats" if score == "nll" else "test error"
    figure.supylabel(label, fontsize=10)
    _legend(figure, lines, columns)
    return _save(figure, path)


def _blank(axes, used: int) -> None:
    for axis in list(axes.flat)[used:]:
        axis.axis("off")


def _readable_log(axis) -> None:
    """Figures on a logarithmic axis as people write them, at 1, 2 and 5 where it spans two decades or less."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high <= 100 * low else (1.0,)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: _in_words(x)))


def _in_words(x: float) -> str:
    if 1e-3 <= x < 1e5:
        return f"{x:,.10g}"
    power = math.floor(math.log10(x) + 1e-9)
    mantissa = f"{x / 10**power:.3g}"
    return rf"$10^{{{power}}}$" if mantissa == "1" else rf"${mantissa}\cdot 10^{{{power}}}$"


def _grid(
    documents: Documents, figures: Sequence[tuple[str, Get, bool]], path: str | Path, torch_steps: bool = False,
    wide: bool = False,
) -> Path:  # fmt: skip
    """One column per experiment and one row per (label, figure, logarithmic), or, wide, a row per experiment: pruned
    against control."""
    groups, lines = by_title(documents), {}
    size = (len(figures), len(groups), 3.4, 2.6) if wide else (len(groups), len(figures), 3.0, 2.2)
    figure, axes = _figure(*size)
    for number, (title, here) in enumerate(groups.items()):
        for index, (label, get, logarithmic) in enumerate(figures):
            axis = axes[number][index] if wide else axes[index][number]
            lines |= _line(axis, here, get, "pruned", PRUNED)
            lines |= _line(axis, here, _control(get), "unpruned control", CONTROL)
            if torch_steps and label == "ms per training step":
                times = [one["torch"]["step_seconds"] * 1e3 for one in here if one["torch"] is not None]
                if times:
                    line = axis.axhline(statistics.mean(times), color=TORCH, linestyle="--", linewidth=1)
                    lines["dense in torch"] = line
            if logarithmic and all(one[2] > 0 for one in _series(here, get)):
                _readable_log(axis)
            else:
                axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if (number if wide else index) == 0:
                axis.set_title(label if wide else title, fontsize=9 if wide else 8)
            if (index if wide else number) == 0:
                axis.set_ylabel(title if wide else label, fontsize=8 if wide else 9)
    figure.supxlabel("prune ratio", fontsize=10)
    _legend(figure, lines, len(axes[0]))
    return _save(figure, path)


def plot_cost(documents: Documents, path: str | Path) -> Path:
    """Live size, evaluations per solve, time per training step, Lipschitz estimate and least step against prune
    ratio."""
    figures = (
        ("live size", lambda r: r["live_size"], False),
        ("NFE of a test solve", lambda r: r["nfe"], False),
        ("ms per training step", lambda r: r["step_seconds"] * 1e3, False),
        ("largest |df/dx|", lambda r: r["dynamics"]["lipschitz"], True),
        ("least step", lambda r: r["dynamics"]["least_step"], True),
    )
    return _grid(documents, figures, path, torch_steps=True)


def plot_modes(documents: Documents, path: str | Path, threshold: float = 3.0) -> Path:
    """Share of samples within `threshold` standard deviations of a mode, and the modes captured at 1 deviation."""
    having = [document for document in documents if any(record["modes"] for record in document["cycles"])]
    figures = (
        (f"share within {threshold:g} sd", lambda r: at_threshold(r["modes"], "high_quality", threshold), False),
        ("modes captured at 1 sd", lambda r: at_threshold(r["modes"], "captured", 1.0), False),
    )
    return _grid(having, figures, path)


def plot_hessian(documents: Documents, path: str | Path) -> Path:
    """Largest eigenvalue, trace and condition number of the loss's Hessian over live parameters, a row per
    experiment."""
    having = [document for document in documents if any(record["hessian"] for record in document["cycles"])]
    names = (
        ("largest eigenvalue", "largest"), ("trace", "trace"), ("paper's trace", "paper_trace"),
        ("condition number", "condition"),
    )  # fmt: skip
    figures = [(label, lambda r, key=key: r["hessian"][key], True) for label, key in names]
    return _grid(having, figures, path, wide=True)


def plot_flows(document: dict[str, Any], folder: str | Path, path: str | Path) -> Path | None:
    """Density, samples and trajectories from the base to the data at up to six prune ratios of one run; None if it
    has no pictures."""
    shown = [
        (record, picture)
        for record in document["cycles"]
        if (picture := picture_path(folder, document["name"], record["index"])).exists()
    ]
    if not shown:
        return None
    if len(shown) > MOST_COLUMNS:
        picked = numpy.linspace(0, len(shown) - 1, MOST_COLUMNS).round().astype(int)
        shown = [shown[index] for index in picked]
    if is_classification(document):
        return _plot_classifier(document, shown, path)
    if is_of_images(document):
        return _plot_images(document, shown, path)
    figure, axes = _figure(len(shown), 3, 2.4, 2.5)
    from matplotlib.colors import PowerNorm

    norm = None
    for column, (record, picture) in enumerate(shown):
        arrays = read_arrays(picture, ("extent", "density", "samples", "trajectories"), "delete it, and run again")
        side, density = float(arrays["extent"]), arrays["density"]
        square = [-side, side, -side, side]
        nll = "n/a" if record["nll"] is None else f"{record['nll']:.3f}"
        axes[0][column].set_title(
            f"{100 * record['prune_ratio']:.0f} % pruned\n{record['size']:,} parameters, NLL {nll}", fontsize=9
        )
        if density.size:  # one scale of colours, by the square root, so that what is a tenth as dense is seen
            norm = norm or PowerNorm(0.5, vmin=0.0, vmax=float(numpy.quantile(density, 0.995)))
            axes[0][column].imshow(density, origin="lower", extent=square, cmap="Blues", norm=norm)
        if arrays["samples"].size:
            axes[1][column].scatter(*arrays["samples"].T, s=1.5, linewidths=0, alpha=0.5, color="#08306b")
        if arrays["trajectories"].size:
            _draw_paths(axes[2][column], arrays["trajectories"][:, :PATHS])
        for axis in axes[:, column]:
            axis.set(xlim=(-side, side), ylim=(-side, side), xticks=[], yticks=[], aspect="equal")
    for row, label in enumerate(("density", "samples", f"{PATHS} paths, from the base\n(orange) to the data (blue)")):
        axes[row][0].set_ylabel(label, fontsize=9)
    figure.suptitle(document["name"], fontsize=10)
    return _save(figure, path)


def _plot_images(document: dict[str, Any], shown: Sequence[tuple[dict, Path]], path: str | Path) -> Path:
    """Test images, then samples at every prune ratio, of the same noise."""
    figure, axes = _figure(len(shown) + 1, 1, 2.0, 2.3)
    for column, (record, picture) in enumerate(shown):
        arrays = read_arrays(picture, ("samples", "data", "levels"), "delete it, and run again")
        if column == 0:
            _mosaic(axes[0][0], arrays["data"], int(arrays["levels"]))
            axes[0][0].set_title("test images", fontsize=8)
        bits = "n/a" if record["nll"] is None else f"{in_bits(document, record['nll']):.3f}"
        axis = axes[0][column + 1]
        axis.set_title(f"PR {record['prune_ratio']:.2f}, {record['size']} parameters\n{bits} bits/dim", fontsize=8)
        if arrays["samples"].size:
            _mosaic(axis, arrays["samples"], int(arrays["levels"]))
    for axis in axes[0]:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{document['name']}: samples", fontsize=9)
    return _save(figure, path)


def _mosaic(axis, images: numpy.ndarray, levels: int) -> None:
    """images: [side^2, height, width, channels], with a line between them."""
    side = int(round(len(images) ** 0.5))
    framed = numpy.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=levels - 1)
    _, height, width, channels = framed.shape
    whole = framed.reshape(side, side, height, width, channels).swapaxes(1, 2).reshape(side * height, side * width, channels)
    axis.imshow((whole if channels > 1 else whole[..., 0]) / (levels - 1), cmap="gray", vmin=0, vmax=1)


def _draw_paths(axis, paths: numpy.ndarray) -> None:
    """paths: [times, n, 2]. Their colour goes with the time from the base's to the data's; where they end is a point."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    pieces = numpy.stack([paths[:-1], paths[1:]], axis=2)  # [times - 1, n, 2 ends, 2]
    times = numpy.repeat(numpy.linspace(0.0, 1.0, len(pieces)), pieces.shape[1])
    colors = LinearSegmentedColormap.from_list("time", [CONTROL, "#bbbbbb", PRUNED])
    axis.add_collection(LineCollection(pieces.reshape(-1, 2, 2), array=times, cmap=colors, linewidths=1.1))
    axis.scatter(*paths[0].T, s=5, linewidths=0, color=CONTROL, zorder=3)
    axis.scatter(*paths[-1].T, s=12, edgecolors="white", linewidths=0.4, color=PRUNED, zorder=4)


def _plot_classifier(document: dict[str, Any], shown: Sequence[tuple[dict, Path]], path: str | Path) -> Path:
    """Decision boundary over the probability of class 1, and the vector field with where it carries test points."""
    figure, axes = _figure(len(shown), 2, 2.0, 2.1)
    names = ("extent", "points", "labels", "probability", "vectors", "ends")
    for column, (record, picture) in enumerate(shown):
        arrays = read_arrays(picture, names, "delete it, and run again")
        side, points, colors = float(arrays["extent"]), arrays["points"], numpy.where(arrays["labels"], CONTROL, PRUNED)
        error = "n/a" if record["error"] is None else f"{100 * record['error']:.1f} %"
        axes[0][column].set_title(
            f"PR {record['prune_ratio']:.2f}, {record['size']} parameters\nerror {error}", fontsize=8
        )
        if arrays["probability"].size:
            square, where = [-side, side, -side, side], numpy.linspace(-side, side, len(arrays["probability"]))
            axes[0][column].imshow(
                arrays["probability"], origin="lower", extent=square, cmap="PuOr_r", vmin=0, vmax=1, alpha=0.7
            )
            axes[0][column].contour(where, where, arrays["probability"], levels=[0.5], colors="black", linewidths=0.8)
        axes[0][column].scatter(*points.T, s=1.0, c=colors)
        if arrays["vectors"].size:
            grid = numpy.linspace(-side, side, len(arrays["vectors"]))
            axes[1][column].quiver(grid, grid, *arrays["vectors"].transpose(2, 0, 1), width=0.006, color="tab:gray")
        if arrays["ends"].size:
            reach = max(side, 1.05 * float(numpy.abs(arrays["ends"]).max()))
            axes[1][column].axline((0, 0), slope=1, color="black", linewidth=0.6)  # where the logits are equal
            axes[1][column].scatter(*arrays["ends"].T, s=1.5, c=colors, zorder=3)
            axes[1][column].set(xlim=(-reach, reach), ylim=(-reach, reach))
        axes[0][column].set(xlim=(-side, side), ylim=(-side, side))
        for axis in axes[:, column]:
            axis.set(xticks=[], yticks=[], aspect="equal")
    for row, label in enumerate(("decision boundary", "field, and test points\nat its end")):
        axes[row][0].set_ylabel(label, fontsize=8)
    figure.suptitle(document["name"], fontsize=9)
    return _save(figure, path)
