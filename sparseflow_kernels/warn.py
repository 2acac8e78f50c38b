"""Warnings that point at the line of the person who can do something about them."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import torch

# Calls of a module pass through torch, and decorated functions through contextlib: neither is the caller's line.
_INSIDE = (*(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__)), contextlib.__file__)


def warn(message: str) -> None:
    """A UserWarning at the nearest line that is neither this package's nor torch's, however deep the call is here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
