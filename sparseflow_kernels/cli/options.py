"""What options of several commands have in common: how their values are checked, and named when they are refused."""

from __future__ import annotations

import math
from typing import Any, Callable

import typer

from ..pruning import KEEP_RATIOS
from .console import fail

METHODS = {"weights": ("weights",), "neurons": ("neurons",), "both": ("weights", "neurons")}

MOST = 2**31 - 1  # what counts can be; more would be a slip of the keyboard
OFF = "off"  # default of a switch, for its help


def whole(least: int = 1, most: int = MOST) -> Callable[..., Any]:
    """A callback that takes whole numbers from `least` to `most`, and None."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not least <= value <= most:
            bound = f">= {least}" if value < least else f"<= {most}"
            raise fail(f"{param.opts[0]} must be a whole number {bound}, got {value}")
        return value

    return check


def number(most: float = math.inf, least: float = 0.0) -> Callable[..., Any]:
    """A callback that takes finite numbers above 0, not below `least` and not above `most`, and None."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not (0 < value < math.inf and least <= value <= most):
            low = f"at least {least:g}" if least else "above 0"
            high = "finite" if most == math.inf else f"at most {most:g}"
            raise fail(f"{param.opts[0]} must be a number {low} and {high}, got {value:g}")
        return value

    return check


def parse_keeps(text: str) -> tuple[float, ...]:
    """Keep ratios of a schedule's name or of numbers with commas. Raises ValueError."""
    if text in KEEP_RATIOS:
        return KEEP_RATIOS[text]
    try:
        ratios = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"keep ratios must be numbers such as 0.5,0.2 or one of {', '.join(KEEP_RATIOS)}; got {text!r}"
        ) from None
    if any(not 0 < keep < 1 for keep in ratios):
        raise ValueError(f"every keep ratio must lie in (0, 1), got {text!r}")
    return tuple(sorted(set(ratios), reverse=True))


def keeps_of(option: str, text: str) -> tuple[float, ...]:
    """`parse_keeps`, with an error that names the option."""
    try:
        return parse_keeps(text)
    except ValueError as error:
        raise fail(f"{option}: {error}") from error
