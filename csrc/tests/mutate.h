// Good programs made bad: one number spoiled, or anything else that a program is made of changed, several times over.
#pragma once

#include <utility>

#include "random_program.h"

namespace sparseflow::testing {

// One number of a good program spoiled.
template <class T>
Program<T> spoiled(Random& random, const Program<double>& good) {
  Program<T> p = convert<T>(good);
  std::vector<int*> fields{&p.dim, &p.out, &p.input, &p.output, &p.noise, &p.ones, &p.externals, &p.context, &p.context_cotangent, &p.time_rows, &p.time_external};
  auto operand = [&](Operand& o) { fields.insert(fields.end(), {&o.buffer, &o.slot, &o.row}); };
  auto list = [&](std::vector<int32_t>& v) {
    if (!v.empty()) fields.push_back(&v[pick(random, 0, static_cast<int>(v.size()) - 1)]);
  };
  for (auto& b : p.buffers) fields.insert(fields.end(), {&b.rows, &b.slots});
  for (auto& m : p.modulations) fields.insert(fields.end(), {&m.n, &m.external_gate, &m.external_shift, &m.scale_vector, &m.shift_vector, &m.shift_sum, &m.gate_sum});
  for (auto& v : p.vectors) fields.insert(fields.end(), {&v.n, &v.time_row, &v.sum});
  for (auto& e : p.expressions) fields.insert(fields.end(), {&e.inputs, &e.vectors, &e.outputs, &e.registers});
  for (auto& sum : p.sums) fields.push_back(&sum.size);
  fields.insert(fields.end(), {&p.cotangent, &p.trace_cotangent, &p.state_cotangent});
  for (auto& m : p.matrices) {
    fields.insert(fields.end(), {&m.rows, &m.cols, &m.gate_modulation, &m.external, &m.sum});
    list(m.row_ptr), list(m.col), list(m.path_entry), list(m.path_gate);
  }
  for (auto* ops : {&p.prologue, &p.body, &p.keep, &p.reverse})
    for (Op& op : *ops) {
      fields.insert(fields.end(), {&op.matrix, &op.modulation, &op.store, &op.coefficient_matrix, &op.sum, &op.slope_from});
      if (op.kind == OpKind::kPointwise) fields.insert(fields.end(), {&op.expression, &op.rows});
      for (auto& in : op.inputs) operand(in.rows);
      for (auto& v : op.vectors) fields.insert(fields.end(), {&v.vector, &v.first});
      for (auto& o : op.outputs) operand(o);
      for (auto& total : op.totals) fields.push_back(&total.place), operand(total.target);
      for (Operand* o : {&op.source, &op.target, &op.seed, &op.weight, &op.factor, &op.factor2, &op.addend, &op.kept, &op.slope_cotangent, &op.value})
        operand(*o);
      list(op.factor_row), list(op.factor2_row);
    }
  int* field = fields[pick(random, 0, static_cast<int>(fields.size()) - 1)];
  const int values[] = {-2, -1, 0, 1, 2, 3, 5, 7, 30, 31, 1 << 20, 1 << 30, INT_MAX, INT_MIN, *field + 1, *field - 1};
  *field = values[pick(random, 0, 13 + (*field < INT_MAX ? 1 : 0) + (*field > INT_MIN ? 1 : 0))];
  return p;
}

// One change of any other kind.
template <class T>
void mutate(Random& random, Program<T>& p) {
  std::vector<std::vector<Op>*> lists{&p.prologue, &p.body, &p.keep, &p.reverse};
  std::vector<Op*> ops;
  for (auto* list : lists)
    for (Op& op : *list) ops.push_back(&op);
  auto one_of = [&](auto& from) -> auto& { return from[pick(random, 0, static_cast<int>(from.size()) - 1)]; };
  auto resize = [&](auto& v) {
    if (v.empty() || chance(random, 0.4)) v.push_back(v.empty() ? decltype(v[0] + v[0])(0) : v[pick(random, 0, int(v.size()) - 1)]);
    else if (chance(random, 0.8)) v.pop_back();
    else v.clear();
  };
  auto operands = [](Op& op) { return std::vector<Operand*>{&op.source, &op.target, &op.seed, &op.weight, &op.factor, &op.factor2, &op.addend, &op.kept, &op.slope_cotangent, &op.value}; };
  auto any_operands = [&](Op& op) {
    std::vector<Operand*> out = operands(op);
    for (auto& in : op.inputs) out.push_back(&in.rows);
    for (auto& o : op.outputs) out.push_back(&o);
    for (auto& total : op.totals) out.push_back(&total.target);
    return out;
  };
  if (ops.empty()) return;
  Op& op = *one_of(ops);
  switch (pick(random, 0, 15)) {
    case 0: {
      bool* const flags[] = {&op.transposed, &op.second, &op.carries, &op.curvature, &op.raw};
      bool& flag = *flags[pick(random, 0, 4)];
      flag = !flag;
      break;
    }
    case 1: op.kind = static_cast<OpKind>(pick(random, -1, 7)); break;
    case 2: op.activation = static_cast<Activation>(pick(random, -1, kActivations)); break;
    case 3: {  // an operand of another operation, or of another role
      std::vector<Operand*> own = any_operands(op), others = any_operands(*one_of(ops));
      *one_of(own) = chance(random, 0.2) ? Operand{} : *one_of(others);
      break;
    }
    case 4: {  // an operation elsewhere
      std::vector<Op>& list = *one_of(lists);
      const Op copy = op;
      list.insert(list.begin() + pick(random, 0, static_cast<int>(list.size())), copy);
      break;
    }
    case 5: {
      std::vector<Op>& list = *one_of(lists);
      if (!list.empty()) list.erase(list.begin() + pick(random, 0, static_cast<int>(list.size()) - 1));
      break;
    }
    case 6: std::swap(op, *one_of(ops)); break;
    case 7: {
      if (p.matrices.empty()) break;
      Matrix<T>& m = one_of(p.matrices);
      switch (pick(random, 0, 5)) {
        case 0: resize(m.row_ptr); break;
        case 1: resize(m.col); break;
        case 2: resize(m.values); break;
        case 3: resize(m.path_entry); break;
        case 4: resize(m.path_gate); break;
        default: resize(m.path_constant);
      }
      break;
    }
    case 8: {
      if (p.matrices.empty()) break;
      Matrix<T>&m = one_of(p.matrices), &other = one_of(p.matrices);
      if (chance(random, 0.3)) m.gated = !m.gated;
      else if (chance(random, 0.5)) std::swap(m, other);
      else m = Matrix<T>(other);
      break;
    }
    case 9: {
      if (p.modulations.empty()) break;
      Modulation<T>& m = one_of(p.modulations);
      std::vector<T>* const arrays[] = {&m.bias, &m.gate_slope, &m.gate_offset, &m.shift_slope, &m.shift_offset};
      if (chance(random, 0.3)) m = Modulation<T>(one_of(p.modulations));
      else resize(*arrays[pick(random, 0, 4)]);
      break;
    }
    case 10: resize(chance(random, 0.5) ? op.factor_row : op.factor2_row); break;
    case 11: p.divergence = !p.divergence; break;
    case 12: {
      if (!p.sums.empty() && chance(random, 0.4)) one_of(p.sums).each_stage = !one_of(p.sums).each_stage;
      else if (chance(random, 0.5)) std::swap(one_of(p.buffers), one_of(p.buffers));
      else p.buffers.push_back(one_of(p.buffers));
      break;
    }
    case 13: {  // an instruction
      if (p.expressions.empty()) break;
      Expression& e = one_of(p.expressions);
      if (e.code.empty()) break;
      Instruction& one = one_of(e.code);
      uint16_t* const places[] = {&one.to, &one.a, &one.b, &one.c};
      const int values[] = {0, 1, 2, 3, 4, 5, 1023, 1024, 65535};
      switch (pick(random, 0, 5)) {
        case 0: one.op = static_cast<Instruct>(pick(random, 0, 50)); break;
        case 1: one.number = chance(random, 0.5) ? NAN : INFINITY; break;
        case 2: e.code.push_back(Instruction(one)); break;
        case 3: e.code.pop_back(); break;
        default: *places[pick(random, 0, 3)] = static_cast<uint16_t>(values[pick(random, 0, 8)]);
      }
      break;
    }
    case 14: {  // what a pointwise operation reads and writes
      const int kind = pick(random, 0, 4);
      if (kind == 0 && !op.inputs.empty()) one_of(op.inputs).broadcast ^= true;
      if (kind == 1 && !op.vectors.empty()) one_of(op.vectors).broadcast ^= true;
      if (kind == 2) op.inputs.resize(pick(random, 0, 4));
      if (kind == 3) op.outputs.resize(pick(random, 0, 4));
      if (kind == 4 && !p.vectors.empty()) {
        RowVector<T>& v = one_of(p.vectors);
        if (chance(random, 0.5)) v.values.resize(v.values.size() + 1);
        else v = RowVector<T>(one_of(p.vectors));
      }
      break;
    }
    default: {  // a field of one operation as another one has it
      const Op& other = *one_of(ops);
      int Op::*const fields[] = {&Op::matrix, &Op::modulation, &Op::store, &Op::coefficient_matrix, &Op::slope_from, &Op::sum, &Op::expression, &Op::rows};
      int Op::*const field = fields[pick(random, 0, 7)];
      op.*field = other.*field;
      op.params = {chance(random, 0.5) ? 0.0 : NAN, chance(random, 0.5) ? -1.0 : INFINITY};
    }
  }
}

template <class T>
Program<T> mutated(Random& random, const Program<double>& good) {
  Program<T> p = chance(random, 0.5) ? spoiled<T>(random, good) : convert<T>(good);
  for (int changes = pick(random, 0, 3); changes > 0; --changes) mutate(random, p);
  return p;
}

}  // namespace sparseflow::testing
