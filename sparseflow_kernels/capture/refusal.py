"""How capture says no."""

from __future__ import annotations

from typing import NoReturn

from ..field import UnsupportedFieldError

REMEDY = "Use the module uncompiled with sfk.odeint, which hands it to torchdiffeq"


def refuse(what: str, remedy: str = REMEDY, cause: Exception | None = None) -> NoReturn:
    """Raises UnsupportedFieldError; the tracer puts the module path in front of it."""
    raise UnsupportedFieldError(f"{what} cannot be expressed as a layer of a vector field. {remedy}.") from cause
