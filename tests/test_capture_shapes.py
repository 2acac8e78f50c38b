"""States of other numbers of axes, examples of states, and modules in wrappers: a compiled field is the module there
too, or says that it is not."""

from __future__ import annotations

import copy
import pickle
from typing import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch import Tensor, nn

import sparseflow_kernels as sfk

L = nn.Linear
TIMES = torch.tensor([0.0, 0.5, 1.0])


class Field(nn.Module):
    """forward(t, y) = rule(self, t, y); tensors among the parts become buffers."""

    def __init__(self, rule: Callable, **parts) -> None:
        super().__init__()
        self.rule = rule
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rule(self, t, y)


class Swapped(Field):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.rule(self, x, t)


def net(inputs: int = 3, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(L(inputs, 12), nn.Tanh(), L(12, outputs))


def pruned(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if type(part) is L:
            prune.l1_unstructured(part, "weight", 0.7)
    return module


def is_the_module(field: sfk.CompiledField, module: nn.Module, y: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(field(0.3, y), module(torch.tensor(0.3), y), rtol=2e-5, atol=2e-5)
        if y.dim() > 1:
            ys = sfk.odeint(module, y, TIMES, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sfk.odeint(field, y, TIMES, rtol=1e-5, atol=1e-5), ys, rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------------- other axes

# name -> (rule, parts, shapes it is right for, shapes it refuses)
SHAPES = {
    "rows": (
        lambda m, t, y: m.n(y), {"n": net()}, [(3,), (4, 3), (1, 3), (2, 5, 3), (2, 2, 5, 3), (2, 2, 2, 2, 3)], []),
    "points that see their mean": (
        lambda m, t, y: m.n(torch.cat([y, y.mean(1, keepdim=True).expand_as(y)], -1)), {"n": net(6)},
        [(4, 3), (3, 3)], [(2, 4, 3), (3, 3, 3), (2, 2, 5, 3)]),
    "centred points": (lambda m, t, y: m.n(y - y.mean(1, keepdim=True)), {"n": net()}, [(4, 3)], [(2, 4, 3)]),
    "attention between points": (
        lambda m, t, y: m.n(torch.softmax(y @ y.mT, -1) @ y) if y.dim() == 3 else m.n(y), {"n": net()},
        [(3,), (4, 3)], [(2, 4, 3), (2, 1, 3)]),
    "channels first": (
        lambda m, t, y: m.n(y.mT).mT if y.dim() == 3 else m.n(y), {"n": net()}, [(4, 3)], [(2, 3, 3)]),
    "a place for every point": (
        lambda m, t, y: m.n(y + m.place) if y.dim() == 3 else m.n(y), {"n": net(), "place": torch.randn(5, 3)},
        [(4, 3)], [(2, 5, 3)]),
    "a matrix times a state": (
        lambda m, t, y: m.A @ torch.tanh(y), {"A": torch.randn(3, 3)}, [(3,)], [(3, 3), (3, 3, 3)]),
    "one state means another thing": (
        lambda m, t, y: m.n(y) + (y.sum(0) if y.dim() == 1 else 0.0), {"n": net()}, [(4, 3)], [(3,)]),
    "time beside every point": (
        lambda m, t, y: m.n(torch.cat([y, torch.ones_like(y[..., :1]) * t], -1)), {"n": net(4)},
        [(3,), (4, 3), (2, 4, 3)], []),
    "points laid end to end and back": (
        lambda m, t, y: (lambda b, n, d: m.n(y.reshape(b * n, d)).reshape(b, n, d))(*y.shape), {"n": net()},
        [(2, 5, 3), (2, 1, 3)], []),
}


@pytest.mark.parametrize("name", SHAPES)
def test_states_with_other_axes(name: str) -> None:
    rule, parts, right, refused = SHAPES[name]
    module = Field(rule, **copy.deepcopy(parts))
    field = sfk.compile(module)
    again = sfk.compile(pickle.loads(pickle.dumps(copy.deepcopy(field))))
    for shape in right:
        y = torch.randn(shape)
        is_the_module(field, module, y)
        is_the_module(sfk.compile(module, like=y), module, y)
    for shape in refused:
        y = torch.randn(shape)
        for call in (lambda f: f(0.3, y), lambda f: sfk.odeint(f, y, TIMES), lambda f: sfk.solve(f, y, TIMES),
                     lambda f: sfk.with_divergence(f)(0.3, (y, torch.zeros(shape[:-1])))):
            for one in (field, again):
                with pytest.raises(sfk.UnsupportedFieldError, match="like=y0"):
                    call(one)
        whole = sfk.compile(module, like=y)  # as one sample [points, ...]
        assert whole.vector_field.layout.shapes in ((shape[1:],), (shape,))
        is_the_module(whole, module, y)
        with pytest.raises(sfk.UnsupportedFieldError, match="like: .*rows"):
            sfk.compile(field, like=y)


@pytest.mark.parametrize("rule", [
    lambda m, t, y: m.n(y.t()).t(),
    lambda m, t, y: m.n(y.T).T,
])
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_samples_as_columns_are_refused(rule) -> None:
    with pytest.raises(sfk.UnsupportedFieldError, match="samples are the columns"):
        sfk.compile(Field(rule, n=net()))


@pytest.mark.parametrize("rule", [
    lambda m, t, y: m.n(y) if len(y) != 3 else m.n(y.t()).t(),
    lambda m, t, y: m.n(y) * (2.0 if len(y) == 1 else 1.0),
    lambda m, t, y: m.n(y) / len(y),
])
def test_a_field_that_depends_on_the_number_of_samples(rule) -> None:
    with pytest.raises(sfk.UnsupportedFieldError, match="differs from the module"):
        sfk.compile(Field(rule, n=net()))


def test_an_example_settles_what_cannot_be_told() -> None:
    halves = Field(lambda m, t, y: torch.cat([y[..., [2, 3]], m.a(y[..., :2])], -1), a=L(2, 2))
    assert sfk.compile(halves, like=torch.randn(5, 4)).dim == 4
    free = Field(lambda m, t, y: -2.0 * y)
    field = sfk.compile(free, like=torch.randn(2, 3, dtype=torch.float64))
    assert field.dim == 3 and field.dtype == torch.float64
    module = pruned(Field(lambda m, t, y: m.n(y), n=net()))
    y = torch.randn(2, 4, 3, requires_grad=True)
    field = sfk.compile(module, like=y)
    with torch.no_grad():
        field.layers[0].values.mul_(1.5)
    field.copy_to(module)
    is_the_module(field, module, y.detach())


def test_a_field_compiled_again_remembers_the_example() -> None:
    module = Field(lambda m, t, y: m.n(y[:, :, :, :]), n=net())
    y = torch.randn(2, 5, 4, 3)
    with pytest.raises((ValueError, sfk.UnsupportedFieldError)):
        sfk.compile(module)
    field = sfk.compile(sfk.compile(module, like=y))
    with torch.no_grad():
        field.layers[0].values.mul_(1.5)
    field.copy_to(module)
    is_the_module(field, module, y)


@pytest.mark.parametrize("like, dim, error, words", [
    (torch.ones(2, 3, dtype=torch.float64), None, TypeError, "float64 .*the module torch.float32"),
    (torch.ones(2, 3, device="meta"), None, ValueError, "on meta, the module"),
    (torch.ones(2, 3, dtype=torch.int64), None, TypeError, "like must be float32 or float64"),
    (torch.ones(2, 3), 4, ValueError, "dim is 4, but the last axis of like is 3"),
    (torch.ones(2, 5), None, ValueError, r"failed for like \[2, 5\]"),
    (torch.ones(0, 3), None, ValueError, "at least one sample"),
    (torch.tensor(1.0), None, sfk.UnsupportedFieldError, "does not run for the example"),
    ((torch.ones(2, 3), torch.ones(2, 1)), None, sfk.UnsupportedFieldError, "does not run for the example"),
    ((torch.ones(2, 3), "v0"), None, TypeError, "a tuple of tensors"),
    ((torch.ones(2, 3), torch.ones(2, 1).double()), None, TypeError, "of one dtype"),
    ((torch.ones(2, 3), torch.ones(2, 1)), 3, ValueError, "dim is for a state"),
    ("y0", None, TypeError, "an example of the state"),
])
def test_bad_examples(like, dim, error, words) -> None:
    with pytest.raises(error, match=words):
        sfk.compile(Field(lambda m, t, y: m.n(y), n=net()), like=like, dim=dim)


# ---------------------------------------------------------------------------------------------------- wrapped modules


def sparsified(module: nn.Module, **settings) -> nn.Module:
    sfk.sparsify_(pruned(module), **settings)
    return module


def script(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module, (torch.randn(5, 3),))


SPARSE = torch.tensor([[0.7, 0.0, -1.2], [0.0, 0.4, 0.0], [1.5, 0.0, 0.0]])


def compiled_inside() -> nn.Module:
    return Field(lambda m, t, y: m.n(y), n=torch.compile(net()))


def compiled_in_place() -> nn.Module:
    module = Field(lambda m, t, y: m.n(y), n=net())
    module.compile()
    return module


WRAPPED = {
    "sparsified": lambda: sparsified(Field(lambda m, t, y: m.n(y), n=net())),
    "sparsified, torch's product": lambda: sparsified(Field(lambda m, t, y: m.n(y), n=net()), backend="torch"),
    "sparsified layers of time": lambda: sparsified(Field(
        lambda m, t, y: m.n(y) * torch.sigmoid(m.g(t.view(1, 1))) + m.h(t.view(1, 1)), n=net(), g=L(1, 3), h=net(1))),
    "sparsified under vmap": lambda: sparsified(Field(lambda m, t, y: torch.vmap(lambda v: m.n(v))(y), n=net())),
    "torch.compile": lambda: torch.compile(pruned(Field(lambda m, t, y: m.n(y), n=net()))),
    "torch.compile inside": compiled_inside,
    "torch.compile in place": compiled_in_place,
    "TorchScript inside": lambda: Field(lambda m, t, y: m.n(y), n=script(net())),
    "DataParallel": lambda: nn.DataParallel(Field(lambda m, t, y: m.n(y), n=net())),
    "nn.Flatten": lambda: Field(lambda m, t, y: m.n(y.flatten(1)), n=nn.Sequential(nn.Flatten(), net())),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Using `torch.compile")
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_modules(name: str) -> None:
    """Read, trained by a step, and written back."""
    torch.manual_seed(0)
    module = WRAPPED[name]()
    field, y = sfk.compile(module), torch.randn(5, 3)
    with torch.compiler.set_stance("force_eager"):
        is_the_module(field, module, y)
        sfk.odeint(field, y, TIMES)[-1].square().sum().backward()
        with torch.no_grad():
            for parameter in field.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        field.copy_to(module)
        is_the_module(field, module, y)


def test_a_sparse_layer_keeps_its_pattern_and_is_trained() -> None:
    torch.manual_seed(0)
    first, second = (prune.random_unstructured(layer, "weight", 0.3) for layer in (L(3, 6), L(6, 3)))
    make = sfk.SparseLinear.from_linear
    module = Field(lambda m, t, y: m.n(y), n=nn.Sequential(make(first), nn.Tanh(), make(second)))
    field = sfk.compile(module)
    first, layer = module.n[0], field.layers[0]
    assert field.nnz == module.n[0].nnz + module.n[2].nnz and torch.equal(layer.values, first.values)
    assert layer.values.requires_grad and field.vector_field.layers[0].name == "n.0"
    y = torch.randn(5, 3)
    field(0.0, y).square().sum().backward()
    module(torch.tensor(0.0), y).square().sum().backward()
    torch.testing.assert_close(layer.values.grad, first.values.grad)


TENSORS = {
    "COO": lambda: Field(lambda m, t, y: torch.sparse.mm(m.w, y.t()).t(), w=SPARSE.to_sparse()),
    "CSR": lambda: Field(lambda m, t, y: torch.sparse.mm(m.w, y.t()).t(), w=SPARSE.to_sparse_csr()),
    "CSR in F.linear": lambda: Field(lambda m, t, y: F.linear(y, m.w), w=SPARSE.to_sparse_csr()),
    "a fixed COO parameter": lambda: Field(lambda m, t, y: (m.w @ y.t()).t(), w=nn.Parameter(SPARSE.to_sparse(), False)),
    "a fixed CSR parameter": lambda: Field(lambda m, t, y: (m.w @ y.t()).t(), w=nn.Parameter(SPARSE.to_sparse_csr(), False)),
    "sparse.addmm": lambda: Field(
        lambda m, t, y: torch.sparse.addmm(m.b, m.w, y.t()).t(), w=SPARSE.to_sparse(), b=torch.randn(3, 1)),
    "made dense": lambda: Field(lambda m, t, y: y @ m.w.to_dense(), w=SPARSE.to_sparse()),
    "of time": lambda: Field(
        lambda m, t, y: m.n(y) + torch.sparse.mm(m.w, t * torch.ones(3, 1)).t(), w=SPARSE.to_sparse(), n=net()),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("name", TENSORS)
def test_sparse_tensors(name: str) -> None:
    module, y = TENSORS[name](), torch.randn(5, 3)
    field = sfk.compile(module)
    assert field.nnz <= 5 + 72
    is_the_module(field, module, y)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.parametrize("kind, what", [(nn.Parameter, "parameter 'w'"), (torch.Tensor.requires_grad_, "tensor")])
def test_sparse_tensors_that_are_trained_are_refused(make, kind, what: str) -> None:
    module = Field(lambda m, t, y: (m.w @ y.t()).t(), w=kind(make(SPARSE.clone())))
    with pytest.raises(sfk.UnsupportedFieldError, match=f"sparse {what} .*requires a gradient.*sfk.SparseLinear"):
        sfk.compile(module)


def test_what_nobody_thought_of_is_a_refusal() -> None:
    def treacherous(m, t, y):
        return {}["no such key"] if torch._C._len_torch_dispatch_stack() else m.n(y)

    with pytest.raises(sfk.UnsupportedFieldError, match="cannot be read.*KeyError.*sfk.odeint"):
        sfk.compile(Field(treacherous, n=net()))


# ---------------------------------------------------------------------------------------------------- the true reason


CONTEXT = torch.randn(6, 2)
REASONS = {
    "a parameter for every sample": (
        lambda: Field(lambda m, t, y: m.n(torch.cat([y, m.c], 1)), n=net(5), c=nn.Parameter(CONTEXT)), {"dim": 3},
        r"differs from sample to sample.*part of the state.*like=y0.*batches of 6.*'c' \[6, 2\]"),
    "a constant for every sample that is nowhere": (
        lambda: Field(lambda m, t, y: m.n(torch.cat([y, torch.arange(12.0).view(6, 2)], 1)), n=net(5)), {"dim": 3},
        "differs from sample to sample"),
    "a graph": (lambda: Field(lambda m, t, y: m.A @ m.n(y), n=net(), A=torch.rand(5, 5)), {},
                r"over the samples.*batches of 5.*'A' \[5, 5\]"),
    "a graph of points": (
        lambda: Field(lambda m, t, y: torch.einsum("ij,bjd->bid", m.A, m.n(y)), n=net(), A=torch.rand(5, 5)), {},
        r"more axes \(\[\d+, 5, 3\] runs.*mixes the rows.*like=y0"),
    "a tuple, indexed": (lambda: Field(lambda m, t, s: (m.n(s[0]), 0 * s[1]), n=net()), {},
                         r"takes a tuple.*like=\(x0, v0\).*with_divergence.*torch.cat"),
    "a tuple, unpacked": (lambda: Field(lambda m, t, s: (lambda a, b, c: (b, -a, c))(*s), n=net()), {}, "a tuple"),
    "a tuple, returned as a list": (lambda: Field(lambda m, t, s: [m.n(s[0]), 0 * s[1]], n=net()), {}, "a tuple"),
    "swapped": (lambda: Swapped(lambda m, x, t: m.n(x) + t, n=net()), {}, "arguments swapped"),
    "swapped, dim": (lambda: Swapped(lambda m, x, t: m.n(x), n=net()), {"dim": 3}, "arguments swapped"),
    "swapped, like": (
        lambda: Swapped(lambda m, x, t: m.n(x), n=net()), {"like": torch.ones(4, 3)}, "arguments swapped"),
    "swapped, runs by accident": (lambda: Swapped(lambda m, x, t: m.n(x) * t, n=net(1, 1)), {}, "arguments swapped"),
    "nothing returned": (lambda: Field(lambda m, t, y: None, n=net()), {}, "returned NoneType"),
}


@pytest.mark.parametrize("name", REASONS)
def test_refusals_tell_the_true_reason(name: str) -> None:
    make, arguments, words = REASONS[name]
    with pytest.raises(ValueError, match=words):
        sfk.compile(make(), **arguments)


def test_sparsify_is_named_where_it_helps() -> None:
    ordered = lambda: Field(lambda m, t, y: m.n(y).mode(-1).values[:, None] * y, n=net())
    with pytest.raises(sfk.UnsupportedFieldError, match=r"sfk.sparsify_\(module\) makes its pruned.*'n.0' and 1 more"):
        sfk.compile(pruned(ordered()))
    with pytest.raises(sfk.UnsupportedFieldError) as error:
        sfk.compile(ordered())
    assert "sparsify_" not in str(error.value)
