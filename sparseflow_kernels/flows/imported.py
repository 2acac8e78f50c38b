"""Weights of flows that other code trained: state dicts of FFJORD and of torchprune, by a checked map of their keys.

FFJORD's tables and toys: a chain of CNFs `chain.<i>.odefunc.diffeq.module.layers.<j>`, with MovingBatchNorm between
them where it was asked for; torchprune's tables are the same under a prefix. Images: the same below
`transforms.<scale>.`. torchprune's toys (torchdyn): one `f_forward.<2 j>` per layer. Copies that their modules hold of
the same tensors under a second name must agree.
"""

from __future__ import annotations

import re
from typing import Mapping

import torch
from torch import Tensor

from .conv_field import ConvField
from .layers import HyperLinear, MLPField
from .neural_ode import NeuralODE

_LEAVES = {  # FFJORD's names in a layer -> ours
    "_layer.": "linear.", "_hyper_gate.": "time_gate.", "_hyper_bias.": "time_bias.", "_hyper.": "time_gate.",
    "_layer0.": "first.", "_layer1.": "last.",
}  # fmt: skip
_CHAIN = r"(?:transforms\.(\d+)\.)?chain\.(\d+)\."
_CNF = re.compile(_CHAIN + r"(?:odefunc\.)+diffeq\.(?:(?:module|diffeq)\.)?layers\.(\d+)\.(.+)$")
_END_TIME = re.compile(_CHAIN + r"sqrt_end_time$")
_NORM = re.compile(_CHAIN + r"(weight|bias|running_mean|running_var|step)$")
_TOY = re.compile(r"(?:^|\.)f_forward\.(\d+)\.(weight|bias)$")
_IGNORED = re.compile(r"(_num_evals|prior\..*|s_span|loc|_unbroadcasted_scale_tril|_param|scale_tril|nfe)$")
_COPY = re.compile(r"\.(?:vf|defunc|f)\..*\d+\.(weight|bias)$")  # torchdyn's second names of f_forward


def load_weights_(flow: NeuralODE, state: Mapping[str, Tensor]) -> NeuralODE:
    """Load an FFJORD or torchprune state dict into `flow`, in place, and return it.

    flow: of the same make: `ffjord_flow`, `tabular_flow`, `image_flow`, a model over `toy_field`, or any of MLPFields
    or ConvFields with the same layers, end times and norms. Zeros stay zeros, and a compiled copy takes them as pruned.
    Raises ValueError, and changes nothing, for keys that are not known, tensors that are missing, left over or of
    another shape, and copies that differ. Only tensors are read: use torch.load(..., weights_only=True).
    """
    fields = list(flow.vector_fields)
    if not all(isinstance(field, (MLPField, ConvField)) for field in fields):
        raise ValueError(
            "flow: its vector fields must be MLPFields or ConvFields (mlp_field, toy_field, tabular_flow, image_flow), "
            "not compiled"
        )
    cnfs = sorted({_place(m) for key in state if (m := _CNF.search(key))})
    norms = sorted({_place(m) for key in state if (m := _NORM.search(key)) and _place(m) not in cnfs})
    own = "conv." if any(isinstance(field, ConvField) for field in fields) else "linear."
    wanted = {name: tensor for name, tensor in flow.state_dict().items()}
    found: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        name = _our_name(key, cnfs, norms, own)
        if name is None:
            if not (_IGNORED.search(key) or (_COPY.search(key) and any(_TOY.search(other) for other in state))):
                unknown.append(key)
            continue
        if name in found and not torch.equal(found[name], tensor):
            raise ValueError(f"state: {key!r} and another key are the same tensor of the flow, {name}, and differ")
        found[name] = tensor
    for number, field in enumerate(fields):
        for index, layer in enumerate(field.layers):
            if isinstance(layer, HyperLinear):
                _unfold_hyper(f"vector_fields.{number}.layers.{index}.", layer, found)
    if flow.sqrt_end_time is None:  # a fixed end time has its number in FFJORD's dict too
        found = {name: tensor for name, tensor in found.items() if not name.startswith("sqrt_end_time")}
    if unknown:
        raise ValueError(f"state: keys that are neither FFJORD's nor torchprune's: {', '.join(sorted(unknown)[:6])}")
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        parts = [f"{len(names)} {what} ({', '.join(names[:4])})" for what, names in
                 (("tensors missing", missing), ("tensors left over", extra)) if names]  # fmt: skip
        raise ValueError(f"state: is of another flow, {' and '.join(parts)}; make one of its layers, widths and norms")
    wrong = [name for name in wanted if found[name].numel() != wanted[name].numel() or (
        found[name].ndim > 1 and found[name].shape != wanted[name].shape)]  # fmt: skip
    if wrong:
        name = sorted(wrong)[0]
        raise ValueError(
            f"state: {len(wrong)} tensors of another shape: {name} is {list(found[name].shape)}, the flow's is "
            f"{list(wanted[name].shape)}"
        )
    flow.load_state_dict({name: found[name].reshape(tensor.shape).to(tensor) for name, tensor in wanted.items()})
    return flow


def _place(match: re.Match) -> tuple[int, int]:
    """(scale, number in its chain)"""
    return int(match[1] or 0), int(match[2])


def _our_name(key: str, cnfs: list[tuple[int, int]], norms: list[tuple[int, int]], own: str) -> str | None:
    """own: what our layers call FFJORD's `_layer`."""
    if m := _CNF.search(key):
        leaf = m[4]
        for theirs, ours in _LEAVES.items():
            if leaf.startswith(theirs):
                leaf = (own if theirs == "_layer." else ours) + leaf.removeprefix(theirs)
                break
        return f"vector_fields.{cnfs.index(_place(m))}.layers.{m[3]}.{leaf}"
    if (m := _END_TIME.search(key)) and _place(m) in cnfs:
        return f"sqrt_end_time.{cnfs.index(_place(m))}"
    if (m := _NORM.search(key)) and _place(m) in norms:
        return f"norms.{norms.index(_place(m))}.{m[3]}"
    if m := _TOY.search(key):
        return f"vector_fields.0.layers.{int(m[1]) // 2}.linear.{m[2]}"
    return None


def _unfold_hyper(prefix: str, layer: HyperLinear, found: dict[str, Tensor]) -> None:
    """FFJORD's hypernetwork gives (b, W) of the layer, [out + out * in], from `hidden` functions of time."""
    names = [f"_hypernet.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")]
    if not all(prefix + name in found for name in names):
        return
    inner, inner_bias, outer, outer_bias = (found.pop(prefix + name) for name in names)
    columns = torch.cat((outer_bias.unsqueeze(1), outer), 1)  # [out + out * in, 1 + hidden]
    out, width = layer.out_features, layer.linear.in_features
    found[f"{prefix}linear.bias"] = columns[:out].T.reshape(-1)
    found[f"{prefix}linear.weight"] = columns[out:].view(out, width, -1).permute(2, 0, 1).reshape(-1, width)
    found[f"{prefix}time_net.weight"], found[f"{prefix}time_net.bias"] = inner, inner_bias
