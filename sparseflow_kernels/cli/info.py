"""`sparseflow info`: what is installed, and how fast this core is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..analysis.floor import activation_rate, fma_rate
from ..build_info import build_info
from .console import show_table
from .options import OFF


def _rate(value: float | None) -> str:
    return "n/a" if value is None else f"{value / 1e9:.2f} G/s"


def _text(entry: Any) -> str:
    if isinstance(entry, list):
        return ", ".join(map(_text, entry))
    if isinstance(entry, dict):
        return f"({', '.join(f'{key} {_text(value)}' for key, value in entry.items())})"
    return ("no", "yes")[entry] if isinstance(entry, bool) else str(entry)


def info(
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object instead of a table", show_default=OFF)
    ] = False,
) -> None:
    """Say what was built and found, and measure this core's multiply-add and activation rates."""
    facts = build_info()
    rates = {"multiply-adds": fma_rate(), **{name: activation_rate(name) for name in ("tanh", "softplus", "sigmoid")}}
    if as_json:
        print(json.dumps({**facts, "rates": rates}, indent=2))
        return
    rows = []
    for part, value in facts.items():
        if not isinstance(value, dict):
            rows.append((part, _text(value)))
            continue
        rows += [(f"{part}.{key}", _text(entry)) for key, entry in value.items() if entry is not None]
    rows += [(f"rate.{name} (one core, float32)", _rate(rate)) for name, rate in rates.items()]
    show_table("sparseflow_kernels", ("what", "value"), rows)
