"""Benchmark results as a Markdown table, and putting it into a document, so that no figure is typed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from .bench import TASKS, Row, Spec
from .graph_problems import GraphSpec


def bench_tables(rows: Sequence[Row], fields: Sequence[Spec], document: dict[str, Any]) -> dict[str, str]:
    """Name of its place in a document -> table: of the flows, and of the fields that are none."""
    block = TASKS[document["task"]].block
    groups: dict[str, list[Spec]] = {}
    for spec in fields:
        groups.setdefault(f"graph-{block}" if isinstance(spec, GraphSpec) else block, []).append(spec)
    names = {place: {spec.name for spec in group} for place, group in groups.items()}
    return {
        place: bench_table([row for row in rows if row.field in names[place]], group, document)
        for place, group in groups.items()
    }


def bench_table(rows: Sequence[Row], fields: Sequence[Spec], document: dict[str, Any]) -> str:
    """One line per field and contender, one column per keep ratio: the ratio to the dense baseline, and for this
    library the share of the floor in brackets; then a line on the machine."""
    keeps = sorted({row.keep for row in rows}, reverse=True)
    task = TASKS[document["task"]]
    known = {(row.field, row.contender, row.keep): row for row in rows}
    baselines = list(dict.fromkeys(task.of(spec).baseline.name for spec in fields))
    head = ["field", f"{' or '.join(baselines)}, dense", "solver", *(f"keep {keep:g}" for keep in keeps)]
    lines = [head, ["---", "---:", "---", *["---:"] * len(keeps)]]
    for spec in fields:
        baseline = task.of(spec).baseline.name
        base = known[spec.name, baseline, keeps[0]]
        own = dict.fromkeys(row.contender for row in rows if row.field == spec.name and row.contender != baseline)
        for place, name in enumerate(own):
            cells = [_cell(known.get((spec.name, name, keep)), name == task.ours.name) for keep in keeps]
            took = base.median * 1e3
            time = f"{took:,.0f} ms, {_counted(base)}" if took >= 1000 else f"{took:.3g} ms, {_counted(base)}"
            if len(baselines) > 1:
                time = f"{baseline}: {time}"
            shown = f"**{name}**" if name == task.ours.name else name
            lines.append([*((spec.title, time) if place == 0 else ("", "")), shown, *cells])
    cpu = document["build"]["cpu"]
    used = f"the {cpu['isa']} kernels" if cpu.get("built") else "no native kernels"
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    torch_version = document["build"]["torch"]["version"]
    return f"{table}\n\nOne core ({document['machine']['processor']}), {used}, PyTorch {torch_version}."


def kernel_table(shares: dict[tuple[str, int, float], float], machine: str) -> str:
    """(kernel, width, density) -> share of the multiply-add rate, one line per kernel and width."""
    densities = sorted({density for *_, density in shares})
    lines = [
        ["kernel", "rows = columns", *(f"density {density:g}" for density in densities)],
        ["---", "---:", *["---:"] * len(densities)],
    ]
    for kernel, width in dict.fromkeys((kernel, width) for kernel, width, _ in shares):
        lines.append([kernel, str(width), *(f"{shares[kernel, width, density]:.2f}" for density in densities)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{machine}."


def evaluations(row: Row) -> str:
    """Of the forward solve, and those of a solve of the backward pass: "32", "32 + 44"."""
    return str(row.nfe) if row.nfe_backward is None else f"{row.nfe} + {row.nfe_backward}"


def _counted(row: Row) -> str:
    return f"{evaluations(row)} evaluation{'s' if (row.nfe, row.nfe_backward) != (1, None) else ''}"


def _cell(row: Row | None, with_share: bool) -> str:
    if row is None or row.ratio is None:
        return "-"
    share = f" ({row.share:.0%})" if with_share and row.share is not None else ""
    return f"{row.ratio:.{0 if row.ratio >= 10 else 1}f}x{share}"


def replace_block(path: str | Path, name: str, text: str) -> None:
    """Put `text` between the lines `<!-- name:begin ... -->` and `<!-- name:end -->` of the document at `path`.

    Raises ValueError if the document does not have exactly one such pair.
    """
    lines = Path(path).read_text().splitlines()
    begins = [i for i, line in enumerate(lines) if line.startswith(f"<!-- {name}:begin")]
    ends = [i for i, line in enumerate(lines) if line.startswith(f"<!-- {name}:end")]
    if len(begins) != 1 or len(ends) != 1 or begins[0] > ends[0]:
        raise ValueError(f"{path} needs one line '<!-- {name}:begin -->' and after it one line '<!-- {name}:end -->'")
    Path(path).write_text("\n".join([*lines[: begins[0] + 1], *text.splitlines(), *lines[ends[0] :]]) + "\n")
