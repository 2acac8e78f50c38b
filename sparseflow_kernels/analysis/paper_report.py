"""What the documents of the paper's experiments (`analysis.paper`) say: claims, tables, times."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Sequence

CLAIMED_KEEP = 0.2  # the claims are judged down to a prune ratio of 0.8


@dataclass(frozen=True)
class Claim:
    """How a run's pruned flows stand against another flow, over the cycles down to a prune ratio of 0.8.

    A cycle counts as worse (better) if its test NLL is above (below) the other's by more than twice the standard error
    of their difference over the test rows: chance in training is not in that. held: no cycle worse, and none missing.
    worst: (prune ratio, nats, error) of the largest difference, None without cycles.
    """

    cycles: int
    missing: int
    better: int
    worse: int
    worst: tuple[float, float, float] | None

    @property
    def held(self) -> bool:
        return self.cycles > 0 and self.worse == self.missing == 0

    def __str__(self) -> str:
        if self.worst is None:
            return "cannot be judged: no cycle was finished"
        ratio, nats, error = self.worst
        missing = f", {self.missing} not finished" if self.missing else ""
        return (
            f"{'holds' if self.held else 'does not hold'} ({self.cycles} prune ratios up to {1 - CLAIMED_KEEP:g}: "
            f"better at {self.better}, worse at {self.worse}{missing}; the least favourable {nats:+.3f} +- "
            f"{error:.3f} nats at {ratio:.2f})"
        )


def claim(document: dict[str, Any], against: str) -> Claim:
    """against: "dense", the flow the run started from, or "control"."""
    wanted = [keep for keep in document["experiment"]["keeps"] if keep >= CLAIMED_KEEP - 1e-9]
    found = []
    for record in document["cycles"]:
        versus = record[f"versus_{against}"]
        if record["index"] and record["keep"] >= CLAIMED_KEEP - 1e-9 and versus is not None:
            nats = math.inf if versus["nats"] is None else versus["nats"]
            found.append((record["prune_ratio"], nats, versus["error"] or 0.0))
    worse = sum(nats > 2 * error for _, nats, error in found)
    better = sum(nats < -2 * error for _, nats, error in found)
    worst = max(found, key=lambda one: one[1], default=None)
    return Claim(len(found), len(wanted) - len(found), better, worse, worst)


QUESTIONS = {
    "dense": "(a) pruned no worse than the dense flow it started from",
    "control": "(b) pruned no worse than the unpruned control after as many epochs",
}


def verdicts(documents: Sequence[dict[str, Any]]) -> list[str]:
    """Per data set: whether the paper's claim holds, run by run, in plain words."""
    lines = []
    for name in dict.fromkeys(document["experiment"]["preset"] for document in documents):
        here = [document for document in documents if document["experiment"]["preset"] == name]
        for against, question in QUESTIONS.items():
            claims = [claim(document, against) for document in here]
            held = sum(one.held for one in claims)
            lines.append(f"{name}: {question}: holds in {held} of {len(here)} runs")
            lines += [f"  {document['name']}: {one}" for document, one in zip(here, claims)]
    return lines


def clock(documents: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Seconds of training of all runs together (one core each), ours and dense in torch: its measured time per step
    times the number of steps. None before the first run has both."""
    ours = theirs = 0.0
    for document in documents:
        records = [part for one in document["cycles"] for part in (one, one["control"]) if part is not None]
        steps = sum(one["steps"] * (1 if one["control"] is None else 2) for one in document["cycles"])
        if document["torch"] is not None:
            ours += sum(part["seconds"] for part in records)
            theirs += steps * document["torch"]["step_seconds"]
    return {"ours": ours, "torch": theirs} if ours else None


COLUMNS = (
    "PR", "size", "live", "NLL", "less dense", "control", "less control", "NFE", "quality", "modes", "ms/step",
    "torch ms",
)  # fmt: skip


def table(documents: Sequence[dict[str, Any]], threshold: float = 3.0) -> dict[str, list[tuple[str, ...]]]:
    """title -> rows of COLUMNS; means over the seeds, and +- their standard deviation where there are several.

    quality, modes: share of samples within `threshold` standard deviations of a mode, and modes captured there.
    ms/step: of a training step of the pruned flow; torch ms: of the dense one in torch.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        groups.setdefault(document["title"], []).append(document)
    found = {}
    for title, here in groups.items():
        keeps = sorted({record["keep"] for document in here for record in document["cycles"]}, reverse=True)
        rows = []
        for keep in keeps:
            records = [record for document in here for record in document["cycles"] if record["keep"] == keep]

            def cell(get: Callable[[dict[str, Any]], float | None], form: str, records=records) -> str:
                return spread([_try(get, record) for record in records], form)

            torch_ms = [document["torch"] and document["torch"]["step_seconds"] * 1e3 for document in here]
            rows.append((
                f"{1 - keep:.3f}", cell(lambda r: r["size"], ".0f"), cell(lambda r: r["live_size"], ".0f"),
                cell(lambda r: r["nll"], ".3f"), cell(lambda r: r["versus_dense"]["nats"], "+.3f") if keep < 1 else "",
                cell(lambda r: r["control"]["nll"], ".3f"), cell(lambda r: r["versus_control"]["nats"], "+.3f"),
                cell(lambda r: r["nfe"], ".0f"),
                cell(lambda r: at_threshold(r["modes"], "high_quality", threshold), ".3f"),
                cell(lambda r: at_threshold(r["modes"], "captured", threshold), ".1f"),
                cell(lambda r: r["step_seconds"] * 1e3, ".1f"), spread(torch_ms, ".1f") if keep == 1 else "",
            ))  # fmt: skip
        found[title] = rows
    return found


HESSIAN_COLUMNS = ("PR", "of", "largest", "trace", "condition", "paper's trace", "paper's condition")


def hessian_table(documents: Sequence[dict[str, Any]]) -> dict[str, list[tuple[str, ...]]]:
    """title -> rows of HESSIAN_COLUMNS, run by run, of those that have a Hessian."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for document in documents:
        for record in document["cycles"]:
            for name, part in (("pruned" if record["index"] else "dense", record), ("control", record["control"])):
                if part is not None and part["hessian"] is not None:
                    h = part["hessian"]
                    figures = [h[key] for key in ("largest", "trace", "condition", "paper_trace", "paper_condition")]
                    cells = ("n/a" if value is None else f"{value:.3g}" for value in figures)
                    found.setdefault(document["name"], []).append((f"{record['prune_ratio']:.3f}", name, *cells))
    return found


def at_threshold(coverage: dict[str, Any], name: str, threshold: float) -> float:
    return coverage[name][coverage["thresholds"].index(threshold)]


def _try(get: Callable[[dict[str, Any]], float | None], record: dict[str, Any]) -> float | None:
    """None where a part of the record is missing, as with data without modes."""
    try:
        return get(record)
    except TypeError:
        return None


def spread(values: Iterable[float | None], form: str) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    mean = format(statistics.mean(found), form)
    return mean if len(found) == 1 else f"{mean} +- {format(statistics.stdev(found), form.lstrip('+'))}"


def markdown(documents: Sequence[dict[str, Any]]) -> str:
    """Verdicts, tables and times, to be put into a document."""
    parts = ["\n".join(f"- {line}" if line[0] != " " else f"  - {line.strip()}" for line in verdicts(documents))]
    for columns, tables in ((COLUMNS, table(documents)), (HESSIAN_COLUMNS, hessian_table(documents))):
        for title, rows in tables.items():
            lines = [columns, ["---:"] * len(columns), *rows]
            parts.append(f"**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts.append("\n".join(closing(documents)))
    return "\n\n".join(parts)


def closing(documents: Sequence[dict[str, Any]]) -> list[str]:
    """What ran, and how long it took beside dense torch."""
    lines = []
    for document in documents:
        training = document["training"]
        state = "" if document["finished"] else f", stopped after {max(len(document['cycles']) - 1, 0)} prune ratios"
        reason = f": {document['stopped']}" if document["stopped"] else ""
        length = _length(training)
        again = _length(training | document["retraining"]) if document["retraining"] else length
        rtol, atol = document["tolerance"]
        floor = "" if document["entropy"] is None else f", entropy {document['entropy']:.3f}"
        lines.append(
            f"{document['name']}: dense {length}, each retraining {again}, batch {training['batch']}, rtol {rtol:g}, "
            f"atol {atol:g}{floor}{state}{reason}."
        )
    times = clock(documents)
    if times is not None:
        torch_parts = {
            f"{d['title']} {t['step_seconds'] * 1e3:.0f} ms ({t['gradient']}, NFE {t['nfe']:.0f})"
            for d in documents if (t := d["torch"]) is not None
        }  # fmt: skip
        lines.append(
            f"Training of all runs, one core each: {_minutes(times['ours'])}; dense in torch, from "
            f"{documents[0]['experiment']['analysis']['torch_steps']} measured steps: {_minutes(times['torch'])} "
            f"({times['torch'] / times['ours']:.1f} times as long). Torch's step: {'; '.join(sorted(torch_parts))}."
        )
        machine = documents[-1]["machine"]["processor"]
        lines.append(f"{machine}, PyTorch {documents[-1]['build']['torch']['version']}.")
    return lines


def _length(training: dict[str, Any]) -> str:
    return f"{training['steps']} steps" if training.get("steps") else f"{training['epochs']} epochs"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
