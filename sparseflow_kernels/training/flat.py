"""Many small parameters as one: an optimizer's step then costs what one tensor's costs, and not one call per
parameter."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn


class FlatParameters:
    """One parameter that has the memory of several; these go on as views of it, and their gradients as views of its.

    parameters: of one dtype and device, each with a gradient at every step (a zero one where nothing reaches it).
    tensor: [total], with a gradient that is zeroed, never replaced.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.shapes = [parameter.shape for parameter in parameters]
        self.sizes = [parameter.numel() for parameter in parameters]
        self.tensor = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
        self.tensor.grad = torch.zeros_like(self.tensor)
        for parameter, values, gradient in zip(parameters, self.split(self.tensor.data), self.split(self.tensor.grad)):
            parameter.data, parameter.grad = values, gradient

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of [total], shaped like the parameters."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes)]

    @staticmethod
    def fit(parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these can be one: all dense, of one dtype and device."""
        return len({(p.dtype, p.device, p.layout) for p in parameters}) == 1 and parameters[0].layout == torch.strided
