// Whole solves: the steps of one initial value problem over tiles that share a step size.
#include "solve.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "tile_io.h"

namespace sparseflow {
namespace {

constexpr size_t kStepsForeseen = 32;  // records of so many steps are not moved; memory that no step fills is never touched

}  // namespace

// One initial value problem over a range of tiles that share a step size.
template <class T>
class Integration {
 public:
  Integration(CompiledProgram<T>& owner, Packed<T>& packed, const SolveInput<T>& input, int first_tile, int tiles, int threads,
              int first_worker, T* xs, T* ls)
      : owner_(owner), program_(owner.program_), kernels_(owner.kernels_), packed_(packed), in_(input), first_tile_(first_tile),
        tiles_(tiles), threads_(threads), first_worker_(first_worker), xs_(xs), ls_(ls), width_(packed.width), dim_(program_.dim),
        rows_(program_.dim + (program_.divergence ? 1 : 0)), stages_(input.tableau.stages()) {
    const int width = width_;
    first_sample_ = first_tile * width;
    samples_ = std::min(tiles * width, input.batch - first_sample_);
    const size_t state = size_t(tiles) * rows_ * width;
    for (Aligned<T>* part : {&y0_, &f0_, &y1_, &f1_, &mid_}) *part = Aligned<T>(state);
    if (program_.noise >= 0) noise_ = Aligned<T>(size_t(tiles) * dim_ * width);
    if (program_.context >= 0) context_ = Aligned<T>(size_t(tiles) * context_size());
    // a gradient needs the states of all stages; of a last one at the solution it is known, and follows from no derivative
    const Tableau& t = input.tableau;
    if (input.record) kept_ = input.record_stages ? stages_ - (t.adaptive && t.last_stage_is_solution() ? 2 : 1) : t.adaptive ? 1 : 0;
    out_.derivatives.reserve(kStepsForeseen * step_size());
    out_.derivatives.resize(step_size());
    if (input.record) out_.states.reserve(kStepsForeseen * input.batch * dim_);
    for (int i = 0; i < stages_; ++i) modulated_.emplace_back(program_, packed, kernels_);
    scratch_.resize(threads);
    std::vector<int> parts = input.parts.empty() ? std::vector<int>{dim_} : input.parts;
    if (program_.divergence) parts.push_back(1);
    for (size_t i = 0, row = 0; i < parts.size(); row += parts[i++])
      components_.push_back({int(row), int(row) + parts[i], T(input.rtol[i]), T(input.atol[i])});
    sums_.assign(components_.size(), std::vector<double>(size_t(tiles) * width, 0.0));
    const Tableau& tableau = input.tableau;
    for (const auto& row : tableau.a) a_.emplace_back(row.begin(), row.end());
    b_.assign(tableau.b.begin(), tableau.b.end());
    b_error_.assign(tableau.b_error.begin(), tableau.b_error.end());
    b_mid_.assign(tableau.b_mid.begin(), tableau.b_mid.end());
  }

  SolveOutput<T> run() {
    load();
    if (in_.tableau.adaptive) run_adaptive();
    else run_fixed();
    std::fill(out_.derivatives.end() - step_size(), out_.derivatives.end(), T(0));  // of no step
    return std::move(out_);
  }

 private:
  struct Scratch {  // the workspace of one worker, and the stages of the tile it is at
    char* workspace = nullptr;
    T* input = nullptr;  // where the program reads the state
    std::vector<T*> k;
    std::vector<const T*> k_rows;  // the same, to be handed to kernels
    T* row = nullptr;              // one tile of state to write into
    double* sums = nullptr;
  };
  struct Component {  // rows of the state whose error has a norm of its own
    int begin, end;
    T rtol, atol;
  };

  int count(int tile) const { return std::min(width_, samples_ - tile * width_); }
  size_t tile_size() const { return size_t(rows_) * width_; }
  size_t state_size() const { return size_t(dim_) * width_; }  // without the log-density row
  size_t context_size() const { return size_t(program_.context_rows()) * width_; }
  // What a tile costs in a loop: so many evaluations, or so many passes over its state.
  Work evaluations(int n) const { return {owner_.evaluation_, double(n) * width_}; }
  Work traffic(int n) const { return {owner_.traffic_, double(n) * double(tile_size())}; }

 public:
  static size_t scratch_bytes(const Packed<T>& packed, int rows, int stages) {
    return packed.workspace_bytes + size_t(stages + 1) * rows * packed.width * sizeof(T) + size_t(packed.width) * sizeof(double) + 256;
  }

 private:
  Scratch& scratch(int worker) {
    Scratch& s = scratch_[worker];
    if (s.workspace != nullptr) return s;
    s.workspace = owner_.workspace(first_worker_ + worker, scratch_bytes(packed_, rows_, stages_));
    s.input = buffer(s, program_.input);
    char* at = s.workspace + (packed_.workspace_bytes + 63) / 64 * 64;
    for (int i = 0; i < stages_; ++i, at += tile_size() * sizeof(T)) s.k.push_back(reinterpret_cast<T*>(at));
    s.k_rows.assign(s.k.begin(), s.k.end());
    s.row = reinterpret_cast<T*>(at);
    at += tile_size() * sizeof(T);
    s.sums = reinterpret_cast<double*>(at);
    if (program_.ones >= 0) std::fill_n(buffer(s, program_.ones), width_, T(1));
    return s;
  }

  T* buffer(const Scratch& s, int id) const { return reinterpret_cast<T*>(s.workspace + packed_.buffer_offset[id]); }

  void load() {
    parallel_for(tiles_, threads_, traffic(1), [&](int tile, int) {
      T* y = y0_.get() + tile * tile_size();
      const int first = first_sample_ + tile * width_;
      load_tile(in_.x, dim_, first, count(tile), width_, y);
      if (program_.divergence) load_tile(in_.l, 1, first, count(tile), width_, y + size_t(dim_) * width_);
      if (program_.noise >= 0) load_tile(in_.noise, dim_, first, count(tile), width_, noise_.get() + size_t(tile) * dim_ * width_);
      if (program_.context >= 0)
        load_tile(in_.context, program_.context_rows(), first, count(tile), width_, context_.get() + tile * context_size());
    });
  }

  // k = sign * (f, -trace) at the state in s.input
  void evaluate(const Scratch& s, const Stage<T>& stage, T* k) const {
    T* reduce = reinterpret_cast<T*>(s.workspace + packed_.reduce_offset);
    if (program_.divergence) std::fill_n(reduce, width_, T(0));
    stage.run(packed_.body, s.workspace);
    const ptrdiff_t stride = packed_.row_bytes(program_.buffers[program_.output]) / ptrdiff_t(sizeof(T));
    const T* f = buffer(s, program_.output);
    for (int c = 0; c < dim_; ++c) kernels_.scale(f + c * stride, T(in_.sign), width_, k + size_t(c) * width_);
    if (program_.divergence) kernels_.scale(reduce, T(-in_.sign), width_, k + state_size());
  }

  void begin_tile(const Scratch& s, int tile) const {
    if (program_.noise >= 0) std::copy_n(noise_.get() + size_t(tile) * dim_ * width_, size_t(dim_) * width_, buffer(s, program_.noise));
    if (program_.context >= 0) std::copy_n(context_.get() + tile * context_size(), context_size(), buffer(s, program_.context));
    if (!packed_.prologue.empty()) modulated_[0].run(packed_.prologue, s.workspace);
  }

  // Times are the solver's; the field sees sign * t in its own precision.
  void modulate(const std::vector<T>& times) {
    std::vector<T> field_times(times);
    for (T& t : field_times) t *= T(in_.sign);
    owner_.refresh(field_times, modulated_);
  }

  static T before(T t) { return std::nextafter(t, t - T(1)); }
  static T after(T t) { return std::nextafter(t, t + T(1)); }

  // RMS over samples and rows of a component, from per-sample sums of squares taken in batch order.
  double norm(size_t component) const {
    double sum = 0;
    for (int s = 0; s < samples_; ++s) sum += sums_[component][s];
    const Component& c = components_[component];
    return std::sqrt(sum / (double(samples_) * (c.end - c.begin)));
  }
  double mixed_norm() const {
    double largest = norm(0);
    for (size_t component = 1; component < sums_.size(); ++component) {
      const double n = norm(component);
      if (n > largest || std::isnan(n)) largest = n;
    }
    return largest;
  }

  // sums of squares of (sum_j c_j k_j) / (atol + rtol max(|y0|, |y1|)) per sample
  void measure(int tile, const Scratch& s, const T* y0, const T* y1, const T* const* k, const T* c, int terms) {
    for (size_t component = 0; component < sums_.size(); ++component) {
      const Component& own = components_[component];
      std::fill_n(s.sums, width_, 0.0);
      for (int row = own.begin; row < own.end; ++row) {
        const size_t at = size_t(row) * width_;
        const T* rows[16];
        for (int j = 0; j < terms; ++j) rows[j] = k[j] + at;
        kernels_.error_row(y0 + at, y1 + at, rows, c, terms, own.rtol, own.atol, width_, s.sums);
      }
      std::copy_n(s.sums, count(tile), sums_[component].begin() + size_t(tile) * width_);
    }
  }

  void write_output(int index, const std::function<const T*(int tile, const Scratch&)>& state) {
    parallel_for(tiles_, threads_, traffic(2), [&](int tile, int worker) {
      Scratch& s = scratch(worker);
      const T* y = state(tile, s);
      const int first = first_sample_ + tile * width_;
      store_tile(y, dim_, first, count(tile), width_, xs_ + size_t(index) * in_.batch * dim_);
      if (program_.divergence) store_tile(y + size_t(dim_) * width_, 1, first, count(tile), width_, ls_ + size_t(index) * in_.batch);
    });
  }

  // ---- what a gradient needs

  void record_state() {
    if (!in_.record) return;
    const size_t at = out_.states.size();
    out_.states.resize(at + size_t(in_.batch) * dim_);
    parallel_for(tiles_, threads_, traffic(1), [&](int tile, int) {
      store_tile(y0_.get() + tile * tile_size(), dim_, tile * width_, count(tile), width_, out_.states.data() + at);
    });
  }

  // The derivatives of a step that is tried are the last ones of the record; they stay when it is accepted.
  size_t step_size() const { return size_t(kept_) * in_.batch * dim_; }
  void try_derivative(int stage, int tile, const T* k) {
    if (stage >= kept_) return;
    T* const step = out_.derivatives.data() + (out_.derivatives.size() - step_size());
    store_tile(k, dim_, tile * width_, count(tile), width_, step + size_t(stage) * in_.batch * dim_);
  }
  void record_derivatives() { out_.derivatives.resize(out_.derivatives.size() + step_size()); }

  // The derivative of the quartic `Kernels::interpolate` evaluates; y0_, f0_ are the new ends of the step.
  void record_slopes(int index, T dt, T x) {
    if (!in_.record) return;
    const T in_b = -T(10) * x + T(42) * x * x - T(32) * x * x * x;
    const T in_mid = T(32) * x - T(96) * x * x + T(64) * x * x * x;
    const T in_fa = T(1) - T(8) * x + T(15) * x * x - T(8) * x * x * x, in_fb = T(2) * x - T(9) * x * x + T(8) * x * x * x;
    out_.x_slopes.resize(in_.times.size() * in_.batch * dim_, T(0));
    out_.l_slopes.resize(program_.divergence ? in_.times.size() * in_.batch : 0, T(0));
    std::vector<T> slope(tile_size());
    for (int tile = 0; tile < tiles_; ++tile) {
      const size_t at = tile * tile_size();
      worked(8 * int64_t(tile_size()));
      const T *a = y1_.get() + at, *b = y0_.get() + at, *mid = mid_.get() + at, *fa = f1_.get() + at, *fb = f0_.get() + at;
      for (size_t j = 0; j < tile_size(); ++j) slope[j] = (in_b * (b[j] - a[j]) + in_mid * (mid[j] - a[j])) / dt + in_fa * fa[j] + in_fb * fb[j];
      const int first = tile * width_;
      store_tile(slope.data(), dim_, first, count(tile), width_, out_.x_slopes.data() + size_t(index) * in_.batch * dim_);
      if (program_.divergence)
        store_tile(slope.data() + state_size(), 1, first, count(tile), width_, out_.l_slopes.data() + size_t(index) * in_.batch);
    }
  }

  // Names the samples that are to blame: those that are not finite; if there are none, those whose own error is too large.
  void stop(const char* status, double t, double dt) {
    out_.status = status;
    out_.t = t;
    out_.dt = dt;
    auto collect = [&](auto blame) {
      for (int s = 0; s < samples_; ++s)
        for (size_t component = 0; component < sums_.size(); ++component)
          if (blame(sums_[component][s], components_[component])) {
            out_.rows.push_back(first_sample_ + s);
            break;
          }
    };
    collect([](double sum, const Component&) { return !std::isfinite(sum); });
    if (out_.rows.empty()) collect([](double sum, const Component& component) { return sum > component.end - component.begin; });
  }

  void first_derivative(T t) {
    modulate({t});
    ++out_.nfe;
    parallel_for(tiles_, threads_, evaluations(1), [&](int tile, int worker) {
      Scratch& s = scratch(worker);
      begin_tile(s, tile);
      std::copy_n(y0_.get() + tile * tile_size(), state_size(), s.input);
      evaluate(s, modulated_[0], f0_.get() + tile * tile_size());
    });
  }

  // ---- adaptive

  double choose_first_step(double t0) {
    const T one = T(1);
    auto norm_of = [&](const Aligned<T>& what, const T* c, int terms, const Aligned<T>* other) {
      parallel_for(tiles_, threads_, traffic(2), [&](int tile, int worker) {
        Scratch& s = scratch(worker);
        const T* y = y0_.get() + tile * tile_size();
        const T* k[2] = {what.get() + tile * tile_size(), other ? other->get() + tile * tile_size() : nullptr};
        measure(tile, s, y, y, k, c, terms);
      });
      return mixed_norm();
    };
    const double d0 = norm_of(y0_, &one, 1, nullptr);
    const double d1 = norm_of(f0_, &one, 1, nullptr);
    const double h0 = first_trial_step(d0, d1);
    modulate({T(t0 + h0)});
    ++out_.nfe;
    parallel_for(tiles_, threads_, evaluations(1), [&](int tile, int worker) {
      Scratch& s = scratch(worker);
      begin_tile(s, tile);
      const T h = T(h0);
      const T* k[1] = {f0_.get() + tile * tile_size()};
      kernels_.combine(y0_.get() + tile * tile_size(), k, &h, 1, int(state_size()), s.input);
      evaluate(s, modulated_[0], f1_.get() + tile * tile_size());
    });
    const T difference[2] = {T(1), T(-1)};
    const double d2 = std::fabs(norm_of(f1_, difference, 2, &f0_) / h0);
    return first_step(h0, d1, d2, in_.tableau.order);
  }

  // One trial step of every tile: y1, f1, the error sums and, if an output may fall inside, the midpoint.
  double try_step(double t0, double dt, double t1, bool with_mid) {
    const Tableau& tableau = in_.tableau;
    const T start = T(t0), step = T(dt), end = T(t1);
    std::vector<T> times;
    for (double c : tableau.c) times.push_back(c == 1.0 ? before(end) : start + T(c) * step);
    modulate(times);
    out_.nfe += stages_ - 1;
    const bool shortcut = tableau.last_stage_is_solution();
    auto scaled = [&](const std::vector<T>& weights) {
      std::vector<T> out(weights);
      for (T& w : out) w *= step;
      return out;
    };
    std::vector<std::vector<T>> a;
    for (const auto& row : a_) a.push_back(scaled(row));
    const std::vector<T> b = scaled(b_), b_error = scaled(b_error_), b_mid = scaled(b_mid_);
    parallel_for(tiles_, threads_, evaluations(stages_ - 1), [&](int tile, int worker) {
      Scratch& s = scratch(worker);
      begin_tile(s, tile);
      const size_t at = tile * tile_size();
      const int n = int(tile_size());
      const T* y0 = y0_.get() + at;
      T *y1 = y1_.get() + at, *f1 = f1_.get() + at;
      const T** k = s.k_rows.data();
      k[0] = f0_.get() + at;
      k[stages_ - 1] = f1;
      try_derivative(0, tile, k[0]);
      for (int i = 0; i + 1 < stages_; ++i) {
        kernels_.combine(y0, k, a[i].data(), i + 1, int(state_size()), s.input);
        evaluate(s, modulated_[i], i + 2 == stages_ ? f1 : s.k[i + 1]);
        try_derivative(i + 1, tile, k[i + 1]);
      }
      kernels_.combine(y0, k, b.data(), stages_, n, y1);
      if (shortcut) std::copy_n(s.input, state_size(), y1);  // the state f1 belongs to, bit for bit
      if (with_mid) kernels_.combine(y0, k, b_mid.data(), stages_, n, mid_.get() + at);
      measure(tile, s, y0, y1, k, b_error.data(), stages_);
    });
    return mixed_norm();
  }

  void interpolate_output(int index, const StepController& last) {
    // after acceptance y0_, f0_ are the new ends and y1_, f1_ hold the old ones
    const double dt = last.last_dt;
    const T x = T((in_.times[index] - last.t0) / (last.t1 - last.t0));
    write_output(index, [&, x](int tile, const Scratch& s) -> const T* {
      const size_t at = tile * tile_size();
      kernels_.interpolate(y1_.get() + at, y0_.get() + at, mid_.get() + at, f1_.get() + at, f0_.get() + at, T(dt), x, int(tile_size()), s.row);
      return s.row;
    });
    record_slopes(index, T(dt), x);
  }

  // Leaves zero or NaN per sample where `stop` looks for the ones to blame.
  bool state_is_finite() {
    std::atomic<bool> finite{true};
    parallel_for(tiles_, threads_, traffic(2), [&](int tile, int) {
      worked(8 * int64_t(tile_size()));
      for (int s = 0; s < count(tile); ++s) {
        auto badness = [&](const Aligned<T>& part) {
          const T* rows = part.get() + tile * tile_size() + s;
          double bad = 0;
          for (int row = 0; row < rows_; ++row) bad += double(rows[size_t(row) * width_]) - double(rows[size_t(row) * width_]);
          return bad;
        };
        const double state = badness(y0_);
        sums_[0][size_t(tile) * width_ + s] = state + badness(f0_);
        for (size_t component = 1; component < sums_.size(); ++component) sums_[component][size_t(tile) * width_ + s] = 0;
        if (!(state == 0)) finite = false;
      }
    });
    return finite;
  }

  void run_adaptive() {
    const StepOptions& o = in_.options;
    const double start = in_.times[0];
    write_output(0, [&](int tile, const Scratch&) { return y0_.get() + tile * tile_size(); });
    record_state();
    first_derivative(T(start));
    const double first = std::isnan(o.first_step) ? choose_first_step(start) : o.first_step;
    if (!std::isfinite(first)) state_is_finite();  // finds the rows to name
    StepController control;
    control.rule = o;
    control.order = in_.tableau.order;
    control.step_t = {o.step_t.data(), int(o.step_t.size())};
    control.jump_t = {o.jump_t.data(), int(o.jump_t.size())};
    control.begin(start, first);

    bool state_checked = false;
    for (size_t index = 1; index < in_.times.size(); ++index) {
      control.next_output(in_.times[index]);
      while (in_.times[index] > control.t1) {
        const Proposal proposal = control.propose();
        if (proposal == Proposal::kTooManySteps) return stop("max_num_steps", control.t1, control.dt);
        if (proposal == Proposal::kUnderflow) return stop("underflow", control.t1, control.dt);
        if (!state_checked && !state_is_finite()) return stop("non_finite", control.t1, control.dt);
        state_checked = true;

        const double ratio = try_step(control.t1, control.dt, control.end, control.end >= in_.times[index]);
        if (!control.judge(ratio)) {
          ++out_.rejected;
          continue;
        }
        ++out_.accepted;
        out_.steps.emplace_back(control.t0, control.last_dt);
        if (!std::isfinite(ratio)) state_checked = false;
        std::swap(y0_, y1_);
        std::swap(f0_, f1_);
        record_derivatives();
        record_state();
        if (control.at_jump) {
          // the output quartic of this step still needs the derivative from before the jump
          write_outputs_inside(index, control);
          first_derivative(after(T(control.t1)));
        }
      }
      if (index >= written_) interpolate_output(int(index), control);
    }
  }

  void write_outputs_inside(size_t index, const StepController& last) {
    for (; index < in_.times.size() && in_.times[index] <= last.t1; ++index) {
      interpolate_output(int(index), last);
      written_ = index + 1;
    }
  }

  // ---- fixed grid

  void run_fixed() {
    const Tableau& tableau = in_.tableau;
    write_output(0, [&](int tile, const Scratch&) { return y0_.get() + tile * tile_size(); });
    record_state();
    size_t index = 1;
    for (size_t i = 0; i + 1 < in_.grid.size(); ++i) {
      const double t0 = in_.grid[i], t1 = in_.grid[i + 1];
      const T start = T(t0), end = T(t1), step = T(t1 - t0);
      std::vector<T> times{in_.perturb ? after(start) : start};
      for (double c : tableau.c) times.push_back(c == 1.0 ? (in_.perturb ? before(end) : end) : start + T(c) * step);
      modulate(times);
      out_.nfe += stages_;
      std::vector<std::vector<T>> a;
      for (const auto& row : a_) {
        a.push_back(row);
        for (T& w : a.back()) w *= step;
      }
      std::vector<T> b(b_);
      for (T& w : b) w *= step;
      parallel_for(tiles_, threads_, evaluations(stages_), [&](int tile, int worker) {
        Scratch& s = scratch(worker);
        begin_tile(s, tile);
        const size_t at = tile * tile_size();
        for (int j = 0; j < stages_; ++j) {
          const T* y = y0_.get() + at;
          if (j == 0) std::copy_n(y, state_size(), s.input);
          else kernels_.combine(y, s.k_rows.data(), a[j - 1].data(), j, int(state_size()), s.input);
          evaluate(s, modulated_[j], s.k[j]);
          try_derivative(j, tile, s.k[j]);
        }
        kernels_.combine(y0_.get() + at, s.k_rows.data(), b.data(), stages_, int(tile_size()), y1_.get() + at);
      });
      ++out_.accepted;
      out_.steps.emplace_back(t0, t1 - t0);
      for (; index < in_.times.size() && t1 >= in_.times[index]; ++index) {
        const double t = in_.times[index];
        const T x = T((t - t0) / (t1 - t0));
        write_output(int(index), [&](int tile, const Scratch& s) -> const T* {
          const T *a0 = y0_.get() + tile * tile_size(), *a1 = y1_.get() + tile * tile_size();
          if (t == t0) return a0;
          if (t == t1) return a1;
          for (size_t j = 0; j < tile_size(); ++j) s.row[j] = a0[j] + x * (a1[j] - a0[j]);
          return s.row;
        });
      }
      std::swap(y0_, y1_);
      record_derivatives();
      record_state();
    }
  }

  CompiledProgram<T>& owner_;
  const Program<T>& program_;
  const Kernels<T>& kernels_;
  Packed<T>& packed_;
  const SolveInput<T>& in_;
  const int first_tile_, tiles_, threads_;
  const int first_worker_;  // of the owner's workspaces, ours begin here
  T *xs_, *ls_;
  const int width_, dim_, rows_, stages_;
  int first_sample_ = 0, samples_ = 0;
  Aligned<T> y0_, f0_, y1_, f1_, mid_, noise_, context_;  // [tiles][rows][width]
  std::vector<Stage<T>> modulated_;             // one per stage
  std::vector<Scratch> scratch_;                // one per worker
  std::vector<Component> components_;
  std::vector<std::vector<double>> sums_;       // by component: [samples]
  std::vector<std::vector<T>> a_;
  std::vector<T> b_, b_error_, b_mid_;
  int kept_ = 0;  // derivatives per step that are recorded
  size_t written_ = 0;
  SolveOutput<T> out_;
};

template <class T>
SolveOutput<T> CompiledProgram<T>::solve(const SolveInput<T>& input, T* xs, T* ls) {
  SolveOutput<T> total;
  if (input.batch == 0) return total;
  const Exclusive::Hold held(one_caller_);
  if (input.tableau.stages() > 16) throw std::invalid_argument("solve: at most 16 stages");
  if (program_.out_rows() != program_.dim) throw std::invalid_argument("solve: the program has not as many outputs as inputs");
  if (program_.context_rows() > 0 && input.context == nullptr) throw std::invalid_argument("solve: this program needs a context");
  const size_t components = std::max<size_t>(1, input.parts.size()) + (program_.divergence ? 1 : 0);
  if (input.rtol.size() < components || input.atol.size() < components)
    throw std::invalid_argument("solve: every component of the state needs its tolerances");
  for (int rows : input.parts)
    if (rows < 1) throw std::invalid_argument("solve: a component of the state has no rows");
  if (!input.parts.empty() && std::accumulate(input.parts.begin(), input.parts.end(), int64_t(0)) != program_.dim)
    throw std::invalid_argument("solve: the components' rows are not the state's " + std::to_string(program_.dim));
  if (input.per_tile && input.record) throw std::invalid_argument("solve: tiles that step on their own record no common steps");
  const auto begin = std::chrono::steady_clock::now();
  const double expected = solve_.known() ? solve_.seconds() * input.batch : 0.0;
  Packed<T>& p = packed(choose_width(input.batch, input.threads, input.tableau.stages(), expected));
  const int tiles = (input.batch + p.width - 1) / p.width;
  const int threads = std::max(1, std::min(input.threads, tiles));
  provide_workspaces(threads);
  if (!input.per_tile) {
    expect_work(expected, threads);
    total = Integration<T>(*this, p, input, 0, tiles, threads, 0, xs, ls).run();
    solve_.learn(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / input.batch);
    return total;
  }

  std::vector<SolveOutput<T>> outs(tiles);
  parallel_for(tiles, threads, Work{solve_, double(p.width)}, [&](int tile, int worker) {
    outs[tile] = Integration<T>(*this, p, input, tile, 1, 1, worker, xs, ls).run();
  });
  for (const SolveOutput<T>& out : outs) {
    total.nfe += out.nfe;
    total.accepted += out.accepted;
    total.rejected += out.rejected;
    if (out.status != "ok" && total.status == "ok") total.status = out.status, total.t = out.t, total.dt = out.dt;
    total.rows.insert(total.rows.end(), out.rows.begin(), out.rows.end());
  }
  total.nfe = (total.nfe + tiles - 1) / tiles;
  return total;
}

template SolveOutput<float> CompiledProgram<float>::solve(const SolveInput<float>&, float*, float*);
template SolveOutput<double> CompiledProgram<double>::solve(const SolveInput<double>&, double*, double*);

}  // namespace sparseflow
