"""scikit-learn is optional: only the data sets that come with it need it."""

from __future__ import annotations

from types import ModuleType


def sklearn_datasets(needed_for: str) -> ModuleType:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"data set {needed_for!r} comes with scikit-learn: pip install scikit-learn pillow"
        ) from error
    return datasets
