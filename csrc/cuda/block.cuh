// A block of threads at work on one tile: where things lie, the streams of weights, and the operations of a program.
//
// Threads stand as [groups][parts][lanes]. The lanes of a group hold a tile's samples, V neighbours each; a group takes one
// row of a matrix at a time, so an activation's row is read as runs of 16-byte words. The entries of a row are dealt out to
// the parts (as many as a thread has samples, or more where rows are long), whose sums meet by shuffles; then every thread
// finishes one sample. Groups take rows in the order of their length, so that the threads of a warp wait little for each other.
//
// Every operation ends at a barrier: the next one may read what it wrote.
#pragma once

#include "activation.cuh"
#include "device_program.h"
#include "pointwise.cuh"

namespace sparseflow::cuda {

template <class T>
struct Quad {
  T v[4];
};
SF_DEVICE Quad<float> load_quad(const float* p) {
  const float4 q = *reinterpret_cast<const float4*>(p);
  return {{q.x, q.y, q.z, q.w}};
}
SF_DEVICE Quad<double> load_quad(const double* p) {
  const double2 q = reinterpret_cast<const double2*>(p)[0], r = reinterpret_cast<const double2*>(p)[1];
  return {{q.x, q.y, r.x, r.y}};
}

template <class T, int V>
struct Samples {
  T v[V];
};
template <class T, int V>
SF_DEVICE Samples<T, V> load(const T* p) {
  Samples<T, V> x;
  if constexpr (V == 4 && sizeof(T) == 4) {
    const float4 q = *reinterpret_cast<const float4*>(p);
    x.v[0] = q.x, x.v[1] = q.y, x.v[2] = q.z, x.v[3] = q.w;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) x.v[i] = p[i];
  }
  return x;
}
constexpr unsigned kWarp = 0xffffffffu;

// T: float or double.  V: neighbouring samples of a thread.  Shared: the workspace is in shared memory.
template <class T, int V, bool Shared>
struct Block {
  static constexpr int kSamplesLog = V == 4 ? 2 : 0;
  const DeviceProgram& program;  // a kernel's parameters: as long as nobody hands on their address, they stay in constant memory
  const BlockPlan& plan;
  char* const global;  // of this block
  const int tile_log, lanes_log, split;
  const int lane, part, group, groups;  // of this thread; how many groups there are
  T* const dynamic;                     // [dynamic_values]
  int red_turn = 0;

  SF_DEVICE Block(const DeviceProgram& p, const BlockPlan& q, char* block_global)
      : program(p), plan(q), global(block_global), tile_log(q.tile_log), lanes_log(q.tile_log - kSamplesLog), split(q.split_log),
        lane(threadIdx.x & ((1 << lanes_log) - 1)), part((threadIdx.x >> lanes_log) & ((1 << split) - 1)), group(threadIdx.x >> (lanes_log + split)),
        groups(blockDim.x >> (lanes_log + split)),
        dynamic(reinterpret_cast<T*>(q.dynamic >= 0 ? shared_memory() + q.dynamic : block_global + q.dynamic_global)) {}

  template <class U>
  SF_DEVICE U* in_shared(int offset) const {
    return reinterpret_cast<U*>(shared_memory() + offset);
  }
  SF_DEVICE const DeviceOp* ops() const { return in_shared<DeviceOp>(plan.ops); }
  SF_DEVICE const Chunk* chunks() const { return in_shared<Chunk>(plan.ops + program.chunks - program.ops); }
  SF_DEVICE T* scale() const { return in_shared<T>(plan.modulation); }              // [modulation_rows]
  SF_DEVICE T* shift() const { return scale() + program.modulation_rows; }          // [modulation_rows]
  SF_DEVICE T* trace() const { return in_shared<T>(plan.reduce); }                  // [S]
  SF_DEVICE T* red() const { return trace() + (size_t(1) << tile_log); }  // [2][warps][S]: sums over rows on their way into the trace
  SF_DEVICE int samples() const { return 1 << tile_log; }
  SF_DEVICE T* work() const {
    if constexpr (Shared) return reinterpret_cast<T*>(shared_memory() + plan.work);
    else return reinterpret_cast<T*>(global + plan.work_global);
  }
  SF_DEVICE T* rows_of(const Place& place) const { return work() + (size_t(place.row) << tile_log); }
  SF_DEVICE T* row_of(const Place& place, int row) const { return work() + (size_t(place.row + row) << tile_log); }
  SF_DEVICE int slot_of(const Place& place) const { return place.slot << tile_log; }  // numbers from one slot to the next
  template <class U>
  SF_DEVICE const U* in_image(int offset) const {
    return reinterpret_cast<const U*>(program.image + offset);
  }

  // Once per launch: what is read often moves next to the block, modulations that time does not change are made, and the
  // workspace becomes finite (lanes without a sample must not carry what was there before).
  SF_DEVICE void begin() {
    const int n = (program.chunks - program.ops + program.n_chunks * int(sizeof(Chunk))) / 16;
    for (int i = threadIdx.x; i < n; i += blockDim.x) copy_async(shared_memory() + plan.ops + 16 * i, program.image + program.ops + 16 * i);
    for (int m = 0; m < program.n_modulations; ++m) {
      const DeviceModulation mod = in_image<DeviceModulation>(program.modulations)[m];
      for (int j = threadIdx.x; j < mod.n; j += blockDim.x) {
        scale()[mod.first + j] = mod.scale < 0 ? T(1) : in_image<T>(mod.scale)[j];
        shift()[mod.first + j] = mod.bias < 0 ? T(0) : in_image<T>(mod.bias)[j];
      }
    }
    const size_t size = size_t(program.workspace_rows) << tile_log;
    for (size_t i = threadIdx.x; i < size; i += blockDim.x) work()[i] = T(0);
    for (int i = threadIdx.x; i < program.dynamic_values; i += blockDim.x) dynamic[i] = T(0);
    sync();
    if (program.ones.row >= 0)
      for (int s = threadIdx.x; s < samples(); s += blockDim.x) rows_of(program.ones)[s] = T(1);
    if (plan.resident) {
      for (int i = threadIdx.x; i < program.stream_bytes / 16; i += blockDim.x)
        copy_async(shared_memory() + plan.streams + 16 * size_t(i), program.image + program.streams + 16 * size_t(i));
    }
    commit_copies();
    wait_for_copies();
    sync();
  }

  // ---- what depends on time alone

  SF_DEVICE void modulate(T t, bool keep_from_zero) {
    for (int m = 0; m < program.n_modulations; ++m) {
      const DeviceModulation mod = in_image<DeviceModulation>(program.modulations)[m];
      if (mod.gate_slope < 0 && mod.shift_slope < 0) continue;
      for (int j = threadIdx.x; j < mod.n; j += blockDim.x) {
        T s = T(1), c = T(0);
        if (mod.gate_slope >= 0) {
          s = sigmoid(in_image<T>(mod.gate_slope)[j] * t + in_image<T>(mod.gate_offset)[j]);
          // the cotangent of a shift is found as that of the gated sum over the gate, so an adjoint's gate must not vanish
          if (keep_from_zero) s = s < (sizeof(T) == 4 ? T(1e-30) : T(1e-290)) ? (sizeof(T) == 4 ? T(1e-30) : T(1e-290)) : s;
        }
        if (mod.shift_slope >= 0) c = in_image<T>(mod.shift_slope)[j] * t + in_image<T>(mod.shift_offset)[j];
        scale()[mod.first + j] = s;
        shift()[mod.first + j] = s * in_image<T>(mod.bias)[j] + c;
      }
    }
  }
  // behind a barrier after modulate
  SF_DEVICE void sum_paths() {
    for (int m = 0; m < program.n_gated; ++m) {
      const DeviceGated gated = in_image<DeviceGated>(program.gated)[m];
      const int* const ptr = in_image<int>(gated.path_ptr);
      for (int e = threadIdx.x; e < gated.entries; e += blockDim.x) {
        T sum = T(0);
        for (int p = ptr[e]; p < ptr[e + 1]; ++p) sum += in_image<T>(gated.path_constant)[p] * scale()[gated.gate + in_image<int>(gated.path_gate)[p]];
        dynamic[gated.values + e] = sum;
      }
    }
  }

  // ---- streams of weights

  int ring_turn = 0;                // the place of the chunk in use, of two
  int in_use = -1, in_other = -1;  // the chunks that this place and the other hold, or will

  SF_DEVICE void fetch(int place, int chunk) {
    const Chunk c = chunks()[chunk];
    char* const to = shared_memory() + plan.streams + size_t(place) * program.largest_chunk;
    for (int i = threadIdx.x; i < c.bytes / 16; i += blockDim.x) copy_async(to + 16 * size_t(i), program.image + c.offset + 16 * size_t(i));
    commit_copies();
  }
  SF_DEVICE void turn_ring() {
    const int held = in_use;
    in_use = in_other, in_other = held;
    ring_turn ^= 1;
  }

  // The chunk, ready to be read; the one that will probably be asked for next is on its way meanwhile.
  SF_DEVICE const char* acquire(int chunk, const Chunk& c, int next) {
    if (plan.resident) return shared_memory() + plan.streams + (c.offset - program.streams);
    if (in_use != chunk) turn_ring();
    if (in_use != chunk) wait_for_copies(), sync(), fetch(ring_turn, in_use = chunk);  // nobody reads there any more
    wait_for_copies();
    sync();  // all threads' copies are there, and all have left the other place
    if (next >= 0 && next != chunk && in_other != next) fetch(ring_turn ^ 1, in_other = next);
    return shared_memory() + plan.streams + size_t(ring_turn) * program.largest_chunk;
  }

  // ---- rows

  // read(source), for each of the memories it may be in a copy of the code that reads it.
  template <class F>
  SF_DEVICE void where_it_is(const T* source, F read) const {
    if (Shared || plan.gathered < 0) read(source);
    else read(in_shared<T>(plan.gathered));
  }

  // The rows of a place that an operation reads at random, and the numbers from one slot to the next. From global memory
  // they come in one piece, because a gather there reads a sector for every activation. Ends at a barrier where it copies.
  SF_DEVICE const T* gathered(const Place& place, int n, int slots, int& slot) const {
    slot = slot_of(place);
    if (Shared || plan.gathered < 0) return rows_of(place);
    constexpr int kAtOnce = 16 / sizeof(T);
    const int size = n << tile_log;
    for (int k = 0; k < slots; ++k) {
      const T* const from = rows_of(place) + k * slot;
      T* const to = in_shared<T>(plan.gathered) + k * size;
      for (int i = threadIdx.x * kAtOnce; i < size; i += blockDim.x * kAtOnce) copy_async(to + i, from + i);
    }
    commit_copies();
    wait_for_copies();
    sync();
    slot = size;
    return in_shared<T>(plan.gathered);
  }

  // sums over the entries first, first + step ... of a row, for V samples (and their tangents)
  template <bool Tangent, bool Indirect>
  SF_DEVICE void multiply(const void* weights, const ushort4* cols, const T* values, int first, int last, int step, const char* source, int tangent, T* sum) const {
    const int stride = int(sizeof(T)) << tile_log;
    for (int q = first; q < last; q += step) {
      Quad<T> w;
      if constexpr (Indirect) {
        const uint4 i = static_cast<const uint4*>(weights)[q];
        w = {{values[i.x], values[i.y], values[i.z], values[i.w]}};
      } else {
        w = load_quad(static_cast<const T*>(weights) + size_t(kQuad) * q);
      }
      const ushort4 c = cols[q];
      const char* const from[4] = {source + int(c.x) * stride, source + int(c.y) * stride, source + int(c.z) * stride, source + int(c.w) * stride};
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const Samples<T, V> x = load<T, V>(reinterpret_cast<const T*>(from[k]));
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += w.v[k] * x.v[v];
        if constexpr (Tangent) {
          const Samples<T, V> p = load<T, V>(reinterpret_cast<const T*>(from[k] + tangent));
#pragma unroll
          for (int v = 0; v < V; ++v) sum[V + v] += w.v[k] * p.v[v];
        }
      }
    }
  }

  // The parts' sums, one sample to a thread: first halves of the samples change hands, then what is left is added up.
  SF_DEVICE T meet(const T* x) const {
    T keep = x[0];
    int done = 0;
    if constexpr (V == 4) {
      const bool upper = part & 1, odd = part & 2;
      T low = upper ? x[2] : x[0], high = upper ? x[3] : x[1];
      low += __shfl_xor_sync(kWarp, upper ? x[0] : x[2], 1 << lanes_log);
      high += __shfl_xor_sync(kWarp, upper ? x[1] : x[3], 1 << lanes_log);
      keep = odd ? high : low;
      keep += __shfl_xor_sync(kWarp, odd ? low : high, 2 << lanes_log);
      done = 2;
    }
    for (int bit = done; bit < split; ++bit) keep += __shfl_xor_sync(kWarp, keep, 1 << (lanes_log + bit));
    return keep;
  }
  // Of the parts, the sample this thread finishes, or is one that stands by.
  SF_DEVICE int sample_of_part() const { return V == 4 ? lane * 4 + 2 * (part & 1) + ((part >> 1) & 1) : lane; }
  SF_DEVICE bool stands_by() const { return (part >> (V == 4 ? 2 : 0)) != 0; }

  template <bool Tangent>
  SF_DEVICE void finish_layer(const DeviceOp& op, int row, T sum, T tangent, T& trace_part) const;
  SF_DEVICE void finish_product(const DeviceOp& op, int row, T sum, T& trace_part) const;

  template <bool Layer, bool Tangent, bool Indirect>
  SF_DEVICE void run_rows(const DeviceOp& op) {
    int tangent = 0;
    const T* const source = gathered(op.source, op.cols, Tangent ? 2 : 1, tangent);
    const T* const values = Indirect ? dynamic + op.values : nullptr;
    const bool reduces = op.flags & kReduces;
    T trace_part = T(0);
    for (int i = 0; i < op.chunks; ++i) {
      const int chunk = op.first_chunk + i;
      const Chunk c = chunks()[chunk];
      const char* const at = acquire(chunk, c, i + 1 < op.chunks ? chunk + 1 : op.next_chunk);
      const RowHead* const heads = reinterpret_cast<const RowHead*>(at);
      const char* const weights = at + (c.rows * sizeof(RowHead) + 15) / 16 * 16;
      const ushort4* const cols = reinterpret_cast<const ushort4*>(weights + size_t(c.quads) * kQuad * (Indirect ? sizeof(uint32_t) : sizeof(T)));
      // all threads of a warp come along as long as one has a row: shuffles need them
      for (int base = 0; base < c.rows; base += groups) {
        const bool mine = base + group < c.rows;
        const RowHead head = mine ? heads[base + group] : RowHead{0, 0};
        const int row = head.row_and_quads & 0xffff, count = head.row_and_quads >> 16;
        T sum[Tangent ? 2 * V : V] = {};
        where_it_is(source, [&](const T* x) {
          multiply<Tangent, Indirect>(weights, cols, values, int(head.first) + part, int(head.first) + count, 1 << split, reinterpret_cast<const char*>(x + lane * V),
                                      tangent * int(sizeof(T)), sum);
        });
        const T value = meet(sum), its_tangent = Tangent ? meet(sum + (Tangent ? V : 0)) : T(0);
        if (mine && !stands_by()) finish<Layer, Tangent>(op, row, value, its_tangent, trace_part);
      }
    }
    if (reduces) add_to_trace(trace_part);
    else sync();
  }

  // Where rows go by fours, each activation is read once for four rows, and all groups of a warp read the same ones.
  template <bool Layer, bool Tangent>
  SF_DEVICE void run_dense(const DeviceOp& op) {
    constexpr int N = Tangent ? 2 * V : V;
    int tangent = 0;
    const T* const source = gathered(op.source, op.cols, Tangent ? 2 : 1, tangent);
    const int stride = samples();
    T trace_part = T(0);
    T sum[kQuad][N];
    for (int i = 0; i < op.chunks; ++i) {
      const int chunk = op.first_chunk + i;
      const Chunk c = chunks()[chunk];
      const char* const at = acquire(chunk, c, i + 1 < op.chunks ? chunk + 1 : op.next_chunk);
      const RowHead* const heads = reinterpret_cast<const RowHead*>(at);
      const T* const weights = reinterpret_cast<const T*>(at + (c.rows * sizeof(RowHead) + 15) / 16 * 16);
      for (int base = 0; base < c.rows; base += groups) {  // once, of a slab
        const bool mine = base + group < c.rows;
        if (c.first_column == 0) {
#pragma unroll
          for (int r = 0; r < kQuad; ++r)
#pragma unroll
            for (int v = 0; v < N; ++v) sum[r][v] = T(0);
        }
        const T* const w = weights + size_t(base + group) * c.columns * kQuad;
        where_it_is(source, [&](const T* rows) {
          const T* const x_begin = rows + c.first_column * stride + lane * V;
#pragma unroll 2
          for (int k = part; mine && k < c.columns; k += 1 << split) {
            const Quad<T> four = load_quad(w + k * kQuad);
            const Samples<T, V> x = load<T, V>(x_begin + k * stride);
#pragma unroll
            for (int r = 0; r < kQuad; ++r)
#pragma unroll
              for (int v = 0; v < V; ++v) sum[r][v] += four.v[r] * x.v[v];
            if constexpr (Tangent) {
              const Samples<T, V> p = load<T, V>(x_begin + k * stride + tangent);
#pragma unroll
              for (int r = 0; r < kQuad; ++r)
#pragma unroll
                for (int v = 0; v < V; ++v) sum[r][V + v] += four.v[r] * p.v[v];
            }
          }
        });
        if (!c.last) continue;
        const RowHead head = mine ? heads[base + group] : RowHead{0xffffffffu, 0xffffffffu};
#pragma unroll 1
        for (int r = 0; r < kQuad; ++r) {  // one copy of what follows a row
          const uint32_t two = r < 2 ? head.row_and_quads : head.first;
          const int row = (r & 1 ? two >> 16 : two) & 0xffff;
          T own[N];
#pragma unroll
          for (int v = 0; v < N; ++v) own[v] = r == 0 ? sum[0][v] : r == 1 ? sum[1][v] : r == 2 ? sum[2][v] : sum[3][v];
          const T value = meet(own), its_tangent = Tangent ? meet(own + (Tangent ? V : 0)) : T(0);
          if (row != kNoRow && !stands_by()) finish<Layer, Tangent>(op, row, value, its_tangent, trace_part);
        }
      }
    }
    if (op.flags & kReduces) add_to_trace(trace_part);
    else sync();
  }

  template <bool Layer, bool Tangent>
  SF_DEVICE void finish(const DeviceOp& op, int row, T sum, T tangent, T& trace_part) const {
    if constexpr (Layer) finish_layer<Tangent>(op, row, sum, tangent, trace_part);
    else finish_product(op, row, sum, trace_part);
  }

  // trace += the threads' parts, in a fixed order
  SF_DEVICE void add_to_trace(T mine) {
    for (int bit = lanes_log + split; bit < 5; ++bit) mine += __shfl_xor_sync(kWarp, mine, 1 << bit);
    const bool first_group = (threadIdx.x & 31) >> (lanes_log + split) == 0;
    sum_over_warps(first_group && !stands_by(), sample_of_part(), mine, trace(), true);
  }
  // The warps' parts of a sample's sum, in their order, into `sum` (+ what is there). mine: of a thread that speaks for its
  // warp's part of a sample.
  SF_DEVICE void sum_over_warps(bool speaks, int sample, T mine, T* sum, bool adds) {
    T* const parts = red() + (size_t(red_turn) * (blockDim.x / 32) << tile_log);
    red_turn ^= 1;
    if (speaks) parts[(threadIdx.x / 32 << tile_log) + sample] = mine;
    sync();
    for (int s = threadIdx.x; s < samples(); s += blockDim.x) {
      T total = T(0);
      for (int w = 0; w < int(blockDim.x) / 32; ++w) total += parts[(w << tile_log) + s];
      // always by the same thread; who else reads it waits at a barrier of its own
      sum[s] = adds ? sum[s] + total : total;
    }
  }

  SF_DEVICE void run_pointwise(const DeviceOp& op) {
    T trace_part = T(0), sums[kMostTotals];
    pointwise_rows<T>(op, program.image, work() + (threadIdx.x & (samples() - 1)), tile_log, trace_part, sums);
    const DeviceTotal* const totals = in_image<DeviceTotal>(op.totals);
    const int traces = op.flags & kReduces ? 1 : 0, in_warp = threadIdx.x & 31;
#pragma unroll 1
    for (int i = -traces; i < op.n_totals; ++i) {
      T mine = i < 0 ? trace_part : sums[i];
      for (int bit = samples(); bit < 32; bit <<= 1) mine += __shfl_xor_sync(kWarp, mine, bit);
      sum_over_warps(in_warp < samples(), in_warp, mine, i < 0 ? trace() : work() + (size_t(totals[i].row) << tile_log), i < 0);
    }
    if (op.n_totals > 0 || !traces) sync();  // the trace is read behind a barrier anyhow
  }

  // sums[e] += the inner product over samples of two rows, for every entry e, always by the same thread
  SF_DEVICE void run_gradient(const DeviceOp& op, T* sums) const {
    const uint32_t* const pairs = in_image<uint32_t>(op.pairs);
    const int tangents = op.flags & kCarries ? 1 : 0, left_slot = slot_of(op.factor);
    int right_slot = 0;
    // a row's entries lie behind each other, and so does what their threads read of the left side
    const T *const left = rows_of(op.factor), *const right = gathered(op.source, op.cols, 1 + tangents, right_slot);
    for (int e = threadIdx.x; e < op.entries; e += blockDim.x) {
      const uint32_t pair = pairs[e];
      Samples<T, V> sum = {};
      for (int slot = 0; slot <= tangents; ++slot) {
        const T* const x = left + (size_t(pair >> 16) << tile_log) + slot * left_slot;
        const T* const y = right + (size_t(pair & 0xffff) << tile_log) + slot * right_slot;
        // threads begin at different samples, and so at different banks
        for (int i = 0, s = int(threadIdx.x) * V & (samples() - 1); i < samples(); i += V, s = (s + V) & (samples() - 1)) {
          const Samples<T, V> p = load<T, V>(x + s), q = load<T, V>(y + s);
#pragma unroll
          for (int v = 0; v < V; ++v) sum.v[v] += p.v[v] * q.v[v];
        }
      }
      T total = sum.v[0];
#pragma unroll
      for (int v = 1; v < V; ++v) total += sum.v[v];
      sums[op.sums + e] += total;
    }
    sync();
  }

  // A list of operations; `lasting` and `each_stage`: where gradients are added up. A kernel calls it in one place, for it is
  // most of its code.
  SF_DEVICE void run(List list, T* lasting = nullptr, T* each_stage = nullptr) {
    const int begin = program.list[list], end = program.list[list + 1];
    for (int i = begin; i < end; ++i) {
      const DeviceOp& op = ops()[i];
      if (op.kind == int(OpKind::kGradient)) {
        run_gradient(op, op.flags & kEachStage ? each_stage : lasting);
        continue;
      }
      if (op.kind == int(OpKind::kPointwise)) {
        run_pointwise(op);
        continue;
      }
      const bool layer = op.kind == int(OpKind::kAffine) || op.kind == int(OpKind::kKeep) || op.kind == int(OpKind::kPull);
      if (op.flags & kDense) {
        if (layer && (op.flags & kCarries)) run_dense<true, true>(op);
        else if (layer) run_dense<true, false>(op);
        else run_dense<false, false>(op);
      } else if (layer && (op.flags & kCarries)) run_rows<true, true, false>(op);
      else if (layer) run_rows<true, false, false>(op);
      else if (op.flags & kIndirect) run_rows<false, false, true>(op);
      else run_rows<false, false, false>(op);
    }
  }
};

// What follows a row, for one sample: `sum` of its value and `tangent` of its tangent.
template <class T, int V, bool Shared>
template <bool Tangent>
SF_DEVICE void Block<T, V, Shared>::finish_layer(const DeviceOp& op, int row, T sum, T tangent, T& trace_part) const {
  const int sample = sample_of_part(), next = slot_of(op.target);
  T* const out = row_of(op.target, row) + sample;
  const T s = scale()[op.modulation + row];
  auto at = [&](const Place& place) { return row_of(place, row) + sample; };

  if (OpKind(op.kind) != OpKind::kPull) {
    const bool keep = OpKind(op.kind) == OpKind::kKeep;
    const Activated<T> act = activate<T>(Activation(op.activation), sum * s + shift()[op.modulation + row], T(op.a), T(op.b));
    const T d = act.slope * s;
    const T carried = Tangent ? act.slope * (s * tangent) : T(0);
    out[0] = act.h;
    if (keep) {
      if (Tangent) out[next] = carried;
      if (op.kept.row < 0) return;
      T* kept = at(op.kept);
      if (op.slope_from == 0) {
        *kept = d, kept += slot_of(op.kept);
        if (op.flags & kCurvature) *kept = act.curvature * s * s * (Tangent ? tangent : T(1)), kept += slot_of(op.kept);
      }
      if (op.flags & kRaw) *kept = sum;
      return;
    }
    switch (Store(op.store)) {
      case Store::kValueSlope:
        out[next] = d;
        break;
      case Store::kSeed:
        out[next] = d * *at(op.seed);
        break;
      case Store::kSeedReduce:
        trace_part += *at(op.weight) * (d * *at(op.seed));
        break;
      case Store::kTangent:
        out[next] = carried;
        break;
      case Store::kTangentReduce:
        trace_part += *at(op.weight) * carried;
        break;
      default:
        break;
    }
    return;
  }

  const bool recovered = op.slope_from != 0, raw = op.flags & kRaw;
  const T* const kept = op.kept.row < 0 ? nullptr : at(op.kept);
  const T* const h = op.value.row < 0 ? nullptr : at(op.value);  // and its tangent behind
  const T* const dbar = op.slope_cotangent.row < 0 ? nullptr : at(op.slope_cotangent);
  T hbar = sum, pbar = tangent, d, e = T(0);
  if (op.addend.row >= 0) {
    const T* const more = at(op.addend);
    hbar += more[0];
    if (Tangent) pbar += more[slot_of(op.addend)];
  }
  if (!recovered) {
    d = kept[0];
    if (Tangent) e = kept[slot_of(op.kept)];
  } else {
    T bend = T(0);
    if (op.slope_from == int(SlopeFrom::kTanh)) d = s * (T(1) - h[0] * h[0]), bend = T(-2) * s * h[0];
    else if (op.slope_from == int(SlopeFrom::kSigmoid)) d = s * (h[0] * (T(1) - h[0])), bend = s * (T(1) - (h[0] + h[0]));
    else d = s;
    if (Tangent) e = bend * h[slot_of(op.value)];
  }
  T u = hbar * d;
  if (Tangent) u += pbar * e, out[next] = pbar * d;
  else if (dbar != nullptr) u += dbar[0] * kept[slot_of(op.kept)];
  out[0] = u;
  if (raw) {
    T gate = u * kept[recovered ? 0 : (op.flags & kCurvature ? 2 : 1) * slot_of(op.kept)];
    if (Tangent) gate += pbar * h[slot_of(op.value)];
    else if (dbar != nullptr) gate += dbar[0] * d;
    out[(Tangent ? 2 : 1) * next] = gate;
  }
}

template <class T, int V, bool Shared>
SF_DEVICE void Block<T, V, Shared>::finish_product(const DeviceOp& op, int row, T sum, T& trace_part) const {
  const int sample = sample_of_part();
  T term = sum;
  if (op.factor.row >= 0) term *= row_of(op.factor, op.factor_row < 0 ? row : in_image<int>(op.factor_row)[row])[sample];
  T other = T(1);
  if (op.factor2.row >= 0) other = row_of(op.factor2, op.factor2_row < 0 ? row : in_image<int>(op.factor2_row)[row])[sample];
  if (OpKind(op.kind) == OpKind::kProduct) {
    T* const out = row_of(op.target, row) + sample;
    if (op.addend.row >= 0) term += row_of(op.addend, row)[sample];
    if (op.flags & kSecond) out[slot_of(op.target)] = other * sum;
    out[0] = term;
    return;
  }
  if (op.coefficient >= 0) term *= op.flags & kDynamicCoefficient ? dynamic[op.coefficient + row] : in_image<T>(op.coefficient)[row];
  trace_part += term * other;
}

}  // namespace sparseflow::cuda
