// What is asked of expressions, and of the operations that run them.
#include "validate.h"

namespace sparseflow {
namespace {

std::string text(int64_t n) { return std::to_string(n); }

// A place is read after it was written, and every output is written once. `written_by` [outputs]: the instruction that does.
// Returns which places are written in the end, the inputs among them.
std::vector<char> check_code(const Expression& e, const std::string& name, std::vector<int>& written_by) {
  std::vector<char> written(e.places(), 0);
  std::fill_n(written.begin(), e.inputs, 1);
  written_by.assign(e.outputs, -1);
  for (size_t i = 0; i < e.code.size(); ++i) {
    const Instruction& one = e.code[i];
    const std::string where = name + ": instruction " + text(i);
    if (static_cast<int>(one.op) >= kInstructs) fail(where + ": unknown");
    const InstructKind& kind = kInstructKinds[static_cast<int>(one.op)];
    const uint16_t reads[] = {one.a, one.b, one.c};
    for (int k = 0; k < kind.reads; ++k)
      if (reads[k] >= e.places() || !written[reads[k]]) fail(where + ": it reads place " + text(reads[k]) + ", which nothing was written to");
    if (kind.row_vector && one.b >= e.vectors) fail(where + ": no such row vector");
    if (one.to < e.inputs || one.to >= e.places()) fail(where + ": it writes place " + text(one.to) + ", which is neither an output nor a register");
    written[one.to] = 1;
    if (one.to >= e.inputs + e.outputs) continue;
    int& by = written_by[one.to - e.inputs];
    if (by >= 0) fail(where + ": an output is written twice");
    by = static_cast<int>(i);
  }
  for (int by : written_by)
    if (by < 0) fail(name + ": an output is not written");
  return written;
}

bool overlap(const Operand& a, int a_rows, const Operand& b, int b_rows) {
  return a.buffer >= 0 && a.buffer == b.buffer && a.slot == b.slot && a.row < int64_t(b.row) + b_rows && b.row < int64_t(a.row) + a_rows;
}

}  // namespace

template <class T>
void validate_expressions(const Program<T>& p) {
  std::vector<int> written_by;
  for (size_t i = 0; i < p.expressions.size(); ++i) {
    const Expression& e = p.expressions[i];
    const std::string name = "expression " + text(i);
    const int64_t places = int64_t(e.inputs) + e.outputs + e.registers;
    if (e.inputs < 0 || e.vectors < 0 || e.outputs < 0 || e.registers < 0 || places < 1) fail(name + ": it needs a place, and counts that are not negative");
    if (places > kMostPlaces) fail(name + ": more than " + text(kMostPlaces) + " places");
    if (e.vectors > kMostRowVectors) fail(name + ": more than " + text(kMostRowVectors) + " row vectors");
    check_code(e, name, written_by);
  }
}

template <class T>
void validate_pointwise(const Op& op, const Program<T>& p, const std::string& name) {
  if (op.expression < 0 || op.expression >= static_cast<int>(p.expressions.size())) fail(name + ": no such expression");
  const Expression& e = p.expressions[op.expression];
  if (op.rows < 0 || op.rows > kMostRows) fail(name + ": " + text(op.rows) + " rows");
  if (static_cast<int>(op.inputs.size()) != e.inputs || static_cast<int>(op.vectors.size()) != e.vectors || static_cast<int>(op.outputs.size()) != e.outputs)
    fail(name + ": it has not as many inputs, row vectors and outputs as its expression");
  auto check = [&](const Operand& o, int rows, const char* role) {
    if (o.buffer < 0 || o.buffer >= static_cast<int>(p.buffers.size())) fail(name + ": no such " + role + " buffer");
    const Buffer& buffer = p.buffers[o.buffer];
    if (o.slot < 0 || o.slot >= buffer.slots) fail(name + ": no such " + role + " slot");
    if (o.row < 0 || int64_t(o.row) + rows > buffer.rows) fail(name + ": the " + role + " buffer has too few rows");
  };
  for (const Op::Input& in : op.inputs) check(in.rows, in.broadcast ? 1 : op.rows, "input");
  for (const Op::Numbers& v : op.vectors) {
    if (v.vector < 0 || v.vector >= static_cast<int>(p.vectors.size())) fail(name + ": no such row vector");
    if (v.first < 0 || int64_t(v.first) + (v.broadcast ? 1 : op.rows) > p.vectors[v.vector].n) fail(name + ": a row vector is too short");
  }
  for (const Operand& o : op.outputs)
    if (o.buffer != -1) check(o, op.rows, "output");
    else if (!p.divergence) fail(name + ": an output without a buffer needs a program with divergence");

  std::vector<int> written_by;
  const std::vector<char> written = check_code(e, name, written_by);
  if (op.outputs.empty() && op.totals.empty()) fail(name + ": it has neither outputs nor totals");
  if (op.totals.size() > size_t(kMostTotals)) fail(name + ": more than " + text(kMostTotals) + " totals");
  for (size_t i = 0; i < op.totals.size(); ++i) {
    const Op::Total& total = op.totals[i];
    if (total.place < 0 || total.place >= e.places() || !written[total.place]) fail(name + ": the total of a place that nothing was written to");
    check(total.target, 1, "total");
    for (size_t j = 0; j < i; ++j)
      if (overlap(total.target, 1, op.totals[j].target, 1)) fail(name + ": two totals overlap");
    for (const Operand& o : op.outputs)
      if (overlap(total.target, 1, o, op.rows)) fail(name + ": an output and a total overlap");
    for (const Op::Input& in : op.inputs)
      if (overlap(total.target, 1, in.rows, in.broadcast ? 1 : op.rows)) fail(name + ": an input and a total overlap");
  }
  for (int i = 0; i < e.outputs; ++i) {
    const Operand& out = op.outputs[i];
    for (int j = 0; j < i; ++j)
      if (overlap(out, op.rows, op.outputs[j], op.rows)) fail(name + ": two outputs overlap");
    for (int j = 0; j < e.inputs; ++j) {
      const Op::Input& in = op.inputs[j];
      if (!overlap(out, op.rows, in.rows, in.broadcast ? 1 : op.rows)) continue;
      if (in.broadcast || !out.same(in.rows)) fail(name + ": an input and an output overlap");
      // the very same rows, to add to them: what reads them comes first
      for (size_t k = written_by[i] + 1; k < e.code.size(); ++k) {
        const uint16_t reads[] = {e.code[k].a, e.code[k].b, e.code[k].c};
        for (int r = 0; r < kInstructKinds[static_cast<int>(e.code[k].op)].reads; ++r)
          if (reads[r] == j) fail(name + ": an input is read after an output at the same rows was written");
      }
    }
  }
}

#define X(T)                                                \
  template void validate_expressions(const Program<T>&);    \
  template void validate_pointwise(const Op&, const Program<T>&, const std::string&);
X(float) X(double)
#undef X

}  // namespace sparseflow
