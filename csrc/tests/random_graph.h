// Random graph programs: products, layers and expressions between ranges of rows, forwards and backwards; what they mean, by
// a plain interpreter in double; and the program that gives them the time answer.
#pragma once

#include <array>
#include <functional>

#include "random_program.h"

namespace sparseflow::testing {

// ---------------------------------------------------------------------------------------------------------- expressions

// An instruction on plain numbers; row: what it reads from a row vector.
inline double instruct(const Instruction& one, double a, double b, double c, double row) {
  switch (one.op) {
    case Instruct::kCopy: return a;
    case Instruct::kNumber: return one.number;
    case Instruct::kRow: return row;
    case Instruct::kAdd: return a + b;
    case Instruct::kSub: return a - b;
    case Instruct::kMul: return a * b;
    case Instruct::kDiv: return a / b;
    case Instruct::kNeg: return -a;
    case Instruct::kAddNumber: return a + one.number;
    case Instruct::kMulNumber: return a * one.number;
    case Instruct::kAbs: return std::fabs(a);
    case Instruct::kSign: return (a > 0) - (a < 0);
    case Instruct::kMaximum: return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b);
    case Instruct::kMinimum: return std::isnan(a) || std::isnan(b) ? NAN : std::min(a, b);
    case Instruct::kSqrt: return std::sqrt(a);
    case Instruct::kRsqrt: return 1 / std::sqrt(a);
    case Instruct::kReciprocal: return 1 / a;
    case Instruct::kExp: return std::exp(a);
    case Instruct::kExpm1: return std::expm1(a);
    case Instruct::kLog: return std::log(a);
    case Instruct::kLog1p: return std::log1p(a);
    case Instruct::kSin: return std::sin(a);
    case Instruct::kCos: return std::cos(a);
    case Instruct::kTan: return std::tan(a);
    case Instruct::kTanh: return std::tanh(a);
    case Instruct::kSigmoid: return 1 / (1 + std::exp(-a));
    case Instruct::kSoftplus: return std::max(a, 0.0) + std::log1p(std::exp(-std::fabs(a)));
    case Instruct::kErf: return std::erf(a);
    case Instruct::kPowNumber: return std::pow(a, one.number);
    case Instruct::kPow: return std::pow(a, b);
    case Instruct::kGreater: return a > b;
    case Instruct::kGreaterEqual: return a >= b;
    case Instruct::kEqual: return a == b;
    case Instruct::kWhere: return a != 0 ? b : c;
    case Instruct::kAtan: return std::atan(a);
    case Instruct::kAsin: return std::asin(a);
    case Instruct::kAcos: return std::acos(a);
    case Instruct::kSinh: return std::sinh(a);
    case Instruct::kCosh: return std::cosh(a);
    case Instruct::kAtan2: return std::atan2(a, b);
    case Instruct::kFloor: return std::floor(a);
    case Instruct::kFma: return a * b + c;
    case Instruct::kRowMul: return a * row;
    case Instruct::kRowAdd: return a + row;
    case Instruct::kSquare: return a * a;
  }
  return NAN;
}

// Smooth, and of numbers of size one again numbers of about size one, so that rounding stays small. Where `linear`, all
// outputs are the first input times something of the others.
inline Expression random_expression(Random& random, int inputs, int vectors, int outputs, bool linear) {
  const Instruct smooth[] = {Instruct::kAdd,  Instruct::kSub, Instruct::kMul, Instruct::kNeg,      Instruct::kAddNumber, Instruct::kMulNumber, Instruct::kSin,
                             Instruct::kCos,  Instruct::kTanh, Instruct::kSigmoid, Instruct::kErf, Instruct::kFma,       Instruct::kSquare,    Instruct::kAtan,
                             Instruct::kCopy, Instruct::kRow, Instruct::kRowMul, Instruct::kRowAdd, Instruct::kNumber,   Instruct::kMaximum,   Instruct::kAbs};
  Expression e;
  e.inputs = inputs, e.vectors = vectors, e.outputs = outputs, e.registers = pick(random, 1, 4);
  const int first = linear ? 1 : 0;  // the linear input enters at the end only
  std::vector<int> known;
  for (int i = first; i < inputs; ++i) known.push_back(i);
  auto any = [&] { return static_cast<uint16_t>(known[pick(random, 0, int(known.size()) - 1)]); };
  auto put = [&](Instruct op, int to, int a, int b, int c, double number) {
    e.code.push_back({op, uint16_t(to), uint16_t(a), uint16_t(b), uint16_t(c), number});
  };
  const int temporary = inputs + outputs;
  put(Instruct::kNumber, temporary, 0, 0, 0, 0.5);
  known.push_back(temporary);
  for (int out = 0; out < outputs; ++out) {
    for (int steps = pick(random, 1, 5); steps > 0; --steps) {
      const Instruct op = smooth[pick(random, 0, 20)];
      const InstructKind kind = kInstructKinds[int(op)];
      if (kind.row_vector && vectors == 0) continue;
      const int to = temporary + pick(random, 0, e.registers - 1);
      const uint16_t a = any(), b = kind.row_vector ? uint16_t(pick(random, 0, vectors - 1)) : any(), c = any();
      put(op, to, a, b, c, number(random));
      if (std::find(known.begin(), known.end(), to) == known.end()) known.push_back(to);
    }
    put(Instruct::kTanh, temporary, any(), 0, 0, 0);
    if (linear) put(Instruct::kMul, inputs + out, 0, temporary, 0, 0);
    else put(Instruct::kCopy, inputs + out, temporary, 0, 0, 0), known.push_back(inputs + out);
  }
  return e;
}

// ------------------------------------------------------------------------------------------------------------- programs

struct Region {
  Operand at;
  int rows;
};

// Targets are handed out from the ends of buffers downwards: what lies behind one was written before it.
struct GraphMaker {
  Random& random;
  Program<double> p;
  std::vector<Region> known;  // written before
  int pool = -1, left = 0, slots = 1;

  explicit GraphMaker(Random& r) : random(r) {}

  Operand target(int rows) {
    if (left < rows) pool = add_buffer(p, left = std::max(rows, 60), slots = pick(random, 1, 2));
    left -= rows;
    return {pool, pick(random, 0, slots - 1), left};
  }
  const Region& any() const { return known[pick(random, 0, int(known.size()) - 1)]; }
  Region some_rows(const Region& from, int rows) const {  // as many of it
    Region out = from;
    const int skipped = pick(random, 0, from.rows - rows);
    out.at.row += skipped, out.rows = rows;
    return out;
  }
  int size() const {
    const int sizes[] = {1, 2, 5, 17, 41, 220};
    return sizes[pick(random, 0, chance(random, 0.1) ? 5 : 4)];
  }
  double density() const { return std::array<double, 4>{0.1, 0.5, 0.9, 1.0}[pick(random, 0, 3)]; }

  int constant_vector(int n) {
    RowVector<double> v;
    v.n = n, v.values = numbers(random, n);
    p.vectors.push_back(v);
    return int(p.vectors.size()) - 1;
  }
  // Rows of the time answer where that is possible and `timed`.
  int vector(int n, bool timed) {
    if (!timed || n > p.time_rows || chance(random, 0.5)) return constant_vector(n);
    RowVector<double> v;
    v.n = n, v.time_row = pick(random, 0, p.time_rows - n);
    p.vectors.push_back(v);
    return int(p.vectors.size()) - 1;
  }

  Op product(const Region& from, const Region& to, bool transposed) {
    const int rows = transposed ? from.rows : to.rows, cols = transposed ? to.rows : from.rows;
    Op op = product_op(add(p, random_matrix(random, rows, cols, density())), from.at, to.at);
    op.transposed = transposed;
    return op;
  }
  Op layer(const Region& from, const Region& to) {
    Op op = product(from, to, false);
    op.kind = OpKind::kAffine;
    op.activation = Activation::kTanh;
    Modulation<double> m;
    m.n = to.rows;
    if (chance(random, 0.7)) {
      m.shift_vector = vector(to.rows, true);
      if (chance(random, 0.6)) m.scale_vector = vector(to.rows, true);
    } else {
      m.bias = numbers(random, to.rows);
    }
    op.modulation = int(p.modulations.size());
    p.modulations.push_back(m);
    return op;
  }
  // `first`: what it is linear in, or nothing
  Op pointwise(const std::vector<Operand>& to, int rows, bool timed, const Region* first) {
    Op op;
    op.kind = OpKind::kPointwise;
    op.rows = rows;
    const int inputs = pick(random, 1, 3), vectors = pick(random, 0, 2);
    for (int i = 0; i < inputs; ++i) {
      Region from = i == 0 && first ? *first : any();
      const bool broadcast = from.rows < rows || chance(random, 0.2);
      from = some_rows(from, broadcast ? 1 : rows);
      op.inputs.push_back({from.at, broadcast});
    }
    for (int i = 0; i < vectors; ++i) {
      const bool broadcast = chance(random, 0.3);
      const int spare = pick(random, 0, 3);
      const int number = vector((broadcast ? 1 : rows) + spare, timed);
      op.vectors.push_back({number, pick(random, 0, spare), broadcast});
    }
    op.outputs = to;
    op.expression = int(p.expressions.size());
    p.expressions.push_back(random_expression(random, inputs, vectors, int(to.size()), first != nullptr));
    return op;
  }
  // An operation that reads what is known, or of these the linear ones.
  void step(std::vector<Op>& list, bool prologue, bool backwards) {
    std::vector<Region>& from = known;
    const int kind = pick(random, 0, 3), n = size();
    if (kind == 0 || (kind == 1 && (prologue || backwards))) {
      const Region source = backwards ? linear[pick(random, 0, int(linear.size()) - 1)] : any();
      const Region to{target(n), n};
      list.push_back(product(source, to, chance(random, 0.4)));
      (backwards ? linear : from).push_back(to);
    } else if (kind == 1) {
      const Region source = any();
      Region to{target(n), n};
      to.at.slot = 0;
      list.push_back(layer(source, to));
      from.push_back(to);
    } else {
      const Region* first = backwards ? &linear[pick(random, 0, int(linear.size()) - 1)] : nullptr;
      const int rows = first && first->rows < n ? first->rows : n;
      std::vector<Operand> to;
      for (int i = pick(random, 1, 2); i > 0; --i) to.push_back(target(rows));
      if (p.divergence && !prologue && !backwards && chance(random, 0.5)) to.push_back({});
      const Region begin = first ? *first : Region{};
      Op op = pointwise(to, rows, !prologue, first ? &begin : nullptr);
      const int inputs = int(op.inputs.size());
      for (int i = chance(random, 0.4) ? pick(random, 1, 2) : 0; i > 0; --i)  // a gradient's are of what is linear
        op.totals.push_back({first ? inputs + pick(random, 0, int(to.size()) - 1) : pick(random, 0, inputs + int(to.size()) - 1), target(1)});
      for (const Op::Total& total : op.totals) (backwards ? linear : from).push_back({total.target, 1});
      list.push_back(op);
      for (const Operand& o : to)
        if (o.buffer >= 0) (backwards ? linear : from).push_back({o, rows});
      if (!backwards && to[0].buffer >= 0 && chance(random, 0.3)) accumulate(list, {to[0], rows});
    }
  }
  void accumulate(std::vector<Op>& list, const Region& to) {
    Op op;
    op.kind = OpKind::kPointwise;
    op.rows = to.rows;
    op.inputs = {{to.at, false}, {some_rows(known[0], 1).at, true}};
    op.outputs = {to.at};
    Expression e;
    e.inputs = 2, e.outputs = 1, e.registers = 1;
    e.code = {{Instruct::kSin, 3, 0, 0, 0, 0}, {Instruct::kFma, 2, 3, 1, 0, 0}};
    op.expression = int(p.expressions.size());
    p.expressions.push_back(e);
    list.push_back(op);
  }
  std::vector<Region> linear;  // of an adjoint's reverse list
};

inline Program<double> graph_program(Random& random, bool adjoint) {
  GraphMaker make(random);
  Program<double>& p = make.p;
  p.dim = pick(random, 1, 4);
  p.out = chance(random, 0.6) ? -1 : pick(random, 1, 4);
  p.divergence = p.out_rows() == p.dim && !adjoint && chance(random, 0.5);
  p.time_rows = chance(random, 0.7) ? pick(random, 1, 50) : 0;
  if (p.time_rows > 0 && chance(random, 0.4)) p.externals = 1, p.time_external = 0;
  const int out = p.out_rows();
  p.input = add_buffer(p, p.dim, 1);
  p.output = add_buffer(p, out, pick(random, 1, 2));
  make.known.push_back({{p.input, 0}, p.dim});
  if (chance(random, 0.6)) {
    p.context = add_buffer(p, pick(random, 1, 4), 1);
    make.known = {{{p.context, 0}, p.buffers[p.context].rows}};  // all that the prologue knows
    for (int steps = pick(random, 0, 2); steps > 0; --steps) make.step(p.prologue, true, false);
    make.known.push_back({{p.input, 0}, p.dim});
  }
  const std::vector<Region> before = make.known;
  const Region f{{p.output, 0}, out};
  auto forwards = [&](std::vector<Op>& list) {
    make.known = before;
    for (int steps = pick(random, 1, 6); steps > 0; --steps) make.step(list, false, false);
    list.push_back(make.layer(make.any(), f));
  };
  forwards(p.body);
  if (!adjoint) return std::move(make.p);

  p.ones = add_buffer(p, 1, 1);
  p.cotangent = add_buffer(p, out, pick(random, 1, 2));
  p.state_cotangent = add_buffer(p, p.dim, pick(random, 1, 2));
  if (p.context >= 0) p.context_cotangent = add_buffer(p, p.buffers[p.context].rows, 1);
  forwards(p.keep);
  make.linear = {{{p.cotangent, 0}, out}};
  for (int steps = pick(random, 1, 5); steps > 0; --steps) make.step(p.reverse, false, true);
  auto any_linear = [&] { return make.linear[pick(random, 0, int(make.linear.size()) - 1)]; };
  p.reverse.push_back(make.product(any_linear(), {{p.state_cotangent, 0}, p.dim}, false));
  if (p.context >= 0) p.reverse.push_back(make.product(any_linear(), {{p.context_cotangent, 0}, p.buffers[p.context].rows}, true));
  auto gradient = [&](int matrix, Operand left, Operand right, bool each_stage) {
    Op op;
    op.kind = OpKind::kGradient;
    op.matrix = matrix, op.factor = left, op.source = right, op.sum = int(p.sums.size());
    p.sums.push_back({p.matrices[matrix].nnz(), each_stage});
    p.reverse.push_back(op);
    return op.sum;
  };
  const int matrices = int(p.matrices.size()), vectors = int(p.vectors.size());
  for (int i = 0; i < matrices; ++i) {
    const Region left = any_linear(), right = make.any();
    if (p.matrices[i].rows > left.rows || p.matrices[i].cols > right.rows) continue;
    p.matrices[i].sum = gradient(i, make.some_rows(left, p.matrices[i].rows).at, make.some_rows(right, p.matrices[i].cols).at, false);
  }
  for (int i = 0; i < vectors; ++i) {
    const Region left = any_linear();
    const int n = p.vectors[i].n;
    if (n > left.rows) continue;
    const int column = add(p, random_matrix(random, n, 1, 1.0));
    p.vectors[i].sum = gradient(column, make.some_rows(left, n).at, {p.ones, 0}, p.vectors[i].timed());
  }
  return std::move(make.p);
}

// sin of slope t + offset, of as many rows as the program wants to know of a time.
struct TimeAnswer {
  std::vector<double> slope, offset;
  TimeAnswer(Random& random, int rows) : slope(numbers(random, rows)), offset(numbers(random, rows)) {}

  std::vector<double> at(double t) const {
    std::vector<double> out;
    for (size_t i = 0; i < slope.size(); ++i) out.push_back(std::sin(slope[i] * t + offset[i]));
    return out;
  }
  Program<double> program() const {
    const int rows = int(slope.size());
    Program<double> p;
    p.dim = 1, p.out = rows, p.input = add_buffer(p, 1, 1), p.output = add_buffer(p, rows, 1);
    for (const auto* values : {&slope, &offset}) p.vectors.push_back({rows, *values});
    Expression e;
    e.inputs = 1, e.vectors = 2, e.outputs = 1, e.registers = 1;
    e.code = {{Instruct::kRowMul, 2, 0, 0, 0, 0}, {Instruct::kRowAdd, 2, 2, 1, 0, 0}, {Instruct::kSin, 1, 2, 0, 0, 0}};
    p.expressions = {e};
    Op op;
    op.kind = OpKind::kPointwise;
    op.expression = 0, op.rows = rows, op.inputs = {{{0, 0}, true}}, op.vectors = {{0, 0, false}, {1, 0, false}}, op.outputs = {{1, 0}};
    p.body = {op};
    return p;
  }
};

// ---------------------------------------------------------------------------------------------------------- interpreter

// One sample of a graph program at one time.
struct GraphInterpreter {
  const Program<double>& p;
  const std::vector<double> answer;
  std::vector<std::vector<double>> memory[2];
  std::vector<std::vector<double>> sums;
  double trace = 0;

  GraphInterpreter(const Program<double>& program, std::vector<double> time_answer) : p(program), answer(std::move(time_answer)) {
    for (const auto& sum : p.sums) sums.emplace_back(sum.size, 0.0);
  }

  double& at(const Operand& o, int row) { return memory[o.slot][o.buffer][o.row + row]; }
  double of_vector(int vector, int row) const { return p.vectors[vector].timed() ? answer[p.vectors[vector].time_row + row] : p.vectors[vector].values[row]; }

  void begin(const double* x, const double* context) {
    for (auto& slot : memory) {
      slot.clear();
      for (const Buffer& b : p.buffers) slot.emplace_back(b.rows, 0.0);
    }
    std::copy_n(x, p.dim, memory[0][p.input].begin());
    if (p.context >= 0) std::copy_n(context, p.context_rows(), memory[0][p.context].begin());
    if (p.ones >= 0) memory[0][p.ones][0] = 1;
    trace = 0;
    run(p.prologue);
  }
  void run(const std::vector<Op>& ops) {
    for (const Op& op : ops) op.kind == OpKind::kPointwise ? pointwise(op) : product(op);
  }
  void pointwise(const Op& op) {
    const Expression& e = p.expressions[op.expression];
    for (int row = 0; row < op.rows; ++row) {
      std::vector<double> place(e.places(), 0.0);
      for (int i = 0; i < e.inputs; ++i) place[i] = at(op.inputs[i].rows, op.inputs[i].broadcast ? 0 : row);
      for (const Instruction& one : e.code) {
        double number = 0;
        const InstructKind kind = kInstructKinds[int(one.op)];
        if (kind.row_vector) {
          const Op::Numbers& v = op.vectors[one.b];
          number = of_vector(v.vector, v.first + (v.broadcast ? 0 : row));
        }
        auto read = [&](int k, uint16_t from) { return kind.reads > k ? place[from] : 0.0; };
        place[one.to] = instruct(one, read(0, one.a), read(1, one.b), read(2, one.c), number);
      }
      for (int i = 0; i < e.outputs; ++i) {
        if (op.outputs[i].buffer < 0) trace += place[e.inputs + i];
        else at(op.outputs[i], row) = place[e.inputs + i];
      }
      for (const Op::Total& total : op.totals) at(total.target, 0) = (row == 0 ? 0.0 : at(total.target, 0)) + place[total.place];
    }
  }
  void product(const Op& op) {
    const Matrix<double>& m = p.matrices[op.matrix];
    std::vector<double> sum(op.transposed ? m.cols : m.rows, 0.0);
    for (int i = 0; i < m.rows; ++i)
      for (int k = m.row_ptr[i]; k < m.row_ptr[i + 1]; ++k) {
        if (op.kind == OpKind::kGradient) sums[op.sum][k] += at(op.factor, i) * at(op.source, m.col[k]);
        else if (op.transposed) sum[m.col[k]] += m.values[k] * at(op.source, i);
        else sum[i] += m.values[k] * at(op.source, m.col[k]);
      }
    if (op.kind == OpKind::kGradient) return;
    for (int i = 0; i < int(sum.size()); ++i) {
      if (op.kind == OpKind::kAffine) {
        const Modulation<double>& by = p.modulations[op.modulation];
        const double scale = by.scale_vector >= 0 ? of_vector(by.scale_vector, i) : 1.0;
        const double shift = by.shift_vector >= 0 ? of_vector(by.shift_vector, i) : by.of_vectors() ? 0.0 : by.bias[i];
        sum[i] = std::tanh(scale * sum[i] + shift);
      }
      at(op.target, i) = sum[i];
    }
  }
};

}  // namespace sparseflow::testing
