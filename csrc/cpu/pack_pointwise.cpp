// Pointwise operations made ready for one tile width: where the places of an expression lie.
#include <algorithm>

#include "pack.h"

namespace sparseflow {
namespace {

constexpr ptrdiff_t kStripBytes = 16 << 10;  // all places of a strip: they should stay in the first-level cache
constexpr int kMostStripRows = 64;

}  // namespace

template <class T>
PackedOp<T> pack_pointwise(const Op& op, const Program<T>& program, Packed<T>& packed) {
  const Expression& e = program.expressions[op.expression];
  PackedOp<T> out;
  out.op = &op;
  out.work = int64_t(op.rows) * std::max<int64_t>(1, e.code.size()) * packed.width;
  PackedPointwise<T>& to = out.pointwise;
  const ptrdiff_t slot_bytes = ptrdiff_t(packed.width) * ptrdiff_t(sizeof(T));
  to.strip = static_cast<int>(std::clamp<ptrdiff_t>(kStripBytes / (slot_bytes * e.places()), 1, kMostStripRows));
  auto lies_in = [&](const Operand& o, bool broadcast) {
    const ptrdiff_t stride = packed.row_bytes(program.buffers[o.buffer]);
    const ptrdiff_t offset = packed.buffer_offset[o.buffer] + o.row * stride + o.slot * slot_bytes;
    to.places.push_back({offset, broadcast ? 0 : stride, broadcast ? 0 : stride});
  };
  ptrdiff_t scratch = 0;
  auto in_scratch = [&] {
    to.places.push_back({packed.scratch_offset + scratch, slot_bytes, 0});
    scratch += to.strip * slot_bytes;
  };
  for (const Op::Input& in : op.inputs) lies_in(in.rows, in.broadcast);
  for (const Operand& o : op.outputs) {
    if (o.buffer >= 0) {
      lies_in(o, false);
    } else {
      to.traces.push_back(static_cast<uint16_t>(to.places.size()));
      in_scratch();
    }
  }
  for (int i = 0; i < e.registers; ++i) in_scratch();
  for (const Op::Total& t : op.totals) {
    const ptrdiff_t stride = packed.row_bytes(program.buffers[t.target.buffer]);
    to.totals.push_back({packed.buffer_offset[t.target.buffer] + t.target.row * stride + t.target.slot * slot_bytes, static_cast<uint16_t>(t.place)});
  }
  packed.scratch_bytes = std::max(packed.scratch_bytes, scratch);
  for (const Instruction& one : e.code) {
    const InstructKind& kind = kInstructKinds[static_cast<int>(one.op)];
    auto place = [&](int number, uint16_t from) { return kind.reads > number ? from : one.to; };
    to.steps.push_back({one.op, one.to, place(0, one.a), kind.row_vector ? one.b : place(1, one.b), place(2, one.c), static_cast<T>(one.number)});
  }
  return out;
}

template <class T>
void run_pointwise(const PackedOp<T>& op, const Packed<T>& packed, const Kernels<T>& kernels, const std::vector<const T*>& vectors, char* workspace) {
  RowNumbers<T> numbers[kMostRowVectors];
  for (size_t i = 0; i < op.op->vectors.size(); ++i) {
    const Op::Numbers& of = op.op->vectors[i];
    numbers[i] = {vectors[of.vector] + of.first, of.broadcast ? 0 : 1};
  }
  const PackedPointwise<T>& p = op.pointwise;
  PointwiseArgs<T> args;
  args.workspace = workspace;
  args.steps = p.steps.data(), args.n_steps = static_cast<int32_t>(p.steps.size());
  args.places = p.places.data();
  args.numbers = numbers;
  args.traces = p.traces.data(), args.n_traces = static_cast<int32_t>(p.traces.size());
  args.totals = p.totals.data(), args.n_totals = static_cast<int32_t>(p.totals.size());
  args.rows = op.op->rows, args.strip = p.strip;
  args.row_vectors = packed.width / kernels.lanes;
  args.reduce = reinterpret_cast<T*>(workspace + packed.reduce_offset);
  kernels.pointwise(args);
}

#define X(T)                                                                         \
  template PackedOp<T> pack_pointwise(const Op&, const Program<T>&, Packed<T>&);     \
  template void run_pointwise(const PackedOp<T>&, const Packed<T>&, const Kernels<T>&, const std::vector<const T*>&, char*);
X(float) X(double)
#undef X

}  // namespace sparseflow
