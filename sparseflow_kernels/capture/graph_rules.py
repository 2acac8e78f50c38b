"""What every aten operation makes of elements of a graph: the table operation -> rule, and that of elementwise functions.

A rule takes (elements, func, args, kwargs, out) as those of a chain do (rules.py).
"""

from __future__ import annotations

import math
from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..field import Activation, Graph, Node, UnsupportedFieldError
from .elements import ANY, Elements, merged, product, rows_of, same_for_all, samples_of
from .operations import STRUCTURAL, aten, base_name
from .refusal import REMEDY, refuse
from .samples import STRIDE
from .values import Constant, StateValue, TimeValue

Rule = Callable[[Elements, Any, tuple, dict, Any], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply_to_elements(e: Elements, func, args: tuple, kwargs: dict, out: Any) -> Any:
    base = base_name(func)
    if base not in RULES:
        refuse(f"the operation {base} on the state")
    try:
        return RULES[base](e, func, args, kwargs, out)
    except (UnsupportedFieldError, NotImplementedError):
        raise
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        refuse(f"the operation {func} on the state ({type(error).__name__}: {error})", REMEDY, error)


def argument(args: tuple, kwargs: dict, position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


# ------------------------------------------------------------------------------------------------- moving elements


@rule(*STRUCTURAL)
def structural(e: Elements, func, args, kwargs, out) -> Any:
    base = base_name(func)
    if not isinstance(args[0], (StateValue, TimeValue)) or any(
        isinstance(a, (StateValue, TimeValue)) for a in tree_leaves((args[1:], kwargs))
    ):
        refuse(f"{base} with an index that depends on t or on the state")
    ids = lambda a: e.ids(a) if isinstance(a, (StateValue, TimeValue)) else a.value.cpu() if isinstance(a, Constant) else a
    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return tree_map(StateValue, func(*tree_map(ids, args), **tree_map(ids, kwargs)))


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_as")
def view(e: Elements, func, args, kwargs, out) -> Any:
    return StateValue(e.ids(args[0]).reshape(out.shape))


@rule("cat", "stack")
def join(e: Elements, func, args, kwargs, out) -> Any:
    axis = argument(args, kwargs, 1, "dim", 0)
    parts = list(args[0])
    if base_name(func) == "stack":
        axis = axis % out.dim()
        parts = [a if isinstance(a, StateValue) else StateValue(e.ids(a)) if isinstance(a, TimeValue) else a for a in parts]
        from .algebra import apply

        parts = [
            StateValue(a.ids.unsqueeze(axis)) if isinstance(a, StateValue) else apply(aten.unsqueeze.default, a, axis)
            for a in parts
        ]
    else:
        axis = axis % out.dim()
        parts = [a for a in parts if a.shape != torch.Size([0])]
    return StateValue(torch.cat([i for i in e.together(parts, axis)], axis))


@rule("_to_copy", "to_copy")
def to_copy(e: Elements, func, args, kwargs, out) -> Any:
    if out.dtype not in (e.table.dtype, torch.bool):
        refuse(f"a change of the state's dtype to {out.dtype}")
    if out.dtype == torch.bool:
        return e.pointwise(lambda g, a: complement(g, g.apply("eq", a, g.number(0.0))), args[0])
    return StateValue(e.ids(args[0]))


@rule("copy")
def copy(e: Elements, func, args, kwargs, out) -> Any:
    if isinstance(args[1], (Constant, int, float)):
        samples = samples_of(args[0].ids) if isinstance(args[0], StateValue) else None
        return StateValue(e.ids(args[1], samples).expand(out.shape).clone())
    return StateValue(e.ids(args[1]).expand(out.shape).clone())


@rule("lift_fresh", "detach", "alias", "clone", "contiguous")
def same(e: Elements, func, args, kwargs, out) -> Any:
    return StateValue(e.ids(args[0]))


def moved(e: Elements, func, value: Any, args: tuple, kwargs: dict) -> StateValue:
    """An operation that copies elements to other places, or puts zeros there: done on their numbers, from 1."""
    ids = e.ids(value)
    places = torch.arange(1.0, ids.numel() + 1, dtype=torch.float64).view(ids.shape)
    places = func(places, *args, **kwargs).round().to(torch.int64)
    flat = torch.cat([e.zero.reshape(1), ids.reshape(-1)])
    return StateValue(flat[places])


@rule(
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "im2col", "unfold", "pixel_shuffle", "pixel_unshuffle", "tril", "triu", "diag_embed",
    "diagonal_copy", "channel_shuffle", "slice_backward", "select_backward", "diagonal_backward", "unfold_copy", "rot90",
)  # fmt: skip
def moving(e: Elements, func, args, kwargs, out) -> Any:
    return moved(e, func, args[0], args[1:], kwargs)


@rule("constant_pad_nd")
def pad(e: Elements, func, args, kwargs, out) -> Any:
    value = argument(args, kwargs, 2, "value", 0)
    result = moved(e, func, args[0], (args[1], 0.0), {})
    if value:
        filler = e.ids(value)
        result = StateValue(torch.where(result.ids == e.zero, filler, result.ids))
    return result


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def index_put(e: Elements, func, args, kwargs, out) -> Any:
    base, indices, values = args[:3]
    if any(isinstance(i, (StateValue, TimeValue)) for i in indices):
        refuse("writing at an index that depends on t or on the state")
    accumulate = argument(args, kwargs, 3, "accumulate", False)
    index = [None if i is None else i.value.cpu() for i in indices]
    places = torch.arange(out.numel()).view(out.shape)[tuple(slice(None) if i is None else i for i in index)]
    samples = samples_of(base.ids) if isinstance(base, StateValue) else None
    target = e.ids(base).expand(out.shape)
    source = e.ids(values, None if samples is None or not isinstance(values, Constant) else samples.reshape(-1)[places])
    source = source.expand(places.shape)
    if accumulate:
        return StateValue(added(e, target.reshape(-1), places.reshape(-1), source.reshape(-1)).view(out.shape))
    return StateValue(target.reshape(-1).clone().index_put((places.reshape(-1),), source.reshape(-1)).view(out.shape))


def added(e: Elements, target: Tensor, places: Tensor, source: Tensor) -> Tensor:
    """target [n], with source [m] added at places [m]."""
    everything = torch.cat([target, source])
    where = torch.cat([torch.arange(target.numel()), places])
    keep = rows_of(everything) != e.table.zero_row
    return grouped(e, everything[keep], where[keep], target.numel(), lambda g: e.sums(g), e.zero)


def grouped(
    e: Elements, ids: Tensor, group: Tensor, count: int, reduce: Callable[[Tensor], Tensor], filler: Tensor | None
) -> Tensor:
    """reduce(elements [groups, terms]) of the elements of each group; short groups are filled, or repeat a term."""
    order = torch.argsort(group, stable=True)
    ids, group = ids[order], group[order]
    sizes = torch.bincount(group, minlength=count)
    starts = sizes.cumsum(0) - sizes
    most = int(sizes.max()) if sizes.numel() else 0
    if most == 0:
        return e.zero.expand(count).clone()
    place = torch.arange(ids.numel()) - starts[group]
    first = ids[starts.clamp(max=ids.numel() - 1)] if filler is None else filler.expand(count)
    table = first[:, None].expand(count, most).clone()
    table[group, place] = ids
    return reduce(table)


@rule("index_add", "scatter_add", "scatter_reduce", "scatter")
def scatter(e: Elements, func, args, kwargs, out) -> Any:
    name, (base, axis, index, source) = base_name(func), args[:4]
    if not isinstance(index, Constant):
        refuse(f"{name} with an index that depends on t or on the state")
    axis, index = axis % max(out.dim(), 1), index.value.cpu()
    places = torch.arange(out.numel()).view(out.shape)
    places = places.index_select(axis, index.reshape(-1)) if name == "index_add" else places.gather(axis, index)
    target = e.ids(base).expand(out.shape).reshape(-1)
    source = e.ids(source)
    source = source[tuple(slice(0, n) for n in places.shape)] if source.dim() else source.expand(places.shape)
    source, places = source.reshape(-1), places.reshape(-1)
    if name == "index_add":
        alpha = kwargs.get("alpha", 1)
        source = source if alpha == 1 else e.pointwise(product, StateValue(source), alpha).ids
    reduction = kwargs.get("reduce", args[4] if len(args) > 4 else None)
    if name == "scatter" and reduction is None:
        return StateValue(target.clone().index_put((places,), source).view(out.shape))
    if name in ("index_add", "scatter_add") or reduction in ("sum", "add"):
        return StateValue(added(e, target, places, source).view(out.shape))
    makers = {"amax": maximum, "amin": minimum}
    if reduction not in makers:
        refuse(f"{name} with reduce={reduction!r}")
    if kwargs.get("include_self", True):
        source, places = torch.cat([target, source]), torch.cat([torch.arange(target.numel()), places])
    found = grouped(e, source, places, target.numel(), lambda g: e.tree(makers[reduction], g), None)
    met = torch.bincount(places, minlength=target.numel()) > 0
    return StateValue(torch.where(met, found, target).view(out.shape))


@rule("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter")
def put(e: Elements, func, args, kwargs, out) -> Any:
    places = torch.arange(out.numel(), dtype=torch.float64).view(out.shape)
    source = e.ids(args[1])
    own = func(torch.full_like(places, -1.0), torch.arange(source.numel(), dtype=torch.float64).view(source.shape), *args[2:], **kwargs)
    index = own.to(torch.int64)
    return StateValue(torch.where(index >= 0, source.reshape(-1)[index.clamp(min=0)], e.ids(args[0])))


# ------------------------------------------------------------------------------------------ elementwise functions


def complement(g: Graph, a: Node) -> Node:
    return g.sub(g.number(1.0), a)


def maximum(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("maximum", a, b)


def minimum(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("minimum", a, b)


def activation(name: str, *params: float) -> Callable[[Graph, Node], Node]:
    return lambda g, z: g.activation(Activation(name, params), z)


def primitive(name: str) -> Callable[..., Node]:
    return lambda g, *operands: g.apply(name, *operands)


def scaled(name: str, inside: float = 1.0, outside: float = 1.0) -> Callable[[Graph, Node], Node]:
    return lambda g, a: g.scaled(g.apply(name, g.scaled(a, inside)), outside)


def choose(g: Graph, condition: Node, a: Node, b: Node) -> Node:
    return g.apply("where", condition, a, b)


def above(g: Graph, a: Node, number: float = 0.0) -> Node:
    return g.apply("gt", a, g.number(number))


def clamped(g: Graph, a: Node, low: Node | None, high: Node | None) -> Node:
    """torch lets the gradient through at the bounds."""
    if low is not None:
        a = choose(g, g.apply("gt", low, a), low, a)
    return a if high is None else choose(g, g.apply("gt", a, high), high, a)


def between(g: Graph, a: Node, low: float, high: float) -> Node:
    """Its gradient is zero at the bounds."""
    a = choose(g, g.apply("ge", g.number(low), a), g.number(low), a)
    return choose(g, g.apply("ge", a, g.number(high)), g.number(high), a)


def softplus(g: Graph, a: Node) -> Node:
    return g.apply("softplus", a)


def gelu(g: Graph, a: Node) -> Node:
    return g.mul(g.scaled(a, 0.5), g.add(g.apply("erf", g.scaled(a, math.sqrt(0.5))), g.number(1.0)))


def gelu_tanh(g: Graph, a: Node) -> Node:
    inner = g.scaled(g.add(a, g.scaled(g.mul(a, g.square(a)), 0.044715)), math.sqrt(2.0 / math.pi))
    return g.mul(g.scaled(a, 0.5), g.add(g.apply("tanh", inner), g.number(1.0)))


def rounded(g: Graph, a: Node) -> Node:
    """To the nearest whole number, and half way to the even one."""
    up = g.apply("floor", g.add(a, g.number(0.5)))
    tie = g.apply("eq", g.sub(up, a), g.number(0.5))
    odd = g.sub(up, g.scaled(g.apply("floor", g.scaled(up, 0.5)), 2.0))
    return g.sub(up, g.mul(tie, odd))


def truncated(g: Graph, a: Node) -> Node:
    return g.mul(g.apply("sign", a), g.apply("floor", g.apply("abs", a)))


def remainder(g: Graph, a: Node, b: Node) -> Node:
    return g.sub(a, g.mul(b, g.apply("floor", g.apply("div", a, b))))


def fmod(g: Graph, a: Node, b: Node) -> Node:
    return g.sub(a, g.mul(b, truncated(g, g.apply("div", a, b))))


def relu6(g: Graph, a: Node) -> Node:
    return between(g, a, 0.0, 6.0)


def hard_sigmoid(g: Graph, a: Node) -> Node:
    return g.scaled(between(g, g.add(a, g.number(3.0)), 0.0, 6.0), 1.0 / 6.0)


def power(g: Graph, a: Node, b: Node) -> Node:
    """a ** b, by what is quick and exact where b is a usual number."""
    if b.kind == "number":
        match b.value:
            case 0.0:
                return g.number(1.0)
            case 1.0:
                return a
            case 2.0:
                return g.activation(Activation("square"), a)
            case 3.0:
                return g.activation(Activation("cube"), a)
            case 4.0:
                return g.square(g.square(a))
            case 0.5:
                return g.apply("sqrt", a)
            case -1.0:
                return g.apply("reciprocal", a)
            case -2.0:
                return g.apply("reciprocal", g.square(a))
            case -0.5:
                return g.apply("rsqrt", a)
    return g.apply("pow", a, b)


def quotient(g: Graph, a: Node, b: Node) -> Node:
    if b.kind == "number" and b.value not in (0.0,) and math.frexp(b.value)[0] in (0.5, -0.5):
        return g.scaled(a, 1.0 / b.value)  # exact
    return g.apply("div", a, b)


def hypot(g: Graph, a: Node, b: Node) -> Node:
    return g.apply("sqrt", g.add(g.square(a), g.square(b)))


def not_a_number(g: Graph, a: Node) -> Node:
    return complement(g, g.apply("eq", a, a))


def truth(g: Graph, a: Node) -> Node:
    return complement(g, g.apply("eq", a, g.number(0.0)))


def log_sigmoid(g: Graph, a: Node) -> Node:
    return g.neg(softplus(g, g.neg(a)))


def inverse_tanh(g: Graph, a: Node) -> Node:
    return g.scaled(g.sub(g.apply("log1p", a), g.apply("log1p", g.neg(a))), 0.5)


def inverse_sinh(g: Graph, a: Node) -> Node:
    """Of the magnitude, so that nothing cancels."""
    size = g.apply("abs", a)
    inner = g.add(size, g.apply("sqrt", g.add(g.square(size), g.number(1.0))))
    return g.mul(g.apply("sign", a), g.apply("log", inner))


# All arguments are operands, numbers too. A new function is a line here.
ELEMENTWISE: dict[str, Callable[..., Node]] = {
    "mul": product,
    "neg": lambda g, a: g.neg(a),
    "abs": primitive("abs"),
    "sign": primitive("sign"),
    "sgn": primitive("sign"),
    "maximum": maximum,
    "minimum": minimum,
    "fmax": maximum,
    "fmin": minimum,
    "sqrt": primitive("sqrt"),
    "rsqrt": primitive("rsqrt"),
    "reciprocal": primitive("reciprocal"),
    "exp": primitive("exp"),
    "exp2": scaled("exp", inside=math.log(2.0)),
    "expm1": primitive("expm1"),
    "log": primitive("log"),
    "log2": scaled("log", outside=1.0 / math.log(2.0)),
    "log10": scaled("log", outside=1.0 / math.log(10.0)),
    "log1p": primitive("log1p"),
    "sin": activation("sin"),
    "cos": primitive("cos"),
    "tan": primitive("tan"),
    "asin": primitive("asin"),
    "acos": primitive("acos"),
    "atan": primitive("atan"),
    "atan2": primitive("atan2"),
    "arctan2": primitive("atan2"),
    "sinh": primitive("sinh"),
    "cosh": primitive("cosh"),
    "asinh": inverse_sinh,
    "atanh": inverse_tanh,
    "tanh": activation("tanh"),
    "sigmoid": activation("sigmoid"),
    "relu": activation("relu"),
    "silu": activation("silu"),
    "erf": primitive("erf"),
    "erfc": lambda g, a: complement(g, g.apply("erf", a)),
    "square": activation("square"),
    "mish": lambda g, a: g.mul(a, g.apply("tanh", softplus(g, a))),
    "relu6": relu6,
    "hardsigmoid": hard_sigmoid,
    "hardswish": lambda g, a: g.mul(a, hard_sigmoid(g, a)),
    "log_sigmoid": log_sigmoid,
    "floor": primitive("floor"),
    "ceil": lambda g, a: g.neg(g.apply("floor", g.neg(a))),
    "round": rounded,
    "trunc": truncated,
    "fix": truncated,
    "frac": lambda g, a: g.sub(a, truncated(g, a)),
    "remainder": remainder,
    "fmod": fmod,
    "pow": power,
    "hypot": hypot,
    "where": choose,
    "gt": primitive("gt"),
    "ge": primitive("ge"),
    "lt": lambda g, a, b: g.apply("gt", b, a),
    "le": lambda g, a, b: g.apply("ge", b, a),
    "eq": primitive("eq"),
    "ne": lambda g, a, b: complement(g, g.apply("eq", a, b)),
    "isnan": not_a_number,
    "logical_not": lambda g, a: g.apply("eq", a, g.number(0.0)),
    "bitwise_not": lambda g, a: g.apply("eq", a, g.number(0.0)),
    "logical_and": lambda g, a, b: g.mul(truth(g, a), truth(g, b)),
    "bitwise_and": lambda g, a, b: g.mul(a, b),
    "logical_or": lambda g, a, b: maximum(g, truth(g, a), truth(g, b)),
    "bitwise_or": maximum,
    "logical_xor": lambda g, a, b: g.apply("abs", g.sub(truth(g, a), truth(g, b))),
    "lerp": lambda g, a, b, w: g.add(a, g.mul(w, g.sub(b, a))),
    "prelu": lambda g, a, w: choose(g, above(g, a), a, g.mul(w, a)),
    "_prelu_kernel": lambda g, a, w: choose(g, above(g, a), a, g.mul(w, a)),
    "threshold": lambda g, a, bound, value: choose(g, g.apply("gt", a, bound), a, value),
    "hardtanh": lambda g, a, low=None, high=None: between(
        g, a, -1.0 if low is None else low.value, 1.0 if high is None else high.value
    ),
    "clamp_min": lambda g, a, low: clamped(g, a, low, None),
    "clamp_max": lambda g, a, high: clamped(g, a, None, high),
    "masked_fill": lambda g, a, mask, value: choose(g, mask, value, a),
    "xlogy": lambda g, a, b: choose(g, g.apply("eq", a, g.number(0.0)), g.number(0.0), g.mul(a, g.apply("log", b))),
    "logaddexp": lambda g, a, b: g.add(maximum(g, a, b), softplus(g, g.neg(g.apply("abs", g.sub(a, b))))),
    "sinc": lambda g, a: choose(
        g, g.apply("eq", a, g.number(0.0)), g.number(1.0),
        g.apply("div", g.apply("sin", g.scaled(a, math.pi)), g.scaled(a, math.pi)),
    ),
    # gradients that torch computes inside forward: grad, then what the function keeps
    "tanh_backward": lambda g, d, y: g.mul(d, complement(g, g.square(y))),
    "sigmoid_backward": lambda g, d, y: g.mul(d, g.mul(y, complement(g, y))),
    "threshold_backward": lambda g, d, a, bound: choose(g, g.apply("gt", a, bound), d, g.number(0.0)),
    "silu_backward": lambda g, d, a: g.mul(d, _silu_slope(g, a)),
    "hardtanh_backward": lambda g, d, a, low, high: choose(
        g, g.mul(g.apply("gt", a, low), g.apply("gt", high, a)), d, g.number(0.0)
    ),
    "mish_backward": lambda g, d, a: g.mul(d, _mish_slope(g, a)),
    "log_sigmoid_backward": lambda g, d, a, buffer=None: g.mul(d, g.apply("sigmoid", g.neg(a))),
    "hardsigmoid_backward": lambda g, d, a: choose(
        g, g.mul(above(g, a, -3.0), g.apply("gt", g.number(3.0), a)), g.scaled(d, 1.0 / 6.0), g.number(0.0)
    ),
}  # fmt: skip


def _silu_slope(g: Graph, a: Node) -> Node:
    s = g.apply("sigmoid", a)
    return g.mul(s, g.add(g.number(1.0), g.mul(a, complement(g, s))))


def _mish_slope(g: Graph, a: Node) -> Node:
    inner = g.apply("tanh", softplus(g, a))
    return g.add(inner, g.mul(g.mul(a, g.apply("sigmoid", a)), complement(g, g.square(inner))))


@rule(*ELEMENTWISE)
def elementwise(e: Elements, func, args, kwargs, out) -> Any:
    base = base_name(func)
    if kwargs and any(v is not None for k, v in kwargs.items() if k not in ("dtype", "layout", "device", "out")):
        given = [kwargs[a.name] for a in func._schema.arguments[len(args):] if a.name in kwargs]
        args = (*args, *given)
    if base == "where" and len(args) == 1 or base == "round" and len(args) > 1:
        refuse(f"the operation {func} on the state")
    first = out[0] if isinstance(out, (tuple, list)) else out
    args = tuple(a for a in args if a is not None)
    if base in ("log_sigmoid_backward",):
        args = args[:2]
    result = e.pointwise(ELEMENTWISE[base], *args, shape=first.shape if base != "prelu" else None)
    return [result, *(Constant(v) for v in out[1:])] if isinstance(out, (tuple, list)) else result


@rule("log_sigmoid_forward")
def log_sigmoid_forward(e: Elements, func, args, kwargs, out) -> Any:
    return [e.pointwise(log_sigmoid, args[0]), Constant(out[1])]


@rule("add", "sub", "rsub")
def sum_rule(e: Elements, func, args, kwargs, out) -> Any:
    base, alpha = base_name(func), argument(args, kwargs, 2, "alpha", 1)
    a, b = args[:2]
    if base == "rsub":
        a, b = b, a
    if alpha != 1:
        b = e.pointwise(product, b, alpha)
    sign = Graph.add if base == "add" else Graph.sub
    return e.pointwise(lambda g, x, y: sign(g, x, y), a, b, shape=out.shape)


@rule("div", "true_divide", "floor_divide")
def div(e: Elements, func, args, kwargs, out) -> Any:
    mode = kwargs.get("rounding_mode") if base_name(func) == "div" else "floor"
    make = {
        None: quotient, "floor": lambda g, a, b: g.apply("floor", g.apply("div", a, b)),
        "trunc": lambda g, a, b: truncated(g, g.apply("div", a, b)),
    }[mode]  # fmt: skip
    return e.pointwise(make, args[0], args[1])


@rule("addcmul")  # a + value * b * c
def addcmul(e: Elements, func, args, kwargs, out) -> Any:
    value = kwargs.get("value", 1)
    return e.pointwise(lambda g, a, b, c, v: g.add(a, g.mul(g.mul(b, c), v)), *args[:3], value)


@rule("addcdiv")
def addcdiv(e: Elements, func, args, kwargs, out) -> Any:
    value = kwargs.get("value", 1)
    return e.pointwise(lambda g, a, b, c, v: g.add(a, g.mul(g.apply("div", b, c), v)), *args[:3], value)


def number(args: tuple, kwargs: dict, position: int, name: str, default: float | None) -> float | None:
    value = argument(args, kwargs, position, name, default)
    if isinstance(value, (TimeValue, StateValue)):
        refuse(f"an activation whose {name} depends on t")
    return float(value) if isinstance(value, (int, float)) else value


@rule("clamp", "clip")
def clamp(e: Elements, func, args, kwargs, out) -> Any:
    low, high = argument(args, kwargs, 1, "min"), argument(args, kwargs, 2, "max")
    if low == 0 and isinstance(low, (int, float)) and high is None:
        return e.pointwise(activation("relu"), args[0])
    bounds = [b for b in (low, high) if b is not None]
    return e.pointwise(
        lambda g, a, *given: clamped(
            g, a, given[0] if low is not None else None, given[-1] if high is not None else None
        ), args[0], *bounds,
    )  # fmt: skip


@rule("softplus")
def softplus_rule(e: Elements, func, args, kwargs, out) -> Any:
    params = (number(args, kwargs, 1, "beta", 1.0), number(args, kwargs, 2, "threshold", 20.0))
    return e.pointwise(activation("softplus", *params), args[0])


@rule("softplus_backward")
def softplus_backward(e: Elements, func, args, kwargs, out) -> Any:
    beta, threshold = number(args, kwargs, 2, "beta", 1.0), number(args, kwargs, 3, "threshold", 20.0)

    def make(g: Graph, d: Node, a: Node) -> Node:
        x = g.scaled(a, beta)
        return choose(g, above(g, x, threshold), d, g.mul(d, g.apply("sigmoid", x)))

    return e.pointwise(make, args[0], args[1])


def _below(g: Graph, a: Node) -> Node:
    """min(a, 0), so that exp of it does not overflow where it is not wanted."""
    return choose(g, above(g, a), g.number(0.0), a)


@rule("elu", "celu", "selu")
def elu(e: Elements, func, args, kwargs, out) -> Any:
    if base_name(func) == "celu":
        alpha = number(args, kwargs, 1, "alpha", 1.0)
        scale, inner = 1.0, 1.0 / alpha
    elif base_name(func) == "selu":
        alpha, scale, inner = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0
    else:
        alpha, scale, inner = (
            number(args, kwargs, i, name, 1.0) for i, name in enumerate(("alpha", "scale", "input_scale"), 1)
        )

    def make(g: Graph, a: Node) -> Node:
        if inner == 1:
            return g.scaled(g.activation(Activation("elu", (alpha,)), a), scale)
        low = g.scaled(g.apply("expm1", g.scaled(_below(g, a), inner)), alpha)
        return g.scaled(choose(g, above(g, a), a, low), scale)

    return e.pointwise(make, args[0])


@rule("elu_backward")
def elu_backward(e: Elements, func, args, kwargs, out) -> Any:
    alpha, scale, inner, is_result = (float(a) for a in args[1:5])

    def make(g: Graph, d: Node, a: Node) -> Node:
        if is_result:
            slope = g.scaled(g.add(a, g.number(alpha * scale)), inner)
        else:
            slope = g.scaled(g.apply("exp", g.scaled(_below(g, a), inner)), alpha * scale * inner)
        return g.mul(d, choose(g, above(g, a), g.number(scale), slope))

    return e.pointwise(make, args[0], args[5])


@rule("leaky_relu")
def leaky_relu(e: Elements, func, args, kwargs, out) -> Any:
    slope = number(args, kwargs, 1, "negative_slope", 0.01)
    return e.pointwise(lambda g, a: choose(g, above(g, a), a, g.scaled(a, slope)), args[0])


@rule("leaky_relu_backward")
def leaky_relu_backward(e: Elements, func, args, kwargs, out) -> Any:
    slope = float(args[2])
    return e.pointwise(lambda g, d, a: choose(g, above(g, a), d, g.scaled(d, slope)), args[0], args[1])


@rule("gelu")
def gelu_rule(e: Elements, func, args, kwargs, out) -> Any:
    return e.pointwise(gelu_tanh if kwargs.get("approximate", "none") == "tanh" else gelu, args[0])


@rule("gelu_backward")
def gelu_backward(e: Elements, func, args, kwargs, out) -> Any:
    def make(g: Graph, d: Node, a: Node) -> Node:
        if kwargs.get("approximate", "none") == "tanh":
            c = math.sqrt(2.0 / math.pi)
            inner = g.apply("tanh", g.scaled(g.add(a, g.scaled(g.mul(a, g.square(a)), 0.044715)), c))
            slope = g.scaled(g.add(g.scaled(g.square(a), 3 * 0.044715), g.number(1.0)), c)
            bent = g.mul(g.mul(g.scaled(a, 0.5), complement(g, g.square(inner))), slope)
            return g.mul(d, g.add(g.scaled(g.add(inner, g.number(1.0)), 0.5), bent))
        density = g.scaled(g.apply("exp", g.scaled(g.square(a), -0.5)), 1.0 / math.sqrt(2.0 * math.pi))
        half = g.scaled(g.add(g.apply("erf", g.scaled(a, math.sqrt(0.5))), g.number(1.0)), 0.5)
        return g.mul(d, g.add(half, g.mul(a, density)))

    return e.pointwise(make, args[0], args[1])


@rule("_prelu_kernel_backward")
def prelu_backward(e: Elements, func, args, kwargs, out) -> Any:
    from .values import Opaque

    slope = e.pointwise(lambda g, d, a, w: choose(g, above(g, a), d, g.mul(d, w)), *args[:3])
    return [slope, Opaque(out[1].shape, "the gradient of a slope")]


@rule("glu", "glu_backward")
def glu(e: Elements, func, args, kwargs, out) -> Any:
    backward = base_name(func) == "glu_backward"
    ids, axis = e.ids(args[1] if backward else args[0]), argument(args, kwargs, 2 if backward else 1, "dim", -1)
    a, b = (StateValue(half) for half in ids.chunk(2, axis))
    if not backward:
        return e.pointwise(lambda g, x, y: g.mul(x, g.apply("sigmoid", y)), a, b)
    left = e.pointwise(lambda g, d, y: g.mul(d, g.apply("sigmoid", y)), args[0], b)
    right = e.pointwise(
        lambda g, d, x, s: g.mul(g.mul(d, x), g.mul(s, complement(g, s))), args[0], a,
        e.pointwise(activation("sigmoid"), b),
    )  # fmt: skip
    return StateValue(torch.cat([left.ids, right.ids], axis))


@rule("softshrink", "hardshrink", "tanhshrink")
def shrink(e: Elements, func, args, kwargs, out) -> Any:
    bound = number(args, kwargs, 1, "lambd", 0.5)

    def make(g: Graph, a: Node) -> Node:
        low, high = above(g, g.neg(a), bound), above(g, a, bound)
        if base_name(func) == "hardshrink":
            return choose(g, g.add(low, high), a, g.number(0.0))
        return choose(g, high, g.sub(a, g.number(bound)), choose(g, low, g.add(a, g.number(bound)), g.number(0.0)))

    return e.pointwise(make, args[0])


@rule("nan_to_num")
def nan_to_num(e: Elements, func, args, kwargs, out) -> Any:
    if any(argument(args, kwargs, i, name) is not None for i, name in ((2, "posinf"), (3, "neginf"))):
        refuse("nan_to_num with values for infinities")
    low, high = torch.finfo(e.table.dtype).min, torch.finfo(e.table.dtype).max
    nan = float(argument(args, kwargs, 1, "nan", 0.0) or 0.0)
    return e.pointwise(lambda g, a: choose(
        g, not_a_number(g, a), g.number(nan), g.apply("minimum", g.apply("maximum", a, g.number(low)), g.number(high))
    ), args[0])  # fmt: skip


@rule("zero", "fill")
def fill(e: Elements, func, args, kwargs, out) -> Any:
    value = args[1] if len(args) > 1 else 0.0
    return StateValue(e.ids(value).expand(out.shape).clone())


from . import graph_linear, graph_reductions  # noqa: E402, F401  they register their rules
