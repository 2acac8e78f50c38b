"""Masks of chains, recorded before fields could be graphs: they stay what they were, bit for bit."""

from __future__ import annotations

import hashlib
import warnings

import pytest
import torch
from sparseflow_kernels.flows import mlp_field
from sparseflow_kernels.pruning import prune_neurons_, prune_weights_

torch.set_num_threads(1)


def chain(layer: str) -> torch.nn.Module:
    """Numbers that no generator of random numbers has a part in."""
    module = mlp_field(3, (20, 24, 18), layer=layer).double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((torch.sin(index * 1.7 + number) * (1 + number % 3)).view(parameter.shape) / 4)
    return module


def digest(module: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, buffer in sorted(module.named_buffers()):
        if name.endswith("_mask"):
            found.update(name.encode() + (buffer != 0).to(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


CASES = {
    ("weights", "parameters"): lambda m: [prune_weights_(m, k) for k in (0.6, 0.3)],
    ("weights", "connected"): lambda m: [prune_weights_(m, k, of="weights", min_neurons=2) for k in (0.5, 0.08)],
    ("neurons", "auto"): lambda m: [prune_neurons_(m, k) for k in (0.7, 0.4)],
    ("neurons", "none"): lambda m: [prune_neurons_(m, k, fold="none", of="weights") for k in (0.7, 0.4)],
    ("neurons", "drop"): lambda m: [prune_neurons_(m, k, fold="drop") for k in (0.7, 0.4)],
    ("weights", "then neurons"): lambda m: [prune_weights_(m, 0.5), prune_neurons_(m, 0.3)],
}

RECORDED = {
    ("weights", "parameters", "ignore"): "12b3973ba35f",
    ("weights", "parameters", "concat"): "2e440c8ec61a",
    ("weights", "parameters", "concat_v2"): "55d777778c71",
    ("weights", "parameters", "squash"): "28bae5febb7b",
    ("weights", "parameters", "concatsquash"): "d0f1523dcb99",
    ("weights", "connected", "ignore"): "a18863308561",
    ("weights", "connected", "concat"): "e83929be31de",
    ("weights", "connected", "concat_v2"): "0c56085da774",
    ("weights", "connected", "squash"): "89349fb3282f",
    ("weights", "connected", "concatsquash"): "7c0e7b492742",
    ("neurons", "auto", "ignore"): "9a59ba06faa3",
    ("neurons", "auto", "concat"): "bed25b0eecd3",
    ("neurons", "auto", "concat_v2"): "bda80ddda5ea",
    ("neurons", "auto", "squash"): "52b0f651700a",
    ("neurons", "auto", "concatsquash"): "bcd5e1dcd72d",
    ("neurons", "none", "ignore"): "74d649f51996",
    ("neurons", "none", "concat"): "4e3b0234f45b",
    ("neurons", "none", "concat_v2"): "79c7880237f4",
    ("neurons", "none", "squash"): "1871f2275925",
    ("neurons", "none", "concatsquash"): "515c045c3726",
    ("neurons", "drop", "ignore"): "9a59ba06faa3",
    ("neurons", "drop", "concat"): "bed25b0eecd3",
    ("neurons", "drop", "concat_v2"): "1bd16879d814",
    ("neurons", "drop", "squash"): "7bb6c125da68",
    ("neurons", "drop", "concatsquash"): "de7455c19115",
    ("weights", "then neurons", "ignore"): "1570d532ac8a",
    ("weights", "then neurons", "concat"): "5bbf081d5e74",
    ("weights", "then neurons", "concat_v2"): "bec68ed81e22",
    ("weights", "then neurons", "squash"): "f652937c8bc2",
    ("weights", "then neurons", "concatsquash"): "fdd3f90c9d35",
}


@pytest.mark.parametrize("layer", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_masks_of_chains_are_those_recorded(layer: str, case: tuple[str, str]) -> None:
    module = chain(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CASES[case](module)
    assert digest(module) == RECORDED[(*case, layer)]
