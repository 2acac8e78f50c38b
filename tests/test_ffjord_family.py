"""FFJORD's family: layer kinds, moving batch norm, penalties on the dynamics, weights that other code trained."""

import math

import pytest
import torch
import torchdiffeq

import sparseflow_kernels as sfk
from sparseflow_kernels.flows import (
    LAYERS, ContinuousFlow, MovingBatchNorm, NeuralClassifier, ffjord_flow, load_weights_, mlp_field, tabular_flow,
    toy_field,
)  # fmt: skip
from sparseflow_kernels.pruning import dense_size, size
from sparseflow_kernels.training import train

T = torch.tensor


@pytest.mark.parametrize("layer", ["blend", "hyper"])
def test_a_layer_kind_runs_natively_with_its_gradient(layer):
    torch.manual_seed(0)
    module = mlp_field(3, (5,), layer, "tanh").double()
    field = sfk.compile(module)
    assert field.engine_name == "cpu" and "gradient: cpu" in field.report()
    x, t = torch.randn(4, 3, dtype=torch.float64), T(0.4, dtype=torch.float64)
    assert torch.allclose(field(t, x), module(t, x), atol=1e-12)
    (field(t, x).square().sum() - module(t, x).square().sum()).backward()
    ours = torch.cat([p.grad.flatten() for p in field.parameters()]).norm()
    theirs = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-9)


def test_what_the_layer_kinds_say():
    torch.manual_seed(0)
    x, t = torch.randn(4, 3), T(0.25)
    blend = LAYERS["blend"](3, 2)
    assert torch.allclose(blend(t, x), 0.75 * blend.first(x) + 0.25 * blend.last(x), atol=1e-6)
    hyper = LAYERS["hyper"](3, 2)
    h = torch.cat((torch.ones(1), torch.tanh(hyper.time_net(t.view(1, 1))).flatten()))
    weight, bias = hyper.linear.weight.view(9, 2, 3), hyper.linear.bias.view(9, 2)
    expected = x @ torch.einsum("k,koi->oi", h, weight).T + torch.einsum("k,ko->o", h, bias)
    assert torch.allclose(hyper(t, x), expected, atol=1e-6)
    assert LAYERS["concatcoord"] is LAYERS["concat"]


# -------------------------------------------------------------------------------------------------------------- norms


def test_moving_batch_norm_moves_by_its_batch_and_is_inverted():
    torch.manual_seed(0)
    norm, x = MovingBatchNorm(2, decay=0.25), 3.0 + 2.0 * torch.randn(500, 2)
    y, logdet = norm(x)  # the running estimates before the step: mean 0, variance 1
    assert torch.allclose(y, x / math.sqrt(1 + 1e-4)) and logdet.item() == pytest.approx(-math.log(1 + 1e-4), abs=1e-6)
    assert torch.allclose(norm.running_mean, 0.25 * x.mean(0)) and norm.step == 1
    assert torch.allclose(norm.running_var, 0.75 + 0.25 * x.var(0))
    norm.eval()
    with torch.no_grad():
        norm.weight.copy_(T([0.3, -0.2])), norm.bias.copy_(T([1.0, 2.0]))
    y, logdet = norm(x)
    jacobian = torch.autograd.functional.jacobian(lambda row: norm(row[None])[0][0], x[0])
    assert float(logdet) == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-5) and norm.step == 1
    assert torch.allclose(norm.inverse(y), x, atol=1e-5)
    lagged = MovingBatchNorm(2, lag=0.9)
    z, _ = lagged(x.requires_grad_())
    assert torch.allclose(z, (x - 0.9 * x.mean(0)) / (0.1 + 0.9 * x.var(0) + 1e-4).sqrt(), atol=1e-5)


def test_a_flow_with_norms_is_a_density_compiles_and_trains():
    torch.manual_seed(0)
    flow = ContinuousFlow([mlp_field(2, (4,)) for _ in range(2)], batch_norm=0.0, rtol=1e-6, atol=1e-6)
    assert len(flow.norms) == 3 and dense_size(flow) == sum(p.numel() for p in flow.parameters())
    rows = 2.0 + 0.5 * torch.randn(600, 2)
    history = train(flow, rows, engine="auto", epochs=3, batch=100, lr=0.02)
    assert history[-1]["nll"] < history[0]["nll"] and flow.norms[0].step == 18  # of the copy that was trained
    flow.eval()
    line = torch.linspace(-1.0, 5.0, 61)
    grid = torch.cartesian_prod(line, line)
    assert flow.compile().log_prob(grid).exp().sum().item() * 0.01 == pytest.approx(1.0, abs=0.02)
    z, _ = flow.transform(rows)
    assert torch.allclose(flow.inverse(z), rows, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("layer", ["concatsquash", "hyper"])
def test_penalties_are_integrated_natively_as_autograd_has_them(divergence, layer):
    torch.manual_seed(0)
    weights = {"kinetic": 0.1, "jacobian": 0.2, "directional": 0.3}
    flow = ContinuousFlow(
        mlp_field(2, (4,), layer).double(), divergence=divergence, penalties=weights, train_end_time=True, rtol=1e-7,
        atol=1e-7,
    )  # fmt: skip
    x, found = torch.randn(5, 2, dtype=torch.float64), []
    for model in (flow, flow.compile()):
        torch.manual_seed(1)
        losses = model.row_nll(x)
        losses.mean().backward()
        end_time = model.sqrt_end_time[0].grad
        norm = torch.cat([p.grad.flatten() for p in model.vector_fields.parameters()]).norm()
        found.append((losses.detach(), model.stats.penalties, float(norm), float(end_time)))
    assert model.stats.solves[0].engine == "cpu"
    assert torch.allclose(found[0][0], found[1][0], atol=1e-9) and found[0][1] == pytest.approx(found[1][1], abs=1e-9)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-6) and found[0][3] == pytest.approx(found[1][3], rel=1e-6)
    torch.manual_seed(1)
    log_probs = model.log_prob(x)
    added = losses + log_probs
    assert float(added.mean()) == pytest.approx(sum(w * p for w, p in zip(weights.values(), found[0][1])), rel=1e-4)
    torch.manual_seed(1)
    assert torch.equal(model.eval().row_nll(x), -log_probs)  # evaluation has none


def test_penalties_of_a_linear_field_are_known():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2, bias=False)

        def forward(self, t, x):
            return self.a(x)

    module = Linear().double()
    with torch.no_grad():
        module.a.weight.copy_(T([[0.0, 1.0], [-1.0, 0.0]]))  # a rotation: |x| stays
    flow = ContinuousFlow(module, penalties={"kinetic": 1.0, "jacobian": 1.0, "directional": 1.0}, rtol=1e-8, atol=1e-8)
    flow.compile().row_nll(T([[3.0, 4.0]], dtype=torch.float64))
    compiled = flow.compile()
    compiled.row_nll(T([[3.0, 4.0]], dtype=torch.float64))
    assert compiled.stats.penalties == pytest.approx((12.5, 1.0, 12.5), rel=1e-6)
    with pytest.raises(ValueError, match="penalties must be named kinetic, jacobian, directional; got 'l2'"):
        ContinuousFlow(module, penalties={"l2": 1.0})
    with pytest.raises(ValueError, match="discrete gradient"):
        ContinuousFlow(module, penalties={"kinetic": 1.0}, gradient="adjoint")


# -------------------------------------------------------------------------------------------- weights of other code


def ffjord_state(flow, prefix="") -> dict:
    """The flow's weights under FFJORD's keys, with the second names that its wrapper registers."""
    norms = flow.norms is not None
    theirs = {"linear.": "_layer.", "time_gate.": "_hyper_gate.", "time_bias.": "_hyper_bias.", "first.": "_layer0.",
              "last.": "_layer1."}
    state = {}
    for name, tensor in flow.state_dict().items():
        part, number, *rest = name.split(".")
        at = int(number) * (2 if norms else 1)
        if part == "vector_fields":
            leaf = ".".join(rest[2:])
            leaf = next((to + leaf.removeprefix(of) for of, to in theirs.items() if leaf.startswith(of)), leaf)
            for inner in ("module", "diffeq"):
                state[f"{prefix}chain.{at + norms}.odefunc.diffeq.{inner}.layers.{rest[1]}.{leaf}"] = tensor
            state[f"{prefix}chain.{at + norms}.odefunc._num_evals"] = T(0.0)
        elif part == "sqrt_end_time":
            state[f"{prefix}chain.{at + norms}.sqrt_end_time"] = tensor
        else:
            state[f"{prefix}chain.{at}.{rest[0]}"] = tensor
    return state


@pytest.mark.parametrize("settings, prefix", [({}, ""), ({"batch_norm": 0.0}, "torchnet.model.")])
def test_weights_of_ffjord_and_torchprune_tables_are_taken_over(settings, prefix):
    torch.manual_seed(0)
    theirs, ours = tabular_flow("power", **settings), tabular_flow("power", **settings)
    state = ffjord_state(theirs, prefix)
    load_weights_(ours, state)
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values()))
    short = {key: tensor for key, tensor in state.items() if "layers.0._layer.bias" not in key}
    with pytest.raises(ValueError, match="5 tensors missing"):
        load_weights_(ours, short)
    with pytest.raises(ValueError, match="neither FFJORD's nor torchprune's: other.weight"):
        load_weights_(ours, {**state, "other.weight": T(0.0)})
    key = next(key for key in state if "module.layers.0._layer.weight" in key)
    with pytest.raises(ValueError, match="are the same tensor of the flow"):
        load_weights_(ours, {**state, key: state[key] + 1})
    with pytest.raises(ValueError, match="another (flow|shape)"):
        load_weights_(tabular_flow("gas", **settings), state)


def test_ffjords_hypernetwork_is_the_hyper_layer():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3 * 2 + 3))
    flow = ContinuousFlow(mlp_field(2, (3,), "hyper"))
    state, prefix = {}, "chain.0.odefunc.diffeq.module.layers."
    second = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3 * 2 + 2))
    for number, part in enumerate((net, second)):
        state |= {f"{prefix}{number}._hypernet.{name}": tensor for name, tensor in part.state_dict().items()}
    load_weights_(flow, state)
    t, x = T(0.7), torch.randn(4, 2)
    params = net(t.view(1, 1)).view(-1)
    expected = torch.nn.functional.linear(x, params[3:].view(3, 2), params[:3])
    assert torch.allclose(flow.vector_fields[0].layers[0](t, x), expected, atol=1e-6)


def test_weights_of_torchprunes_toys_are_taken_over():
    net = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    state = {f"f_forward.{name}": tensor for name, tensor in net.state_dict().items()}
    state |= {f"model.vf.vf.{name}": tensor for name, tensor in net.state_dict().items()}
    state["model.s_span"] = T([0.0, 1.0])
    node = load_weights_(NeuralClassifier(toy_field("l2_h5", "tanh")), state)
    x = torch.randn(3, 2)
    assert torch.allclose(node.vector_fields[0](T(0.0), x), net(x), atol=1e-6)


def test_presets_are_ffjords():
    toy = ffjord_flow("toy")
    widths = [(2, 64), (64, 64), (64, 64), (64, 2)]
    assert size(toy) == sum(a * b + 4 * b for a, b in widths) + 1
    assert toy.t1 == 0.5 and toy.divergence == "exact" and float(toy.sqrt_end_time[0]) == pytest.approx(math.sqrt(0.5))
    counts = {"power": 43_325, "gas": 278_565, "hepmass": 546_850, "miniboone": 820_613, "bsds300": 6_698_666}
    assert {name: sum(p.numel() for p in ffjord_flow(name).parameters()) for name in counts} == counts
    with pytest.raises(ValueError, match="toy, power"):
        ffjord_flow("svhn")


# ------------------------------------------------------------------------------------------- initial log-densities


def pushed_by_hand(flow, x, logp, reverse=False):
    """FFJORD's: torchdiffeq's solve of (x, l), l from the given log-density on, with the trace by autograd."""

    def func(t, state):
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            dx = flow.vector_fields[0](t, x)
            trace = sum(torch.autograd.grad(dx[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1]))
        return dx.detach(), -trace

    times = torch.tensor([1.0, 0.0] if reverse else [0.0, 1.0], dtype=x.dtype)
    found = torchdiffeq.odeint(func, (x, logp), times, rtol=flow.rtol, atol=flow.atol, method="dopri5")
    return tuple(part[-1] for part in found)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_log_density_is_pushed_through_as_ffjord_does(reverse):
    torch.manual_seed(0)
    flow = ContinuousFlow(toy_field("l2_h8", "tanh"), rtol=1e-9, atol=1e-9).double()
    fast, x = flow.compile("cpu"), torch.randn(5, 2).double()
    logp = (-x.square().sum(1) - 3.0).requires_grad_()
    y, found = fast.push(x, logp, reverse)
    assert [stats.engine for stats in fast.stats.solves] == ["cpu"]
    expected, density = pushed_by_hand(flow, x, logp.detach(), reverse)
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found, density, rtol=1e-7, atol=1e-7)
    column = fast.push(x, logp[:, None].detach(), reverse)[1]
    assert torch.equal(column, found[:, None])
    found.sum().backward()
    assert torch.equal(logp.grad, torch.ones(5).double()) and any(bool((p.grad != 0).any()) for p in fast.parameters())


def test_flows_are_chained_and_samples_come_with_their_densities():
    torch.manual_seed(0)
    fields = [toy_field("l2_h8", "tanh") for _ in range(2)]
    both = ContinuousFlow(fields, rtol=1e-9, atol=1e-9, batch_norm=0.0, train_end_time=True).double().eval()
    with torch.no_grad():
        for number, norm in enumerate(both.norms):
            norm.weight += 0.3 - 0.2 * number
            norm.running_var += 0.5
    x, normal = torch.randn(5, 2).double(), torch.distributions.Normal(0.0, 1.0)
    z, delta = both.push(x, torch.zeros(5).double())
    torch.testing.assert_close(normal.log_prob(z).sum(1) - delta, both.log_prob(x))
    back, logp = both.push(z, normal.log_prob(z).sum(1), reverse=True)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logp, both.log_prob(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both.push(x), z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both.push(z, reverse=True), both.inverse(z))
    first, second = (ContinuousFlow(field, rtol=1e-9, atol=1e-9).double() for field in fields)
    chained = ContinuousFlow(fields, rtol=1e-9, atol=1e-9).double()
    start = torch.randn(5, dtype=torch.float64)
    for one, other in zip(second.push(*first.push(x, start)), chained.push(x, start)):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
    assert [part.shape for part in chained.push(x[:0], start[:0])] == [(0, 2), (0,)]
    for wrong in (start[:3], 0.0, start.view(1, 5)):
        with pytest.raises(ValueError, match=r"logp must be a tensor \[n\] or \[n, 1\]"):
            chained.push(x, wrong)
