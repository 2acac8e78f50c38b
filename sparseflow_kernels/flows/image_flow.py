"""FFJORD's multiscale flow of images (Grathwohl et al. 2019, arXiv 1810.01367, after RealNVP, Dinh et al. 2017).

Grey levels are dequantised and brought to the line by a logit. Then, scale by scale: `blocks` fields, every 2x2 block
of pixels becomes four channels, `blocks` fields, and half of the channels are done; the other half goes on to the next
scale. The last scale has `blocks` fields and is done.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..divergence import Kind
from ..divergence_field import Noise
from ..solution import Stats
from .conv_field import image_shape
from .continuous_flow import ContinuousFlow
from .image_transforms import Dequantise, Logit, Squeeze
from .neural_ode import FlowStats

LEAST_SIDE = 4  # pixels, of a scale's images


def count_scales(shape: Sequence[int]) -> int:
    """FFJORD's: as often as height and width, halved each time, are at least 4. Raises ValueError where that is never,
    or a side of a scale before the last is odd, which no 2x2 blocks cover."""
    channels, height, width = image_shape(shape)
    scales, h, w = 0, height, width
    while min(h, w) >= LEAST_SIDE:
        scales, h, w = scales + 1, h // 2, w // 2
    if not scales:
        raise ValueError(f"shape: images must be at least {LEAST_SIDE} pixels high and wide; got {height} x {width}")
    if height % 2 ** (scales - 1) or width % 2 ** (scales - 1):
        raise ValueError(
            f"shape: height and width must be divisible by {2 ** (scales - 1)}, they are halved {scales - 1} times; "
            f"got {height} x {width}; pad or crop the images, or choose fewer scales"
        )
    return scales


def field_shapes(
    shape: Sequence[int], blocks: int = 2, scales: int | None = None
) -> list[tuple[int, int, int]]:
    """(channels, height, width) of the states of every field of an ImageFlow, in the order of the data.

    scales: None for FFJORD's count of them. Raises ValueError for bad shapes, and for scales that the images do not
    have.
    """
    channels, height, width = image_shape(shape)
    if scales is None:
        scales = count_scales(shape)
    if scales < 1 or height % 2 ** (scales - 1) or width % 2 ** (scales - 1):
        raise ValueError(
            f"scales must be at least 1, and {height} x {width} pixels be divisible by 2 to the power of (scales - 1); "
            f"got {scales!r}"
        )
    if blocks < 1:
        raise ValueError(f"blocks must be at least 1, got {blocks!r}")
    found = []
    for scale in range(scales):
        found += [(channels, height, width)] * blocks
        if scale + 1 < scales:
            found += [(4 * channels, height // 2, width // 2)] * blocks
            channels, height, width = 2 * channels, height // 2, width // 2
    return found


class ImageFlow(ContinuousFlow):
    """A density of images of whole grey levels, by FFJORD's multiscale flow.

    fields: modules f(t, x [batch, channels, height, width]), one for each of `field_shapes(shape, blocks, scales)`;
        `image_flow` and `multiscale_flow` make them. Compiled fields are as good as plain modules.
    shape: (channels, height, width).  levels: of grey, 256 for bytes.  alpha: of the `Logit`.
    blocks, scales: fields before and after every squeeze, and scales, None for FFJORD's count.
    flip: in training mode, `row_nll` mirrors every image left to right with probability 1/2.
    divergence: "hutchinson" as a rule: the exact trace takes as many products as a sample has numbers. An evaluation
        of the training loop takes the estimate too (`exact_evaluation`).
    base, eval_divergence, noise, solver: ContinuousFlow's.

    x is [n, channels, height, width], or flat rows [n, dim], in whole levels 0..levels-1 of any real dtype. `log_prob`
    dequantises it, by noise of torch's global generator at every call, and is over [0, levels)^dim: its mean is a lower
    bound of the log-probability of the levels, and `bits_per_dim` is that in the unit of papers. Raises ValueError for
    x of another shape and for values that are no such levels.
    """

    SETTINGS = (
        "levels", "alpha", "blocks", "scales", "flip",
        *(name for name in ContinuousFlow.SETTINGS if name != "penalties"),
    )  # fmt: skip
    exact_evaluation = False
    evaluation_rows = 256

    def __init__(
        self,
        fields: Sequence[nn.Module],
        shape: Sequence[int],
        *,
        levels: int = 256,
        alpha: float = 1e-6,
        blocks: int = 2,
        scales: int | None = None,
        flip: bool = False,
        base: Distribution | None = None,
        divergence: Kind = "hutchinson",
        eval_divergence: Kind | None = None,
        noise: Noise = "gaussian",
        **solver: Any,
    ) -> None:
        shape = image_shape(shape)
        shapes = field_shapes(shape, blocks, scales)
        for name in ("penalties", "batch_norm"):
            if solver.pop(name, None):
                raise ValueError(f"{name}: image flows have none; leave it out")
        super().__init__(
            fields, math.prod(shape), base=base, divergence=divergence, eval_divergence=eval_divergence, noise=noise,
            **solver,
        )  # fmt: skip
        if len(self.vector_fields) != len(shapes):
            raise ValueError(
                f"fields must be {len(shapes)}, one for every state of field_shapes{(shape, blocks, scales)}; got "
                f"{len(self.vector_fields)}"
            )
        self.shape, self.shapes = shape, shapes
        self.blocks, self.scales, self.flip = blocks, scales, flip
        self.dequantise, self.logit, self.squeeze = Dequantise(levels), Logit(alpha), Squeeze()

    @property
    def levels(self) -> int:
        return self.dequantise.levels

    @property
    def alpha(self) -> float:
        return self.logit.alpha

    # ------------------------------------------------------------------------------------------------------ densities

    def log_prob(self, x: Tensor, dequantise: bool = True) -> Tensor:
        """A lower bound of the log-probability of the levels, nats: [n]. dequantise: False takes x in [0, levels] as it
        is, and this is its log-density."""
        z, logdet = self.transform(x, dequantise)
        return self._base_term(z) + logdet if len(z) else logdet

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """-log_prob in bits, per number of an image: [n]. As in the papers, -(log p / dim - log levels) / log 2 of the
        density on [0, 1]."""
        return -self.log_prob(x) / (self.dim * math.log(2.0))

    def row_nll(self, x: Tensor, labels: None = None) -> Tensor:
        """-log_prob, nats per image, what training minimises the mean of: [n]."""
        return -self.log_prob(self._flipped(x))

    def transform(self, x: Tensor, dequantise: bool = True) -> tuple[Tensor, Tensor]:
        """Data to base: (z [n, dim], log|det dz/dx| [n]). The parts of z that are done first come first.

        dequantise: False takes x in [0, levels] as it is, which `inverse` undoes.
        """
        z, change = self._moved(*self._on_the_line(x, dequantise))
        return z, -change

    def push(
        self, x: Tensor, logp: Tensor | None = None, reverse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """ContinuousFlow's, of x in [0, levels] as it is, which is what comes with `reverse`: no noise is added and
        nothing rounded."""
        return super().push(x, logp, reverse)

    def inverse(self, z: Tensor) -> Tensor:
        """Base to data: z [n, dim] -> x [n, channels, height, width], in levels but not rounded."""
        return self._backwards(z, None)[0]

    @torch.no_grad()
    def sample(self, shape: int | Sequence[int] = ()) -> Tensor:
        """Samples [*shape, channels, height, width] (an int n means (n,)) in whole levels, from torch's global
        generator; no gradient."""
        sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        if not all(isinstance(size, numbers.Integral) and size >= 0 for size in sizes):
            raise ValueError(f"shape must be an int or a sequence of ints, none below 0; got {shape!r}")
        like = next(self._tensors())
        z = self._base(like).sample((math.prod(map(int, sizes)),)).to(like)
        return self.dequantise.floor(self._unit(z, None)[0]).view(*map(int, sizes), *self.shape)

    # ------------------------------------------------------------------------------------------------------- internal

    def _flipped(self, x: Tensor) -> Tensor:
        """In training mode, with `flip`, every image mirrored with probability 1/2."""
        if not (self.training and self.flip):
            return x
        x = self._checked(x, "x").view(-1, *self.shape)
        turned = torch.rand(len(x), device=x.device) < 0.5
        return torch.where(turned.view(-1, 1, 1, 1), x.flip(3), x)

    def _on_the_line(self, x: Tensor, dequantise: bool) -> tuple[Tensor, Tensor]:
        """(the first field's state, minus the log-determinant [n] so far: solves subtract from that channel, too)."""
        x = self._checked(x, "x").view(-1, *self.shape)
        x, logdet = self.dequantise(x) if dequantise else self.dequantise(x, torch.zeros_like(x))
        x, more = self.logit(x)
        return x, -(logdet + more)

    def _forwards(self, x: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
        x, before = self._on_the_line(x, dequantise=False)
        return self._moved(x, before if change is None else before + change)

    def _moved(self, x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """Through the fields: (z [n, dim], change at the end)."""
        solves: list[Stats] = []
        done = []
        for index in range(len(self.shapes)):
            x, factored = self._enter(index, x)
            if factored is not None:
                done.append(factored.flatten(1))
            x, change = self._solve(self._with_divergence(index), (x, change), self._times(index, x), solves)
        self.stats = FlowStats(tuple(solves)) if solves else None
        return torch.cat([*done, x.flatten(1)], 1), change

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._on_the_line(self._flipped(x), dequantise=True)

    def _enter(self, index: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        channels = self.shapes[index][0]
        if x.shape[1] < channels:
            return self.squeeze(x)[0], None  # its volume is one
        return (x, None) if x.shape[1] == channels else tuple(x.chunk(2, 1))

    def _leave(self, index: int, x: Tensor, done: Tensor | None) -> Tensor:
        if done is not None:
            return torch.cat([x, done], 1)
        return self.squeeze.inverse(x) if index and self.shapes[index - 1][0] < x.shape[1] else x

    def _unit(self, z: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Base to images in [0, 1]; change: as in `_backwards`."""
        z = ContinuousFlow._checked(self, z, "z")
        solves: list[Stats] = []
        halved = [math.prod(one) // 2 for one, after in zip(self.shapes, self.shapes[1:]) if after[0] < one[0]]
        *factored, x = z.split([*halved, math.prod(self.shapes[-1])], 1)
        x = x.reshape(-1, *self.shapes[-1])
        for index in reversed(range(len(self.shapes))):
            x, change = self._solved_back(index, x, change, solves)
            was_halved = index and self.shapes[index - 1][0] > x.shape[1]
            x = self._leave(index, x, factored.pop().reshape(x.shape) if was_halved else None)
        self.stats = FlowStats(tuple(solves)) if solves else None
        x, logdet = self.logit.inverted(x)
        return x, None if change is None else change - logdet

    def _backwards(self, z: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, change = self._unit(z, change)
        return self.dequantise.inverse(x), None if change is None else change + self.dequantise.logdet(x)

    def _of_fields(self, fields: list[nn.Module]) -> "ImageFlow":
        return type(self)(fields, self.shape, **self.settings())

    def _like_of(self, index: int) -> Tensor:
        return next(self._tensors()).detach().new_zeros(1, *self.shapes[index])

    def _checked(self, x: Tensor, name: str) -> Tensor:
        """Rows [n, dim], in the parameters' dtype."""
        if not isinstance(x, Tensor) or tuple(x.shape[1:]) not in (self.shape, (self.dim,)) or x.ndim < 2:
            got = f"of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            sizes = ", ".join(map(str, self.shape))
            raise ValueError(f"{name} must be images [n, {sizes}], or rows [n, {self.dim}]; got a tensor {got}")
        if not x.is_floating_point():
            x = x.to(next(self._tensors()).dtype)
        return super()._checked(x.reshape(len(x), self.dim), name)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, levels={self.levels}, {super().extra_repr()}"
