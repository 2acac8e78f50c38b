// A compiled program but for its solves: packings, the choice of a tile width, refreshes, single evaluations.
#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>

#include "solve.h"
#include "thread_pool.h"
#include "tile_io.h"

namespace sparseflow {

namespace {
constexpr double kEnoughSeconds = 0.1;  // a run that takes as long is not repeated: its noise is small beside it
constexpr size_t kKeptBytes = size_t(16) << 20;  // a packing that is measured and takes more is not kept meanwhile
}

template <class T>
CompiledProgram<T>::CompiledProgram(Program<T> program, const Kernels<T>& kernels) : program_(std::move(program)), kernels_(kernels) {
  if (program_.adjoint()) throw std::invalid_argument("program: an adjoint is not solved forwards");
  validate(program_);
}

template <class T>
Packed<T>& CompiledProgram<T>::packed(int width_index) {
  std::unique_ptr<Packed<T>>& slot = packed_[width_index];
  if (!slot) slot = pack(program_, kernels_, width_index);
  return *slot;
}

template <class T>
const std::vector<double>& CompiledProgram<T>::seconds() {
  if (!seconds_.empty()) return seconds_;
  std::vector<double> found;  // all or nothing: it may be interrupted
  using Clock = std::chrono::steady_clock;
  for (int w = 0; w < Kernels<T>::kWidths; ++w) {
    Packed<T>& p = packed(w);
    const Stage<T> stage(program_, p, kernels_);  // not refreshed: its zeros take as long, and no callback sees a made-up time
    Aligned<char> workspace(p.workspace_bytes);
    double best = std::numeric_limits<double>::infinity();
    double spent = 0;
    for (int repeat = 0; repeat < 5 && spent < kEnoughSeconds; ++repeat) {
      const auto begin = Clock::now();
      stage.run(p.body, workspace.get());
      const double took = std::chrono::duration<double>(Clock::now() - begin).count();
      best = std::min(best, took);
      spent += took;
    }
    found.push_back(best);
    if (p.bytes() > kKeptBytes) packed_.erase(w);  // the chosen one is packed again: that costs less than all at once
  }
  seconds_ = std::move(found);
  return seconds_;
}

template <class T>
int CompiledProgram<T>::choose_width(int batch, int threads, int evaluations, double total) {
  if (forced_ >= 0) return forced_;
  // A convolution's weight serves many pixels in the narrowest tile too, whose planes lie in the nearest cache.
  if (std::any_of(program_.matrices.begin(), program_.matrices.end(), [](const Matrix<T>& m) { return m.window.present(); })) return 0;
  const std::vector<double>& seconds = this->seconds();
  int best = 0;
  double least = std::numeric_limits<double>::infinity();
  for (int w = 0; w < Kernels<T>::kWidths; ++w) {
    const int tiles = (batch + width(w) - 1) / width(w);
    const int at_hand = threads_at_hand(tiles * seconds[w] * evaluations, total, std::min(threads, tiles));
    const double cost = double((tiles + at_hand - 1) / at_hand) * seconds[w];
    if (cost < least) least = cost, best = w;
  }
  // keep one packing for the batch sizes to come rather than five
  for (auto it = packed_.begin(); it != packed_.end();) it = it->second && it->first != best && packed_.size() > 2 ? packed_.erase(it) : std::next(it);
  return best;
}

template <class T>
void CompiledProgram<T>::evaluate(double t, const T* x, const T* noise, int batch, int threads, T* f, T* trace, const T* context) {
  if (batch == 0) return;
  if (program_.context_rows() > 0 && context == nullptr) throw std::invalid_argument("evaluate: this program needs a context");
  const Exclusive::Hold held(one_caller_);
  Packed<T>& p = packed(choose_width(batch, threads, 1, 0));
  const int width = p.width, dim = program_.dim, out_rows = program_.out_rows(), tiles = (batch + width - 1) / width;
  std::vector<Stage<T>> stages;
  stages.emplace_back(program_, p, kernels_);
  refresh({static_cast<T>(t)}, stages);
  const int workers = std::max(1, std::min(threads, tiles));
  provide_workspaces(workers);
  parallel_for(tiles, workers, Work{evaluation_, double(width)}, [&](int tile, int worker) {
    char* ws = workspace(worker, p.workspace_bytes);
    auto buffer = [&](int id) { return reinterpret_cast<T*>(ws + p.buffer_offset[id]); };
    const int first = tile * width, count = std::min(width, batch - first);
    load_tile(x, dim, first, count, width, buffer(program_.input));
    if (program_.ones >= 0) std::fill_n(buffer(program_.ones), width, T(1));
    if (program_.noise >= 0 && noise != nullptr) load_tile(noise, dim, first, count, width, buffer(program_.noise));
    if (program_.context >= 0) load_tile(context, program_.context_rows(), first, count, width, buffer(program_.context));
    T* reduce = reinterpret_cast<T*>(ws + p.reduce_offset);
    std::fill_n(reduce, width, T(0));
    stages[0].run(p.prologue, ws);
    stages[0].run(p.body, ws);
    const ptrdiff_t stride = p.row_bytes(program_.buffers[program_.output]) / ptrdiff_t(sizeof(T));
    const T* out = buffer(program_.output);
    for (int s = 0; s < count; ++s)
      for (int c = 0; c < out_rows; ++c) f[size_t(first + s) * out_rows + c] = out[c * stride + s];
    if (trace) std::copy_n(reduce, count, trace + first);
  });
}

template class CompiledProgram<float>;
template class CompiledProgram<double>;

}  // namespace sparseflow
