"""Everything but the native engines' own work, with tensors on a GPU: a real one, or the pretended (pretend_gpu.py).

Run by test_gpu_tensors.py. Every case fails where an operation of ours mixes devices; those that count, where the host
waits for the device more often than they say.
"""

from __future__ import annotations

import copy
import math

import pretend_gpu
import pytest
import torch
from torch import Tensor, nn

import sparseflow_kernels as sfk
from sparseflow_kernels import activations, divergence
from sparseflow_kernels.analysis.hessian import LossHessian, curvature, exact_curvature
from sparseflow_kernels.analysis.modes import Modes, mode_coverage
from sparseflow_kernels.data.dataset import Dataset
from sparseflow_kernels.field import Layer, Pattern, VectorField
from sparseflow_kernels.flows import ContinuousFlow, mlp_field
from sparseflow_kernels.pruning import prune_with_propagation_, remove_masks_, sparsity_report
from sparseflow_kernels.sparse_linear import SparseLinear
from sparseflow_kernels.training import evaluate, load_checkpoint, save_checkpoint, sparse_flow, train

T = torch.tensor([0.0, 0.5, 1.0])
LOOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture
def gpu():
    if torch.cuda.is_available():
        yield torch.device("cuda", 0)
    else:
        with pretend_gpu.PretendGpu() as pretended:
            yield pretended.device


@pytest.fixture
def waits(gpu) -> pretend_gpu.PretendGpu:
    if pretend_gpu.PretendGpu.active is None:
        pytest.skip("waits are counted on the pretended GPU only")
    return pretend_gpu.PretendGpu.active


def module(layer: str = "concatsquash", hidden=(8, 8)) -> nn.Module:
    torch.manual_seed(0)
    return mlp_field(2, hidden, layer)


def field(gpu, **options) -> sfk.CompiledField:
    return sfk.compile(module(**options), "reference").to(gpu)


def rows(gpu, n: int = 6) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1)).to(gpu)


def flow(**options) -> ContinuousFlow:
    return ContinuousFlow(module(), 2, **LOOSE, **options)


def data() -> Dataset:
    return Dataset("rows", *torch.randn(112, 2, generator=torch.Generator().manual_seed(2)).split([64, 32, 16]))


def states(gpu, func):
    x = rows(gpu)
    return x if isinstance(func, sfk.CompiledField) else (x, torch.zeros(len(x), device=gpu))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize("layer", ["concat", "concatsquash"])
def test_a_module_is_compiled_and_written_back_where_it_is(gpu, layer):
    own = module(layer)
    sfk.prune_weights_(own, 0.5)
    expected = sfk.compile(own, "reference")(0.3, rows("cpu"))
    own.to(gpu)
    compiled = sfk.compile(own, "reference")
    assert compiled.device == gpu
    moved = sfk.compile(module(layer), "reference").to(gpu)
    moved.load_state_dict(sfk.compile(module(layer).to(gpu), "reference").state_dict())
    assert moved.device == gpu and "engine: reference" in moved.report()
    for one in (compiled, copy.deepcopy(compiled), sfk.compile(compiled, "reference")):
        close(one(0.3, rows(gpu)), expected)
    with torch.no_grad():
        compiled.layers[0].values.mul_(2)
    compiled.copy_to(own)
    close(own(torch.tensor(0.3, device=gpu), rows(gpu)), compiled(0.3, rows(gpu)))


class AnyTime(nn.Module):
    """The first layer's shift is a function of t of no known form, and some of its neurons have no inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(2, 8), nn.Linear(8, 2)
        self.time = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 8))
        nn.utils.prune.custom_from_mask(self.into, "weight", torch.arange(8)[:, None].expand(8, 2) > 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.tanh(self.into(y) + self.time(t.view(1, 1))))


@pytest.mark.parametrize("compiled_on_cpu", [False, True])
def test_functions_of_time_follow_the_field(gpu, compiled_on_cpu):
    own = AnyTime()
    compiled = sfk.compile(own if compiled_on_cpu else own.to(gpu), "reference").to(gpu)
    close(compiled(0.3, rows(gpu)), own.to(gpu)(torch.tensor(0.3, device=gpu), rows(gpu)))
    if pretend_gpu.PretendGpu.active is not None:
        with torch.no_grad():
            compiled(0.4, rows(gpu))
            t, y = torch.tensor(0.5, device=gpu), rows(gpu)
            pretend_gpu.PretendGpu.active.reset()
            compiled(t, y)
        # the values are compared with those that were packed, and nothing else makes the host wait
        assert pretend_gpu.PretendGpu.active.by_file() == {("equal", "packing.py"): 1}


@pytest.mark.parametrize("hidden", [(), (6,), (6, 6), (6, 6, 6), (6, 6, 6, 6)])
def test_every_form_of_the_divergence(gpu, hidden):
    compiled = field(gpu, hidden=hidden)
    program, engine, t, x = compiled.vector_field, compiled.reference("exact"), torch.tensor(0.3, device=gpu), rows(gpu)
    _, trail = engine._forward(engine._weights(), t, x)
    slopes = [
        scale * activations.derivative(layer.activation, z) for layer, (scale, z) in zip(program.layers[:-1], trail)
    ]
    found = divergence.evaluate(compiled.divergence_plan("exact"), program, t, slopes)
    close(found.expand(len(x)), engine.evaluate_with_divergence(t, x)[1])


# -------------------------------------------------------------------------------------------------------------- solves


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
@pytest.mark.parametrize("times, method, options", [
    ("cpu", "dopri5", None), ("gpu", "dopri5", None), ("gpu", "tsit5", None), ("cpu", "rk4", {"step_size": 0.3}),
    ("gpu", "rk4", {"step_size": 0.3}),
])  # fmt: skip
def test_solves_and_their_gradients(gpu, kind, times, method, options):
    noise = None if kind != "hutchinson" else rows("cpu").sign()

    def solved(device) -> tuple[Tensor, ...]:
        own = sfk.compile(module(), "reference").to(device)
        func = own if kind is None else sfk.with_divergence(own, kind, noise)
        x, t = rows(device).requires_grad_(), T.clone().to(device if times == "gpu" else "cpu").requires_grad_()
        y0 = x if kind is None else (x, torch.zeros(len(x), device=device))
        solution = sfk.solve(func, y0, t, method=method, options=options, **LOOSE)
        assert solution.stats.steps.device.type == "cpu"
        ys = solution.ys if kind is None else torch.cat((solution.ys[0], solution.ys[1][..., None]), -1)
        ys.square().sum().backward()
        assert t.grad.device == t.device
        return ys, x.grad, t.grad, own.layers[0].values.grad

    for found, expected in zip(solved(gpu), solved("cpu")):
        close(found, expected)


def test_options_in_tensors_and_backward_time(gpu):
    options = {"jump_t": torch.tensor([0.3], device=gpu), "step_t": [0.2], "first_step": torch.tensor(0.1, device=gpu)}
    sfk.odeint(field(gpu), rows(gpu), T.flip(0), rtol=torch.tensor(1e-3, device=gpu), atol=1e-3, options=options)


def test_what_torchdiffeq_and_the_torch_solver_run(gpu):
    own, x = field(gpu), rows(gpu)
    solution = sfk.solve(own, x, T.to(gpu), options={"norm": lambda y: y.abs().max()}, **LOOSE)
    assert solution.stats.engine == "torchdiffeq" and len(solution.stats.steps) == solution.stats.accepted
    assert sfk.solve(module().to(gpu), x, T.to(gpu), method="tsit5", **LOOSE).stats.engine == "numerics"
    both = lambda t, y: (own(t, y[0]), own(t, y[1]))
    sfk.solve(both, (x, x), T, method="tsit5", rtol=(1e-3, 1e-4), atol=torch.tensor(1e-3))
    event_t, _ = sfk.odeint_event(own, x, torch.tensor(0.0, device=gpu), event_fn=lambda t, y: t - 0.5, **LOOSE)
    assert event_t.device == gpu
    with pytest.warns(UserWarning, match="t is not on the same device as y0"):  # torchdiffeq's t is on the CPU
        dense = sfk.odeint_dense(own, x, torch.tensor(0.0), torch.tensor(1.0), **LOOSE)
    close(dense(torch.tensor(0.5, device=gpu)), sfk.odeint(own, x, T, **LOOSE)[1])


@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
def test_the_continuous_adjoint(gpu, kind):
    own = field(gpu)
    func = own if kind is None else sfk.with_divergence(own, kind)
    ys = sfk.odeint_adjoint(func, states(gpu, func), T.to(gpu), gradient="adjoint", **LOOSE)
    (ys if kind is None else ys[1]).sum().backward()
    assert own.layers[0].values.grad.device == gpu


def test_errors_name_rows(gpu):
    own, x = field(gpu), rows(gpu)
    x[3] = math.nan
    with pytest.raises(sfk.SolverError) as failed:
        sfk.solve(own, x, T)
    assert failed.value.rows == (3,)
    y0 = rows(gpu).requires_grad_()
    weight = torch.ones(3, 6, 2)
    weight[1, 2] = math.nan
    with pytest.raises(sfk.GradientError) as failed:
        (sfk.odeint(own, y0, T, **LOOSE) * weight.to(gpu)).sum().backward()
    assert failed.value.rows == (2,)
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 1.0]], device=gpu).requires_grad_()
    ys = sfk.odeint(growing(5.0, gpu), x, T[[0, 2]], method="rk4", options={"step_size": 0.125})
    weight = torch.ones(3, 2)
    weight[1, 1] = 3e37
    with pytest.raises(sfk.GradientError, match="is not finite, in step") as failed:
        (ys[-1] * weight.to(gpu)).sum().backward()
    assert failed.value.rows == (1,)
    x = torch.tensor([[1e34, 0.0], [1.0, 1.0]], device=gpu).requires_grad_()
    ys = sfk.odeint(growing(200.0, gpu), x, T[[0, 2]], method="euler", options={"step_size": 0.25})
    with pytest.raises(sfk.GradientError, match="the state that the solve had come to is not finite"):
        ys[-1].sum().backward()


def growing(rate: float, gpu) -> sfk.CompiledField:
    """y' = rate * y in two components."""
    pattern = Pattern.from_mask(torch.eye(2).bool())
    layer = Layer(pattern, torch.full((2,), rate, device=gpu), torch.zeros(2, device=gpu))
    return sfk.compile(VectorField([layer]), "reference")


def test_mixed_devices_are_named(gpu):
    own, x = field(gpu), rows("cpu")
    with pytest.raises(ValueError, match=r"y: is on cpu, the field on .*:0; move one"):
        sfk.odeint(own, x, T)
    with pytest.raises(ValueError, match="x is on .*:0 and l on cpu"):
        sfk.odeint(sfk.with_divergence(own), (rows(gpu), torch.zeros(6)), T)
    with pytest.raises(TypeError, match=r"x\.to\('.*:0'\) or flow\.to\('cpu'\)"):
        flow().to(gpu).log_prob(x)
    base = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="base: its tensors are on cpu, the flow on"):
        flow(base=base).to(gpu).log_prob(rows(gpu))
    with pytest.raises(sfk.UnsupportedFieldError, match="needs it on the CPU"):
        sfk.compile(module().to(gpu), "cpu")


# ------------------------------------------------------------------------------------------ flows, pruning and training


def test_flows(gpu):
    own, x = flow().to(gpu), rows(gpu)
    compiled = own.compile("reference")
    close(compiled.log_prob(x), own.log_prob(x))
    close(compiled.inverse(x), own.inverse(x))
    assert compiled.sample(3).device == gpu
    compiled.copy_to(own)
    assert math.isfinite(evaluate(compiled, rows("cpu")).nll)
    for other in (flow(train_end_time=True, divergence="hutchinson"), flow(gradient="adjoint")):
        other.to(gpu).compile("reference").log_prob(x).sum().backward()


@pytest.mark.parametrize("layer", ["concat", "concatsquash"])
def test_pruning(gpu, layer):
    for options in ({"min_neurons": 2}, {"of": "weights"}, {"remove_dead": False}):
        here, there = sfk.prune_weights_(module(layer), 0.6, **options), module(layer).to(gpu)
        sfk.prune_weights_(there, 0.6, **options)
        assert str(sparsity_report(there)) == str(sparsity_report(here))
    for fold in ("auto", "none", "drop"):
        sfk.prune_neurons_(module(layer).to(gpu), 0.6, fold=fold)
    remove_masks_(there)


@pytest.mark.parametrize("engine", [None, "reference"])
def test_training(gpu, engine):
    own = flow().to(gpu)
    sfk.prune_weights_(own, 0.5)
    train(own, data(), engine=engine, steps=2, batch=32, clip=1.0)
    train(own, data().train.to(gpu), engine=engine, steps=1, batch=32)


def test_cycles_and_checkpoints(gpu, tmp_path):
    for again in (False, True):
        cycles = sparse_flow(
            flow().to(gpu), data(), (0.5,), engine="reference", steps=1, batch=32, folder=tmp_path, select="best"
        )  # fmt: skip
        for cycle in cycles:
            assert next(cycle.flow.parameters()).device == gpu and cycle.resumed == again
    save_checkpoint(tmp_path / "last", cycle.flow)
    for place in (gpu, "cpu"):
        load_checkpoint(tmp_path / "last", flow().to(place))


def test_dead_parameters_found_by_their_gradient(gpu):
    fixed = ContinuousFlow(module("ignore"), 2, method="euler", options={"step_size": 1.0}).to(gpu)
    prune_with_propagation_(fixed, 0.5, rows("cpu"))


def test_sparse_linear(gpu):
    own = nn.Linear(6, 5).to(gpu)
    nn.utils.prune.l1_unstructured(own, "weight", 0.5)
    layer, x = SparseLinear.from_linear(own, "torch"), torch.ones(3, 6, device=gpu)
    close(layer(x), own(x))
    close(layer.to_linear()(x), own(x))
    SparseLinear(layer.pattern, device=gpu).load_state_dict(layer.state_dict())


def test_analysis(gpu):
    small = ContinuousFlow(module("ignore", (3,)), 2, method="rk4", options={"step_size": 1.0}).to(gpu)
    hessian = LossHessian(small, rows("cpu"))
    exact, found = exact_curvature(hessian.dense()), curvature(hessian, steps=hessian.size, probes=1)
    assert found.largest == pytest.approx(exact.largest, rel=1e-3)
    labels = torch.arange(64) % 3
    for train_rows, numbers in ((data().train, labels), (data().train.to(gpu), labels.to(gpu))):
        mode_coverage(flow().to(gpu).sample, Modes.of(train_rows, numbers), samples=20, repeats=2)


# --------------------------------------------------------------------------------------------------------------- waits


def test_waits_of_a_solve(waits, gpu):
    """A step is read once, the first step's size takes two more, the initial state's check one, the gradient's check
    one, and so does the comparison of the values with those that were packed; dense weights are laid out once a solve, at places
    that the device knows from the first one."""
    func = sfk.with_divergence(field(gpu), "exact")
    y0 = states(gpu, func)
    for _ in range(2):
        waits.reset()
        solution = sfk.solve(func, y0, T, **LOOSE)
        solution.ys[0].sum().backward()
    steps = solution.stats.accepted + solution.stats.rejected
    expected = {"copy to the host": steps + 2, "item": 2, "equal": 1}
    assert waits.waits == expected, waits.places


def test_waits_of_a_training_step(waits, gpu):
    """Beside the solve's: the check of the rows, the loss, the gradient's own check and its norm, the comparison of the
    values with those that were packed. The order of the rows goes over once an epoch."""
    own = flow().to(gpu).compile("reference")
    found = []
    for steps in (2, 2, 4):  # the first packs
        waits.reset()
        (entry,) = train(own, data().train, steps=steps, batch=16, clip=1.0)
        assert entry["skipped"] == 0
        found.append(waits.by_file())
    a_step = {key: count / 2 for key, count in (found[2] - found[1]).items() if key[1].split("/")[0] != "numerics"}
    assert a_step == {
        ("item", "finite.py"): 1, ("item", "gradients.py"): 1, ("item", "training/loop.py"): 2,
        ("equal", "packing.py"): 1,
    }, waits.places  # fmt: skip


def test_a_default_device_of_the_callers_changes_nothing(gpu):
    """torch.set_default_device, or a block with torch.device, puts the caller's tensors there, and not our own."""
    with torch.device(gpu):
        odefunc = mlp_field(2, (8, 8), "concatsquash").to(gpu)
        sfk.prune_weights_(odefunc, keep=0.7)
        sfk.prune_neurons_(odefunc, keep=0.9)
        compiled = sfk.compile(odefunc, "reference")
        assert compiled.device == gpu and "reference" in compiled.report()
        y0 = torch.ones(6, 2, requires_grad=True)
        solution = sfk.solve(sfk.with_divergence(compiled, "exact"), (y0, torch.zeros(6)), T.to(gpu), **LOOSE)
        assert solution.ys[0].device == gpu
        (solution.ys[0].sum() + solution.ys[1].sum()).backward()
        compiled(0.5, y0).sum().backward()
        compiled.copy_to(odefunc)
    assert bool(torch.isfinite(y0.grad).all().cpu())
