"""What the operations of a graph program mean (csrc/field.h), in plain torch: a builder that stands in for the native one,
so that what is written can be told from how it is run."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from sparseflow_kernels import activations
from sparseflow_kernels.engines.program import Store
from sparseflow_kernels.field import Activation
from sparseflow_kernels.field.primitives import PRIMITIVES

BY_NUMBER = {primitive.number: primitive for primitive in PRIMITIVES.values()}
ABSENT = (-1, 0, 0)
ACTIVATIONS = {rule.number: name for name, rule in activations.ACTIVATIONS.items()}


class Builder:
    dtype = torch.float64

    def __init__(self):
        self.matrices, self.vectors, self.modulations, self.buffers = [], [], [], []
        self.expressions, self.sums, self.lists = [], [], {"body": [], "reverse": []}

    def matrix(self, rows, cols, row_ptr, col, values):
        row = np.repeat(np.arange(rows), np.diff(row_ptr))
        self.matrices.append({"shape": (rows, cols), "row": torch.tensor(row), "col": torch.tensor(col).long(),
                              "values": torch.tensor(values, dtype=self.dtype), "sum": -1})
        return len(self.matrices) - 1

    def vector(self, n, values=None, time_row=-1):
        values = None if values is None else torch.tensor(values, dtype=self.dtype)
        self.vectors.append({"n": n, "values": values, "row": time_row, "sum": -1})
        return len(self.vectors) - 1

    def vector_modulation(self, n, scale=-1, shift=-1):
        self.modulations.append((n, scale, shift))
        return len(self.modulations) - 1

    def buffer(self, rows, slots=1):
        self.buffers.append((rows, slots))
        return len(self.buffers) - 1

    def expression(self, inputs, vectors, outputs, registers, op, to, a, b, c, number):
        self.expressions.append((inputs, vectors, outputs, registers, list(zip(op, to, a, b, c, number))))
        written = set(range(inputs))
        for o, t, x, y, z, _ in self.expressions[-1][-1]:
            arity = {0: 1, 1: 0, 2: 0, 8: 1, 9: 1, 28: 1, 41: 3, 42: 1, 43: 1}.get(o) if o not in BY_NUMBER else None
            arity = BY_NUMBER[o].arity if arity is None else arity
            assert all(p in written for p in (x, y, z)[:arity]), "reads what nobody has written"
            assert t >= inputs and t < inputs + outputs + registers
            written.add(t)
        return len(self.expressions) - 1

    def sum(self, size, each_stage):
        self.sums.append((size, each_stage))
        return len(self.sums) - 1

    def sum_of_matrix(self, matrix, number):
        assert self.matrices[matrix]["sum"] == -1
        self.matrices[matrix]["sum"] = number

    def sum_of_vector(self, vector, number):
        assert self.vectors[vector]["sum"] == -1
        self.vectors[vector]["sum"] = number

    def pointwise(self, expression, rows, inputs, vectors, outputs, list="body", totals=()):
        self.lists[list].append(("pointwise", expression, rows, inputs, vectors, outputs, totals))

    def product(self, matrix, source, target, factor=ABSENT, transposed=False, addend=ABSENT, list="body"):
        self.lists[list].append(("product", matrix, source, target, factor, transposed, addend))

    def affine(self, matrix, source, target, modulation, activation, a, b, store, list="body", seed=ABSENT):
        self.lists[list].append(("affine", matrix, source, target, modulation, activation, a, b, store, seed))

    def gradient(self, matrix, left, right, sum):
        self.lists["reverse"].append(("gradient", matrix, left, right, sum))

    def graph_roles(self, dim, out, divergence, input, output, ones=-1, context=-1, time_rows=0, time_external=-1, externals=0):
        self.roles = dict(dim=dim, out=out, divergence=divergence, input=input, output=output, ones=ones, context=context, time_rows=time_rows)

    def graph_adjoint_roles(self, cotangent, trace_cotangent, state_cotangent, context_cotangent=-1):
        self.roles |= dict(cotangent=cotangent, trace=trace_cotangent, pulled=state_cotangent, of_context=context_cotangent)

    def compile(self):
        return Program(self)

    compile_adjoint = compile


def numbers_at(address: int, count: int) -> torch.Tensor:
    number = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}[Builder.dtype]
    return torch.tensor((number * count).from_address(address), dtype=Builder.dtype)


def write_to(address: int, values: torch.Tensor) -> None:
    ctypes.memmove(address, values.contiguous().data_ptr(), values.nbytes)


class Program:
    def __init__(self, builder):
        self.b, self.time, self.refresh = builder, None, None

    def renew(self, matrices, vectors, modulations):
        assert not modulations
        for number, (address, count) in matrices:
            assert count == len(self.b.matrices[number]["values"])
            self.b.matrices[number]["values"] = numbers_at(address, count)
        for number, (address, count) in vectors:
            assert count == self.b.vectors[number]["n"] and self.b.vectors[number]["row"] < 0
            self.b.vectors[number]["values"] = numbers_at(address, count)

    def set_time(self, program):
        self.time = program

    def dense(self, number):
        m = self.b.matrices[number]
        dense = torch.zeros(m["shape"], dtype=Builder.dtype)
        dense[m["row"], m["col"]] = m["values"]
        return dense

    def start(self, t, x, context):
        b, batch = self.b, len(x)
        self.memory = [torch.full((slots, rows, batch), math.nan, dtype=Builder.dtype) for rows, slots in b.buffers]
        self.whole("input")[:] = x.T
        if b.roles["ones"] >= 0:
            self.whole("ones")[:] = 1.0
        if b.roles["context"] >= 0:
            self.whole("context")[:] = context.T
        self.answer = None
        if b.roles["time_rows"]:
            self.answer = self.time.call(0.0, torch.tensor([[t]], dtype=Builder.dtype))[0][0]
        self.reduce = torch.zeros(batch, dtype=Builder.dtype)
        self.totals = [torch.zeros(size, dtype=Builder.dtype) for size, _ in b.sums]

    def vector(self, number):
        v = self.b.vectors[number]
        return v["values"] if v["row"] < 0 else self.answer[v["row"] : v["row"] + v["n"]]

    def rows(self, place, count):
        buffer, slot, row = place
        rows, slots = self.b.buffers[buffer]
        assert 0 <= row and row + count <= rows and 0 <= slot < slots, "rows outside the buffer"
        return self.memory[buffer][slot, row : row + count]

    def whole(self, role):
        """Slot 0 of the buffer of this role."""
        return self.memory[self.b.roles[role]][0]

    def run(self, name):
        for kind, *op in self.b.lists[name]:
            getattr(self, "_" + kind)(*op)

    def _product(self, matrix, source, target, factor, transposed, addend):
        dense = self.dense(matrix).T if transposed else self.dense(matrix)
        value = dense @ self.rows(source, dense.shape[1])
        if factor[0] >= 0:
            value = value * self.rows(factor, dense.shape[0])
        if addend[0] >= 0:
            value = value + self.rows(addend, dense.shape[0])
        self.rows(target, dense.shape[0])[:] = value

    def _affine(self, matrix, source, target, modulation, activation, a, b, store, seed):
        assert target[1] == 0, "a layer's value lies in a first slot"
        dense = self.dense(matrix)
        n, scale, shift = self.b.modulations[modulation]
        assert n == dense.shape[0]
        z = dense @ self.rows(source, dense.shape[1])
        z = z if scale < 0 else self.vector(scale)[:, None] * z
        z = z if shift < 0 else z + self.vector(shift)[:, None]
        name = ACTIVATIONS[activation]
        params = (a, b)[: len(activations.ACTIVATIONS[name].defaults)]
        self.rows(target, dense.shape[0])[:] = activations.apply(Activation(name, params), z)
        assert store == Store.VALUE or scale < 0, "a slope would be that of z by W h"
        if store != Store.VALUE:
            buffer, slot, row = target
            slope = activations.derivative(Activation(name, params), z)
            if store == Store.TANGENT:
                assert source[1] == slot == 0
                slope = slope * (dense @ self.rows((source[0], 1, source[2]), dense.shape[1]))
            if store == Store.SEED:
                slope = slope * self.rows(seed, dense.shape[0])
            self.rows((buffer, slot + 1, row), dense.shape[0])[:] = slope

    def _pointwise(self, expression, rows, inputs, vectors, outputs, totals):
        n_in, n_vec, n_out, _, code = self.b.expressions[expression]
        assert (n_in, n_vec, n_out) == (len(inputs), len(vectors), len(outputs))
        places = {i: self.rows(p[:3], 1 if p[3] else rows).expand(rows, -1).clone() for i, p in enumerate(inputs)}
        values = []
        for number, first, broadcast in vectors:
            v = self.vector(number)
            values.append((v[first : first + 1].expand(rows) if broadcast else v[first : first + rows])[:, None])
            assert len(values[-1]) == rows
        one = torch.ones(rows, len(self.reduce), dtype=Builder.dtype)
        for op, to, a, b, c, number in code:
            match op:
                case 0: value = places[a]
                case 1: value = number * one
                case 2: value = values[b] * one
                case 8: value = places[a] + number
                case 9: value = places[a] * number
                case 28: value = places[a] ** number
                case 41: value = places[a] * places[b] + places[c]
                case 42: value = places[a] * values[b]
                case 43: value = places[a] + values[b]
                case _: value = BY_NUMBER[op].value(*(places[p] for p in (a, b, c)[: BY_NUMBER[op].arity]))
            places[to] = value
        for number, place in enumerate(outputs):
            value = places[n_in + number]
            if place[0] < 0:
                self.reduce += value.sum(0)
            else:
                self.rows(place, rows)[:] = value
        for place, row in totals:
            self.rows(row, 1)[:] = places[place].sum(0)

    def _gradient(self, matrix, left, right, sum):
        m = self.b.matrices[matrix]
        left, right = self.rows(left, m["shape"][0]), self.rows(right, m["shape"][1])
        self.totals[sum] += (left[m["row"]] * right[m["col"]]).sum(1)

    def evaluate(self, t, x, noise, batch, threads, f=0, trace=0, grad_f=0, grad_trace=0, grad_x=0):
        """By addresses, as native programs are called; without noise, trace and context."""
        roles, buffers = self.b.roles, self.b.buffers
        x = numbers_at(x, batch * buffers[roles["input"]][0]).view(batch, -1)
        if not grad_f:
            write_to(f, self.call(t, x)[0])
            return None
        grad_f = numbers_at(grad_f, batch * buffers[roles["output"]][0]).view(batch, -1)
        pulled, _, raw = self.back(t, x, grad_f, None)
        write_to(grad_x, pulled)
        return raw

    def call(self, t, x, context=None):
        self.start(t, x, context)
        self.run("body")
        f = self.whole("output").T.clone()
        assert not f.isnan().any(), "a row that nobody has written"
        return f, self.reduce.clone()

    def back(self, t, x, grad_f, grad_trace, context=None):
        self.start(t, x, context)
        roles = self.b.roles
        self.whole("cotangent")[:] = grad_f.T
        if roles["trace"] >= 0:
            self.whole("trace")[:] = grad_trace
        self.run("reverse")
        raw = {
            "matrices": [(self.totals[m["sum"]] if m["sum"] >= 0 else torch.zeros(0)).numpy() for m in self.b.matrices],
            "vectors": [
                (self.totals[v["sum"]] if v["sum"] >= 0 and v["row"] < 0 else torch.zeros(0)).numpy() for v in self.b.vectors
            ],
            "time_points": np.array([t] if roles["time_rows"] else []),
        }
        cotangent = torch.zeros(roles["time_rows"], dtype=Builder.dtype)
        for v in self.b.vectors:
            if v["sum"] >= 0 and v["row"] >= 0:
                cotangent[v["row"] : v["row"] + v["n"]] += self.totals[v["sum"]]
        raw["time_cotangents"] = cotangent.numpy()
        of_context = None if roles["of_context"] < 0 else self.whole("of_context").T.clone()
        return self.whole("pulled").T.clone(), of_context, raw
