"""The flows of the Sparse Flows experiments (arXiv 2106.12718) and FFJORD's, shape for shape and parameter for
parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .continuous_flow import ContinuousFlow
from .layers import MLPField, mlp_field


@dataclass(frozen=True)
class TabularShape:
    """FFJORD's published architecture for a tabular data set: `flows` chained concatsquash fields on R^dim."""

    dim: int
    hidden: tuple[int, ...]
    flows: int
    activation: str


TABULAR: dict[str, TabularShape] = {
    "power": TabularShape(6, (60,) * 3, 5, "tanh"),
    "gas": TabularShape(8, (160,) * 3, 5, "tanh"),
    "hepmass": TabularShape(21, (210,) * 2, 10, "softplus"),
    "miniboone": TabularShape(43, (860,) * 2, 1, "softplus"),
    "bsds300": TabularShape(63, (1260,) * 3, 2, "softplus"),
}


def toy_field(shape: str = "l4_h64", activation: str = "sigmoid", dim: int = 2) -> MLPField:
    """The toys' autonomous field. shape: "lL_hH", L Linear layers dim-H-...-H-dim with L >= 2, as in "l2_h128"."""
    match = re.fullmatch(r"l(\d+)_h(\d+)", shape)
    if match is None or int(match[1]) < 2 or int(match[2]) < 1:
        raise ValueError(f"shape must look like 'l4_h64', at least 2 layers and 1 neuron; got {shape!r}")
    return mlp_field(dim, [int(match[2])] * (int(match[1]) - 1), layer="ignore", activation=activation)


def tabular_flow(name: str, **settings: Any) -> ContinuousFlow:
    """The flow for a tabular data set of `TABULAR`, one trained end time per field included in its size.

    settings: ContinuousFlow's, over the experiment's: Hutchinson with Gaussian noise in training and the exact trace in
    eval mode, dopri5 at rtol 1e-6, atol 1e-8. (float32 does not support those tolerances well: loosen, or use float64.)
    """
    if name not in TABULAR:
        raise ValueError(f"name must be one of {', '.join(TABULAR)}; got {name!r}")
    shape = TABULAR[name]
    fields = [mlp_field(shape.dim, shape.hidden, "concatsquash", shape.activation) for _ in range(shape.flows)]
    defaults: dict[str, Any] = {
        "divergence": "hutchinson",
        "eval_divergence": "exact",
        "noise": "gaussian",
        "train_end_time": True,
        "rtol": 1e-6,
        "atol": 1e-8,
    }
    return ContinuousFlow(fields, shape.dim, **(defaults | settings))


def ffjord_flow(name: str = "toy", **settings: Any) -> ContinuousFlow:
    """FFJORD's own flow for "toy" or a tabular data set of `TABULAR`.

    toy: 2-d, one concatsquash field of 3x64, tanh, the interval [0, 0.5] with a trained end, the exact trace, dopri5 at
    1e-5.  settings: ContinuousFlow's, over these. Raises ValueError for other names.
    """
    if name in TABULAR:
        return tabular_flow(name, **settings)
    if name != "toy":
        raise ValueError(f"name must be one of toy, {', '.join(TABULAR)}; got {name!r}")
    defaults = {"divergence": "exact", "t1": 0.5, "train_end_time": True, "rtol": 1e-5, "atol": 1e-5}
    return ContinuousFlow(mlp_field(2, (64, 64, 64), "concatsquash", "tanh"), 2, **(defaults | settings))
