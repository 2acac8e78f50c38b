"""Elementwise activations: the one table of names, native numbers, values and derivatives.

The native engines know an activation by its `number` (the enum of csrc/activations.h). The functions here define the
meaning; all take z of any shape in float32 or float64 and are themselves differentiable by autograd.

Derivatives are written so that float32 keeps its relative accuracy in the tails: the complement 1 - sigmoid(z) is taken
as sigmoid(-z), never by subtraction. Where a derivative jumps (relu, elu and softplus's threshold) the value is the
one torch's own backward uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .field import Activation, UnsupportedFieldError


@dataclass(frozen=True)
class ActivationRule:
    """One row of the table. value, first, second: (z, *params) -> tensor shaped like z; `defaults` fills missing
    params."""

    number: int
    value: Callable[..., Tensor]
    first: Callable[..., Tensor]
    second: Callable[..., Tensor]
    defaults: tuple[float, ...] = ()


def _tanh_second(z: Tensor) -> Tensor:
    h = torch.tanh(z)
    return -2.0 * h * (1.0 - h * h)


def _sigmoid_second(z: Tensor) -> Tensor:
    s, complement = torch.sigmoid(z), torch.sigmoid(-z)
    return s * complement * (complement - s)


# torch turns softplus into the identity where beta * z > threshold, and differentiates it so.
def _softplus_first(z: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(beta * z > threshold, torch.ones_like(z), torch.sigmoid(beta * z))


def _softplus_second(z: Tensor, beta: float, threshold: float) -> Tensor:
    curvature = beta * torch.sigmoid(beta * z) * torch.sigmoid(-beta * z)
    return torch.where(beta * z > threshold, torch.zeros_like(z), curvature)


# The clamp keeps exp finite in the branch that `where` throws away: its gradient would be 0 * inf.
def _elu_first(z: Tensor, alpha: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), alpha * torch.exp(z.clamp(max=0.0)))


def _elu_second(z: Tensor, alpha: float) -> Tensor:
    return torch.where(z > 0, torch.zeros_like(z), alpha * torch.exp(z.clamp(max=0.0)))


def _silu_first(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * (1.0 + z * torch.sigmoid(-z))


def _silu_second(z: Tensor) -> Tensor:
    s, complement = torch.sigmoid(z), torch.sigmoid(-z)
    return s * complement * (2.0 + z * (complement - s))


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _gelu_first(z: Tensor) -> Tensor:
    # torch.special.erfc, so that the left tail does not cancel
    return 0.5 * torch.special.erfc(-math.sqrt(0.5) * z) + z * _normal_density(z)


ACTIVATIONS: dict[str, ActivationRule] = {
    "identity": ActivationRule(0, lambda z: z, torch.ones_like, torch.zeros_like),
    "tanh": ActivationRule(1, torch.tanh, lambda z: 1.0 - torch.tanh(z).square(), _tanh_second),
    "sigmoid": ActivationRule(
        2, torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z), _sigmoid_second
    ),
    "softplus": ActivationRule(3, functional.softplus, _softplus_first, _softplus_second, (1.0, 20.0)),
    "relu": ActivationRule(4, torch.relu, lambda z: (z > 0).to(z.dtype), torch.zeros_like),
    "elu": ActivationRule(5, functional.elu, _elu_first, _elu_second, (1.0,)),
    "silu": ActivationRule(6, functional.silu, _silu_first, _silu_second),
    "sin": ActivationRule(7, torch.sin, torch.cos, lambda z: -torch.sin(z)),
    "square": ActivationRule(8, lambda z: z * z, lambda z: 2.0 * z, lambda z: torch.full_like(z, 2.0)),
    "cube": ActivationRule(9, lambda z: z * z * z, lambda z: 3.0 * z * z, lambda z: 6.0 * z),
    "gelu": ActivationRule(10, functional.gelu, _gelu_first, lambda z: _normal_density(z) * (2.0 - z * z)),
}


def rule_and_params(activation: Activation) -> tuple[ActivationRule, tuple[float, ...]]:
    """The table's row for an activation and its full parameters. Raises UnsupportedFieldError for unknown names or a
    wrong number of parameters."""
    rule = ACTIVATIONS.get(activation.name)
    if rule is None:
        raise UnsupportedFieldError(f"activation {activation.name!r} is not known; known are {', '.join(ACTIVATIONS)}")
    params = activation.params or rule.defaults
    if len(params) != len(rule.defaults):
        raise UnsupportedFieldError(
            f"activation {activation.name!r} takes {len(rule.defaults)} parameters, got {activation.params}"
        )
    return rule, params


def apply(activation: Activation, z: Tensor) -> Tensor:
    """act(z)."""
    rule, params = rule_and_params(activation)
    return rule.value(z, *params)


def derivative(activation: Activation, z: Tensor) -> Tensor:
    """act'(z)."""
    rule, params = rule_and_params(activation)
    return rule.first(z, *params)
