#include "adjoint.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "tile_io.h"

namespace sparseflow {
namespace {

constexpr size_t kTileBytes = size_t(2) << 20;  // a tile's rows should not leave the second-level cache too often
constexpr int kChunks = 128;                       // places to add gradients up in, at most: two for each of 64 threads
constexpr size_t kChunkBytes = size_t(256) << 20;  // and their memory
constexpr size_t kGathered = 4096;                 // sums that a thread adds up at a time

// Cotangents of lanes beyond the batch are zero, so that they add nothing to any sum.
template <class T>
void load_cotangent(const T* source, int columns, int first, int count, int width, T* rows) {
  for (int c = 0; c < columns; ++c) {
    T* row = rows + size_t(c) * width;
    for (int s = 0; s < count; ++s) row[s] = source[size_t(first + s) * columns + c];
    std::fill(row + count, row + width, T(0));
  }
  worked(int64_t(columns) * width);
}

}  // namespace

template <class T>
CompiledAdjoint<T>::CompiledAdjoint(Program<T> program, const Kernels<T>& kernels) : program_(std::move(program)), kernels_(kernels) {
  if (!program_.adjoint()) throw std::invalid_argument("program: it says nothing of cotangents");
  validate(program_);
}

template <class T>
Packed<T>& CompiledAdjoint<T>::packed(int width_index) {
  std::unique_ptr<Packed<T>>& slot = packed_[width_index];
  if (!slot) slot = pack(program_, kernels_, width_index);
  return *slot;
}

template <class T>
int CompiledAdjoint<T>::width_index(int batch) const {
  if (forced_ >= 0) return forced_;
  size_t rows = 0;
  for (const Buffer& b : program_.buffers) rows += size_t(b.rows) * b.slots;
  int best = -1;
  for (int w = 0; w < Kernels<T>::kWidths; ++w) {
    if (kernels_.pull[0][0][w] == nullptr) continue;
    const int width = kernels_.lanes * kernels_.vectors[w];
    if (best >= 0 && (rows * width * sizeof(T) > kTileBytes || kernels_.lanes * kernels_.vectors[best] >= batch)) break;
    best = w;
  }
  return best;
}

template <class T>
int CompiledAdjoint<T>::width(int batch) const {
  return kernels_.lanes * kernels_.vectors[width_index(batch)];
}

template <class T>
void CompiledAdjoint<T>::force_width(int index) {
  if (index < -1 || index >= Kernels<T>::kWidths || (index >= 0 && kernels_.pull[0][0][index] == nullptr))
    throw std::invalid_argument("force_width: no such width for gradients: index is " + std::to_string(index));
  const Exclusive::Hold held(one_caller_);
  forced_ = index;
}

// One backward pass over the tiles of a batch. Tiles are dealt out in chunks of neighbours; a chunk has its own place to
// add gradients up in and goes through its tiles in order, and the chunks are added in order, whoever did the work.
template <class T>
class Reversal {
 public:
  Reversal(CompiledAdjoint<T>& owner, int batch, const T* noise, const T* context, T* grad_context, const Tableau& tableau, int sign, int threads)
      : owner_(owner), program_(owner.program_), kernels_(owner.kernels_), packed_(owner.packed(owner.width_index(batch))),
        tableau_(tableau), noise_(noise), context_(context), grad_context_(program_.context_cotangent < 0 ? nullptr : grad_context), batch_(batch), sign_(sign), width_(packed_.width), dim_(program_.dim),
        rows_(std::max(dim_ + (program_.divergence ? 1 : 0), program_.out_rows())), tiles_((batch + width_ - 1) / width_), stages_(tableau.stages()) {
    const size_t bytes = std::max<size_t>(1, (packed_.lasting_sums + stages_ * packed_.stage_sums) * sizeof(T));
    chunks_ = std::max(1, std::min({tiles_, kChunks, int(kChunkBytes / bytes)}));
    threads_ = std::max(1, std::min(threads, chunks_));
    lasting_ = Aligned<T>(packed_.lasting_sums * chunks_);
    each_stage_ = Aligned<T>(packed_.stage_sums * stages_ * chunks_);
    cotangent_ = Aligned<T>(tiles_ * tile_size());
    carried_ = Aligned<T>(tiles_ * tile_size());
    if (grad_context_ != nullptr) context_cotangent_ = Aligned<T>(tiles_ * context_size());
    for (int i = 0; i < stages_; ++i) modulated_.emplace_back(program_, packed_, kernels_);
    pulled_.resize(stages_, false);
    if (static_cast<int>(owner.workspaces_.size()) < threads_) owner.workspaces_.resize(threads_);
    scratch_.resize(threads_);
    for (const Matrix<T>& m : program_.matrices) gradient_.matrices.emplace_back(m.sum < 0 ? 0 : m.gated ? m.path_entry.size() : m.nnz(), 0.0);
    for (const Modulation<T>& m : program_.modulations) {
      gradient_.modulations.emplace_back();
      if (m.shift_sum < 0) continue;
      auto& g = gradient_.modulations.back();
      g.bias.resize(m.n);
      g.gate_slope.resize(m.gate_slope.size()), g.gate_offset.resize(m.gate_offset.size());
      g.shift_slope.resize(m.shift_slope.size()), g.shift_offset.resize(m.shift_offset.size());
    }
    for (const RowVector<T>& v : program_.vectors) {
      gradient_.vectors.emplace_back(v.sum < 0 || v.timed() ? 0 : v.n, 0.0);
      time_summed_ = time_summed_ || (v.timed() && v.sum >= 0);
    }
    op_of_sum_.resize(program_.sums.size(), nullptr);
    for (const PackedOp<T>& op : packed_.reverse)
      if (op.op->kind == OpKind::kGradient && op.repeats < 0) op_of_sum_[op.op->sum] = &op;
  }

  ProgramGradient<T> evaluate(double t, const T* x, const T* grad_f, const T* grad_trace, T* grad_x) {
    modulate({static_cast<T>(t)});
    pulled_[0] = true;
    for_each_tile(owner_.pull_, 1, [&](int tile, int chunk, Scratch& s) {
      const int first = tile * width_, n = count(tile);
      load_tile(x, dim_, first, n, width_, s.y);
      load_cotangent(grad_f, program_.out_rows(), first, n, width_, s.k_cotangent[0]);
      T* const trace = s.k_cotangent[0] + state_size();
      if (program_.divergence && grad_trace) load_cotangent(grad_trace, 1, first, n, width_, trace);
      else if (program_.divergence) std::fill_n(trace, width_, T(0));
      if (program_.divergence)  // what the solver sees is the opposite of the trace
        for (int j = 0; j < width_; ++j) trace[j] = -trace[j];
      pull(s, tile, chunk, 0, s.y, s.k_cotangent[0]);
      store_tile(s.pulled, dim_, first, n, width_, grad_x);
    });
    store_context();
    take_away_stages();
    return finish();
  }

  ProgramGradient<T> solve(const SolveRecord<T>& record, const T* grad_xs, const T* grad_ls, T* grad_x, T* grad_l) {
    record_ = &record, grad_xs_ = grad_xs, grad_ls_ = grad_ls;
    const int steps = static_cast<int>(record.steps.size());
    int last = static_cast<int>(record.times.size()) - 1;
    for (int n = steps - 1; n >= 0; --n) {
      const double t0 = record.steps[n].first;
      const double t1 = n + 1 < steps ? record.steps[n + 1].first : t0 + record.steps[n].second;
      int first = last;  // outputs read off this step: (t0, t1], the last step's beyond its rounding too
      while (first > 0 && record.times[first] > t0) --first;
      step_back(n, t0, t1, first + 1, last);
      last = first;
    }
    if (tableau_.adaptive && steps > 0) first_derivative();
    for_each_tile(owner_.traffic_, 2 * rows_, [&](int tile, int, Scratch& s) {  // the first output is the initial state itself
      T* const y = cotangent_.get() + tile * tile_size();
      load_output(0, tile, s.output);
      const T one = T(1);
      add(y, s.output, one, int(tile_size()));
      store_tile(y, dim_, tile * width_, count(tile), width_, grad_x);
      if (program_.divergence) store_tile(y + state_size(), 1, tile * width_, count(tile), width_, grad_l);
    });
    store_context();
    return finish();
  }

 private:
  struct Scratch {  // one worker's
    char* workspace = nullptr;
    T *y = nullptr, *y_cotangent = nullptr, *pulled = nullptr, *output = nullptr;
    std::vector<T*> k, input, k_cotangent;  // by stage
    std::vector<const T*> k_rows;
  };

  int count(int tile) const { return std::min(width_, batch_ - tile * width_); }
  size_t tile_size() const { return size_t(rows_) * width_; }
  size_t state_size() const { return size_t(dim_) * width_; }
  size_t context_size() const { return size_t(program_.context_rows()) * width_; }
  T* buffer(const Scratch& s, int id) const { return reinterpret_cast<T*>(s.workspace + packed_.buffer_offset[id]); }
  ptrdiff_t stride(int id) const { return packed_.row_bytes(program_.buffers[id]) / ptrdiff_t(sizeof(T)); }

  Scratch& scratch(int worker) {
    Scratch& s = scratch_[worker];
    if (s.workspace != nullptr) return s;
    const size_t arrays = size_t(3 * stages_ + 4);
    const size_t begin = (packed_.workspace_bytes + 63) / 64 * 64;
    s.workspace = owner_.workspace(worker, begin + arrays * tile_size() * sizeof(T) + 64);
    T* at = reinterpret_cast<T*>(s.workspace + begin);
    auto next = [&] { return std::exchange(at, at + tile_size()); };
    s.y = next(), s.y_cotangent = next(), s.pulled = next(), s.output = next();
    for (int i = 0; i < stages_; ++i) s.k.push_back(next()), s.input.push_back(next()), s.k_cotangent.push_back(next());
    s.k_rows.assign(s.k.begin(), s.k.end());
    if (program_.ones >= 0) std::fill_n(buffer(s, program_.ones), width_, T(1));
    return s;
  }

  // work(tile, chunk, scratch), the tiles of a chunk in order; it costs so many units for every sample
  template <class Visit>
  void for_each_tile(Cost& cost, double units, Visit work) {
    parallel_for(chunks_, threads_, Work{cost, units * width_ * tiles_ / chunks_}, [&](int chunk, int worker) {
      Scratch& s = scratch(worker);
      const int begin = int(int64_t(tiles_) * chunk / chunks_), end = int(int64_t(tiles_) * (chunk + 1) / chunks_);
      for (int tile = begin; tile < end; ++tile) {
        if (program_.noise >= 0) {  // slot 1 of the input
          const int first = tile * width_, n = count(tile);
          T* row = buffer(s, program_.input) + width_;
          for (int c = 0; c < dim_; ++c, row += stride(program_.input)) {
            for (int j = 0; j < n; ++j) row[j] = noise_[size_t(first + j) * dim_ + c];
            std::fill(row + n, row + width_, T(0));
          }
        }
        if (program_.context >= 0) load_tile(context_, program_.context_rows(), tile * width_, count(tile), width_, buffer(s, program_.context));
        if (!packed_.prologue.empty()) modulated_[0].run(packed_.prologue, s.workspace);
        work(tile, chunk, s);
      }
    });
  }

  void store_context() {
    if (grad_context_ == nullptr) return;
    for (int tile = 0; tile < tiles_; ++tile)
      store_tile(context_cotangent_.get() + tile * context_size(), program_.context_rows(), tile * width_, count(tile), width_, grad_context_);
  }

  void add(T* y, const T* x, T factor, int n) const { kernels_.combine(y, &x, &factor, 1, n, y); }

  void modulate(const std::vector<T>& times) {
    times_ = times;
    for (T& t : times_) t *= T(sign_);
    owner_.time_.refresh(program_, times_, modulated_);
  }

  void write_rows(const Scratch& s, int id, const T* rows, T factor) const {  // slot 0 of a whole buffer
    T* out = buffer(s, id);
    for (int c = 0; c < program_.buffers[id].rows; ++c, rows += width_, out += stride(id)) kernels_.scale(rows, factor, width_, out);
  }

  // k = sign * f at a state, without its trace
  void evaluate(const Scratch& s, int stage, const T* y, T* k) const {
    write_rows(s, program_.input, y, T(1));
    modulated_[stage].run(packed_.body, s.workspace);
    const T* f = buffer(s, program_.output);
    for (int c = 0; c < dim_; ++c, f += stride(program_.output)) kernels_.scale(f, T(sign_), width_, k + size_t(c) * width_);
  }

  // s.pulled: the cotangent of the state, from that of sign * (f, -trace) at it; gradients are added up on the way.
  void pull(const Scratch& s, int tile, int chunk, int stage, const T* y, const T* k_cotangent) {
    write_rows(s, program_.input, y, T(1));
    modulated_[stage].run(packed_.keep, s.workspace);
    write_rows(s, program_.cotangent, k_cotangent, T(sign_));
    if (program_.divergence) kernels_.scale(k_cotangent + state_size(), T(-sign_), width_, buffer(s, program_.trace_cotangent));
    modulated_[stage].run(packed_.reverse, s.workspace, lasting_.get() + chunk * packed_.lasting_sums,
                          each_stage_.get() + (size_t(chunk) * stages_ + stage) * packed_.stage_sums);
    const T* x = buffer(s, program_.state_cotangent);
    for (int c = 0; c < dim_; ++c, x += stride(program_.state_cotangent)) std::copy_n(x, width_, s.pulled + size_t(c) * width_);
    if (grad_context_ == nullptr) return;
    T* sum = context_cotangent_.get() + tile * context_size();
    const T* more = buffer(s, program_.context_cotangent);
    for (int c = 0; c < program_.context_rows(); ++c, more += stride(program_.context_cotangent), sum += width_) add(sum, more, T(1), width_);
  }

  static T before(T t) { return std::nextafter(t, t - T(1)); }
  static T after(T t) { return std::nextafter(t, t + T(1)); }

  // As the solver took them (csrc/cpu/solve.cpp).
  std::vector<T> stage_times(int n, double t0, double t1) const {
    const T start = T(t0), end = T(t1), step = tableau_.adaptive ? T(record_->steps[n].second) : T(t1 - t0);
    const bool adaptive = tableau_.adaptive, perturb = record_->perturb;
    std::vector<T> times{adaptive ? (n == 0 ? start : before(start)) : perturb ? after(start) : start};
    for (double c : tableau_.c) times.push_back(c == 1.0 ? (adaptive || perturb ? before(end) : end) : start + T(c) * step);
    return times;
  }

  void load_output(int index, int tile, T* rows) const {
    load_cotangent(grad_xs_ + size_t(index) * batch_ * dim_, dim_, tile * width_, count(tile), width_, rows);
    if (!program_.divergence) return;
    if (grad_ls_) load_cotangent(grad_ls_ + size_t(index) * batch_, 1, tile * width_, count(tile), width_, rows + state_size());
    else std::fill_n(rows + state_size(), width_, T(0));
  }

  // As the step had it. (Where the last stage is not at the solution, a step begins with another derivative than f there.)
  void load_derivative(int n, int stage, int tile, T* k) const {
    const size_t at = (size_t(n) * record_->kept + stage) * batch_ * dim_;
    load_tile(record_->derivatives + at, dim_, tile * width_, count(tile), width_, k);
  }

  // What an output at fraction x of a step owes to the ends, the midpoint and the derivatives at the ends.
  struct Reading {
    T start, end, mid, slope_start, slope_end;
  };
  Reading reading(T x) const {
    if (!tableau_.adaptive) return {T(1) - x, x, 0, 0, 0};
    const T x2 = x * x, x3 = x2 * x, x4 = x2 * x2;
    return {T(1) - T(11) * x2 + T(18) * x3 - T(8) * x4, -T(5) * x2 + T(14) * x3 - T(8) * x4, T(16) * (x2 - T(2) * x3 + x4),
            x - T(4) * x2 + T(5) * x3 - T(2) * x4, x2 - T(3) * x3 + T(2) * x4};
  }

  // The step from t0 to t1, of which outputs first .. last were read off: turns the cotangent of its end into that of its
  // start. An adaptive step's first derivative is the last one of the step before, whose cotangent is carried there.
  void step_back(int n, double t0, double t1, int first, int last) {
    const T dt = tableau_.adaptive ? T(record_->steps[n].second) : T(t1 - t0);
    const bool adaptive = tableau_.adaptive, shortcut = adaptive && tableau_.last_stage_is_solution();
    const int s_end = stages_ - 1;
    auto scaled = [dt](const std::vector<double>& weights) {
      std::vector<T> out(weights.begin(), weights.end());
      for (T& w : out) w *= dt;
      return out;
    };
    std::vector<std::vector<T>> a;
    for (const auto& row : tableau_.a) a.push_back(scaled(row));
    const std::vector<T> b = scaled(tableau_.b), b_mid = scaled(tableau_.b_mid);
    std::vector<Reading> readings;
    for (int i = first; i <= last; ++i) readings.push_back(reading(T((record_->times[i] - t0) / (t1 - t0))));
    const bool is_last = n + 1 == static_cast<int>(record_->steps.size());

    // which stages have a cotangent at all; they are pulled back from the last to the first
    std::vector<bool> active(stages_);
    const bool read_inside = std::any_of(readings.begin(), readings.end(), [](const Reading& r) { return r.mid != T(0) || r.slope_start != T(0) || r.slope_end != T(0); });
    for (int i = s_end; i >= 0; --i) {
      active[i] = b[i] != T(0) || (adaptive && read_inside && (b_mid[i] != T(0) || i == 0 || i == s_end)) || (adaptive && i == s_end && !is_last);
      for (int j = i + 1; j < stages_; ++j) active[i] = active[i] || (active[j] && a[j - 1][i] != T(0));
    }
    int needed = s_end;  // derivatives up to the one before the last active stage, whose state follows from them
    while (needed > 0 && !active[needed]) --needed;
    const bool end_known = shortcut && needed == s_end;

    modulate(stage_times(n, t0, t1));
    for (int i = adaptive ? 1 : 0; i < stages_; ++i) pulled_[i] = active[i];
    const size_t per_state = size_t(batch_) * dim_;
    for_each_tile(owner_.pull_, std::count(active.begin() + (adaptive ? 1 : 0), active.end(), true), [&](int tile, int chunk, Scratch& s) {
      const int from = tile * width_, samples = count(tile), size = int(tile_size()), state = int(state_size());
      T* const cotangent = cotangent_.get() + tile * tile_size();
      T* const carried = carried_.get() + tile * tile_size();
      load_tile(record_->states + size_t(n) * per_state, dim_, from, samples, width_, s.input[0]);
      for (int i = 1; i <= needed; ++i) {
        if (end_known && i == s_end) {
          load_tile(record_->states + size_t(n + 1) * per_state, dim_, from, samples, width_, s.input[i]);
          break;
        }
        if (i <= record_->kept) load_derivative(n, i - 1, tile, s.k[i - 1]);
        else evaluate(s, i - 1, s.input[i - 1], s.k[i - 1]);
        kernels_.combine(s.input[0], s.k_rows.data(), a[i - 1].data(), i, state, s.input[i]);
      }

      T* const start = s.y_cotangent;
      std::fill_n(start, size, T(0));
      for (int i = 0; i < stages_; ++i) std::fill_n(s.k_cotangent[i], size, T(0));
      if (adaptive && !is_last) std::copy_n(carried, size, s.k_cotangent[s_end]);
      for (int i = first; i <= last; ++i) {
        load_output(i, tile, s.output);
        const Reading& r = readings[i - first];
        add(cotangent, s.output, r.end, size);
        add(start, s.output, r.start + r.mid, size);
        if (!adaptive || !read_inside) continue;
        for (int j = 0; j < stages_; ++j)
          if (b_mid[j] != T(0)) add(s.k_cotangent[j], s.output, r.mid * b_mid[j], size);
        add(s.k_cotangent[0], s.output, r.slope_start * dt, size);
        add(s.k_cotangent[s_end], s.output, r.slope_end * dt, size);
      }
      add(start, cotangent, T(1), size);
      for (int j = 0; j < stages_; ++j)
        if (b[j] != T(0)) add(s.k_cotangent[j], cotangent, b[j], size);

      for (int i = s_end; i >= (adaptive ? 1 : 0); --i) {
        if (!active[i]) continue;
        pull(s, tile, chunk, i, s.input[i], s.k_cotangent[i]);
        add(start, s.pulled, T(1), state);
        for (int j = 0; j < i; ++j)
          if (a[i - 1][j] != T(0)) add(s.k_cotangent[j], s.pulled, a[i - 1][j], state);
      }
      std::copy_n(start, size, cotangent);
      if (adaptive) std::copy_n(s.k_cotangent[0], size, carried);
    });
    take_away_stages();
  }

  void first_derivative() {
    modulate({T(record_->steps[0].first)});
    pulled_[0] = true;
    for_each_tile(owner_.pull_, 1, [&](int tile, int chunk, Scratch& s) {
      load_tile(record_->states, dim_, tile * width_, count(tile), width_, s.y);
      pull(s, tile, chunk, 0, s.y, carried_.get() + tile * tile_size());
      add(cotangent_.get() + tile * tile_size(), s.pulled, T(1), int(state_size()));
    });
    take_away_stages();
  }

  // ---- from sums over samples to gradients

  // The sum `id` over all chunks, entry by entry of its matrix.
  void gather(int id, const T* base, size_t per_chunk, std::vector<double>& out) const {
    out.assign(program_.sums[id].size, 0.0);
    const PackedOp<T>* const op = op_of_sum_[id];
    if (op == nullptr) return;
    const size_t size = op->entry.size();
    parallel_for(int((size + kGathered - 1) / kGathered), threads_, Work{owner_.gather_, double(kGathered) * chunks_}, [&](int part, int) {
      const size_t begin = part * kGathered, end = std::min(size, begin + kGathered);
      for (int chunk = 0; chunk < chunks_; ++chunk) {
        const T* const sums = base + chunk * per_chunk + op->sums;
        worked(int64_t(end - begin));
        for (size_t k = begin; k < end; ++k)
          if (op->entry[k] >= 0) out[op->entry[k]] += double(sums[k]);
      }
    });
  }

  // Sums whose meaning depends on time, stage by stage.
  void take_away_stages() {
    for (int stage = 0; stage < stages_; ++stage) {
      if (!pulled_[stage]) continue;
      pulled_[stage] = false;
      if (packed_.stage_sums == 0) continue;
      const T* const base = each_stage_.get() + size_t(stage) * packed_.stage_sums;
      const size_t per_chunk = size_t(stages_) * packed_.stage_sums;
      const double t = double(times_[stage]);
      std::vector<double> shift, gate;
      std::vector<std::vector<double>> output_gate(program_.modulations.size());
      for (size_t i = 0; i < program_.matrices.size(); ++i) {
        const Matrix<T>& m = program_.matrices[i];
        if (!m.gated || m.sum < 0) continue;
        const std::vector<T>& scale = modulated_[stage].scale(m.gate_modulation);
        std::vector<double>& of_gate = output_gate[m.gate_modulation];
        of_gate.resize(scale.size(), 0.0);
        gather(m.sum, base, per_chunk, gate);
        for (size_t p = 0; p < m.path_entry.size(); ++p) {
          const double g = gate[m.path_entry[p]];
          gradient_.matrices[i][p] += double(scale[m.path_gate[p]]) * g;
          of_gate[m.path_gate[p]] += double(m.path_constant[p]) * g;
        }
      }
      for (size_t i = 0; i < program_.modulations.size(); ++i) {
        const Modulation<T>& m = program_.modulations[i];
        if (m.shift_sum < 0 || !m.dynamic()) continue;
        auto& out = gradient_.modulations[i];
        const std::vector<T>& scale = modulated_[stage].scale(int(i));
        gather(m.shift_sum, base, per_chunk, shift);
        if (!m.gate_slope.empty()) gather(m.gate_sum, base, per_chunk, gate);
        for (int j = 0; j < m.n; ++j) {
          const double u = shift[j], s = double(scale[j]);  // u = s * (cotangent of z)
          out.bias[j] += u;
          if (!m.gate_slope.empty()) {
            const double through_output = output_gate[i].empty() ? 0.0 : output_gate[i][j] * s;
            const double logit = (gate[j] + double(m.bias[j]) * u + through_output) * (1.0 - s);
            out.gate_slope[j] += t * logit;
            out.gate_offset[j] += logit;
            gradient_.t += logit * double(m.gate_slope[j]);
          }
          if (!m.shift_slope.empty()) {
            const double z = u / s;  // Stage::modulate keeps s from zero
            out.shift_slope[j] += t * z;
            out.shift_offset[j] += z;
            gradient_.t += z * double(m.shift_slope[j]);
          }
        }
      }
      if (time_summed_) take_away_time(base, per_chunk, times_[stage]);
      for (int chunk = 0; chunk < chunks_; ++chunk)
        std::fill_n(each_stage_.get() + chunk * per_chunk + size_t(stage) * packed_.stage_sums, packed_.stage_sums, T(0));
    }
  }

  // The cotangent of a stage's time answer, from the sums of the vectors that are rows of it.
  void take_away_time(const T* base, size_t per_chunk, T t) {
    const size_t first = gradient_.time_cotangents.size();
    gradient_.time_points.push_back(t);
    gradient_.time_cotangents.resize(first + program_.time_rows, 0.0);
    std::vector<double> part;
    for (const RowVector<T>& v : program_.vectors) {
      if (!v.timed() || v.sum < 0) continue;
      gather(v.sum, base, per_chunk, part);
      for (int j = 0; j < v.n; ++j) gradient_.time_cotangents[first + v.time_row + j] += part[j];
    }
  }

  ProgramGradient<T> finish() {
    for (size_t i = 0; i < program_.vectors.size(); ++i) {
      const RowVector<T>& v = program_.vectors[i];
      if (v.sum >= 0 && !v.timed()) gather(v.sum, lasting_.get(), packed_.lasting_sums, gradient_.vectors[i]);
    }
    for (size_t i = 0; i < program_.matrices.size(); ++i) {
      const Matrix<T>& m = program_.matrices[i];
      if (m.sum >= 0 && !m.dynamic()) gather(m.sum, lasting_.get(), packed_.lasting_sums, gradient_.matrices[i]);
    }
    for (size_t i = 0; i < program_.modulations.size(); ++i) {
      const Modulation<T>& m = program_.modulations[i];
      if (m.shift_sum >= 0 && !m.dynamic()) gather(m.shift_sum, lasting_.get(), packed_.lasting_sums, gradient_.modulations[i].bias);
    }
    return std::move(gradient_);
  }

  CompiledAdjoint<T>& owner_;
  const Program<T>& program_;
  const Kernels<T>& kernels_;
  Packed<T>& packed_;
  const Tableau& tableau_;
  const T *noise_, *context_;
  T* grad_context_;  // null: not wanted
  const SolveRecord<T>* record_ = nullptr;
  const T *grad_xs_ = nullptr, *grad_ls_ = nullptr;
  const int batch_, sign_, width_, dim_, rows_, tiles_, stages_;
  int chunks_ = 1, threads_ = 1;
  Aligned<T> lasting_;                 // [chunks][lasting_sums]
  Aligned<T> each_stage_;              // [chunks][stages][stage_sums]
  Aligned<T> cotangent_, carried_;     // [tiles][rows][width]: of the state, and of the derivative at it
  Aligned<T> context_cotangent_;       // [tiles][context rows][width]
  bool time_summed_ = false;           // timed row vectors have sums
  std::vector<Stage<T>> modulated_;    // one per stage
  std::vector<bool> pulled_;           // stages that have something in each_stage_
  std::vector<T> times_;               // the field's, by stage
  std::vector<Scratch> scratch_;       // one per worker
  std::vector<const PackedOp<T>*> op_of_sum_;
  ProgramGradient<T> gradient_;
};

template <class T>
std::vector<std::vector<double>> CompiledAdjoint<T>::op_seconds(int batch) {
  using Clock = std::chrono::steady_clock;
  const Exclusive::Hold held(one_caller_);
  Packed<T>& p = packed(width_index(batch));
  std::vector<Stage<T>> stages;
  stages.emplace_back(program_, p, kernels_);
  time_.refresh(program_, {T(0)}, stages);
  Aligned<char> workspace(p.workspace_bytes);
  Aligned<T> lasting(p.lasting_sums), each_stage(p.stage_sums);
  std::vector<std::vector<double>> out;
  for (const auto* list : {&p.body, &p.keep, &p.reverse}) {
    out.emplace_back(list->size(), std::numeric_limits<double>::infinity());
    for (int repeat = 0; repeat < 20; ++repeat)
      for (size_t i = 0; i < list->size(); ++i) {
        const auto begin = Clock::now();
        stages[0].run(*list, workspace.get(), lasting.get(), each_stage.get(), i, 1);
        out.back()[i] = std::min(out.back()[i], std::chrono::duration<double>(Clock::now() - begin).count());
      }
  }
  return out;
}

template <class T>
ProgramGradient<T> CompiledAdjoint<T>::evaluate(double t, const T* x, const T* noise, int batch, int threads, const T* grad_f, const T* grad_trace, T* grad_x,
                                                const T* context, T* grad_context) {
  if (program_.context_rows() > 0 && batch > 0 && context == nullptr) throw std::invalid_argument("evaluate: this program needs a context");
  const Exclusive::Hold held(one_caller_);
  Tableau one;
  one.adaptive = false;
  return Reversal<T>(*this, batch, noise, context, grad_context, one, 1, threads).evaluate(t, x, grad_f, grad_trace, grad_x);
}

template <class T>
ProgramGradient<T> CompiledAdjoint<T>::solve(const SolveRecord<T>& record, int threads, const T* grad_xs, const T* grad_ls, T* grad_x, T* grad_l,
                                             T* grad_context) {
  if (program_.out_rows() != program_.dim) throw std::invalid_argument("solve: the program has not as many outputs as inputs");
  if (program_.context_rows() > 0 && record.batch > 0 && record.context == nullptr) throw std::invalid_argument("solve: this program needs a context");
  if (record.tableau.stages() > 16) throw std::invalid_argument("solve: at most 16 stages");
  const Exclusive::Hold held(one_caller_);
  return Reversal<T>(*this, record.batch, record.noise, record.context, grad_context, record.tableau, record.sign, threads).solve(record, grad_xs, grad_ls, grad_x, grad_l);
}

template class CompiledAdjoint<float>;
template class CompiledAdjoint<double>;

}  // namespace sparseflow
