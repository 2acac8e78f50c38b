"""Pruning of fields that are no chains: which neurons there are, that removing them is exact, and that sizes are right."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import sparseflow_kernels as sfk
import torch
from pruning_fields import KINDS, Film, made
from sparseflow_kernels.data import Dataset
from sparseflow_kernels.flows import ContinuousFlow, mlp_field
from sparseflow_kernels.pruning import (
    NoNeurons,
    NotAChain,
    copy_module,
    dense_size,
    keep_ratio,
    neuron_report,
    prune_neurons_,
    prune_weights_,
    remove_masks_,
    size,
    sparsity_report,
    weight_matrices,
)
from sparseflow_kernels.pruning.fields import Fields
from sparseflow_kernels.pruning.graph_neurons import Neurons
from sparseflow_kernels.pruning.graph_plan import GraphPlan
from sparseflow_kernels.training import load_checkpoint, save_checkpoint, sparse_flow
from torch import Tensor, nn

torch.set_num_threads(1)
WITH_NEURONS = [kind for kind in KINDS if kind != "one gate"]


def at(module: nn.Module, like: Tensor, t: float = 0.4) -> Tensor:
    return module(torch.tensor(t, dtype=like.dtype), like)


def same(one: nn.Module, other: nn.Module, like: Tensor) -> None:
    for t in (-0.6, 0.0, 0.8):
        torch.testing.assert_close(at(one, like, t), at(other, like, t), rtol=1e-11, atol=1e-11)


def planned(module: nn.Module, like: Tensor, fold: str) -> GraphPlan:
    fields = Fields(module, None, like)
    return GraphPlan(Neurons(fields.graphs.wiring(), fields.matrices), fold)


def quiet(prune_, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prune_(*args, **options)


# ------------------------------------------------------------------------------------------------ neurons


@pytest.mark.parametrize("kind", WITH_NEURONS)
@pytest.mark.parametrize("fold", ["auto", "none"])
@pytest.mark.parametrize("share", [0.8, 0.4, 0.0])
def test_the_function_is_that_of_the_module_without_the_slices(kind: str, fold: str, share: float) -> None:
    module, like = made(kind)
    reference = copy.deepcopy(module)
    plan, other = planned(module, like, fold), planned(reference, like, fold)
    counts = plan.counts_at(share)
    removed, slices = plan._removed(counts)
    assert bool(slices.any())
    with torch.no_grad():
        for item in other.wiring.numbering.items:
            item.parameter[slices[item.elements].view(item.parameter.shape)] = 0
    before, taken = size(module), plan.removed_at(counts, "parameters")
    plan.apply_(counts)
    same(module, reference, like)
    assert size(module) == before - taken
    if fold == "none":
        assert torch.equal(removed, slices)


@pytest.mark.parametrize("kind", WITH_NEURONS)
def test_what_is_kept_is_read_and_does_something(kind: str) -> None:
    module, like = made(kind)
    quiet(prune_neurons_, module, 0.5, like=like)
    like = torch.randn(like.shape, dtype=torch.float64) * 2
    value = at(module, like)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad((value * torch.randn_like(value)).sum(), list(named.values()), allow_unused=True)
    used = Fields(module, None, like).graphs.wiring().seen
    numbering = Fields(module, None, like).graphs.numbering
    for (name, parameter), gradient in zip(named.items(), gradients):
        item = next(i for i in numbering.items if i.parameter is parameter)
        live = (item.owners[0][0]._buffers.get(f"{item.owners[0][1]}_mask", torch.ones_like(parameter)) != 0)
        live &= used[item.elements].view(parameter.shape)
        if kind == "attention" and name in ("q.bias", "k.bias"):
            continue  # a softmax does not see what is the same in all its rows, and no graph shows that
        if bool(live.any()):
            assert gradient is not None and bool((gradient[live] != 0).all()), name


@pytest.mark.parametrize("kind", WITH_NEURONS)
@pytest.mark.parametrize("prune_", [prune_weights_, prune_neurons_])
def test_the_compiled_field_is_the_pruned_module_and_smaller(kind: str, prune_) -> None:
    module, like = made(kind)
    dense = sfk.compile(module, like=like, engine="reference").nnz
    quiet(prune_, module, 0.6, like=like, **({"fold": "drop"} if prune_ is prune_neurons_ else {}))
    field = sfk.compile(module, like=like, engine="reference")
    torch.testing.assert_close(field(torch.tensor(0.4).double(), like), at(module, like))
    assert field.nnz < dense


def test_groups_and_why_some_are_left_alone() -> None:
    found = {}
    for kind in KINDS:
        module, like = made(kind)
        found[kind] = {tuple(dict.fromkeys(g.weights)): g for g in neuron_report(module, like=like)}
    assert found["residual"]["enter.weight", "down.0.weight", "down.1.weight"].neurons == 10
    assert [found["residual"][f"up.{i}.weight",].neurons for i in (0, 1)] == [12, 12]
    assert found["gated"]["a.weight",].weights == ("a.weight", "a.weight") and found["gated"]["a.weight",].neurons == 12
    assert len(found["hidden cell"]["start.weight", "cell.weight_hh", "cell.weight_ih"].weights) == 7
    assert found["attention"]["q.weight", "k.weight"].neurons == 6
    assert found["fourier"]["a.weight",].neurons == 8
    assert found["hamiltonian"]["net.2.weight",].neurons == 9
    assert {g.reason for g in found["cell"].values()} == {"", "they are the derivative's own rows"}
    assert "with the state's own rows" in found["residual of the state"]["b.weight",].reason
    for kind, where in (("norm", "norm"), ("one gate", "forward"), ("attention", "forward")):
        (coupled,) = [g for g in found[kind].values() if g.coupled]
        assert repr(where) in coupled.reason and "prune_weights_" in str(coupled)


def test_what_is_not_pruned_is_said() -> None:
    module, like = made("norm")
    with pytest.warns(UserWarning, match=r"a\.weight: 11 of 11 .*at 'norm' they meet.*prune_weights_"):
        prune_neurons_(module, 0.5)
    assert "a.weight_orig" not in dict(module.named_parameters())
    module, like = made("one gate")
    before = list(module.state_dict())
    with pytest.raises(NoNeurons, match=r"a\.weight.*one gate for all.*prune_weights_"):
        prune_neurons_(module, 0.5)
    assert list(module.state_dict()) == before


@pytest.mark.parametrize("kind", ["residual", "hidden cell", "hamiltonian", "points", "bare", "gated"])
def test_sizes_are_met_and_masks_nest(kind: str) -> None:
    module, like = made(kind)
    previous = None
    for keep in (0.8, 0.6, 0.4):
        quiet(prune_neurons_, module, keep, like=like)
        now = planned(module, like, "auto").unmasked
        assert previous is None or not bool((now & ~previous).any())
        assert keep_ratio(module) == pytest.approx(keep, abs=0.08)
        previous = now
    again = copy_module(module)
    quiet(prune_neurons_, again, 0.4, like=like)
    assert size(again) == size(module)
    same(again, module, like)


@pytest.mark.parametrize("layer", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
@pytest.mark.parametrize("fold", ["auto", "none", "drop"])
def test_a_chain_read_as_a_graph_has_the_masks_of_the_chain(layer: str, fold: str, monkeypatch) -> None:
    torch.manual_seed(3)
    chain = mlp_field(3, (14, 17), layer=layer, activation="softplus").double()
    graph = copy.deepcopy(chain)

    def no_chain(self, field):
        raise NotAChain("made one for this test")

    quiet(prune_neurons_, chain, 0.5, fold=fold)
    monkeypatch.setattr(Fields, "chain", no_chain)
    quiet(prune_neurons_, graph, 0.5, fold=fold)
    assert {n: b.bool().tolist() for n, b in graph.named_buffers()} == {n: b.bool().tolist() for n, b in chain.named_buffers()}
    for (name, one), other in zip(graph.named_parameters(), chain.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7, msg=name)


def test_time_and_context_may_be_left_of_a_neuron() -> None:
    """Its row is masked; what scales and shifts it by the context goes on, unless it is dropped."""
    module, like = made("film")
    reference = copy.deepcopy(module)
    quiet(prune_neurons_, module, 0.8, of="weights", layers=["a", "b"])
    gone = ~(module.a.weight_mask.any(1))
    assert 0 < int(gone.sum()) < 10 and not hasattr(module.b, "weight_mask")
    with torch.no_grad():
        reference.a.weight[gone] = 0
    same(module, reference, like)
    module.context = reference.context = torch.randn(5, 4).double()
    same(module, reference, like)
    dropped, _ = made("film")
    quiet(prune_neurons_, dropped, 0.8, of="weights", layers=["a", "b"], fold="drop")
    assert torch.equal(dropped.b.weight_mask.bool().any(0), dropped.a.weight_mask.bool().any(1))


# ------------------------------------------------------------------------------------------------ single weights


@pytest.mark.parametrize("kind", KINDS)
def test_weights_meet_the_size_and_dead_parameters_do_not_matter(kind: str) -> None:
    module, like = made(kind)
    for keep in (0.7, 0.5):
        alive = copy_module(module)
        quiet(prune_weights_, module, keep, like=like)
        assert size(module) == math.floor(keep * dense_size(module))
        matrices = weight_matrices(module)
        for path, matrix in weight_matrices(alive).items():
            matrix.mask_(matrices[path].value != 0)
        same(module, alive, like)


def test_which_parameters_are_matrices() -> None:
    names = {kind: list(weight_matrices(made(kind)[0])) for kind in KINDS}
    assert names["bare"] == ["w1", "w2"]  # [1, 12] only scales rows
    assert names["tied"] == ["enter.weight", "twice.weight", "leave.weight"]
    assert names["cell"] == ["cell.weight_hh", "cell.weight_ih", "up.weight", "down.weight"]
    assert names["norm"] == ["a.weight", "b.weight", "c.weight"]
    assert names["past"] == ["a.weight", "more.0"]
    attention = nn.MultiheadAttention(4, 2)
    assert list(weight_matrices(attention)) == ["in_proj_weight", "out_proj.weight"]
    assert list(weight_matrices(nn.LSTMCell(3, 4))) == ["weight_hh", "weight_ih"]
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return y @ self.w * float(y.detach().sum())

    with pytest.raises(ValueError, match="no prunable layer.*layers=.*its own parameters are not known"):
        weight_matrices(Unread())
    assert list(weight_matrices(Unread(), ["w"])) == ["w"]
    report = sparsity_report(made("bare")[0])
    assert (report.total_weights, report.total) == (72, 99)


def test_parameters_are_chosen_by_their_paths() -> None:
    module, _ = made("bare")
    prune_weights_(module, 0.5, of="weights", layers=["w2"], remove_dead=False)
    assert not hasattr(module, "w1_mask") and int(module.w2_mask.sum()) == 18
    with pytest.raises(ValueError, match="layers: 'bias' is not a Linear.* no parameter of two axes"):
        prune_weights_(module, 0.5, layers=["bias"])


def test_a_shared_weight_is_ranked_once_and_masked_in_every_layer() -> None:
    module, like = made("tied")
    prune_weights_(module, 0.5, of="weights", remove_dead=False)
    assert module.again.weight_orig is module.twice.weight_orig
    assert torch.equal(module.again.weight_mask, module.twice.weight_mask)
    assert sparsity_report(module).live_weights == (32 + 64 + 32) // 2
    before = at(module, like).detach()
    remove_masks_(module)
    assert module.again.weight is module.twice.weight
    torch.testing.assert_close(at(module, like), before)


def test_a_norm_sees_what_is_not_read_after_it() -> None:
    """A neuron whose normalised row is not read still has a part in the mean of the others: it is not dead."""
    module, like = made("norm")
    with torch.no_grad():
        module.b.weight[:, 3] = 0
    before = at(module, like)
    prune_weights_(module, 1.0)
    torch.testing.assert_close(at(module, like), before, rtol=1e-13, atol=1e-13)
    assert not hasattr(module.a, "weight_mask")
    assert int((module.norm.weight_mask == 0).sum()) == 1


# ------------------------------------------------------------------------------------------------ training


def step(module: nn.Module, like: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        at(module, like).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["residual", "hidden cell", "tied", "past", "bare", "hamiltonian", "conv"])
@pytest.mark.parametrize("prune_", [prune_weights_, prune_neurons_])
def test_pruned_entries_stay_away_and_others_train(kind: str, prune_, tmp_path) -> None:
    module, like = made(kind)
    for keep in (0.8, 0.65):
        quiet(prune_, module, keep, like=like)
        sizes, before = size(module), at(module, like).detach()
        step(module, like)
        assert size(module) <= sizes
        after = at(module, like).detach()
        assert not torch.allclose(after, before)
        plain = remove_masks_(copy_module(module))
        torch.testing.assert_close(at(plain, like), after)
        assert not any(part._forward_pre_hooks for part in plain.modules())
    save_checkpoint(tmp_path / "pruned.safetensors", module)
    other, _ = made(kind, seed=1)
    load_checkpoint(tmp_path / "pruned.safetensors", other)
    torch.testing.assert_close(at(other, like), at(module, like))
    step(module, like)
    step(other, like)
    torch.testing.assert_close(at(other, like), at(module, like))


@pytest.mark.parametrize("method", ["weights", "neurons"])
@pytest.mark.parametrize("engine", [None, "auto"])
def test_the_loop_of_train_and_prune_takes_graphs(method: str, engine: str | None, tmp_path) -> None:
    torch.manual_seed(0)
    flow = ContinuousFlow([KINDS["residual"]()], dim=3, divergence="exact", rtol=1e-3, atol=1e-3)
    rows = torch.randn(96, 3) * torch.tensor([1.0, 0.3, 2.0])
    data = Dataset("rows", rows[:64], rows[64:80], rows[80:])
    run = lambda: list(sparse_flow(
        copy_module(flow), data, (0.7, 0.4), method=method, engine=engine, epochs=2, batch=32, lr=1e-2, folder=tmp_path,
    ))  # fmt: skip
    cycles = run()
    for cycle, keep in zip(cycles, (1.0, 0.7, 0.4)):
        assert keep_ratio(cycle.flow) == pytest.approx(keep, abs=0.06) and math.isfinite(cycle.history[-1]["nll"])
    again = run()
    assert all(cycle.resumed for cycle in again)
    for one, other in zip(cycles, again):
        assert size(one.flow) == size(other.flow)
        torch.testing.assert_close(one.flow.log_prob(rows), other.flow.log_prob(rows))


def test_memory_that_nobody_has_written_is_not_read() -> None:
    """Padding around is written into empty memory, which torch fills with NaN here."""
    module, like = made("conv around")
    torch.use_deterministic_algorithms(True)
    try:
        assert len(neuron_report(module, like=like)) == 2
    finally:
        torch.use_deterministic_algorithms(False)


def test_film_alone_has_parameters_that_its_graph_does_not_show() -> None:
    """What the context is computed with is run once a solve, outside the graph: it is ranked, and never taken for dead."""
    module, like = made("film")
    assert isinstance(module, Film)
    fields = Fields(module, None, like)
    wiring = fields.graphs.wiring()
    assert not bool(wiring.seen[wiring.numbering.item_of(module.scale, "weight").elements].any())
    quiet(prune_weights_, module, 0.6)
    assert bool(module.scale.weight_mask.any()) and bool(module.shift.weight_mask.any())


def test_what_has_one_neuron_left_is_pruned_no_further() -> None:
    module, like = made("residual")
    for _ in range(2):
        with pytest.warns(UserWarning, match="but one neuron per hidden layer leaves"):
            prune_neurons_(module, 0.02, like=like)


# ------------------------------------------------------------------------------------------------ the floor


@pytest.mark.parametrize("kind", KINDS)
def test_so_many_neurons_of_every_group_stay_connected(kind: str) -> None:
    module, like = made(kind)
    quiet(prune_weights_, module, 0.03, of="weights", min_neurons=1, like=like)
    y = like.clone().requires_grad_()
    found = at(module, y)
    (slope,) = torch.autograd.grad(found.square().sum(), y)
    assert bool((slope != 0).any()) or kind in ("hamiltonian", "attention")  # products, whose other factor may be zero
    for group in neuron_report(module, like=like):
        assert group.live >= 1 or group.reason or kind in ("film", "conditional"), str(group)  # these read a context alone


class Convolutions(nn.Module):
    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 6), (7, 5), (6, 2)))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            y = layer(torch.cat([torch.ones_like(y[:, :1]) * t, y], 1))
            y = torch.tanh(y) if number < 2 else y
        return y

    def channels(self) -> list[Tensor]:
        """float64 [out, in] of every layer: 1 where a channel reads another one, of those but time."""
        masks = ((layer.weight_orig * layer.weight_mask)[:, 1:] != 0 for layer in self.layers)
        return [mask.flatten(2).any(2).double() for mask in masks]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dead", [True, False])
def test_channels_of_convolutions_stay_connected(n: int, dead: bool) -> None:
    torch.manual_seed(0)
    module, like = Convolutions().double(), torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():  # a global ranking would empty the middle layer
        module.layers[1].weight.mul_(1e-3)
    plain = copy_module(module)
    with pytest.warns(UserWarning, match="1 of 1 vector fields in which no path"):
        prune_weights_(plain, 0.1, of="weights", like=like)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_weights_(module, 0.1, of="weights", min_neurons=n, remove_dead=dead, like=like)
    first, second, last = module.channels()
    assert bool(((last @ second @ first) > 0).any())
    hidden = (first.any(1) & ((last @ second).any(0)), (second @ first).any(1) & last.any(0))
    assert all(int(channels.sum()) >= n for channels in hidden)
    assert keep_ratio(module) <= 0.15
    assert bool((torch.autograd.functional.jacobian(lambda y: at(module, y), torch.randn(1, 2, 5, 5).double()) != 0).any())


def test_a_floor_that_holds_changes_nothing() -> None:
    for kind in KINDS:
        (one, like), (other, _) = made(kind), made(kind)
        quiet(prune_weights_, one, 0.6, like=like)
        quiet(prune_weights_, other, 0.6, min_neurons=1, like=like)
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values())), kind
