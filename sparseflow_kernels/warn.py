"""Warnings that point at the line of the person who can do something about them."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import torch

# Calls of a module pass through torch, and decorated functions through contextlib: neither is the caller's line.
_INSIDE = (*(os.path.dirname(file) + os.sep for file in (__file__, torch.__file__)), contextlib.__file__)
_OWN = os.path.dirname(__file__) + os.sep


def line_of_forward() -> str | None:
    """The file and line of the code that this package has called, and that has called it again through torch."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
    found, caller = frame, frame
    while caller is not None and not caller.f_code.co_filename.startswith(_OWN):
        caller = caller.f_back
    if caller is None:  # the frame is that of whoever called this package
        return None
    return f"{os.path.basename(found.f_code.co_filename)}, line {found.f_lineno}"


def warn(message: str) -> None:
    """A UserWarning at the nearest line that is neither this package's nor torch's, however deep the call is here."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
