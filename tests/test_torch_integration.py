"""What torch users put round a module: GradScaler, autocast, hooks, vmap and batched gradients, FSDP."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import sparseflow_kernels as sfk
import torch
import torch.distributed as dist
import torchdiffeq
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.nn.modules import module as nn_module

from sparseflow_kernels.flows import mlp_field
from sparseflow_kernels.solution import GradientError

F64 = torch.float64
T = torch.tensor([0.0, 0.4, 1.0])
ENGINES = pytest.mark.parametrize("engine", ["auto", "reference"])
GRADIENTS = pytest.mark.parametrize("gradient", ["discrete", "adjoint"])


def module_of(dtype=torch.float32, dim=3):
    module = mlp_field(dim, (8, 7)).to(dtype)
    sfk.prune_weights_(module, keep=0.7)
    return module


@pytest.fixture(autouse=True)
def mode_as_it_was():
    yield
    sfk.set_nonfinite_gradients("auto")


# --------------------------------------------------------------------------------------------------------- GradScaler


def trained_with_scaler(parameters, loss, steps=8):
    """The scale that is left, and whether any step was taken."""
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer, scaler = torch.optim.SGD(parameters, lr=1e-3), torch.amp.GradScaler("cpu", 2.0**127, backoff_factor=2.0**-16)
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale(loss()).backward()
        scaler.step(optimizer)
        scaler.update()
    moved = any(not torch.equal(old, new) for old, new in zip(before, parameters))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in parameters)
    return scaler.get_scale(), moved


@GRADIENTS
@ENGINES
@pytest.mark.parametrize("head", [False, True], ids=["alone", "head"])
def test_a_scaler_backs_off_after_an_overflow(engine, gradient, head):
    """With a layer behind the solve what arrives is NaN, where infinities of both signs meet."""
    module, y = module_of(), 3.0 * torch.randn(6, 3)
    field = sfk.compile(module, engine)
    last = nn.Linear(3, 4) if head else nn.Identity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale, moved = trained_with_scaler(
            [*field.parameters(), *last.parameters()],
            lambda: last(sfk.odeint_adjoint(field, y, T, rtol=1e-3, atol=1e-3, gradient=gradient)[-1]).pow(2).sum(),
        )
    assert moved and 1.0 < scale < 2.0**127
    own = copy.deepcopy(last)
    theirs = trained_with_scaler(
        [*module.parameters(), *own.parameters()],
        lambda: own(torchdiffeq.odeint(module, y, T, rtol=1e-3, atol=1e-3)[-1]).pow(2).sum(),
    )
    assert theirs[1] and 1.0 < theirs[0] < 2.0**127  # how far depends on what overflows on the way


@GRADIENTS
@ENGINES
def test_nonfinite_gradients_pass_where_asked(engine, gradient):
    field, y = sfk.compile(module_of(), engine), torch.randn(4, 3, requires_grad=True)

    def backward(weight):
        field.zero_grad()
        y.grad = None
        (sfk.odeint_adjoint(field, y, T, rtol=1e-3, atol=1e-3, gradient=gradient)[-1] * weight).sum().backward()

    weight = torch.ones(4, 3)
    weight[2, 1] = math.nan
    with pytest.raises(GradientError, match=r"output for t = 1 is not finite, 1 row\(s\) of the batch: 2"):
        backward(weight)
    sfk.set_nonfinite_gradients("pass")
    assert sfk.get_nonfinite_gradients() == "pass"
    for bad in (weight, torch.full((4, 3), 3e38)):  # the latter overflows on the way
        backward(bad)
        assert not all(bool(torch.isfinite(p.grad).all()) for p in field.parameters() if p.grad is not None)
    sfk.set_nonfinite_gradients("raise")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(GradientError):
        backward(weight)
    sfk.set_nonfinite_gradients("auto")
    backward(weight)
    for _ in range(20):  # NaN whatever the scale
        scaler._scale.fill_(0.5)
    with pytest.warns(UserWarning, match="is not finite.* not the GradScaler's doing, whose scale is 0.5"):
        backward(weight)
    with pytest.raises(ValueError, match="'auto', 'raise', 'pass'"):
        sfk.set_nonfinite_gradients("warn")


def test_evaluations_and_sparse_layers_hand_on_what_comes():
    field, layer = sfk.compile(module_of()), sfk.SparseLinear.from_linear(nn.Linear(3, 3))
    y = torch.randn(4, 3)
    for run in (lambda: field(0.3, y), lambda: layer(y)):
        (run().sum() * math.inf).backward()
    assert not torch.isfinite(field.layers[0].values.grad).all() and not torch.isfinite(layer.values.grad).all()


# ----------------------------------------------------------------------------------------------------------- autocast


@ENGINES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64])
def test_states_made_by_autocast_are_converted(engine, dtype):
    field = sfk.compile(module_of(), engine)
    aug, flow = sfk.with_divergence(field), sfk.ContinuousFlow(field, 3)
    y = torch.randn(4, 3).to(torch.bfloat16).to(dtype)
    l = torch.zeros(4, dtype=dtype)  # noqa: E741
    calls = {
        "evaluation": lambda y, l: field(0.3, y),  # noqa: E741
        "divergence": lambda y, l: aug(0.3, (y, l))[1],  # noqa: E741
        "odeint": lambda y, l: sfk.odeint(field, y, T),  # noqa: E741
        "solve": lambda y, l: sfk.solve(aug, (y, l), T).ys[1],  # noqa: E741
        "adjoint": lambda y, l: sfk.odeint_adjoint(field, y, T, gradient="adjoint"),  # noqa: E741
        "handed over": lambda y, l: sfk.odeint(field, y, T, options={"norm": lambda y: y.abs().max()}),  # noqa: E741
        "flow": lambda y, l: flow.log_prob(y),  # noqa: E741
        "samples": lambda y, l: flow.inverse(y),  # noqa: E741
    }
    for name, call in calls.items():
        given = y.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = call(given, l)
        assert found.dtype == torch.float32, name
        torch.testing.assert_close(found, call(y.float(), l.float()), rtol=1e-6, atol=1e-6)
        found.sum().backward()
        assert given.grad.dtype == dtype and bool(given.grad.any()), name
    with pytest.raises(TypeError, match="convert one of them"):
        field(0.3, y)


# -------------------------------------------------------------------------------------------------------------- hooks


def counted(register, run):
    calls = []
    handle = register(lambda *arguments: calls.append(1))
    try:
        result = run()
    finally:
        handle.remove()
    return len(calls), result


@pytest.mark.parametrize("kind", [
    "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook",
])  # fmt: skip
def test_hooks_fire_as_on_a_plain_module(kind):
    module = module_of(F64)
    field, y = sfk.compile(module), torch.randn(4, 3, dtype=F64)

    def run(func, call):
        state = y.clone().requires_grad_()
        ys = call(func, state, T.double(), rtol=1e-6, atol=1e-6)
        ys[-1].sum().backward()
        return ys.detach(), state.grad

    expected, (ys, grad) = counted(getattr(module, f"register_{kind}"), lambda: run(module, torchdiffeq.odeint))
    places = {
        "the field": getattr(field, f"register_{kind}"),
        "a layer": getattr(field.layers[1], f"register_{kind}"),
        "all modules": getattr(nn_module, f"register_module_{kind}"),
    }
    for name, register in places.items():
        found, (ours, ours_grad) = counted(register, lambda: run(field, sfk.odeint))
        assert found >= expected > 10 if name == "all modules" else found == expected or name == "a layer", name
        assert found >= 0.5 * expected, name  # the last stages' layers may have no gradient
        torch.testing.assert_close(ours, ys, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ours_grad, grad, rtol=1e-6, atol=1e-6)
        assert counted(register, lambda: field(0.3, y.clone().requires_grad_()).sum().backward())[0] >= 1
    aug, state = sfk.with_divergence(field), (y, y.new_zeros(4))
    for register in places.values():
        found, _ = counted(register, lambda: sum(part[-1].sum() for part in sfk.odeint(aug, state, T.double())).backward())
        assert found > 10
    assert sfk.solve(aug, state, T.double()).stats.engine == sfk.solve(field, y, T.double()).stats.engine == "cpu"


def test_a_hook_may_change_what_comes_out():
    field, y = sfk.compile(module_of()), torch.randn(4, 3)
    handle = field.layers[-1].register_forward_hook(lambda module, inputs, output: 0 * output)
    torch.testing.assert_close(sfk.odeint(field, y, T)[-1], y)
    assert not field(0.3, y).any()
    assert not copy.deepcopy(field)(0.3, y).any()
    handle.remove()
    assert field(0.3, y).any()


# ------------------------------------------------------------------------------------- many cotangents, torch.func


@pytest.fixture(scope="module")
def smooth():
    torch.manual_seed(0)
    return sfk.compile(module_of(F64))


def calls_of(field):
    aug, times = sfk.with_divergence(field), T.double()
    close = {"rtol": 1e-9, "atol": 1e-9}
    return {
        "evaluation": lambda v: field(0.3, v),
        "odeint": lambda v: sfk.odeint(field, v, times, **close)[-1],
        "adjoint's discrete": lambda v: sfk.odeint_adjoint(field, v, times, **close)[-1],
        "fixed": lambda v: sfk.odeint(field, v, times, method="rk4", options={"step_size": 0.1})[-1],
        "dopri8": lambda v: sfk.solve(field, v, times, method="dopri8", **close).ys[-1],
        "density": lambda v: torch.cat([p[-1].reshape(-1) for p in sfk.odeint(aug, (v, v.new_zeros(())), times, **close)]),
    }


NAMES = pytest.mark.parametrize("name", ["evaluation", "odeint", "adjoint's discrete", "fixed", "dopri8", "density"])


@NAMES
def test_gradients_of_many_cotangents(smooth, name):
    call, y = calls_of(smooth)[name], torch.randn(3, dtype=F64)
    expected = torch.autograd.functional.jacobian(call, y)
    given = y.clone().requires_grad_()
    out = call(given)
    units = torch.eye(len(out), dtype=F64)
    (found,) = torch.autograd.grad(out, given, units, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    (found,) = torch.autograd.grad(out, given, units, is_grads_batched=True, create_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    product = torch.func.vmap(lambda unit: torch.autograd.grad(out, given, unit, retain_graph=True)[0])
    torch.testing.assert_close(product(units), expected, rtol=1e-9, atol=1e-9)
    weights = smooth.layers[1].values
    batched = torch.autograd.grad(out, weights, units, is_grads_batched=True, retain_graph=True)[0]
    single = torch.stack([torch.autograd.grad(out, weights, unit, retain_graph=True)[0] for unit in units])
    torch.testing.assert_close(batched, single, rtol=1e-9, atol=1e-9)


@NAMES
def test_torch_func_over_a_batch(smooth, name):
    call, y = calls_of(smooth)[name], torch.randn(4, 3, dtype=F64)
    each = [torch.autograd.functional.jacobian(call, row) for row in y]
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(torch.func.vmap(jacobian(call))(y), torch.stack(each), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.func.vmap(call)(y), torch.stack([call(row) for row in y]), rtol=1e-6, atol=1e-6)
    scalar = lambda v: call(v).pow(2).sum()  # noqa: E731
    hessian = torch.autograd.functional.hessian(scalar, y[0])
    torch.testing.assert_close(torch.func.hessian(scalar)(y[0]), hessian, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.func.vmap(torch.func.hessian(scalar))(y)[0], hessian, rtol=1e-5, atol=1e-5)
    for options in ({"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        torch.testing.assert_close(
            torch.autograd.functional.jacobian(call, y[0], **options), each[0], rtol=1e-6, atol=1e-6
        )


def test_ensembles_and_scores(smooth):
    y = torch.randn(4, 3, dtype=F64)

    class Solved(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = smooth

        def forward(self, y):
            return sfk.odeint(self.field, y, T.double(), rtol=1e-9, atol=1e-9)[-1]

    model = Solved()
    members = {name: torch.stack([p, 1.1 * p]).detach() for name, p in model.named_parameters()}
    call = lambda parameters: torch.func.functional_call(model, parameters, (y,))  # noqa: E731
    expected = torch.stack([call({name: p[i] for name, p in members.items()}) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(call)(members), expected, rtol=1e-6, atol=1e-6)
    flow = sfk.ContinuousFlow(smooth, 3, rtol=1e-9, atol=1e-9)
    score = torch.func.vmap(torch.func.grad(lambda v: flow.log_prob(v[None])[0]))(y)
    given = y.clone().requires_grad_()
    torch.testing.assert_close(
        score, torch.autograd.grad(flow.log_prob(given).sum(), given)[0], rtol=1e-6, atol=1e-6
    )


def test_what_cannot_be_transformed_says_so(smooth):
    y, times = torch.randn(4, 3, dtype=F64), T.double()
    with pytest.raises(ValueError, match="t cannot be vmapped"):
        torch.func.vmap(lambda t: sfk.odeint(smooth, y, t))(torch.stack((times, 2 * times)))
    with pytest.raises(sfk.SolverError, match="underflow"):
        torch.func.vmap(lambda v: sfk.odeint(smooth, v, times))(y * math.nan)
    with pytest.raises(RuntimeError, match="gradient='discrete'"):
        torch.func.jacrev(lambda v: sfk.odeint_adjoint(smooth, v, times, gradient="adjoint"))(y)
    given = y.clone().requires_grad_()
    out = sfk.odeint_adjoint(smooth, given, times, gradient="adjoint")[-1, 0]
    with pytest.raises(RuntimeError, match="gradient='discrete'"):
        torch.autograd.grad(out, given, torch.eye(3, dtype=F64), is_grads_batched=True)


# --------------------------------------------------------------------------------------------------------------- FSDP


class Model(nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field, self.head = field, nn.Linear(3, 1)

    def forward(self, y):
        return self.head(sfk.odeint(self.field, y, T, rtol=1e-4, atol=1e-4)[-1])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fully_sharded_training_is_training(tmp_path):
    """FSDP gives the memory of parameters back between uses."""
    from torch.distributed.fsdp import fully_shard

    field, y = sfk.compile(module_of()), torch.randn(8, 3)
    models = [Model(copy.deepcopy(field)) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())

    def losses(model):
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(4):
            loss = model(y).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(models[1], mesh=mesh)
        fully_shard(models[2].field, mesh=mesh)
        fully_shard(models[2], mesh=mesh)
        expected = losses(models[0])
        assert losses(models[1]) == pytest.approx(expected, rel=1e-6)
        assert losses(models[2]) == pytest.approx(expected, rel=1e-4)
    finally:
        dist.destroy_process_group()
    assert expected[-1] < 0.9 * expected[0]


def test_packing_leaves_the_size_of_parameters_to_their_owner():
    field = sfk.compile(module_of(), "cpu")
    for kind in (None, "exact", "hutchinson"):
        field.packed(kind)
    y = torch.randn(4, 3, requires_grad=True)
    sfk.odeint(field, y, T).sum().backward()
    assert all(parameter.untyped_storage().resizable() for parameter in field.parameters())


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.gate = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), nn.Linear(3, 3)

    def forward(self, t, x):
        features = torch.stack([t.sin(), t.cos()]).expand(len(x), 2)
        return torch.sigmoid(self.gate(x)) * self.net(torch.cat([x, features], 1))


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("graph", [False, True])
def test_what_an_inference_mode_met_first_is_trained_after_it(graph, live, kind):
    """A validation before the training, as Lightning makes one."""
    make = Gated if graph else lambda: Chain()
    x, l, times = torch.randn(4, 3), torch.zeros(4), torch.tensor([0.0, 1.0])
    module = make()
    with torch.inference_mode():
        sfk.prune_weights_(module, keep=0.5)
        field = sfk.compile(module, like=x.clone(), live=live)
        func = field if kind is None else sfk.with_divergence(field, kind)
        start = (lambda: x.clone().requires_grad_()) if kind is None else lambda: (x.clone().requires_grad_(), l)
        sfk.odeint(func, x if kind is None else (x, l), times)
        field(torch.rand(4), x)
    outs = sfk.odeint(func, start(), times), field(0.1, x), field(torch.rand(4), x)
    sum(part.sum() for out in outs for part in (out if isinstance(out, tuple) else (out,))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in field.parameters())
    assert "engine: cpu" in field.report()


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t, x):
        return self.net(x)


def test_what_torch_func_met_first_is_accelerated_after_it():
    module, x, times = Chain(), torch.randn(4, 3), torch.tensor([0.0, 1.0])
    with sfk.accelerate() as context:
        torch.func.jacrev(lambda z: torchdiffeq.odeint(module, z, times, method="rk4")[-1])(x)
        torchdiffeq.odeint(module, x, times)
    assert context.report() == "Chain: cpu engine, 1 solves"


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("live", [False, True])
def test_a_checkpoint_counts_the_same_the_first_time_and_again(graph, live, kind):
    module, x, l, times = Gated() if graph else Chain(), torch.randn(4, 3), torch.zeros(4), torch.tensor([0.0, 1.0])
    sfk.prune_weights_(module, keep=0.5)
    own, start = torch.rand(4), x.clone().requires_grad_()
    field = sfk.compile(module, dim=3, live=live)
    func = field if kind is None else sfk.with_divergence(field, kind, torch.ones(4, 3) if kind == "hutchinson" else None)

    def solve(x):
        return sfk.odeint(func, x if kind is None else (x, l), times)

    def total(run):
        out = run()
        return sum(part.sum() for part in (out if isinstance(out, tuple) else (out,)))

    for run in (solve, lambda x: field(0.1, x), lambda x: field(own, x)):
        (found,) = torch.autograd.grad(total(lambda: checkpoint(run, start, use_reentrant=False)), start)
        (wanted,) = torch.autograd.grad(total(lambda: run(start)), start)
        torch.testing.assert_close(found, wanted)
    with sfk.accelerate():
        out = checkpoint(lambda x: torchdiffeq.odeint(module, x, times), start, use_reentrant=False)
        out.sum().backward()
