"""What the documents of the paper's experiments (`analysis.paper`) say: claims, tables, times."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, Sequence

CLAIMED_KEEP = 0.2  # the claims are judged down to a prune ratio of 0.8
MARGIN = {"nats": 0.0, "bits/dim": 0.0, "points": 0.5}  # what a worse cycle has to differ by: half a percent is two or three test rows

Documents = Sequence[dict[str, Any]]


def is_classification(document: dict[str, Any]) -> bool:
    return document.get("kind") == "classification"


def is_of_images(document: dict[str, Any]) -> bool:
    return document.get("kind") == "images"


def in_bits(document: dict[str, Any], nats: float) -> float:
    """Nats per image as bits per number of an image."""
    return nats / (document["dim"] * math.log(2.0))


def by_title(documents: Documents) -> dict[str, list[dict[str, Any]]]:
    """The runs of several seeds together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        groups.setdefault(document["title"], []).append(document)
    return groups


# ---------------------------------------------------------------------------------------------------------- the claims


@dataclass(frozen=True)
class Claim:
    """How the pruned models of one net and method stand against others, over the cycles down to a prune ratio of 0.8.

    At every prune ratio the differences of the seeds are averaged: test NLL less the other's in nats, of images in bits
    per dimension, of classifiers the top-1 error less the other's in percentage points. The error of that mean is s / sqrt(seeds), s the standard
    deviation between seeds, pooled over the prune ratios. A ratio counts as worse (better) if the mean is above (below)
    0 by more than twice that error, and of classifiers by more than half a percentage point.

    missing: cycles that not all seeds have.  worst: (prune ratio, mean, error) of the largest difference, None without
    cycles.  reach: the largest prune ratio up to which none is worse, also beyond 0.8.
    """

    seeds: int
    cycles: int
    missing: int
    better: int
    worse: int
    worst: tuple[float, float, float] | None
    reach: float
    unit: str = "nats"

    @property
    def verdict(self) -> str:
        """"holds": no cycle worse, and none missing. One seed decides nothing: how much seeds differ is not known."""
        if self.seeds < 2 or self.cycles == 0:
            return "not decided"
        if self.worse:
            return "does not hold"
        return "not decided" if self.missing else "holds"

    def __str__(self) -> str:
        if self.worst is None:
            return "not decided: no cycle was finished"
        ratio, mean, error = self.worst
        missing = f", {self.missing} not finished" if self.missing else ""
        if self.seeds < 2:
            return (
                f"not decided by one seed ({self.cycles} prune ratios up to {1 - CLAIMED_KEEP:g}{missing}; the least "
                f"favourable {mean:+.3f} {self.unit} at {ratio:.2f})"
            )
        return (
            f"{self.verdict} ({self.seeds} seeds, {self.cycles} prune ratios up to {1 - CLAIMED_KEEP:g}: better at "
            f"{self.better}, worse at {self.worse}{missing}; the least favourable {mean:+.3f} +- {error:.3f} "
            f"{self.unit} at {ratio:.2f}; no worse up to {self.reach:.2f})"
        )


def claim(documents: Documents, against: str) -> Claim:
    """documents: runs that differ by their seed.  against: "dense", the model the run started from, or "control"."""
    differences: dict[float, list[float]] = {}
    for document in documents:
        dense = document["cycles"][0] if document["cycles"] else None
        for record in document["cycles"][1:]:
            value = _difference(document, record, dense if against == "dense" else record["control"], against)
            if value is not None:
                differences.setdefault(record["keep"], []).append(value)
    claimed = {keep: found for keep, found in differences.items() if keep >= CLAIMED_KEEP - 1e-9}
    wanted = {k for document in documents for k in document["experiment"]["keeps"] if k >= CLAIMED_KEEP - 1e-9}
    spreads = [statistics.variance(v) for v in claimed.values() if len(v) > 1 and all(map(math.isfinite, v))]
    error = math.sqrt(statistics.mean(spreads) / len(documents)) if spreads else 0.0
    means = {keep: statistics.mean(found) for keep, found in differences.items()}
    unit = "points" if any(map(is_classification, documents)) else "nats"
    unit = "bits/dim" if any(map(is_of_images, documents)) else unit
    least = max(2 * error, MARGIN[unit])
    reach = 0.0
    for keep in sorted(means, reverse=True):
        if means[keep] > least:
            break
        reach = 1 - keep
    worst = max(claimed, key=lambda keep: means[keep], default=None)
    return Claim(
        len(documents), len(claimed), sum(len(claimed.get(keep, ())) < len(documents) for keep in wanted),
        sum(means[keep] < -least for keep in claimed), sum(means[keep] > least for keep in claimed),
        None if worst is None else (1 - worst, means[worst], error), reach, unit,
    )  # fmt: skip


def _difference(
    document: dict[str, Any], record: dict[str, Any], other: dict[str, Any] | None, against: str
) -> float | None:
    """NLL less the other's, of images in bits/dim, of classifiers the error in percentage points; infinite where a solve failed, None where
    there is no other."""
    if is_classification(document):
        if other is None or other["error"] is None:
            return None
        return math.inf if record["error"] is None else 100.0 * (record["error"] - other["error"])
    versus = record[f"versus_{against}"]
    if versus is None:
        return None
    if versus["nats"] is None:
        return math.inf
    return in_bits(document, versus["nats"]) if is_of_images(document) else versus["nats"]


QUESTIONS = {
    "dense": "(a) pruned no worse than the dense net it started from",
    "control": "(b) pruned no worse than the unpruned control after as many epochs",
}


def verdicts(documents: Documents) -> list[str]:
    """Per data set: whether the paper's claim holds, net by net and method by method, in plain words."""
    lines = []
    for name in dict.fromkeys(document["experiment"]["preset"] for document in documents):
        groups = by_title([d for d in documents if d["experiment"]["preset"] == name and d["experiment"]["keeps"]])
        for against, question in QUESTIONS.items() if groups else ():
            claims = {title: claim(here, against) for title, here in groups.items()}
            told = [one.verdict for one in claims.values()]
            counts = ", ".join(f"{word} in {told.count(word)}" for word in ("holds", "does not hold", "not decided"))
            lines.append(f"{name}: {question}: {counts} of {len(told)} nets and methods")
            lines += [f"  {title}: {one}" for title, one in claims.items()]
    return lines


def clock(documents: Documents) -> dict[str, float] | None:
    """Seconds of training of all runs together (one core each), ours and dense in torch: its measured time per step
    times the number of steps. None before the first run has both. What runs share is counted once."""
    ours = theirs = 0.0
    counted: set[tuple] = set()
    for document in documents:
        if document["torch"] is None:
            continue
        shared = (document["title"].rsplit(" ", 1)[0], document["experiment"]["seed"])
        for record in document["cycles"]:
            parts = [((*shared, record["index"]), record["control"] if record["index"] else record)]
            parts += [((document["name"], record["index"]), record)] if record["index"] else []
            for key, part in parts:
                if part is not None and key not in counted:
                    counted.add(key)
                    ours += part["seconds"]
                    theirs += record["steps"] * document["torch"]["step_seconds"]
    return {"ours": ours, "torch": theirs} if ours else None


# ---------------------------------------------------------------------------------------------------------- the tables


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


_SHOWN = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.94, 0.98)  # prune ratios of a short table


def tables(documents: Documents, threshold: float = 3.0, short: bool = False) -> list[Table]:
    """One for every net and method: means over the seeds, and +- their standard deviation where there are several; and
    one for every run that has a Hessian.

    quality, modes: share of samples within `threshold` standard deviations of a mode, and modes captured there.
    ms/step: of a training step of the pruned model; torch ms: of the dense one in torch.  short: at eight prune ratios.
    """
    found = []
    for title, here in by_title(documents).items():
        keeps = sorted({record["keep"] for document in here for record in document["cycles"]}, reverse=True)
        if short and len(keeps) > len(_SHOWN):
            keeps = sorted({min(keeps, key=lambda keep: abs(1 - keep - ratio)) for ratio in _SHOWN}, reverse=True)
        columns = _CLASSIFICATION if is_classification(here[0]) else _density(threshold)
        if is_of_images(here[0]):
            columns = _images(here[0])
        torch_ms = [document["torch"] and document["torch"]["step_seconds"] * 1e3 for document in here]
        rows = []
        for keep in keeps:
            pairs = [(d["cycles"][0], r) for d in here for r in d["cycles"] if r["keep"] == keep]
            cells = [spread([_try(get, *pair) for pair in pairs], form) for get, form in columns.values()]
            rows.append((f"{1 - keep:.3f}", *cells, spread(torch_ms, ".1f") if keep == 1 else ""))
        found.append(Table(title, ("PR", *columns, "torch ms"), rows))
    found += [Table(name, _HESSIAN, rows) for name, rows in _hessian_rows(documents).items()]
    return found


Get = Callable[[dict[str, Any], dict[str, Any]], "float | None"]


def _density(threshold: float) -> dict[str, tuple[Get, str]]:
    return {
        "size": (lambda _, r: r["size"], ".0f"), "live": (lambda _, r: r["live_size"], ".0f"),
        "NLL": (lambda _, r: r["nll"], ".3f"),
        "less dense": (lambda _, r: r["versus_dense"]["nats"] if r["index"] else None, "+.3f"),
        "control": (lambda _, r: r["control"]["nll"], ".3f"),
        "less control": (lambda _, r: r["versus_control"]["nats"], "+.3f"), "NFE": (lambda _, r: r["nfe"], ".0f"),
        "quality": (lambda _, r: at_threshold(r["modes"], "high_quality", threshold), ".3f"),
        "modes": (lambda _, r: at_threshold(r["modes"], "captured", threshold), ".1f"),
        "ms/step": (lambda _, r: r["step_seconds"] * 1e3, ".1f"),
    }  # fmt: skip


def _images(document: dict[str, Any]) -> dict[str, tuple[Get, str]]:
    bits = lambda nats: in_bits(document, nats)
    return {
        "size": (lambda _, r: r["size"], ".0f"), "live": (lambda _, r: r["live_size"], ".0f"),
        "bits/dim": (lambda _, r: bits(r["nll"]), ".3f"),
        "less dense": (lambda _, r: bits(r["versus_dense"]["nats"]) if r["index"] else None, "+.3f"),
        "control": (lambda _, r: bits(r["control"]["nll"]), ".3f"),
        "less control": (lambda _, r: bits(r["versus_control"]["nats"]), "+.3f"),
        "NFE": (lambda _, r: r["nfe"], ".0f"), "s/step": (lambda _, r: r["step_seconds"], ".2f"),
        "control's": (lambda _, r: r["control"]["step_seconds"], ".2f"),
    }  # fmt: skip


_CLASSIFICATION: dict[str, tuple[Get, str]] = {
    "size": (lambda _, r: r["size"], ".0f"), "live": (lambda _, r: r["live_size"], ".0f"),
    "error %": (lambda _, r: 100 * r["error"], ".2f"),
    "less dense": (lambda d, r: 100 * (r["error"] - d["error"]) if r["index"] else None, "+.2f"),
    "control": (lambda _, r: 100 * r["control"]["error"], ".2f"),
    "less control": (lambda _, r: 100 * (r["error"] - r["control"]["error"]), "+.2f"),
    "Matthews": (lambda _, r: r["matthews"], ".3f"), "NLL": (lambda _, r: r["nll"], ".3f"),
    "NFE": (lambda _, r: r["nfe"], ".0f"), "ms/step": (lambda _, r: r["step_seconds"] * 1e3, ".2f"),
}  # fmt: skip
_HESSIAN = ("PR", "of", "largest", "trace", "condition", "paper's trace", "paper's condition")


def _hessian_rows(documents: Documents) -> dict[str, list[tuple[str, ...]]]:
    """name -> rows of _HESSIAN, run by run, of those that have a Hessian."""
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


def _try(get: Get, dense: dict[str, Any], record: dict[str, Any]) -> float | None:
    """None where a part of the record is missing, as with data without modes."""
    try:
        return get(dense, record)
    except TypeError:
        return None


def spread(values: Iterable[float | None], form: str) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    mean = format(statistics.mean(found), form)
    return mean if len(found) == 1 else f"{mean} +- {format(statistics.stdev(found), form.lstrip('+'))}"


def markdown(documents: Documents) -> str:
    """Verdicts, tables and times, to be put into a document."""
    parts = ["\n".join(f"- {line}" if line[0] != " " else f"  - {line.strip()}" for line in verdicts(documents))]
    for table in tables(documents, short=True):
        lines = [table.columns, ["---:"] * len(table.columns), *table.rows]
        parts.append(f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts.append("\n".join(closing(documents)))
    return "\n\n".join(parts)


def closing(documents: Documents) -> list[str]:
    """What ran, and how long it took beside dense torch; a line for runs that differ by their seed alone."""
    lines = []
    for title, document, seeds in _alike(documents):
        training = document["training"]
        state = "" if document["finished"] else f", stopped after {max(len(document['cycles']) - 1, 0)} prune ratios"
        reason = f": {document['stopped']}" if document["stopped"] else ""
        length = _length(training)
        again = _length(training | document["retraining"]) if document["retraining"] else length
        rtol, atol = document["tolerance"]
        floor = "" if document["entropy"] is None else f", entropy {document['entropy']:.3f}"
        lines.append(
            f"{title}, seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}: dense {length}, each retraining {again}, "
            f"batch {training['batch']}, rtol {rtol:g}, atol {atol:g}{floor}{state}{reason}."
        )
    times = clock(documents)
    if times is not None:
        torch_parts = {
            f"{d['title'].rsplit(' ', 1)[0]} {t['step_seconds'] * 1e3:.0f} ms ({t['gradient']}, NFE {t['nfe']:.0f})"
            for _, d, _ in _alike(documents) if (t := d["torch"]) is not None and t["nfe"] is not None
        }  # fmt: skip
        lines.append(
            f"Training of all runs, one core each: {_minutes(times['ours'])}; dense in torch, from "
            f"{documents[0]['experiment']['analysis']['torch_steps']} measured steps: {_minutes(times['torch'])} "
            f"({times['torch'] / times['ours']:.1f} times as long). Torch's step: {'; '.join(sorted(torch_parts))}."
        )
        machine = documents[-1]["machine"]["processor"]
        lines.append(f"{machine}, PyTorch {documents[-1]['build']['torch']['version']}.")
    return lines


def _alike(documents: Documents) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """(title, the first run, seeds) of runs that differ by their seed alone and ended alike."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for one in documents:
        key = one["title"], one["finished"], one["stopped"], None if one["finished"] else len(one["cycles"])
        groups.setdefault(key, []).append(one)
    for (title, *_), here in groups.items():
        yield title, here[0], [str(one["experiment"]["seed"]) for one in here]


def _length(training: dict[str, Any]) -> str:
    return f"{training['steps']} steps" if training.get("steps") else f"{training['epochs']} epochs"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def summary(documents: Documents) -> dict[str, Any]:
    """Few figures of every run, to be kept: title -> prune ratios, seeds, and by figure the rows of the seeds, rounded
    to five digits; None where a run has it not."""
    figures: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "size": lambda r: r["size"], "live_size": lambda r: r["live_size"], "nll": lambda r: r["nll"],
        "control_nll": lambda r: r["control"]["nll"], "nfe": lambda r: r["nfe"],
        "ms_per_step": lambda r: r["step_seconds"] * 1e3, "error": lambda r: r["error"],
        "control_error": lambda r: r["control"]["error"], "matthews": lambda r: r["matthews"],
    }  # fmt: skip
    found = {}
    for title, here in by_title(documents).items():
        keeps = sorted({record["keep"] for document in here for record in document["cycles"]}, reverse=True)
        entry: dict[str, Any] = {
            "keeps": keeps, "seeds": [d["experiment"]["seed"] for d in here], "finished": [d["finished"] for d in here],
            "training": here[0]["training"], "retraining": here[0]["retraining"], "tolerance": here[0]["tolerance"],
        }  # fmt: skip
        if is_of_images(here[0]):
            entry["dim"] = here[0]["dim"]
        for name, get in figures.items():
            rows = []
            for document in here:
                by_keep = {record["keep"]: record for record in document["cycles"]}
                rows.append([_rounded(get, by_keep.get(keep)) for keep in keeps])
            if any(value is not None for row in rows for value in row):
                entry[name] = rows
        found[title] = entry
    return found


def _rounded(get: Callable[[dict[str, Any]], float | None], record: dict[str, Any] | None) -> float | None:
    try:
        value = get(record)
    except (KeyError, TypeError):  # no such record, or it lacks that part
        return None
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")
