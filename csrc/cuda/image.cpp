#include "image.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <tuple>
#include <utility>

#include "../calls.h"
#include "buffers.h"
#include "streams.h"

namespace sparseflow::cuda {
namespace {

constexpr size_t kAlign = 16;

template <class T>
class Writer {
 public:
  Writer(const Program<T>& program, size_t chunk_bytes, double dense_above) : p_(program), dense_above_(dense_above), streams_(chunk_bytes) {}

  Image<T> write() {
    validate(p_);
    for (const Matrix<T>& m : p_.matrices)
      if (m.window.present()) fail("there are no kernels for convolutions");
    refuse_graphs();
    if (p_.externals > 0) fail("a function of time that is neither a sigmoid gate nor linear runs in Python, which a kernel cannot call");
    for (const Matrix<T>& m : p_.matrices)
      if (m.rows > 0xffff || m.cols > 0xffff) fail("a layer is wider than 65535, and a GPU's stream has 16 bits for a column");
    DeviceProgram& d = out_.program;
    d.dim = p_.out_rows();
    d.time_in_input = p_.dim - d.dim;
    d.divergence = p_.divergence;
    buffers_ = place_buffers(p_, d.workspace_rows);
    out_.matrices.resize(p_.matrices.size());
    for (size_t i = 0; i < p_.matrices.size(); ++i) out_.dense.push_back(dense(static_cast<int>(i)));
    out_.matrix_gradients.resize(p_.matrices.size());
    place_sums();
    write_vectors();
    write_modulations();
    write_gated();
    const std::vector<Op>* lists[] = {&p_.prologue, &p_.body, &p_.keep, &p_.reverse};
    for (int l = 0; l < kLists; ++l) {
      d.list[l] = static_cast<int32_t>(ops_.size());
      for (const Op& op : *lists[l]) look(), ops_.push_back(describe(op));
      round_and_round(d.list[l], static_cast<int>(ops_.size()));
    }
    d.list[kLists] = d.n_ops = static_cast<int32_t>(ops_.size());
    for (const auto* list : p_.adjoint() ? std::vector<const std::vector<Op>*>{&p_.keep, &p_.reverse} : std::vector<const std::vector<Op>*>{&p_.body})
      for (const Op& op : *list) {
        if (op.kind == OpKind::kPointwise) {
          out_.work.push_back({double(op.rows), 0, 0, 1, false, false, double(p_.expressions[op.expression].code.size())});
          continue;
        }
        const Matrix<T>& m = p_.matrices[op.matrix];
        const bool whole = dense(op.matrix) && op.kind != OpKind::kGradient, gradient = op.kind == OpKind::kGradient;
        out_.work.push_back({double(op.transposed ? m.cols : m.rows), double(op.transposed ? m.rows : m.cols), (whole ? double(m.rows) * m.cols : double(m.nnz())) / kQuad, op.tangent() ? 2.0 : 1.0, whole, gradient});
      }
    place_streams();
    d.n_chunks = static_cast<int32_t>(streams_.chunks.size());
    d.ops = append(ops_.data(), ops_.size() * sizeof(DeviceOp));
    d.chunks = append(streams_.chunks.data(), streams_.chunks.size() * sizeof(Chunk));
    auto whole = [&](int id) { return id < 0 ? Place{} : place({id, 0}); };
    d.input = whole(p_.input), d.output = whole(p_.output), d.noise = whole(p_.noise), d.ones = whole(p_.ones);
    d.cotangent = whole(p_.cotangent), d.trace_cotangent = whole(p_.trace_cotangent), d.state_cotangent = whole(p_.state_cotangent);
    d.context = whole(p_.context), d.context_cotangent = whole(p_.context_cotangent), d.context_rows = p_.context_rows();
    return std::move(out_);
  }

 private:
  // What only the CPU's engine runs.
  void refuse_graphs() const {
    if (p_.time_rows > 0) fail("a time answer runs on the CPU only: a GPU's program has the time as a last row of its input");
    if (p_.dim != p_.out_rows() && p_.dim != p_.out_rows() + 1) fail("an output of another size than the input, but for the time, runs on the CPU only");
    if (p_.adjoint() && !p_.prologue.empty()) fail("an adjoint with a prologue runs on the CPU only");
  }
  int32_t append(const void* data, size_t bytes) {
    const size_t at = out_.bytes.size();
    if (at + bytes > size_t(0x7fffffff) - kAlign) fail("the field is too large for one image of 2 GB");
    out_.bytes.resize(aligned(at + bytes), 0);
    if (bytes > 0) std::memcpy(out_.bytes.data() + at, data, bytes);
    return static_cast<int32_t>(at);
  }
  static int32_t counted(int64_t n, const char* what) {
    if (n >= int64_t(0x7fffffff)) fail(std::string("the field is too large: more ") + what + " than 32 bits count");
    return static_cast<int32_t>(n);
  }
  template <class U>
  int32_t append(const std::vector<U>& values) {
    return append(values.data(), values.size() * sizeof(U));
  }
  static int64_t index(int32_t offset) { return offset / int64_t(sizeof(T)); }

  Place place(const Operand& o) const {
    if (o.buffer < 0) return {};
    return {buffers_[o.buffer] + o.slot * p_.buffers[o.buffer].rows + o.row, p_.buffers[o.buffer].rows};
  }

  // ---- gradients' places

  void place_sums() {
    DeviceProgram& d = out_.program;
    for (const auto& sum : p_.sums) {
      int32_t& at = sum.each_stage ? d.stage_sums : d.lasting_sums;
      sums_.push_back(at);
      at = counted(int64_t(at) + sum.size, "gradients");
    }
    int64_t total = 0;
    auto next = [&](int64_t n) {
      const typename Image<T>::Range range{d.lasting_sums + total, n};
      total += n;
      return range;
    };
    if (p_.adjoint()) {
      for (size_t i = 0; i < p_.matrices.size(); ++i) {
        const Matrix<T>& m = p_.matrices[i];
        if (m.sum < 0) continue;
        out_.matrix_gradients[i] = m.gated ? next(int64_t(m.path_entry.size())) : typename Image<T>::Range{sums_[m.sum], m.nnz()};
      }
      for (const Modulation<T>& m : p_.modulations) {
        out_.bias_gradients.emplace_back();
        out_.time_gradients.emplace_back();
        if (m.shift_sum < 0) continue;
        if (!m.dynamic()) {
          out_.bias_gradients.back() = {sums_[m.shift_sum], m.n};
          continue;
        }
        auto& ranges = out_.time_gradients.back();
        out_.bias_gradients.back() = next(m.n);
        if (!m.gate_slope.empty()) ranges.gate_slope = next(m.n), ranges.gate_offset = next(m.n);
        if (!m.shift_slope.empty()) ranges.shift_slope = next(m.n), ranges.shift_offset = next(m.n);
      }
      for (const RowVector<T>& v : p_.vectors) out_.vector_gradients.push_back(v.sum < 0 ? typename Image<T>::Range{} : typename Image<T>::Range{sums_[v.sum], v.n});
      next(1);
    }
    d.totals = counted(total, "gradients");
    counted(int64_t(d.lasting_sums) + total, "gradients");
  }

  void write_vectors() {
    for (const RowVector<T>& v : p_.vectors) {
      vectors_.push_back(append(v.values));
      out_.vectors.push_back(index(vectors_.back()));
    }
  }

  // ---- what time changes

  void write_modulations() {
    std::vector<DeviceModulation> found;
    DeviceProgram& d = out_.program;
    for (size_t i = 0; i < p_.modulations.size(); ++i) {
      const Modulation<T>& m = p_.modulations[i];
      DeviceModulation to{};
      to.first = d.modulation_rows;
      to.n = m.n;
      d.modulation_rows = counted(int64_t(d.modulation_rows) + m.n, "rows of modulations");
      first_row_.push_back(to.first);
      auto put = [&](const std::vector<T>& values) { return values.empty() ? -1 : append(values); };
      to.bias = m.of_vectors() ? m.shift_vector < 0 ? -1 : vectors_[m.shift_vector] : append(m.bias);
      to.scale = m.scale_vector < 0 ? -1 : vectors_[m.scale_vector];
      to.gate_slope = put(m.gate_slope), to.gate_offset = put(m.gate_offset);
      to.shift_slope = put(m.shift_slope), to.shift_offset = put(m.shift_offset);
      auto at = [&](int32_t offset) { return offset < 0 ? -1 : index(offset); };
      out_.modulations.push_back({m.n, at(to.bias), at(to.gate_slope), at(to.gate_offset), at(to.shift_slope), at(to.shift_offset)});
      to.shift_sum = to.gate_sum = to.totals = -1;
      if (m.dynamic()) ++d.dynamic_modulations;
      if (p_.adjoint() && m.dynamic() && m.shift_sum >= 0) {
        to.shift_sum = sums_[m.shift_sum];
        if (m.gate_sum >= 0) to.gate_sum = sums_[m.gate_sum];
        to.totals = static_cast<int32_t>(out_.bias_gradients[i].first - d.lasting_sums);
      }
      found.push_back(to);
    }
    d.n_modulations = static_cast<int32_t>(found.size());
    d.modulations = append(found);
  }

  void write_gated() {
    std::vector<DeviceGated> found;
    DeviceProgram& d = out_.program;
    dynamic_values_.assign(p_.matrices.size(), -1);
    for (size_t i = 0; i < p_.matrices.size(); ++i) {
      const Matrix<T>& m = p_.matrices[i];
      if (!m.gated) continue;
      DeviceGated to{};
      const int paths = static_cast<int>(m.path_entry.size()), gates = p_.modulations[m.gate_modulation].n;
      to.entries = m.nnz();
      to.values = dynamic_values_[i] = d.dynamic_values;
      d.dynamic_values = counted(int64_t(d.dynamic_values) + m.nnz(), "values that depend on time");
      auto pointers = [](const std::vector<int32_t>& of, int n) {
        std::vector<int32_t> ptr(size_t(n) + 1, 0);
        for (int32_t v : of) ++ptr[v + 1];
        for (int v = 0; v < n; ++v) ptr[v + 1] += ptr[v];
        return ptr;
      };
      to.path_ptr = append(pointers(m.path_entry, m.nnz()));  // entries ascend
      to.path_gate = append(m.path_gate);
      to.path_constant = append(m.path_constant);
      for (int k = 0; k < paths; ++k) note(static_cast<int>(i), index(to.path_constant) + k, k);
      to.gate = first_row_[m.gate_modulation];
      to.gates = gates;
      to.sum = to.totals = to.gate_ptr = to.gate_path = to.path_entry = -1;
      if (p_.adjoint() && m.sum >= 0) {
        to.sum = sums_[m.sum];
        to.totals = static_cast<int32_t>(out_.matrix_gradients[i].first - d.lasting_sums);
        std::vector<int32_t> by_gate(paths);
        std::iota(by_gate.begin(), by_gate.end(), 0);
        std::stable_sort(by_gate.begin(), by_gate.end(), [&](int a, int b) { return m.path_gate[a] < m.path_gate[b]; });
        to.gate_ptr = append(pointers(m.path_gate, gates));
        to.gate_path = append(by_gate);
        to.path_entry = append(m.path_entry);
      }
      found.push_back(to);
    }
    d.n_gated = static_cast<int32_t>(found.size());
    d.gated = append(found);
  }

  void note(int matrix, int64_t place, int64_t entry) {
    out_.matrices[matrix].place.push_back(place);
    out_.matrices[matrix].entry.push_back(entry);
  }

  // ---- operations

  DeviceOp describe_pointwise(const Op& op) {
    const Expression& e = p_.expressions[op.expression];
    DeviceOp to{};
    to.kind = int(op.kind);
    to.flags = op.reduces() ? kReduces : 0;
    to.rows = op.rows;
    to.next_chunk = -1;
    to.first_chunk = static_cast<int32_t>(streams_.chunks.size());
    std::vector<DeviceRows> operands, vectors;
    std::vector<uint16_t> traces;
    int registers = e.registers;
    std::vector<int> where(e.places());  // of a place of the expression: operand or register
    auto operand = [&](const Operand& o, int step) {
      operands.push_back({place(o).row, step});
      return static_cast<int>(operands.size()) - 1;
    };
    for (int i = 0; i < e.inputs; ++i) where[i] = operand(op.inputs[i].rows, op.inputs[i].broadcast ? 0 : 1);
    for (int i = 0; i < e.outputs; ++i) {
      const Operand& o = op.outputs[i];
      where[e.inputs + i] = o.buffer < 0 ? kRegister | registers : operand(o, 1);
      if (o.buffer < 0) traces.push_back(static_cast<uint16_t>(registers++));
    }
    for (int i = 0; i < e.registers; ++i) where[e.inputs + e.outputs + i] = kRegister | i;
    if (registers > kRegisters) fail("a pointwise operation needs " + std::to_string(registers) + " registers, and a thread has " + std::to_string(kRegisters));
    for (const auto& v : op.vectors) vectors.push_back({static_cast<int32_t>(vectors_[v.vector] + v.first * int64_t(sizeof(T))), v.broadcast ? 0 : 1});
    std::vector<DeviceInstruct> code;
    for (const Instruction& one : e.code) {
      const InstructKind& kind = kInstructKinds[static_cast<int>(one.op)];
      DeviceInstruct in{};
      in.op = static_cast<uint16_t>(one.op), in.reads = static_cast<uint16_t>(kind.reads), in.row_vector = kind.row_vector;
      in.to = static_cast<uint16_t>(where[one.to]);
      if (kind.reads > 0) in.a = static_cast<uint16_t>(where[one.a]);
      if (kind.row_vector) in.b = one.b;
      else if (kind.reads > 1) in.b = static_cast<uint16_t>(where[one.b]);
      if (kind.reads > 2) in.c = static_cast<uint16_t>(where[one.c]);
      in.number = one.number;
      code.push_back(in);
    }
    to.instructions = static_cast<int32_t>(code.size());
    to.n_vectors = static_cast<int32_t>(vectors.size());
    to.traces = static_cast<int32_t>(traces.size());
    to.code = append(code);
    to.operands = append(operands);
    // the registers of the traces lie behind the row vectors
    std::vector<char> both(vectors.size() * sizeof(DeviceRows) + traces.size() * sizeof(uint16_t));
    if (!vectors.empty()) std::memcpy(both.data(), vectors.data(), vectors.size() * sizeof(DeviceRows));
    if (!traces.empty()) std::memcpy(both.data() + vectors.size() * sizeof(DeviceRows), traces.data(), traces.size() * sizeof(uint16_t));
    to.vectors = append(both);
    std::vector<DeviceTotal> totals;
    for (const Op::Total& total : op.totals) totals.push_back({where[total.place], place(total.target).row});
    to.totals = append(totals);
    to.n_totals = static_cast<int32_t>(totals.size());
    return to;
  }

  static bool has_kernel(OpKind kind) {
    switch (kind) {  // a kind that is new is not run as another one
      case OpKind::kProduct:
      case OpKind::kReduction:
      case OpKind::kAffine:
      case OpKind::kKeep:
      case OpKind::kPull:
      case OpKind::kGradient:
      case OpKind::kPointwise:
        return true;
    }
    return false;
  }

  DeviceOp describe(const Op& op) {
    if (!has_kernel(op.kind)) fail("an operation of this kind runs on the CPU only");
    if (op.kind == OpKind::kPointwise) return describe_pointwise(op);
    const Matrix<T>& m = p_.matrices[op.matrix];
    DeviceOp to{};
    to.kind = int(op.kind);
    to.store = op.store;
    to.activation = int(op.activation);
    to.slope_from = op.slope_from;
    to.a = op.params.a, to.b = op.params.b;
    const bool layer = op.kind == OpKind::kAffine || op.kind == OpKind::kKeep || op.kind == OpKind::kPull;
    if (layer && m.dynamic()) fail("a layer's own weights do not depend on time");
    to.flags = (op.tangent() ? kCarries : 0) | (op.curvature ? kCurvature : 0) | (op.raw ? kRaw : 0) | (op.second ? kSecond : 0) | (op.reduces() ? kReduces : 0);
    to.first_chunk = static_cast<int32_t>(streams_.chunks.size());
    to.next_chunk = to.pairs = to.coefficient = to.factor_row = to.factor2_row = to.modulation = to.values = -1;
    to.rows = op.transposed ? m.cols : m.rows;
    to.cols = op.transposed ? m.rows : m.cols;
    to.entries = m.nnz();
    out_.program.gathered_rows = std::max(out_.program.gathered_rows, to.cols * (op.tangent() ? 2 : 1));
    to.source = place(op.source), to.target = place(op.target), to.seed = place(op.seed), to.weight = place(op.weight);
    to.factor = place(op.factor), to.factor2 = place(op.factor2), to.addend = place(op.addend), to.kept = place(op.kept);
    to.slope_cotangent = place(op.slope_cotangent), to.value = place(op.value);
    if (op.kind == OpKind::kReduction) to.target = {};  // only the CPU waits there
    if (layer && op.modulation >= 0) to.modulation = first_row_[op.modulation];
    if (!op.factor_row.empty()) to.factor_row = append(op.factor_row);
    if (!op.factor2_row.empty()) to.factor2_row = append(op.factor2_row);
    if (op.coefficient_matrix >= 0) {
      const Matrix<T>& c = p_.matrices[op.coefficient_matrix];
      if (c.gated) {
        to.coefficient = dynamic_values_[op.coefficient_matrix];
        to.flags |= kDynamicCoefficient;
      } else {
        to.coefficient = append(c.values);
        for (int k = 0; k < c.nnz(); ++k) note(op.coefficient_matrix, index(to.coefficient) + k, k);
      }
    }
    if (op.kind == OpKind::kGradient) {
      const auto [known, is_new] = pairs_.try_emplace(op.matrix, -1);
      if (is_new) {
        std::vector<uint32_t> pairs;
        for (int i = 0; i < m.rows; ++i)
          for (int e = m.row_ptr[i]; e < m.row_ptr[i + 1]; ++e) pairs.push_back(uint32_t(i) << 16 | uint32_t(m.col[e]));
        known->second = append(pairs);
      }
      to.pairs = known->second;
      to.sums = sums_[op.sum];
      if (p_.sums[op.sum].each_stage) to.flags |= kEachStage;
      return to;
    }
    if (dense(op.matrix)) to.flags |= kDense;
    if (m.gated) to.flags |= kIndirect, to.values = dynamic_values_[op.matrix];
    // operations that read a matrix the same way share its stream
    auto [known, is_new] = known_streams_.try_emplace({op.matrix, op.transposed}, to.first_chunk, 0);
    if (is_new) {
      if (dense(op.matrix)) streams_.add_dense(op.matrix, m.values, entries_of(m, op.transposed));
      else streams_.add(op.matrix, m.values, entries_of(m, op.transposed), m.gated ? dynamic_values_[op.matrix] : -1);
      known->second.second = static_cast<int32_t>(streams_.chunks.size()) - to.first_chunk;
    }
    std::tie(to.first_chunk, to.chunks) = known->second;
    return to;
  }

  // What a list's streams come to behind each operation: its next one's, and after the last its first.
  void round_and_round(int begin, int end) {
    int32_t next = -1;
    for (int i = begin; i < end && next < 0; ++i) next = ops_[i].chunks > 0 ? ops_[i].first_chunk : -1;
    for (int i = end - 1; i >= begin; --i) {
      ops_[i].next_chunk = next;
      if (ops_[i].chunks > 0) next = ops_[i].first_chunk;
    }
  }

  bool dense(int matrix) const {
    const Matrix<T>& m = p_.matrices[matrix];
    return !m.dynamic() && m.rows > 1 && m.cols > 1 && m.nnz() > dense_above_ * m.rows * m.cols;
  }

  // The streams one after another; and now it is known where their numbers lie.
  void place_streams() {
    DeviceProgram& d = out_.program;
    const int32_t zero = d.dynamic_values++;  // one more dynamic value, which stays zero
    d.streams = static_cast<int32_t>(out_.bytes.size());
    streams_.fill_up_with(zero);
    for (size_t c = 0; c < streams_.chunks.size(); ++c) streams_.chunks[c].offset = append(streams_.blobs[c]);
    d.stream_bytes = static_cast<int32_t>(out_.bytes.size()) - d.streams;
    d.largest_chunk = streams_.largest, d.slabs = streams_.slabs;
    for (const auto& one : streams_.pending) note(one.matrix, index(streams_.chunks[one.chunk].offset) + one.place, one.entry);
  }

  const Program<T>& p_;
  const double dense_above_;
  Image<T> out_;
  std::vector<int32_t> buffers_, sums_, first_row_, dynamic_values_;
  std::vector<int32_t> vectors_;  // byte offsets of row vectors
  std::map<std::pair<int, bool>, std::pair<int32_t, int32_t>> known_streams_;  // (matrix, transposed) -> first chunk, how many
  std::map<int, int32_t> pairs_;                                         // by matrix, of its gradients
  std::vector<DeviceOp> ops_;
  Streams<T> streams_;
};

}  // namespace

template <class T>
Image<T> make_image(const Program<T>& program, size_t chunk_bytes, double dense_above) {
  return Writer<T>(program, chunk_bytes, dense_above).write();
}

template Image<float> make_image(const Program<float>&, size_t, double);
template Image<double> make_image(const Program<double>&, size_t, double);

}  // namespace sparseflow::cuda
