"""Pruning: global ranking, nested masks, honest sizes, and structured pruning that keeps the function's meaning."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseflow_kernels as sfk
from sparseflow_kernels.flows import ContinuousFlow, mlp_field, tabular_flow, toy_field
from sparseflow_kernels.pruning import (
    KEEP_RATIOS,
    NoNeurons,
    NotAChain,
    copy_module,
    dense_size,
    keep_ratio,
    prunable_layers,
    prune_neurons_,
    prune_weights_,
    remove_masks_,
    size,
    sparsity_report,
)
from sparseflow_kernels.training.presets import PRESETS

torch.set_num_threads(1)


def field(layer="ignore", hidden=(20, 24), dim=3, seed=0, activation="tanh"):
    torch.manual_seed(seed)
    return mlp_field(dim, hidden, layer=layer, activation=activation).double()


def weights(module):
    return {
        path: (part.weight_orig * part.weight_mask if hasattr(part, "weight_mask") else part.weight).detach()
        for path, part in prunable_layers(module).items()
    }


def masks(module):
    return {path: (weight != 0) for path, weight in weights(module).items()}


def evaluate(module, t=0.4, seed=9, rows=7):
    y = torch.randn(rows, module.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return module(torch.tensor(t, dtype=torch.float64), y)


# ------------------------------------------------------------------------------------------------ sizes and schedules


def test_schedules_are_the_papers():
    toy = KEEP_RATIOS["toy"]
    assert len(toy) == 29 and {name: len(ratios) for name, ratios in KEEP_RATIOS.items()} == {
        "toy": 29,
        "power": 8,
        "gas": 8,
        "bsds300": 8,
        "hepmass": 12,
        "images": 12,
        "miniboone": 16,
    }
    assert [round(k, 4) for k in toy[:5]] == [0.8, 0.7437, 0.6914, 0.6427, 0.5975]
    assert [round(k, 4) for k in toy[18:22]] == [0.2151, 0.2, 0.18, 0.16] and round(toy[-1], 4) == 0.02
    expected = {
        "power": (43_325, [30327, 22967, 17393, 13172, 9975, 7554, 5721, 4332]),
        "hepmass": (
            546_850,
            [437480, 340011, 264257, 205382, 159623, 124060, 96420, 74938, 58242, 45266, 35181, 27342],
        ),
        "miniboone": (
            820_613,
            [
                656490,
                510226,
                396550,
                308200,
                239534,
                186166,
                144689,
                112453,
                87399,
                67927,
                52793,
                41031,
                32825,
                24618,
                16412,
                8206,
            ],
        ),
    }
    for name, (total, sizes) in expected.items():
        assert all(abs(k * total - size) <= 0.51 for k, size in zip(KEEP_RATIOS[name], sizes)), name


def test_size_sees_through_masks_and_counts_shared_parameters_once():
    module = field()
    total = sum(p.numel() for p in module.parameters())
    assert size(module) == dense_size(module) == total and keep_ratio(module) == 1.0
    prune.random_unstructured(module.layers[1].linear, "weight", amount=100)
    assert (size(module), dense_size(module)) == (total - 100, total)
    with torch.no_grad():  # an optimizer step changes `weight_orig` behind the attribute's back
        module.layers[1].linear.weight_orig.zero_()
    assert size(module) == total - module.layers[1].linear.weight.numel()
    report = sparsity_report(module)
    assert (report.live, report.total) == (size(module), total)
    assert report.live_weights == total - 480 - (20 + 24 + 3) and "layers.1.linear.weight *" in str(report)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert dense_size(tied) == 16 + 8


# --------------------------------------------------------------------------------------------------------- WT


def test_weights_are_the_global_top_k():
    module = field("concatsquash")
    before = torch.cat([w.reshape(-1) for w in weights(module).values()])
    prune_weights_(module, 0.3, of="weights", remove_dead=False)
    after = torch.cat([w.reshape(-1) for w in weights(module).values()])
    budget = math.floor(0.3 * before.numel())
    kept = after != 0
    assert int(kept.sum()) == budget
    assert torch.equal(after[kept], before[kept])
    assert float(before[kept].abs().min()) >= float(before[~kept].abs().max())


@pytest.mark.parametrize("layer", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
@pytest.mark.parametrize("of", ["parameters", "weights"])
def test_sizes_are_met_masks_nest_and_dead_parameters_do_not_matter(layer, of):
    module = field(layer)
    total = dense_size(module) if of == "parameters" else sum(w.numel() for w in weights(module).values())
    previous = masks(module)
    for keep in (0.7, 0.5, 0.3):
        target = math.floor(keep * total)
        kept_dead = copy_module(module)
        prune_weights_(module, keep, of=of)
        reached = size(module) if of == "parameters" else sum(int(m.sum()) for m in masks(module).values())
        assert reached == target
        now = masks(module)
        assert all(not bool((now[path] & ~previous[path]).any()) for path in now)
        # the weight masks alone, dead biases and gates left in, compute the same function
        for path, part in prunable_layers(kept_dead).items():
            prune.custom_from_mask(part, "weight", now[path])
        torch.testing.assert_close(evaluate(module), evaluate(kept_dead), rtol=1e-12, atol=1e-12)
        previous = now


def test_dead_neurons_lose_bias_and_gates_but_the_function_stays():
    module = field("concatsquash")
    with torch.no_grad():  # nobody reads neurons 3 and 5 of the first hidden layer
        module.layers[1].linear.weight[:, [3, 5]] = 0
    before = evaluate(module)
    prune_weights_(module, 1.0)
    first = module.layers[0]
    for parameter in (
        first.linear.bias_orig * first.linear.bias_mask,
        first.time_gate.weight_orig * first.time_gate.weight_mask,
        first.time_gate.bias_orig * first.time_gate.bias_mask,
        first.time_bias.weight_orig * first.time_bias.weight_mask,
        first.linear.weight_orig * first.linear.weight_mask,
    ):
        assert torch.equal((parameter == 0).reshape(20, -1).all(1).nonzero().flatten(), torch.tensor([3, 5]))
    assert not hasattr(module.layers[1].time_gate, "weight_mask")
    torch.testing.assert_close(evaluate(module), before, rtol=1e-14, atol=1e-14)
    assert size(module) == dense_size(module) - 2 * 24 - 2 * (3 + 1 + 3)


def test_pruned_entries_never_return_not_even_through_training():
    module = field("concatsquash")
    prune_weights_(module, 0.4)
    before = masks(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.tensor(0.3).double(), torch.randn(16, 3).double()).square().sum().backward()
        optimizer.step()
    now = masks(module)
    assert all(torch.equal(before[path], now[path]) for path in before)
    prune_weights_(module, 0.9)  # a larger keep changes nothing
    assert all(torch.equal(before[path], masks(module)[path]) for path in before)


def test_ties_are_settled_by_position():
    module = field(hidden=(8,))
    with torch.no_grad():
        for part in prunable_layers(module).values():
            part.weight.fill_(0.5)
    prune_weights_(module, 0.25, of="weights", remove_dead=False)
    flat = torch.cat([m.reshape(-1) for m in masks(module).values()])
    assert bool(flat[:12].all()) and not bool(flat[12:].any())


def test_papers_accounting_on_power():
    """4,332 entries at keep 0.1, of which most cannot be weights: 607, or more once dead parameters are gone."""
    torch.manual_seed(0)
    flow = tabular_flow("power")
    plain = copy_module(flow)
    prune_weights_(plain, 0.1, remove_dead=False)
    assert size(plain) == 4332 and sparsity_report(plain).live_weights == 607
    prune_weights_(flow, 0.1)
    assert size(flow) == 4332 and sparsity_report(flow).live_weights > 607


def test_a_budget_that_leaves_nothing_is_said():
    module = field("concatsquash")
    with pytest.warns(UserWarning) as record:
        prune_weights_(module, 0.02, remove_dead=False)
    texts = [str(warning.message) for warning in record]
    assert "non-zero entries, but" in texts[0] and "no weight at all" in texts[1]
    assert all(not bool(m.any()) for m in masks(module).values())
    module = field()
    with pytest.warns(UserWarning, match="no path leads from the state"):
        prune_weights_(module, 0.01)
    assert size(module) <= 0.01 * dense_size(module)


@pytest.mark.parametrize("layer", ["ignore", "concat"])
def test_min_neurons_keep_every_layer_connected(layer):
    module = field(layer)
    with torch.no_grad():  # a global ranking would empty the middle layer
        module.layers[1].linear.weight.mul_(1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_weights_(module, 0.1, of="weights", min_neurons=2)
    flow = [m[:, -w:] if layer == "concat" else m for m, w in zip(masks(module).values(), (3, 20, 24))]
    middle = flow[1][flow[2].any(0)]
    assert int(middle.any(1).sum()) >= 2
    assert bool(((flow[2].double() @ flow[1].double() @ flow[0].double()) > 0).any())


def test_a_field_of_a_single_layer_stays_connected():
    module = field(hidden=())
    with pytest.warns(UserWarning, match="weights held by min_neurons"):
        prune_weights_(module, 0.05, of="weights", min_neurons=1)
    (mask,) = masks(module).values()
    assert bool(mask.any())


def test_pruning_neurons_tells_of_a_field_that_it_cuts():
    module = field(hidden=(4, 4))
    with torch.no_grad():
        module.layers[0].linear.weight[0] *= 100.0  # the one that stays
        module.layers[1].linear.weight[:, 0] = 0.0  # which nobody reads
    with pytest.warns(UserWarning, match="prune_neurons_: keep=0.1 of weights leaves 1 of 1 vector fields in which no path"):
        prune_neurons_(module, 0.1, of="weights")


def test_layers_chosen_by_module_or_path_and_bad_arguments():
    module = field("concatsquash")
    chosen = module.layers[1].linear
    prune_weights_(module, 0.5, of="weights", layers=[chosen], remove_dead=False)
    assert int((masks(module)["layers.1.linear"]).sum()) == 240 and not hasattr(module.layers[0].linear, "weight_mask")
    assert list(prunable_layers(module, ["layers.1.linear"])) == ["layers.1.linear"]
    assert not any("time" in path for path in prunable_layers(module))
    with pytest.raises(ValueError, match="layers: 'nowhere' is not a Linear"):
        prune_weights_(module, 0.5, layers=["nowhere"])
    for keep in (0.0, 1.5, -1, "half", True):
        with pytest.raises(ValueError, match="keep must be a number in"):
            prune_weights_(module, keep)
    with pytest.raises(ValueError, match="of must be"):
        prune_weights_(module, 0.5, of="bytes")
    with pytest.raises(ValueError, match="no prunable layer"):
        prune_weights_(nn.Tanh(), 0.5)
    with torch.no_grad():
        module.layers[2].linear.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="layers.2.linear.weight has non-finite"):
        prune_weights_(module, 0.2)


class Residual(nn.Module):
    dim = 4

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, t, y):
        h = torch.tanh(self.a(y))
        return self.c(h + torch.tanh(self.b(h)))


class Unreadable(Residual):
    """Its neurons depend on the numbers of the state in a way that no graph shows."""

    def forward(self, t, y):
        return super().forward(t, y) * float(y.detach().sum())


def test_what_cannot_be_read_is_pruned_by_weight_with_a_warning_and_not_by_neuron():
    module = Unreadable()
    with pytest.warns(UserWarning, match="dead parameters are left"):
        prune_weights_(module, 0.5)
    assert size(module) == 30
    with pytest.raises(NoNeurons, match="prune_weights_ prunes its weights one by one"):
        prune_neurons_(module, 0.5)
    with pytest.raises(NotAChain, match="min_neurons needs fields that can be read"):
        prune_weights_(Unreadable(), 0.5, min_neurons=1)


# --------------------------------------------------------------------------------------------------------- FT


def masked_rows_only(module, pruned):
    """The meaning of FT: the same network with the rows of the pruned neurons zero, and nothing else changed."""
    reference = copy.deepcopy(module)
    for path, part in prunable_layers(reference).items():
        rows = pruned.get(path)
        if rows is not None:
            with torch.no_grad():
                part.weight[rows] = 0
    return reference


@pytest.mark.parametrize("layer", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
@pytest.mark.parametrize("activation", ["tanh", "softplus", "relu"])
def test_neurons_fold_preserves_the_function_and_keeps_the_largest_rows(layer, activation):
    module = field(layer, activation=activation)
    dense = copy.deepcopy(module)
    prune_neurons_(module, 0.6)
    assert size(module) == pytest.approx(0.6 * dense_size(module), rel=0.03)  # the nearest there is, from either side
    pruned, fractions = {}, []
    paths = list(prunable_layers(module))
    for path, dense_path in zip(paths[:-1], paths[:-1]):
        row_mask = masks(module)[path].any(1)
        norms = dict(prunable_layers(dense))[dense_path].weight.detach().abs().sum(1)
        assert 0 < int(row_mask.sum()) < len(row_mask)
        assert float(norms[row_mask].min()) >= float(norms[~row_mask].max())
        pruned[path] = ~row_mask
        fractions.append(float(row_mask.double().mean()))
    assert abs(fractions[0] - fractions[1]) < 0.05  # one phi for all layers
    for t in (-0.5, 0.0, 0.7, 1.0):
        torch.testing.assert_close(
            evaluate(module, t), evaluate(masked_rows_only(dense, pruned), t), rtol=1e-12, atol=1e-12
        )
    last = prunable_layers(module)[paths[-1]]
    if layer in ("ignore", "concat"):  # constants folded: columns and biases of pruned neurons are gone
        offset = last.in_features - 24
        assert not bool(masks(module)[paths[-1]][:, offset:][:, pruned[paths[1]]].any())
        hidden = prunable_layers(module)[paths[0]]
        assert not bool((hidden.bias_orig * hidden.bias_mask)[pruned[paths[0]]].any())
    else:  # functions of time: nothing of them may be lost
        assert bool(masks(module)[paths[-1]].all())


@pytest.mark.parametrize("fold", ["auto", "none", "drop"])
def test_time_channel_and_output_rows_survive_in_every_flow(fold):
    torch.manual_seed(0)
    flow = ContinuousFlow([mlp_field(3, (16, 16), layer="concat") for _ in range(3)], dim=3)
    prune_neurons_(flow, 0.35, fold=fold)
    for vector_field in flow.vector_fields:
        vector_masks = masks(vector_field)
        last = vector_masks["layers.2.linear"]
        assert bool(last.any(1).all())  # every state coordinate moves in every flow
        for mask in vector_masks.values():
            assert bool(mask[mask.any(1)][:, 0].all())  # kept neurons still see time
    if fold != "none":
        assert size(flow) <= 0.35 * dense_size(flow)


def test_neuron_pruning_meets_the_nearest_size_nests_and_repeats():
    module = field(hidden=(40, 40))
    previous = masks(module)
    for keep in (0.7, 0.4, 0.2):
        prune_neurons_(module, keep)
        now = masks(module)
        assert all(not bool((now[path] & ~previous[path]).any()) for path in now)
        # no other choice of layers that have a neuron more or less is nearer, unless it is above and this one within 0.5 %
        a, b, _ = [int(m.any(1).sum()) for m in now.values()]
        assert abs(a - b) <= 1
        n = min(a, b)
        target, near = math.floor(keep * dense_size(module)), range(n - 1, n + 3)
        sizes = [4 * i + (i + 1) * j + 3 * j + 3 for i in near for j in near if abs(i - j) <= 1]
        off = size(module) - target
        assert abs(off) == min(abs(other - target) for other in sizes) or -0.005 * target <= off <= 0
        previous = now
    same = copy_module(module)
    prune_neurons_(same, 0.2)
    assert size(same) == size(module)
    torch.testing.assert_close(evaluate(same), evaluate(module), rtol=1e-12, atol=1e-12)


def test_neurons_floor_is_one_per_layer_and_said():
    module = field()
    with pytest.warns(UserWarning, match="one neuron per hidden layer leaves"):
        prune_neurons_(module, 0.001)
    assert [int(m.any(1).sum()) for m in masks(module).values()] == [1, 1, 3]


def test_drop_removes_gated_neurons_entirely():
    module = field("concatsquash")
    prune_neurons_(module, 0.4, fold="drop")
    rows = [int(m.any(1).sum()) for m in masks(module).values()]
    widths = [3, *rows]
    assert size(module) == sum(a * b + 4 * b for a, b in zip(widths, widths[1:]))
    with pytest.raises(ValueError, match="fold must be"):
        prune_neurons_(module, 0.4, fold="maybe")


def test_frozen_modules_user_classes_and_time_behind_are_traced():
    class Behind(nn.Module):  # time is the LAST input column, no t in the second layer, frozen parameters
        dim = 3

        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(12, 3), nn.Linear(4, 12)  # registered in the wrong order

        def forward(self, t, y):
            return self.second(torch.sin(self.first(torch.cat([y, t.expand(len(y), 1)], 1))))

    torch.manual_seed(0)
    module = Behind().double().requires_grad_(False)
    dense = copy.deepcopy(module)
    prune_neurons_(module, 0.5)
    pruned = {"first": ~masks(module)["first"].any(1)}
    assert 0 < int(pruned["first"].sum()) < 12 and not any(p.requires_grad for p in module.parameters())
    torch.testing.assert_close(evaluate(module), evaluate(masked_rows_only(dense, pruned)), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- masks


def test_copy_and_remove_masks():
    module = field("concatsquash")
    prune_weights_(module, 0.5)
    module(torch.tensor(0.1).double(), torch.randn(2, 3).double())  # leaves graph tensors behind
    twin = copy_module(module)
    torch.testing.assert_close(evaluate(twin), evaluate(module))
    with torch.no_grad():
        twin.layers[0].linear.weight_orig.zero_()
    assert size(twin) < size(module)
    before = evaluate(module), size(module)
    remove_masks_(module)
    assert not any(name.endswith("_mask") for name, _ in module.named_buffers())
    torch.testing.assert_close(evaluate(module), before[0])
    assert size(module) == before[1]


def test_toy_field_compiles_to_what_was_pruned():
    compiled_field = pytest.importorskip("sparseflow_kernels.compiled_field")
    torch.manual_seed(0)
    module = toy_field("l3_h23").double()
    prune_weights_(module, 0.3)
    compiled = compiled_field.compile(module, engine="reference")
    y = torch.randn(5, 2, dtype=torch.float64)
    t = torch.tensor(0.0, dtype=torch.float64)
    torch.testing.assert_close(compiled(t, y), module(t, y))
    assert compiled.nnz <= sum(int(m.sum()) for m in masks(module).values())


@pytest.mark.parametrize(
    ("preset", "net", "within"),
    [("gaussians", "l4_h64", 0.015), ("power", None, 0.005), ("hepmass", None, 0.005), ("gaussians", "l8_h10", 0.1)],
)
def test_neuron_pruning_meets_the_papers_sizes(preset, net, within):
    """Layers of the same width that all step together miss by 14 % (l4_h64), 7 % (POWER), 56 % (l8_h10)."""
    torch.manual_seed(0)
    chosen = PRESETS[preset]
    flow = chosen.flow(net)
    for keep in chosen.keep_ratios[3::6] if net == "l8_h10" else chosen.keep_ratios[1::4]:
        if keep < 0.03:
            continue  # one neuron in every layer of l8_h10 is more than that
        prune_neurons_(flow, keep, **chosen.prune_options("neurons"))
        assert abs(size(flow) / dense_size(flow) / keep - 1) <= within, keep


def test_presets_keep_deep_thin_nets_connected():
    chosen = PRESETS["gaussians"]
    torch.manual_seed(0)
    floored = chosen.flow("l8_h10")
    plain = copy_module(floored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keep in chosen.keep_ratios[4::6]:
            prune_weights_(floored, keep, **chosen.prune_options("weights"))
            prune_weights_(plain, keep)

    def moves(flow):
        path = torch.eye(2, dtype=torch.float64)
        for mask in masks(flow).values():
            path = mask.double() @ path
        return bool((path > 0).any())

    assert moves(floored)
    assert not moves(plain)  # a global ranking empties a layer


def test_the_floor_changes_nothing_where_no_layer_runs_empty():
    one, other = field(hidden=(20, 24)), field(hidden=(20, 24))
    for keep in (0.6, 0.3):
        prune_weights_(one, keep)
        prune_weights_(other, keep, min_neurons=1)
    assert all(torch.equal(a, b) for a, b in zip(masks(one).values(), masks(other).values()))


def reparametrized(kind):
    module = field(hidden=(8, 9))
    last = module.layers[2].linear  # the layers before it must not be masked already
    if kind == "gate":
        module = field("concatsquash", hidden=(8, 9))
        nn.utils.parametrizations.weight_norm(module.layers[1].time_gate)
    else:
        {
            "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
            "parametrized spectral_norm": nn.utils.parametrizations.spectral_norm,
            "old weight_norm": nn.utils.weight_norm,
            "old spectral_norm": nn.utils.spectral_norm,
        }[kind](last)
    return module


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("prune_", [prune_weights_, prune_neurons_])
@pytest.mark.parametrize(
    "kind",
    ["parametrized weight_norm", "parametrized spectral_norm", "old weight_norm", "old spectral_norm", "gate"],
)
def test_computed_weights_are_refused_before_anything_changed(kind, prune_):
    module = reparametrized(kind).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    options = {"fold": "drop"} if prune_ is prune_neurons_ else {}
    with pytest.raises(ValueError, match="make (it|that) plain first") as error:
        prune_(module, 0.3, **options)
    assert ("remove_parametrizations" in str(error.value)) == (not kind.startswith("old"))
    after = module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(name.endswith("_mask") for name in after)


def test_made_plain_they_are_pruned():
    module = reparametrized("parametrized weight_norm")
    nn.utils.parametrize.remove_parametrizations(module.layers[2].linear, "weight")
    prune_weights_(module, 0.3)
    assert size(module) <= 0.3 * dense_size(module)


@pytest.mark.parametrize("prune_", [prune_weights_, prune_neurons_])
def test_compiled_fields_are_refused_in_words(prune_):
    compiled = sfk.compile(field())
    inside = nn.Sequential(nn.Linear(3, 3).double(), compiled)
    flow = ContinuousFlow(mlp_field(3, (8,)), dim=3).compile()
    for module in (compiled, inside, flow, sfk.with_divergence(compiled)):
        before = list(module.state_dict())
        with pytest.raises(ValueError, match="prune the module, then compile"):
            prune_(module, 0.5)
        assert list(module.state_dict()) == before
