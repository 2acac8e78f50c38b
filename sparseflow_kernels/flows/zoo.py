"""The flows of the Sparse Flows experiments (arXiv 2106.12718) and FFJORD's, shape for shape and parameter for
parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Sequence

from .conv_field import ConvField
from .continuous_flow import ContinuousFlow
from .image_flow import ImageFlow, field_shapes
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


@dataclass(frozen=True)
class ImageShape:
    """FFJORD's multiscale architecture for a set of images. shape: (channels, height, width).  hidden: channels between
    the convolutions of every field.  levels, alpha, flip: `ImageFlow`'s.  tolerance: rtol and atol."""

    shape: tuple[int, int, int]
    hidden: tuple[int, ...] = (64,) * 3
    levels: int = 256
    alpha: float = 1e-6
    flip: bool = False
    tolerance: float = 1e-5


IMAGES: dict[str, ImageShape] = {
    "mnist": ImageShape((1, 28, 28)),
    "cifar10": ImageShape((3, 32, 32), flip=True),
    "digits": ImageShape((1, 8, 8), (16,) * 3, levels=17, alpha=0.05, tolerance=1e-3),
}
"""mnist and cifar10 are FFJORD's; digits, a small one of ours for 8x8 images, trains in minutes."""


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
    """FFJORD's own flow for "toy", a tabular data set of `TABULAR`, or images of `IMAGES`.

    toy: 2-d, one concatsquash field of 3x64, tanh, the interval [0, 0.5] with a trained end, the exact trace, dopri5 at
    1e-5.  settings: ContinuousFlow's, over these. Raises ValueError for other names.
    """
    if name in TABULAR:
        return tabular_flow(name, **settings)
    if name in IMAGES:
        return image_flow(name, **settings)
    if name != "toy":
        raise ValueError(f"name must be one of toy, {', '.join([*TABULAR, *IMAGES])}; got {name!r}")
    defaults = {"divergence": "exact", "t1": 0.5, "train_end_time": True, "rtol": 1e-5, "atol": 1e-5}
    return ContinuousFlow(mlp_field(2, (64, 64, 64), "concatsquash", "tanh"), 2, **(defaults | settings))


def multiscale_flow(
    shape: Sequence[int], hidden: Sequence[int] = (64, 64, 64), *, layer: str = "concat", activation: str = "softplus",
    blocks: int = 2, scales: int | None = None, **settings: Any,
) -> ImageFlow:  # fmt: skip
    """FFJORD's flow for images of a shape (channels, height, width), with a `ConvField` at every place.

    hidden, layer, activation: of the fields.  blocks, scales, settings: ImageFlow's. Raises ValueError as these do.
    """
    fields = [ConvField(one, hidden, layer, activation) for one in field_shapes(shape, blocks, scales)]
    return ImageFlow(fields, shape, blocks=blocks, scales=scales, **settings)


def image_flow(name: str, **settings: Any) -> ImageFlow:
    """The flow for a set of images of `IMAGES`, in torch's default initialisation, one trained end time per field
    included in its size: 800,646 parameters for "mnist", 1,358,882 for "cifar10".

    settings: ImageFlow's and `multiscale_flow`'s, over the experiment's: Hutchinson's trace, Gaussian noise, dopri5.
    """
    if name not in IMAGES:
        raise ValueError(f"name must be one of {', '.join(IMAGES)}; got {name!r}")
    image = IMAGES[name]
    defaults: dict[str, Any] = {
        "hidden": image.hidden, "levels": image.levels, "alpha": image.alpha, "flip": image.flip,
        "train_end_time": True, "rtol": image.tolerance, "atol": image.tolerance,
    }  # fmt: skip
    return multiscale_flow(image.shape, **(defaults | settings))
