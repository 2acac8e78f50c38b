"""What a result of bench/gpu.py says, in words and pictures: ratios, the goals and whether they are met, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from sparseflow_kernels.analysis.bench import Row

OWN = ("cuda", "triton", "cpu", "reference")  # the last two in dry runs
PEERS = ("torchdiffeq", "torch.compile", "diffrax")
DENSE = "own dense"
BARRIER_GOAL = 3.0  # microseconds
# (fields, keep, batch, against whom, at least this ratio), forward
GOALS = (
    (("toy", "power"), 0.1, 1000, "torchdiffeq", 100.0),
    (("hepmass",), 0.1, 1000, "torchdiffeq", 50.0),
    (("miniboone",), 0.1, 1000, "torchdiffeq", 5.0),
    (("miniboone",), 0.02, 1000, "torchdiffeq", 15.0),
    *((("miniboone", "bsds300"), 0.1, 10000, rival, 2.0) for rival in ("diffrax", DENSE)),
    *((("miniboone", "bsds300"), 0.02, 10000, rival, 8.0) for rival in ("diffrax", DENSE)),
)

Document = dict[str, Any]


class Table:
    """The rows of a result, found by (field, keep, batch, engine, task)."""

    def __init__(self, document: Document) -> None:
        self.rows = [row for row in document.get("rows", []) if row.get("median")]
        self.known: dict[tuple, dict] = {}
        for row in self.rows:  # the baseline is timed beside every engine; any will do, the quickest is fair to it
            key = tuple(row[name] for name in ("field", "keep", "batch", "engine", "task"))
            if key not in self.known or row["per_evaluation"] < self.known[key]["per_evaluation"]:
                self.known[key] = row

    def find(self, field: str, keep: float, batch: int, engine: str, task: str) -> dict | None:
        return self.known.get((field, keep, batch, engine, task))

    def best(self, field: str, keep: float, batch: int, task: str) -> dict | None:
        """The quickest of our engines."""
        found = [row for name in OWN if (row := self.find(field, keep, batch, name, task)) is not None]
        return min(found, key=lambda row: row["per_evaluation"], default=None)

    def ratio(self, row: dict, rival: str) -> float | None:
        """The rival's time over the row's: of the same problem and in turns where that was timed, else per evaluation,
        the rival's with dense weights (keep 1), whose time masks do not change."""
        if rival == "torchdiffeq" and row.get("ratio"):
            return row["ratio"]
        at = (row["field"], 1.0, row["batch"])
        other = self.best(*at, row["task"]) if rival == DENSE else self.find(*at, rival, row["task"])
        return None if other is None else other["per_evaluation"] / row["per_evaluation"]

    def values(self, name: str) -> list:
        return list(dict.fromkeys(row[name] for row in self.rows))


def barrier_cost(document: Document) -> dict | None:
    """The dearest of the cuda engine's launch shapes."""
    found = [entry for entry in document.get("barrier", []) if entry["engine"] == "cuda"]
    return max(found, key=lambda entry: entry["microseconds"], default=None)


def goals(document: Document) -> list[tuple[str, float | None, float, bool | None]]:
    """(what, found, wanted, met); None where it was not measured."""
    table, lines = Table(document), []
    for fields, keep, batch, rival, least in GOALS:
        for field in fields:
            row = table.best(field, keep, batch, "forward")
            found = None if row is None else table.ratio(row, rival)
            lines.append((f"{field}, keep {keep:g}, batch {batch}: times quicker than {rival}, at least", found, least,
                          None if found is None else found >= least))  # fmt: skip
    cost = barrier_cost(document)
    found = None if cost is None else cost["microseconds"]
    met = None if found is None else found <= BARRIER_GOAL
    lines.append(("barrier of a shared step, microseconds, at most", found, BARRIER_GOAL, met))
    own = [e["own"] for e in document.get("launches", []) if e["engine"] == "cuda" and e["task"] == "forward" and "own" in e]
    found = max(own, default=None)
    lines.append(("launches of the cuda engine's kernels in a solve, exactly", found, 1, None if found is None else found == 1))
    return lines


# ------------------------------------------------------------------------------------------------------------- markdown


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _times(value: float) -> str:
    return f"{value:.{0 if value >= 10 else 1}f}x"


def markdown(document: Document, failures: Sequence[str], skipped: Sequence[str]) -> str:
    device, rates, table = document.get("device", {}), document.get("rates", {}), Table(document)
    parts = [f"# {device.get('name', 'unknown device')}"]
    if document.get("dry_run"):
        parts.append("**A dry run on the CPU: no figure here means anything.**")
    facts = {
        "date": device.get("date"), "commit": f"{device.get('commit')}{' (changed)' if device.get('changed') else ''}",
        "capability": device.get("capability"), "multiprocessors": device.get("multiprocessors"),
        "driver": device.get("driver_version"),
        "PyTorch": device.get("torch"), "Triton": device.get("build", {}).get("triton", {}).get("version"),
        "SM clock (at most)": " / ".join(str(device[k]) for k in ("clocks.sm", "clocks.max.sm") if device.get(k)) or None,
    }  # fmt: skip
    if "fma_per_s" in rates:
        facts |= {
            "copy": f"{rates['copy_bytes_per_s'] / 1e9:.0f} GB/s, read and written",
            "multiply-adds": f"{rates['fma_per_s'] / 1e12:.2f} T/s ({rates['fma_by']})",
            "one trivial launch": f"{rates['launch_s'] * 1e6:.1f} us, in a row {rates['launch_rate_s'] * 1e6:.1f} us each",
        }  # fmt: skip
    if (cost := barrier_cost(document)) is not None:
        cost_is = f"{cost['microseconds']:.2f} us with {cost['blocks']} blocks"
        facts["barrier of a shared step"] = f"{cost_is} (the dearest launch shape)"
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items() if value))

    parts += ["## Goals", _table(["goal", "wanted", "found", "met"], [
        [what, f"{wanted:g}", _number(found), {None: "not measured", True: "yes", False: "**no**"}[met]]
        for what, found, wanted, met in goals(document)
    ])]  # fmt: skip

    for task, title in (("forward", "Whole solves with divergence"), ("train", "Training steps (log-likelihood and gradient)")):
        if any(row["task"] == task for row in table.rows):
            parts += [f"## {title}", _solves(table, task)]
    parts.append(
        "dopri5, rtol = atol = 1e-5, float32, times from 0 to 1. Cells: ms / evaluations (of the forward solve); in brackets "
        "the quickness against torchdiffeq's eager dense solve of the same problem, timed in turns, and the share of the "
        "roofline floor (multiply-adds at the measured rate, a quarter of it where rows are sparse, and a launch). "
        "torch.compile and diffrax, and torchdiffeq's training step, are timed at keep 1 only: they multiply dense weights, "
        "and masks do not change their time. Against them, and against our own dense kernels (keep 1), the ratio is of times "
        "per evaluation."
    )

    ratios = []
    for row in table.rows:
        if row["engine"] in OWN and row is table.best(row["field"], row["keep"], row["batch"], row["task"]):
            found = [table.ratio(row, rival) for rival in (*PEERS, DENSE)]
            ratios.append([f"{row['field']}, {row['task']}", f"{row['keep']:g}", str(row["batch"]), row["engine"],
                           *("-" if r is None else _times(r) for r in found)])  # fmt: skip
    if ratios:
        head = ["field", "keep", "batch", "engine", *PEERS, DENSE]
        parts += ["## The quickest engine against each rival", _table(head, ratios)]

    errors = [
        [row["field"], f"{row['keep']:g}", str(row["batch"]), row["engine"], row["task"], f"{row['error']:.1e}"]
        for row in table.rows if row.get("error") is not None
    ]  # fmt: skip
    if errors:
        parts += [
            "## Errors", "Forward: largest difference of states and log-densities of the first samples to a float64 solve at "
            "tolerance 1e-10. Training: |gradient - reference| / |reference|, float64 at 1e-8, of a few samples.",
            _table(["field", "keep", "batch", "solver", "task", "error"], errors),
        ]  # fmt: skip
    launches = [
        [*(entry[k] for k in ("field", "engine", "task")),
         *(str(entry[k]) for k in ("nfe", "kernels", "own", "copies", "fills", "calls"))]
        for entry in document.get("launches", []) if "kernels" in entry
    ]  # fmt: skip
    if launches:
        head = ["field", "solver", "task", "NFE", "kernels run", "ours (cuda)", "copies", "fills", "launch calls"]
        parts += ["## Launches of one solve or step, by torch.profiler", _table(head, launches)]
    for entry in document.get("tuning", []):
        if entry["shapes"] and "## Launch shapes" not in parts:
            parts += ["## Launch shapes", "The quickest and the slowest of each; all of them are in the JSON file."]
    tuned = [
        [f"{e['field']}, keep {e['keep']:g}, batch {e['batch']}, {e.get('kind', 'forward')}",
         *(word for s in (e["shapes"][0], e["shapes"][-1]) for word in (str(tuple(s["shape"])), f"{s['seconds'] * 1e3:.3g}")),
         str(len(e["shapes"])), e.get("remark") or "-"]
        for e in document.get("tuning", []) if e["shapes"]
    ]  # fmt: skip
    if tuned:
        shape = "quickest (tile, per thread, parts, threads)"
        parts.append(_table(["problem", shape, "ms", "slowest", "ms", "tried", "remark"], tuned))
    sanitized = [
        [entry["tool"], entry["engine"], entry.get("summary") or entry.get("failed") or entry.get("skipped") or ""]
        for entry in document.get("sanitizer", [])
    ]  # fmt: skip
    if sanitized:
        parts += ["## compute-sanitizer", _table(["tool", "engine", "summary"], sanitized)]
    for title, lines in (("Failed", failures), ("Skipped", skipped)):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _solves(table: Table, task: str) -> str:
    keeps = sorted(table.values("keep"), reverse=True)
    lines = []
    for field in table.values("field"):
        for batch in sorted(table.values("batch")):
            for engine in (*OWN, *PEERS):
                rows = [table.find(field, keep, batch, engine, task) for keep in keeps]
                if any(rows):
                    lines.append([f"{field}, batch {batch}", engine, *map(_cell, rows)])
    return _table(["field", "solver", *(f"keep {keep:g}" for keep in keeps)], lines)


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    more = []
    if row["engine"] in OWN and row.get("ratio"):
        more.append(_times(row["ratio"]))
    if row.get("share"):
        more.append(f"{row['share']:.0%}")
    return f"{row['median'] * 1e3:.3g} / {row['nfe']}" + (f" ({', '.join(more)})" if more else "")


def plot(document: Document, path: Path) -> Path:
    """Time of a solve against the keep ratio, a panel for every field and batch. Raises ImportError without matplotlib."""
    from sparseflow_kernels.analysis.plots import plot_bench

    table, rows = Table(document), []
    for (field, keep, batch, engine, task), row in table.known.items():
        if task == "forward":
            name = "sparseflow" if engine == "cuda" else engine  # which `plot_bench` draws thick, with its floor
            rows.append(Row(f"{field}, batch {batch}", keep, name, median=row["median"], floor=row.get("floor")))
    if not rows:
        raise ValueError("no solve was measured")
    return plot_bench(sorted(rows, key=lambda row: row.field), path)
