"""The compiled field's contract: values, checks, gradients on native engines, caches, moves, copies; divergences."""

import copy
import io
import pickle

import pytest
import torch
import torchdiffeq
from fields import FIELDS, make_ffjord
from random_fields import jacobians, plain_forward, random_field
from torch import nn

import sparseflow_kernels as sfk
from sparseflow_kernels import engines
from sparseflow_kernels.compiled_field import CompiledField
from sparseflow_kernels.divergence_field import DivergenceField, with_divergence
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Activation, Pattern, TimeFunction, UnsupportedFieldError


class FakeNative(ReferenceEngine):
    """A native engine as the door sees it: values without a graph, and a copy of the weights taken when packed."""

    name = "cpu"
    differentiable = False

    def __init__(self, field, plan=None):
        super().__init__(field.map_tensors(lambda tensor: tensor.detach().clone()), plan)

    def evaluate(self, t, y):
        assert y.is_contiguous() and y.dim() == 2
        with torch.no_grad():
            return super().evaluate(t, y)

    def evaluate_with_divergence(self, t, x, noise=None):
        assert x.is_contiguous() and x.dim() == 2 and (noise is None or noise.is_contiguous())
        with torch.no_grad():
            return super().evaluate_with_divergence(t, x, noise)


@pytest.fixture(params=["reference", "stand-in", "cpu"])
def engine(request, monkeypatch):
    """The tests that take this run on the reference engine, on a stand-in for a native one, and on the cpu engine."""
    truly = engines.available
    if request.param == "stand-in":
        monkeypatch.setattr(engines, "available", lambda name, graph=False: (FakeNative, "") if name == "cpu" else truly(name, graph))
    elif request.param == "cpu" and not sfk.build_info()["cpu"]["built"]:
        pytest.skip("the cpu engine is not built")
    return "reference" if request.param == "reference" else "cpu"


def compiled(engine="reference", sizes=(3, 8, 7, 3), seed=0, dtype=torch.float64, **options):
    return CompiledField(random_field(sizes, 0.6, gate=True, shift=True, seed=seed, dtype=dtype, **options), engine)


def state(*shape, dtype=torch.float64, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize(
    "name", ["ffjord_concatsquash_three", "ffjord_concat", "act_softplus", "ode_demo", "time_mlp", "scaled"]
)
def test_compile_keeps_the_meaning(name):
    torch.manual_seed(4)
    module = FIELDS[name]().double()
    field = sfk.compile(module, engine="reference")
    assert field.dim == module.dim and field.dtype == torch.float64
    y = state(6, field.dim)
    for t in (0.0, 0.7):
        torch.testing.assert_close(field(t, y), module(torch.tensor(t, dtype=torch.float64), y), rtol=1e-10, atol=1e-11)


def test_compile_shares_no_memory_and_takes_fields():
    module = make_ffjord("concatsquash", 2, (8, 8)).double()
    field, y = sfk.compile(module, "reference"), state(4, 2)
    before = field(0.3, y)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(field(0.3, y), before)
    plain = random_field([3, 6, 3], 0.5)
    y = state(4, 3)
    from_data = sfk.compile(plain, "reference")
    again = sfk.compile(from_data, "reference")
    want = plain_forward(plain, torch.tensor(0.2), y)[0]
    torch.testing.assert_close(from_data(0.2, y), want)
    torch.testing.assert_close(again(0.2, y), want)
    with torch.no_grad():
        next(again.parameters()).mul_(2)
    torch.testing.assert_close(from_data(0.2, y), want)


def test_compile_refuses():
    with pytest.raises(TypeError, match="module_or_field"):
        sfk.compile(lambda t, y: -y)
    with pytest.raises(ValueError, match="unknown name 'tpu'"):
        sfk.compile(random_field([3, 6, 3]), engine="tpu")
    with pytest.raises(ValueError, match="dim is 4"):
        sfk.compile(random_field([3, 6, 3]), dim=4)
    field = random_field([3, 6, 3])
    field.layers[0].activation = Activation("mish")
    with pytest.raises(UnsupportedFieldError, match="mish"):
        CompiledField(field)


def test_what_the_module_does_not_have_is_not_trained():
    field = sfk.compile(make_ffjord("concat", 2, (6,)), "reference")
    trained = {name: parameter.requires_grad for name, parameter in field.named_parameters()}
    assert trained["layers.0.values"] and trained["layers.0.bias"] and trained["layers.0.shift.slope"]
    assert "layers.0.shift.offset" not in trained and "layers.0.shift.offset" in dict(field.named_buffers())
    again = sfk.compile(field, "reference")
    assert trained == {name: parameter.requires_grad for name, parameter in again.named_parameters()}
    assert all(parameter.requires_grad for parameter in sfk.compile(random_field([3, 6, 3], shift=True)).parameters())


# --------------------------------------------------------------------------------------------------------- copy_to


def train(field, y, steps=3):
    optimizer = torch.optim.Adam([p for p in field.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        field(0.3, y).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["ignore", "concat", "concat_v2", "squash", "concatsquash"])
@pytest.mark.filterwarnings("ignore:prune_weights_")  # keep 0.15 may cut every path, which is also to be written back
@pytest.mark.parametrize("keep", [1.0, 0.4, 0.15])
def test_copy_to_gives_the_module_the_trained_values(kind, keep):
    torch.manual_seed(7)
    module = make_ffjord(kind, 3, (8, 7), "softplus").double()
    if keep < 1:
        sfk.prune_weights_(module, keep=keep)
    field, y = sfk.compile(module, "reference"), state(5, 3)
    train(field, y)
    t = torch.tensor(0.8, dtype=torch.float64)
    assert not torch.allclose(module(t, y), field(t, y))
    field.copy_to(module)
    torch.testing.assert_close(module(t, y), field(t, y))
    torch.testing.assert_close(sfk.compile(module)(t, y), field(t, y))


def test_masked_time_weights_are_not_trained_whatever_becomes_of_the_field(engine):
    torch.manual_seed(9)
    module = make_ffjord("concat", 3, (8, 7)).double()
    sfk.prune_weights_(module, keep=0.5)
    field, y = sfk.compile(module, engine), state(5, 3)
    masks = {key: field.origins[key].parameter < 0 for key in field.shares.own}
    masks = {key: mask for key, mask in masks.items() if bool(mask.any())}
    assert any(name == "shift.slope" for _, name in masks)
    buffer = io.BytesIO()
    torch.save(field, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(field), torch.load(buffer, weights_only=False), sfk.compile(field, engine), field):
        train(other, y)
        for (number, name), mask in masks.items():
            tensor = dict(other.vector_field.layers[number].tensors())[name]
            assert not tensor[mask].any() and tensor.grad[~mask].all()


def test_copy_to_keeps_what_was_folded_where_it_was():
    torch.manual_seed(8)
    module = make_ffjord("ignore", 2, (6, 5), "tanh").double()
    with torch.no_grad():
        module.diffeq.layers[0]._layer.weight[2] = 0  # neuron 2 is a constant, tanh(bias): folded into the next bias
    field, y = sfk.compile(module, "reference"), state(4, 2)
    assert field.vector_field.layers[0].out_features == 5
    before = copy.deepcopy(module)
    field.copy_to(module)
    for one, other in zip(module.parameters(), before.parameters()):
        assert torch.equal(one, other)
    train(field, y)
    field.copy_to(module)
    t = torch.tensor(0.1, dtype=torch.float64)
    torch.testing.assert_close(module(t, y), field(t, y))


def test_copy_to_refuses_another_module():
    field = sfk.compile(make_ffjord("ignore", 2, (6, 5)))
    with pytest.raises(ValueError, match="copy_to: layer 0"):
        field.copy_to(make_ffjord("ignore", 2, (7, 5)))
    with pytest.raises(ValueError, match="copy_to: layer 1"):
        field.copy_to(make_ffjord("ignore", 2, (6,)))
    module = make_ffjord("ignore", 2, (6, 5))
    with torch.no_grad():
        module.diffeq.layers[1]._layer.weight[1, 1] = 0
    with pytest.raises(ValueError, match="copy_to: layer 1 .*30 weights.*29 weights"):
        field.copy_to(module)


# ------------------------------------------------------------------------------------------------ forward's contract


def test_shapes_and_times(engine):
    field = compiled(engine)
    y = state(4, 3)
    want = plain_forward(field.vector_field, torch.tensor(0.4, dtype=torch.float64), y)[0]
    for t in (0.4, torch.tensor(0.4, dtype=torch.float64), torch.full((1,), 0.4, dtype=torch.float64),
              torch.full((1, 1), 0.4, dtype=torch.float64)):
        torch.testing.assert_close(field(t, y), want)
    torch.testing.assert_close(field(torch.tensor(1), y), field(1.0, y))
    torch.testing.assert_close(field(0.4, y.view(2, 2, 1, 3)), want.view(2, 2, 1, 3))
    torch.testing.assert_close(field(0.4, y[0]), want[0])
    torch.testing.assert_close(field(0.4, y.T.contiguous().T), want)
    torch.testing.assert_close(field(0.4, y[:1].expand(5, 3)), want[:1].expand(5, 3))
    for empty in (torch.empty(0, 3, dtype=y.dtype), torch.empty(2, 0, 3, dtype=y.dtype)):
        assert field(0.4, empty).shape == empty.shape


@pytest.mark.parametrize("call, error, words", [
    (lambda f, y: f("0", y), TypeError, "t: must be a number"),
    (lambda f, y: f(True, y), TypeError, "t: must be a number"),
    (lambda f, y: f(torch.zeros(2), y), ValueError, "t: .*one element"),
    (lambda f, y: f(torch.zeros(1, 1, 1), y), ValueError, "t: .*one element"),
    (lambda f, y: f(torch.tensor(1j), y), TypeError, "t: .*real"),
    (lambda f, y: f(0.0, [1.0]), TypeError, "y: must be a tensor"),
    (lambda f, y: f(0.0, y[:, :2]), ValueError, "y: the last axis must be 3"),
    (lambda f, y: f(0.0, y[0, 0]), ValueError, "y: the last axis must be 3"),
    (lambda f, y: f(0.0, y.float()), TypeError, "y: is torch.float32, the field torch.float64"),
    (lambda f, y: f(0.0, y.to("meta")), ValueError, "y: is on meta"),
])
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(compiled(), state(4, 3))


def test_parameters_are_the_fields_tensors():
    field = compiled()
    names = {name.removeprefix("layers.") for name, _ in field.named_parameters()}
    assert names == {name for name, _ in field.vector_field.tensors()}
    live = dict(field.vector_field.tensors())
    for name, parameter in field.named_parameters():
        assert live[name.removeprefix("layers.")] is parameter and parameter.requires_grad
    assert field.nnz == sum(layer.pattern.nnz for layer in field.vector_field.layers)


# -------------------------------------------------------------------------------------------------------- gradients


def gradcheck(field, function, batch=3, again=False):
    """Against finite differences in y, t and every parameter; `again`: second derivatives too."""

    def of_all(y, t, *_):
        return function(t, y)

    y, t = state(batch, field.dim).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradgradcheck if again else torch.autograd.gradcheck
    return check(of_all, (y, t, *field.parameters()), fast_mode=True)


@pytest.mark.parametrize("again", [False, True])
def test_gradcheck(engine, again):
    field = compiled(engine, sizes=(2, 5, 4, 2))
    assert gradcheck(field, field, again=again)


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 5, 2), (2, 5, 4, 2), (2, 4, 5, 4, 2)])
def test_gradcheck_with_divergence(engine, kind, sizes):
    field = compiled(engine, sizes=sizes)
    augmented, l = with_divergence(field, kind), torch.zeros(3, 1, dtype=torch.float64)  # noqa: E741
    assert gradcheck(field, lambda t, y: augmented(t, (y, l)))


def test_a_state_that_depends_on_the_parameters_is_not_counted_twice(engine):
    field, y = compiled(engine), state(4, 3)
    plain = lambda y: plain_forward(field.vector_field, torch.tensor(0.0, dtype=torch.float64), y)[0]
    results = []
    for f in (lambda y: field(0.0, y), plain):
        x = y.clone().requires_grad_()
        value = f(f(x)).square().sum()
        first = torch.autograd.grad(value, [x, *field.parameters()], create_graph=True, allow_unused=True)
        first = [g for g in first if g is not None]
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(field.parameters()), allow_unused=True)
        results.append([*first, *(g for g in second if g is not None)])
    assert len(results[0]) == len(results[1])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


def test_gradients_equal_the_modules(engine):
    torch.manual_seed(5)
    module = make_ffjord("concatsquash", 3, (8, 7), "softplus").double()
    field = CompiledField(sfk.compile(module).vector_field, engine)
    y = state(5, 3)
    wanted = y.clone().requires_grad_()
    module(torch.tensor(0.4).double(), wanted).square().sum().backward()
    got = y.clone().requires_grad_()
    field(0.4, got).square().sum().backward()
    torch.testing.assert_close(got.grad, wanted.grad)
    layer = module.diffeq.layers[1]
    torch.testing.assert_close(field.layers[1].values.grad, layer._layer.weight.grad.flatten())
    torch.testing.assert_close(field.layers[1].gate.slope.grad, layer._hyper_gate.weight.grad.flatten())
    torch.testing.assert_close(field.layers[1].shift.slope.grad, layer._hyper_bias.weight.grad.flatten())


def test_autograd_is_only_paid_for_when_asked(engine):
    field, y = compiled(engine), state(4, 3)
    assert field(0.0, y).requires_grad
    with torch.no_grad():
        assert not field(0.0, y).requires_grad
    with torch.inference_mode():
        assert not field(0.0, y).requires_grad
    field.requires_grad_(False)
    assert not field(0.0, y).requires_grad
    assert field(0.0, y.requires_grad_()).requires_grad


def test_native_gradients_refuse_changed_parameters(engine):
    if engine == "reference":
        pytest.skip("autograd's own rules hold for the reference engine")
    field, y = compiled(engine), state(4, 3).requires_grad_()
    out = field(0.0, y).sum()
    with torch.no_grad():
        field.layers[0].values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


class TimeNet(nn.Sequential):
    def forward(self, t):
        return super().forward(t.view(1))


def test_functions_of_time_that_are_modules_are_trained(engine):
    field = random_field([2, 4, 2], 1.0)
    net = TimeNet(nn.Linear(1, 4), nn.Tanh()).double()
    field.layers[0].shift = TimeFunction(net)
    CompiledField(field, engine)(0.3, state(3, 2)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


# ------------------------------------------------------------------------------------- the pack, moves and pickling


def test_packed_is_kept_until_a_parameter_changes(engine):
    """A change makes another engine, or has this one take over the new values."""
    field, y = compiled(engine), state(4, 3)
    first = field.packed()
    assert field.packed() is first and field.packed("exact") is not first and first.plan is None
    assert field.packed("exact").plan.kind == "exact" and field.packed("exact") is field.packed("exact")
    before, packed = field(0.0, y).detach(), (first, first.stamp)
    optimizer = torch.optim.SGD(field.parameters(), lr=0.1)
    field(0.0, y).square().sum().backward()
    optimizer.step()
    assert (field.packed(), field.packed().stamp) != packed
    after = field(0.0, y).detach()
    torch.testing.assert_close(after, plain_forward(field.vector_field, torch.tensor(0.0).double(), y)[0])
    assert not torch.allclose(after, before)
    packed = field.packed(), field.packed().stamp
    field.layers[0].bias.data = torch.zeros_like(field.layers[0].bias)  # assignment moves no version counter
    assert (field.packed(), field.packed().stamp) != packed
    torch.testing.assert_close(field(0.0, y), plain_forward(field.vector_field, torch.tensor(0.0).double(), y)[0])


def test_dtype_moves(engine):
    field, y = compiled(engine), state(4, 3)
    want = field(0.5, y)
    moved = copy.deepcopy(field).to(torch.float32)
    assert moved.dtype == torch.float32 and moved.vector_field.dtype == torch.float32
    torch.testing.assert_close(moved(0.5, y.float()), want.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved(torch.tensor(0.5).double(), y.float()), want.float(), rtol=1e-4, atol=1e-5)


def test_deepcopy_pickle_and_state_dict(engine):
    field, y = compiled(engine), state(4, 3)
    want = field(0.5, y)
    field.packed("exact")
    buffer = io.BytesIO()
    torch.save(field, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(field), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(field))]
    for other in others:
        assert len(other._packing) == 0 and len(field._packing) > 0
        assert torch.equal(other(0.5, y), want)
        with torch.no_grad():
            other.layers[0].bias.add_(1)
        assert not torch.equal(other(0.5, y), want) and torch.equal(field(0.5, y), want)
    other = CompiledField(field.vector_field.map_tensors(torch.zeros_like), engine)
    other.load_state_dict(field.state_dict())
    assert torch.equal(other(0.5, y), want)


EDITS = {
    ".data": lambda p: p.data.mul_(0.5),
    "numpy": lambda p: p.detach().numpy().__imul__(0.5),
    "a view": lambda p: p.detach()[:1].mul_(0.5),
    "new memory": lambda p: setattr(p, "data", p.data * 0.5),
    "strided memory": lambda p: setattr(p, "data", (p.data * 0.5).repeat_interleave(2)[::2]),
    "shared memory": lambda p: p.share_memory_().data.mul_(0.5),
    "fused optimizer": lambda p: torch.optim.SGD([p], lr=0.5, fused=True).step(setattr(p, "grad", p.detach().clone())),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edits_that_no_version_counter_tells_are_seen(engine, edit):
    y, t = state(4, 3), torch.tensor([0.0, 1.0], dtype=torch.float64)
    field = compiled(engine)
    augmented = with_divergence(field)

    def everything(f, a):
        with torch.no_grad():
            return f(0.5, y), sfk.odeint(f, y, t), *a(0.5, (y, y[:, 0])), sfk.odeint(a, (y, y[:, 0]), t)[1]

    everything(field, augmented)
    for parameter in field.parameters():
        EDITS[edit](parameter)
        again = sfk.compile(field, "reference")
        for got, want in zip(everything(field, augmented), everything(again, with_divergence(again))):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    x = y.clone().requires_grad_()
    sfk.odeint(field, x, t)[-1].sum().backward()
    z = y.clone().requires_grad_()
    sfk.odeint(again, z, t)[-1].sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-6, atol=1e-6)


def test_inference_mode_construction(engine):
    with torch.inference_mode():
        field, y = compiled(engine), state(4, 3)
        one = field(0.0, y)
        field.layers[0].bias.add_(1.0)
        assert not torch.equal(field(0.0, y), one)


def test_report_says_what_and_why():
    torch.manual_seed(6)
    text = sfk.compile(make_ffjord("concatsquash", 3, (8, 7), "softplus")).report()
    for words in ("diffeq.layers.1", "7 x 8", "56", "100.0%", "softplus", "sigmoid", "linear", "engine:",
                  "exact divergence: pairs", "hutchinson divergence"):
        assert words in text, words
    assert f"evaluation: {24 + 56 + 21}" in text


# ------------------------------------------------------------------------------------------------------ divergence


@pytest.mark.parametrize("sizes", [(3, 3), (3, 8, 3), (3, 8, 7, 3), (3, 6, 8, 5, 3), (3, 5, 6, 7, 5, 3)])
def test_divergence_of_compiled_fields_and_of_any_function(engine, sizes):
    field = compiled(engine, sizes=sizes)
    x, t = state(4, 3), torch.tensor(0.3, dtype=torch.float64)
    plain = lambda t, x: plain_forward(field.vector_field, t, x)[0]
    jacobian = jacobians(lambda x: plain(t, x), x)
    noise = state(4, 3, seed=9)
    for f in (field, plain):
        for l in (torch.zeros(4).double(), torch.zeros(4, 1).double()):  # noqa: E741
            dx, dl = with_divergence(f)(t, (x, l))
            torch.testing.assert_close(dx, plain(t, x))
            torch.testing.assert_close(dl, -torch.einsum("bmm->b", jacobian).view(l.shape))
            dx, dl = with_divergence(f, "hutchinson", noise)(t, (x, l))
            torch.testing.assert_close(dx, plain(t, x))
            torch.testing.assert_close(dl, -torch.einsum("bm,bmn,bn->b", noise, jacobian, noise).view(l.shape))


def test_divergence_of_other_shapes(engine):
    augmented = with_divergence(compiled(engine))
    x = state(4, 3)
    want = augmented(0.1, (x, torch.zeros(4).double()))
    dx, dl = augmented(0.1, (x.view(2, 2, 3), torch.zeros(2, 2).double()))
    assert torch.equal(dx, want[0].view(2, 2, 3)) and torch.equal(dl, want[1].view(2, 2))
    dx, dl = augmented(0.1, (x[0], torch.tensor(0.0).double()))
    torch.testing.assert_close(dl, want[1][0])
    dx, dl = augmented(0.1, (x[:0], torch.zeros(0, 1).double()))
    assert dx.shape == (0, 3) and dl.shape == (0, 1)


def test_gradients_of_the_divergence_agree_with_autograds(engine):
    field = compiled(engine)
    plain = lambda t, x: plain_forward(field.vector_field, t, x)[0]
    grads = []
    for f in (field, plain):
        x, t = state(4, 3).requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        dx, dl = with_divergence(f)(t, (x, torch.zeros(4).double()))
        grads.append(torch.autograd.grad((dx.square().sum(1) * dl).sum(), [x, t, *field.parameters()]))
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want)


def test_divergence_of_any_function_pays_for_a_graph_only_when_asked():
    module = make_ffjord("concat", 2, (6,)).double()
    x, l = state(4, 2), torch.zeros(4).double()  # noqa: E741
    augmented = with_divergence(module)
    t = torch.tensor(0.2).double()
    assert all(part.requires_grad for part in augmented(t, (x, l)))
    with torch.no_grad():
        want = augmented(t, (x, l))
        assert not any(part.requires_grad for part in want)
    with torch.inference_mode():
        for kind in ("exact", "hutchinson"):
            got = with_divergence(module, kind)(t.clone(), (x.clone(), l))
            torch.testing.assert_close(got[0], want[0])
    module.requires_grad_(False)
    assert not any(part.requires_grad for part in augmented(t, (x, l)))
    dx, dl = with_divergence(lambda t, x: torch.ones_like(x))(t, (x, l))
    assert not dl.any() and dl.shape == (4,)
    with pytest.raises(ValueError, match="shaped like x"):
        with_divergence(lambda t, x: x[:, :1])(t, (x, l))


def test_noise_is_drawn_once_per_solve(engine):
    field, x = compiled(engine), state(50, 3)
    augmented = with_divergence(field, "hutchinson")
    first = augmented.begin_solve(x)
    assert first.shape == x.shape and first.dtype == x.dtype and set(first.unique().tolist()) == {-1.0, 1.0}
    l = torch.zeros(50).double()  # noqa: E741
    want = augmented(0.2, (x, l))[1]
    assert torch.equal(augmented(0.2, (x, l))[1], want)
    torch.testing.assert_close(want, with_divergence(field, "hutchinson", first)(0.2, (x, l))[1])
    assert not torch.equal(augmented.begin_solve(x), first)
    kept = augmented._probe(x)
    assert augmented._probe(x) is kept
    augmented.resample()
    assert augmented._probe(x) is not kept
    assert augmented._probe(x[:7]).shape == (7, 3)
    gaussian = with_divergence(field, "hutchinson", "gaussian").begin_solve(state(2000, 3))
    assert abs(gaussian.mean()) < 0.05 and abs(gaussian.std() - 1) < 0.05 and gaussian.unique().numel() > 1000
    torch.manual_seed(1)
    one = augmented.begin_solve(x)
    torch.manual_seed(1)
    assert torch.equal(augmented.begin_solve(x), one)
    assert with_divergence(field).begin_solve(x) is None


def test_given_noise_moves_with_the_module_and_must_fit():
    field, x = compiled(), state(4, 3)
    augmented = with_divergence(field, "hutchinson", state(4, 3, seed=8))
    assert torch.equal(augmented.begin_solve(x), state(4, 3, seed=8))
    assert "noise" not in augmented.state_dict()
    moved = copy.deepcopy(augmented).float()
    assert moved.begin_solve(x.float()).dtype == torch.float32 and moved.field.dtype == torch.float32
    with pytest.raises(ValueError, match=r"noise: is \[4, 3\], the state \[5, 3\]"):
        augmented(0.0, (state(5, 3), torch.zeros(5).double()))


@pytest.mark.parametrize("make, error, words", [
    (lambda f: with_divergence(f, "brute"), ValueError, "kind must be"),
    (lambda f: with_divergence(f, "exact", "gaussian"), ValueError, "noise is only for"),
    (lambda f: with_divergence(f, "hutchinson", "uniform"), ValueError, "noise must be"),
    (lambda f: with_divergence(f, "hutchinson", 3), TypeError, "noise must be"),
    (lambda f: with_divergence(3), TypeError, "callable"),
    (lambda f: with_divergence(f.vector_field), TypeError, "compile"),
    (lambda f: with_divergence(f)(0.0, state(4, 3)), TypeError, "state: must be a tuple"),
    (lambda f: with_divergence(f)(0.0, (state(4, 3), torch.zeros(3))), ValueError, "l: must be"),
    (lambda f: with_divergence(f)(0.0, (state(4, 2), torch.zeros(4))), ValueError, "x: the last axis"),
])
def test_divergence_errors(make, error, words):
    with pytest.raises(error, match=words):
        make(compiled())


def test_a_drop_in_for_torchdiffeq(engine):
    field, x = compiled(engine), state(6, 3)
    times = torch.linspace(0, 1, 3, dtype=torch.float64)
    augmented = with_divergence(field)
    assert isinstance(augmented, DivergenceField)
    plain = with_divergence(lambda t, x: plain_forward(field.vector_field, t, x)[0])
    start = (x, torch.zeros(6).double())
    with torch.no_grad():
        got = torchdiffeq.odeint(augmented, start, times, method="rk4")
        want = torchdiffeq.odeint(plain, start, times, method="rk4")
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)
    got = torchdiffeq.odeint_adjoint(augmented, start, times, method="rk4")
    (got[0].sum() + got[1].sum()).backward()
    assert all(parameter.grad is not None for parameter in field.parameters())


def test_threads():
    before = sfk.get_num_threads()
    assert before == torch.get_num_threads()
    from sparseflow_kernels import threads

    try:
        sfk.set_num_threads(3)
        assert sfk.get_num_threads() == 3 and torch.get_num_threads() == before
        for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError)):
            with pytest.raises(error, match="set_num_threads"):
                sfk.set_num_threads(bad)
    finally:
        threads._count = None


def test_empty_layer_fields_run(engine):
    field = random_field([3, 6, 5, 3], 0.5)
    layer = field.layers[1]
    layer.pattern, layer.values = Pattern.from_mask(torch.zeros(5, 6, dtype=torch.bool)), layer.values[:0]
    x = state(4, 3)
    dx, dl = with_divergence(CompiledField(field, engine))(0.0, (x, torch.zeros(4).double()))
    torch.testing.assert_close(dx, plain_forward(field, torch.tensor(0.0), x)[0])
    assert not dl.any()
