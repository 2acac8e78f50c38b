"""Running a module's forward under a dispatch mode that sees every aten operation, and keeping an abstract value beside
each tensor."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ..field import UnsupportedFieldError
from ..warn import line_of_forward
from .algebra import apply, evaluate, sparse_linear
from .branches import Branches
from .complex_operations import is_complex
from .complex_pairs import Pairs
from .context import names_of
from .operations import ADDITIVE, BILINEAR, FACTORIES, FULL, aten, base_name, is_in_place, written
from .probe import Probe
from .provenance import ParameterNumbers
from .reads import Reads, is_finiteness
from .python_times import SlotReader
from .refusal import REMEDY, PythonValue, refuse, refuse_python_value
from .replay import Node, Replay
from .rows import Affine, Hidden, RowTable
from .rules import Reading, apply_to_state
from .samples import Samples
from .seen import AT_POSITIONS, current
from .trees import tree_leaves, tree_map
from .values import Constant, Overwritten, StateValue, TimeValue


DENSE = {aten._sparse_addmm.default: aten.addmm.default, aten._sparse_mm.default: aten.mm.default}  # what they compute


def _memory(tensor: Tensor) -> int:
    """Equal for tensors that share memory."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _draws_nothing(base: str, args: tuple) -> bool:
    """Whether an operation that may draw numbers does not: attention without dropout, RReLU in evaluation."""
    return base.startswith("_scaled_dot_product") or base == "rrelu_with_noise" and not any(a is True for a in args[2:])


class ModuleStack:
    """Which submodule is running."""

    def __init__(self, root: nn.Module) -> None:
        self._root, self._running = root, []
        self.refusal: UnsupportedFieldError | None = None  # the last one: TorchScript makes another error of it
        self._paths = {id(m): name for name, m in root.named_modules()}

    @property
    def path(self) -> str:
        return self._paths.get(id(self._running[-1]), "") if self._running else ""

    def __str__(self) -> str:
        name = type(self._running[-1] if self._running else self._root).__name__
        return f"module {self.path!r} ({name})" if self.path else f"module {name}"

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        def leave(module, args, result) -> None:
            while self._running and self._running.pop() is not module:
                pass

        hooks = (
            register_module_forward_pre_hook(lambda module, args: self._running.append(module)),
            register_module_forward_hook(leave),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Refusals say where."""
        try:
            yield
        except UnsupportedFieldError as error:
            if error is self.refusal:  # by an operation within this one
                raise
            line = line_of_forward()
            at = f" ({line})" if line is not None and line not in str(error) else ""
            kind = PythonValue if isinstance(error, PythonValue) else UnsupportedFieldError
            self.refusal = kind(f"{self}: {error}{at}")
            raise self.refusal from error.__cause__


class Following(TorchDispatchMode):
    """Sees every operation of one run of a module, and what its tensors depend on."""

    attends = False  # attention is followed, not refused where it is called
    branches: Branches | None = None  # on t, that are followed
    slots: SlotReader | None = None  # what Python makes of t

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would load its compiler, which takes seconds, only to keep it from compiling this class."""
        return False

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.stack, self.seen = module, ModuleStack(module), current()
        self.parameters = ParameterNumbers(module, dtype, self.seen.take, self.seen.moving)
        self.seen.begin()
        self.values: dict[int, Any] = {}
        self.pairs = Pairs(self)  # complex tensors
        self.aliases: dict[int, list[Tensor]] = {}  # by memory; also keeps ids unique, for these tensors stay alive
        self.numbers: dict[float, TimeValue] = {}  # t, and what is read out of functions of t by .item()
        self.read_by_python = False  # values that depend on t
        self.without_grad: list[tuple[Any, bool]] = []  # what forward has entered of torch.no_grad's kind: does it cut?
        self.operation = ""  # the last one
        self.given: tuple = ()  # its arguments, as they are

    def bind_time(self, t: Tensor) -> None:
        slope, offset = Constant(torch.ones_like(t)), Constant(torch.zeros_like(t))
        time = TimeValue(t, Node(aten.reshape.default, (Node(), list(t.shape))), (slope, offset))
        self.bind(t, time)
        self.numbers[t.item()] = apply(aten.reshape.default, time, [])

    def follow(self, number: float, value: TimeValue) -> None:
        """A number that Python has read out of a function of t."""
        self.read_by_python = True
        self.numbers[number] = apply(aten.reshape.default, value, [])

    def layer_name(self, weight: Constant) -> str:
        path, parameter = self.stack.path, self.parameters.first_name(weight)
        # A bare parameter names its layer itself: its owner holds several.
        return path if parameter is None or (path and path == parameter.rpartition(".")[0]) else parameter

    # --------------------------------------------------------------------------------------------- values of tensors

    def value_of(self, tensor: Tensor) -> Any:
        value = self.values.get(id(tensor))
        if value is None:
            value = self.constant_of(tensor)
            self.bind(tensor, value)
        elif isinstance(value, Overwritten):
            refuse("writing into a slice of a tensor", "Join the parts with torch.cat or torch.stack instead")
        return value

    def constant_of(self, tensor: Tensor) -> Constant:
        """The value of a tensor that is met for the first time."""
        self.seen.ids.add(id(tensor))  # torch may have been called with none, by an extension in C++
        return self.parameters.constant(tensor)

    def bind(self, tensor: Tensor, value: Any) -> None:
        if id(tensor) not in self.values:
            self.aliases.setdefault(_memory(tensor), []).append(tensor)
        self.values[id(tensor)] = value

    def rebind(self, tensor: Tensor, value: Any) -> None:
        """After an in-place operation: other views of the same memory follow, or become unreadable."""
        self.pairs.check_written(tensor)
        self.bind(tensor, value)
        geometry = lambda x: (x.shape, x.stride(), x.storage_offset())
        for other in self.aliases[_memory(tensor)]:
            if other is not tensor:
                self.values[id(other)] = value if geometry(other) == geometry(tensor) else Overwritten()

    def detached(self, tensor: Tensor) -> None:
        """forward itself has detached it: gradients end there. What autograd detaches on its way is not meant."""
        if isinstance(self.values.get(id(tensor)), StateValue):
            self.values[id(tensor)] = self._detached(self.values[id(tensor)])
        self.pairs.detached(tensor)

    def _cut(self, value: Any) -> Any:
        """A value that was made within torch.no_grad."""
        if isinstance(value, StateValue):
            return self._detached(value)
        return apply(aten.detach.default, value) if isinstance(value, Constant) and value.source is not None else value

    def _detached(self, value: StateValue) -> Any:
        return Overwritten()  # no layer of a chain: unreadable, but it may be kept

    # ------------------------------------------------------------------------------------------------------ operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self.stack.naming():
            return self._operation(func, args, kwargs or {})

    def _operation(self, func, args: tuple, kwargs: dict) -> Any:
        base = base_name(func)
        self.operation = base
        if torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(base, args):
            if self.module.training and ("dropout" in base or base.startswith("bernoulli")):
                refuse(f"randomness ({base})", "Call .eval() on the module first (dropout is active in training)")
            refuse(
                f"randomness ({base})",
                "Draw the numbers before the solve, and keep them as an attribute: a tensor with a row for every sample",
            )

        leaves = tree_leaves((args, kwargs))
        if any(map(is_complex, leaves)):
            return self._complex(func, args, kwargs, None)

        slots = {} if self.slots is None else self.slots.at(func, leaves)
        number = itertools.count()

        def lift(a):
            if (slot := slots.get(next(number))) is not None:
                return slot
            if isinstance(a, Tensor):
                return self.value_of(a)
            return self.numbers.get(a, a) if isinstance(a, float) else a

        abstract_args, abstract_kwargs = tree_map(lift, tuple(args)), tree_map(lift, kwargs)
        self.given = args
        out = func(*args, **kwargs)
        results = tree_leaves(out)
        if any(isinstance(x, Tensor) and x.is_meta for x in (*leaves, *results)):
            return out  # forward derivatives ask so for shapes
        if base.startswith(("empty", "new_empty")) and isinstance(out, Tensor):
            out.zero_()  # memory that nobody has written yet holds anything, NaN too
        if any(map(is_complex, results)):
            return self._complex(func, args, kwargs, out)
        result = self._abstract(func, abstract_args, abstract_kwargs, out)
        if self.without_grad and self.without_grad[-1][1]:
            result = tree_map(self._cut, result)
        changed = [args[i] for i in written(func) if i < len(args) and isinstance(args[i], Tensor)]
        if changed and is_in_place(func):
            self.rebind(changed[0], result)
        else:
            for tensor, value in zip(results, tree_leaves(result)):
                if isinstance(tensor, Tensor):
                    self.bind(tensor, value)
        return out

    def _complex(self, func, args: tuple, kwargs: dict, out: Any) -> Any:
        """The result of an operation that complex tensors take part in. out: it, where it is known."""
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        return self.pairs.operation(func, args, kwargs, out)

    def _abstract(self, func, args: tuple, kwargs: dict, out: Any) -> Any:
        """The abstract value of `out`."""
        base, leaves = base_name(func), tree_leaves((args, kwargs))
        has_time, has_state = (any(isinstance(a, kind) for a in leaves) for kind in (TimeValue, StateValue))
        if base in AT_POSITIONS:
            for a in leaves:
                if isinstance(a, Constant) and not a.value.is_floating_point():
                    self.seen.take(a)
        if torch.Tag.data_dependent_output in func.tags and not isinstance(out, Tensor):
            for a in leaves:
                self.seen.take(a)
            if has_state and not all(a.checks for a in leaves if isinstance(a, StateValue)):
                refuse("reading a number out of the state (.item(), an if on its values)")
            if isinstance(out, float) and isinstance(args[0], Constant):
                self._refuse_number_of_parameter(args[0])
            if has_time and isinstance(out, float):
                self.follow(out, args[0])
            elif has_time and self.slots is None and not (base == "_local_scalar_dense" and is_finiteness(args[0].node)):
                what = "a truth value" if isinstance(out, bool) else "a whole number"
                refuse_python_value(f"{what} is made of t (an if, a comparison in Python, an index of a list)")
            return out
        if torch.Tag.dynamic_output_shape in func.tags:
            self.read_by_python |= has_time  # the shape
            for a in leaves:
                self.seen.take(a)
        if "out" in kwargs and (has_state or has_time):
            refuse(f"out= of {base}", "Use the result instead")
        if base == "select" and isinstance(args[2], TimeValue):  # a slot
            axis, place = args[1], apply(aten.reshape.default, args[2], [1])
            behind = apply(aten.add.Tensor, place, args[0].shape[axis])  # counted from the end
            place = apply(aten.where.self, apply(aten.lt.Scalar, place, 0), behind, place)
            one = self._abstract(aten.index_select.default, (args[0], axis, place), {}, out.unsqueeze(axis))
            return self._abstract(aten.squeeze.dim, (one, axis), {}, out)
        if base == "lift_fresh" and isinstance(args[0], Constant) and out.is_floating_point():
            return self._with_numbers(args[0])
        number = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, TimeValue)), None)
        if base in FULL and number is not None:
            return apply(aten.expand.default, number, list(out.shape))
        if base in FACTORIES:
            return tree_map(Constant, out)
        if func in DENSE:
            func = DENSE[func]
        if func.namespace == "sparseflow" and base == "linear" and not isinstance(args[0], StateValue):
            return sparse_linear(args, out)
        if has_state:
            return self._of_state(func, args, kwargs, out)
        if not has_time:  # the tensor may be written to later, through whatever shares its memory
            out = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)
        if base in ADDITIVE | BILINEAR and func._overloadname == "Scalar" and number is not None:
            func = getattr(aten, base).Tensor  # its number was read out of t
        return evaluate(func, args, kwargs, out)

    def _refuse_number_of_parameter(self, value: Constant) -> None:
        names = [] if value.node is None else Replay(value.node, self.parameters.dtype).leaves()
        trained = sorted(name for name in names if self.parameters.knows(name) and self.parameters.trained(name))
        if trained:
            refuse(
                f"a number read out of the parameter {trained[0]!r} (.item(), float(), torch.full), which would stay what it "
                "is now",
                "Use the tensor itself (.detach() where it is to have no gradient), or freeze the parameter "
                f"(requires_grad_(False)). Otherwise u{REMEDY[1:]}",
            )

    def _of_state(self, func, args: tuple, kwargs: dict, out: Any) -> Any:
        """The abstract value of an operation on states."""
        raise NotImplementedError

    def _with_numbers(self, constant: Constant) -> Constant | TimeValue:
        """What torch.tensor([..., t, ...]) makes: the number is copied unseen, but equals no other by accident."""
        result, dtype = constant, constant.value.dtype
        for number, time in self.numbers.items():
            here = constant.value == torch.tensor(number, dtype=dtype, device=constant.value.device)
            if bool(here.any()):
                time = apply(aten._to_copy.default, time, dtype=dtype)
                time = apply(aten.mul.Tensor, Constant(here.to(dtype)), time)
                rest = result.value.masked_fill(here, 0.0)
                if isinstance(result, Constant) and not bool(rest.any()):
                    result = time
                else:
                    kept = Constant((~here).to(dtype))
                    result = apply(aten.add.Tensor, apply(aten.mul.Tensor, result, kept), time)
        return result


class Tracer(Following):
    """Reads one run of module(t, y), y [batch, dim], as a chain: `tracer.read(t, y)` gives the rows of the result."""

    def __init__(self, module: nn.Module, probe: Probe) -> None:
        super().__init__(module, probe.dtype)
        self.probe, self.table, self.samples = probe, RowTable(probe.dtype, probe.device), Samples(probe.batch)
        self.reading = Reading(self.table, self.samples, self.layer_name)
        # Where forward runs for one batch alone, what has a row for each of its samples is theirs, even if they are alike now.
        self._of_samples = names_of(module, probe.batch) if probe.only else {}

    def value_of(self, tensor: Tensor) -> Any:
        if id(tensor) in self._of_samples and id(tensor) not in self.values:
            refuse(f"numbers per sample, which the module holds ({self._of_samples[id(tensor)].name})")
        return super().value_of(tensor)

    def read(self, t: Tensor, y: Tensor) -> tuple[Affine, Hidden]:
        """The pending rows of module(t, y), and the layer that stands for y."""
        root = Hidden(y.shape[1])
        self.bind(y, self.samples.spread(self.table.outputs(root)))
        self.bind_time(t)
        with Reads(self), self, self.stack.following():
            out = self.probe.run(self.module, t, y)
        with self.stack.naming():
            value = self.value_of(out)
            if not isinstance(value, StateValue):
                value = self.reading.as_state(value, 0)
            if self.samples.axis_of(value.ids) != 0:
                refuse("a result whose first axis is not the batch")
            return self.table.gather(value.ids[0]), root

    def _complex(self, func, args: tuple, kwargs: dict, out: Any) -> Any:
        refuse("complex numbers")

    def _of_state(self, func, args: tuple, kwargs: dict, out: Any) -> Any:
        return apply_to_state(self.reading, func, args, kwargs, out)
