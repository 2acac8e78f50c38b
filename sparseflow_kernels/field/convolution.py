"""Convolutions as matrices of a graph: a weight for every (out, in, tap), used at every pixel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .chain import Pattern
from .nodes import Matrix


@dataclass(frozen=True)
class Window:
    """Which pixels of the source a tap reads; pairs are (height, width). The target's pixel (y, x) reads through the tap (i, j)
    the source's (y * stride + i * dilation - padding, likewise for x), and zero where that is outside."""

    source: tuple[int, int]
    target: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def source_area(self) -> int:
        return self.source[0] * self.source[1]

    @property
    def target_area(self) -> int:
        return self.target[0] * self.target[1]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """As native builders take it."""
        return self.source, self.target, self.kernel, self.stride, self.padding, self.dilation

    @property
    def around(self) -> list[int]:
        """Zeros (left, right, above, below) with which a convolution without padding gives the target; negative: cut off."""
        found = []
        for axis in (1, 0):
            reach = (self.target[axis] - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1
            found += [self.padding[axis], reach - self.source[axis] - self.padding[axis]]
        return found


@dataclass(frozen=True, eq=False)
class Convolution(Matrix):
    """A convolution of [in, *source] to [out, *target], as a matrix over the rows of both, channels outermost.

    pattern: of the weight as a matrix [out, in * taps], where columns are (in, tap). Its values are those of a Matrix.
    """

    window: Window = None

    @property
    def channels(self) -> tuple[int, int]:
        """(out, in)"""
        return self.pattern.shape[0], self.pattern.shape[1] // self.window.taps

    @property
    def shape(self) -> tuple[int, int]:
        out, in_ = self.channels
        return out * self.window.target_area, in_ * self.window.source_area

    @property
    def multiply_adds(self) -> int:
        return self.pattern.nnz * self.window.target_area

    def product(self, x: Tensor, values: Tensor, transposed: bool = False) -> Tensor:
        window, (out, in_) = self.window, self.channels
        weight = self.pattern.dense(values).view(out, in_, *window.kernel)
        if not transposed:
            wide = F.pad(x.reshape(len(x), in_, *window.source), window.around)
            return F.conv2d(wide, weight, stride=window.stride, dilation=window.dilation).flatten(1)
        y = x.reshape(len(x), out, *window.target)
        wide = F.conv_transpose2d(y, weight, stride=window.stride, dilation=window.dilation)
        return F.pad(wide, [-n for n in window.around]).flatten(1)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        window = self.window
        lines = []  # of every axis and tap: (target, source) positions that meet
        for axis in (0, 1):
            at = torch.arange(window.target[axis]) * window.stride[axis] - window.padding[axis]
            read = at[None] + torch.arange(window.kernel[axis])[:, None] * window.dilation[axis]
            lines.append([
                (own := ((row >= 0) & (row < window.source[axis])).nonzero()[:, 0], row[own]) for row in read
            ])  # fmt: skip
        into, of = [], []
        for (y, from_y) in lines[0]:
            for (x, from_x) in lines[1]:
                into.append((y[:, None] * window.target[1] + x).flatten())
                of.append((from_y[:, None] * window.source[1] + from_x).flatten())
        count = torch.tensor([one.numel() for one in into])
        start = count.cumsum(0) - count
        into, of = torch.cat(into), torch.cat(of)
        channel, tap = self.pattern.col // window.taps, self.pattern.col % window.taps
        entry = torch.arange(self.pattern.nnz).repeat_interleave(count[tap])
        first = (count[tap].cumsum(0) - count[tap])[entry]
        pixel = start[tap][entry] + torch.arange(entry.numel()) - first
        row = self.pattern.row[entry] * window.target_area + into[pixel]
        return row, channel[entry] * window.source_area + of[pixel], entry

    def of_channels(self, channels: Sequence[int] | Tensor) -> tuple[Pattern, Tensor]:
        """(the pattern of these source channels alone, the entries of this one's that it has)."""
        window, in_ = self.window, self.channels[1]
        place = torch.full((in_,), -1)
        place[channels] = torch.arange(len(channels))
        now = place[self.pattern.col // window.taps]
        own = (now >= 0).nonzero()[:, 0]
        col = now[own] * window.taps + self.pattern.col[own] % window.taps
        return self.pattern.of_entries(own, col, len(channels) * window.taps), own
