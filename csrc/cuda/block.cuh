// A block of threads at work on one tile: where things lie, the streams of weights, and the operations of a program.
//
// Threads stand as [groups][parts][lanes]. The lanes of a group hold a tile's samples, V neighbours each; a group takes one
// row of a matrix at a time, so an activation's row is read as one run of 16-byte words, without bank conflicts. Where rows
// are long the entries of one are dealt out to several parts, whose sums meet by shuffles; then every thread finishes one
// sample. Groups take rows in the order of their length, so that the threads of a warp wait little for each other.
//
// Every operation ends at a barrier: the next one may read what it wrote.
#pragma once

#include "activation.cuh"
#include "device_program.h"

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
template <class T, int V>
SF_DEVICE void store(T* p, const Samples<T, V>& x) {
  if constexpr (V == 4 && sizeof(T) == 4) {
    *reinterpret_cast<float4*>(p) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) p[i] = x.v[i];
  }
}

constexpr unsigned kWarp = 0xffffffffu;

// T: float or double.  V: neighbouring samples of a thread.  Shared: the workspace is in shared memory.
template <class T, int V, bool Shared>
struct Block {
  const DeviceProgram& program;
  const BlockPlan& plan;
  char* const global;  // of this block
  const int tile_log, lanes_log, split;
  const int lane, part, group, groups;  // of this thread; how many groups there are

  const DeviceOp* ops;  // and behind them the chunks
  const Chunk* chunks;
  T *scale, *shift;  // [modulation_rows]
  T* dynamic;        // [dynamic_values]
  T* trace;          // [S]
  T* red;            // [2][warps][S]: sums over rows on their way into the trace
  int red_turn = 0;

  SF_DEVICE Block(const DeviceProgram& p, const BlockPlan& q, char* block_global)
      : program(p), plan(q), global(block_global), tile_log(q.tile_log), lanes_log(q.tile_log - (V == 4 ? 2 : 0)), split(q.split_log),
        lane(threadIdx.x & ((1 << (q.tile_log - (V == 4 ? 2 : 0))) - 1)), part((threadIdx.x >> (q.tile_log - (V == 4 ? 2 : 0))) & ((1 << q.split_log) - 1)),
        group(threadIdx.x >> (q.tile_log - (V == 4 ? 2 : 0) + q.split_log)), groups(blockDim.x >> (q.tile_log - (V == 4 ? 2 : 0) + q.split_log)) {
    char* const shared = shared_memory();
    ops = reinterpret_cast<const DeviceOp*>(shared + q.ops);
    chunks = reinterpret_cast<const Chunk*>(shared + q.ops + (p.chunks - p.ops));
    scale = reinterpret_cast<T*>(shared + q.modulation);
    shift = scale + p.modulation_rows;
    dynamic = reinterpret_cast<T*>(q.dynamic >= 0 ? shared + q.dynamic : block_global + q.dynamic_global);
    trace = reinterpret_cast<T*>(shared + q.reduce);
    red = trace + (size_t(1) << q.tile_log);
  }

  SF_DEVICE int samples() const { return 1 << tile_log; }
  SF_DEVICE T* work() const {
    if constexpr (Shared) return reinterpret_cast<T*>(shared_memory() + plan.work);
    else return reinterpret_cast<T*>(global + plan.work_global);
  }
  SF_DEVICE T* rows_of(const Place& place) const { return work() + (size_t(place.row) << tile_log); }
  SF_DEVICE T* row_of(const Place& place, int row) const { return work() + (size_t(place.row + row * place.stride) << tile_log); }
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
      for (int j = threadIdx.x; j < mod.n; j += blockDim.x) scale[mod.first + j] = T(1), shift[mod.first + j] = in_image<T>(mod.bias)[j];
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
        scale[mod.first + j] = s;
        shift[mod.first + j] = s * in_image<T>(mod.bias)[j] + c;
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
        for (int p = ptr[e]; p < ptr[e + 1]; ++p) sum += in_image<T>(gated.path_constant)[p] * scale[gated.gate + in_image<int>(gated.path_gate)[p]];
        dynamic[gated.values + e] = sum;
      }
    }
  }

  // ---- streams of weights

  int ring_chunk[2] = {-1, -1};  // what its two places hold, or will
  int ring_turn = 0;             // the place of the chunk in use

  SF_DEVICE void fetch(int place, int chunk) {
    const Chunk c = chunks[chunk];
    char* const to = shared_memory() + plan.streams + size_t(place) * program.largest_chunk;
    for (int i = threadIdx.x; i < c.bytes / 16; i += blockDim.x) copy_async(to + 16 * size_t(i), program.image + c.offset + 16 * size_t(i));
    commit_copies();
    ring_chunk[place] = chunk;
  }

  // The chunk, ready to be read; the one that will probably be asked for next is on its way meanwhile.
  SF_DEVICE const char* acquire(int chunk, const Chunk& c, int next) {
    if (plan.resident) return shared_memory() + plan.streams + (c.offset - program.streams);
    ring_turn ^= 1;
    if (ring_chunk[ring_turn] != chunk) {
      if (ring_chunk[ring_turn ^ 1] == chunk) ring_turn ^= 1;
      else wait_for_copies(), sync(), fetch(ring_turn, chunk);  // nobody reads there any more
    }
    wait_for_copies();
    sync();  // all threads' copies are there, and all have left the other place
    if (next >= 0 && next != chunk && ring_chunk[ring_turn ^ 1] != next) fetch(ring_turn ^ 1, next);
    return shared_memory() + plan.streams + size_t(ring_turn) * program.largest_chunk;
  }

  // ---- rows

  // sums over the entries first, first + step ... of a row, for V samples (and their tangents)
  template <bool Tangent, bool Indirect>
  SF_DEVICE void multiply(const void* weights, const ushort4* cols, const T* values, int first, int last, int step, const T* source, int stride, T* sum) const {
    const int tangent = samples();
    for (int q = first; q < last; q += step) {
      Quad<T> w;
      if constexpr (Indirect) {
        const uint4 i = static_cast<const uint4*>(weights)[q];
        w = {{values[i.x], values[i.y], values[i.z], values[i.w]}};
      } else {
        w = load_quad(static_cast<const T*>(weights) + size_t(kQuad) * q);
      }
      const ushort4 c = cols[q];
      const T* const from[4] = {source + int(c.x) * stride, source + int(c.y) * stride, source + int(c.z) * stride, source + int(c.w) * stride};
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const Samples<T, V> x = load<T, V>(from[k]);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += w.v[k] * x.v[v];
        if constexpr (Tangent) {
          const Samples<T, V> p = load<T, V>(from[k] + tangent);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[V + v] += w.v[k] * p.v[v];
        }
      }
    }
  }

  // The parts' sums, one sample each: first halves of the samples change hands, then what is left is added up.
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

  template <int N, bool Tangent>
  SF_DEVICE void finish_layer(const DeviceOp& op, int row, int sample, const T* sum, T* trace_part) const;
  template <int N>
  SF_DEVICE void finish_product(const DeviceOp& op, int row, int sample, const T* sum, T* trace_part) const;

  template <bool Layer, bool Tangent, bool Indirect>
  SF_DEVICE void run_rows(const DeviceOp& op) {
    const T* const source = rows_of(op.source) + lane * V;
    const int stride = op.source.stride << tile_log;
    const T* const values = Indirect ? dynamic + op.values : nullptr;
    const bool reduces = op.flags & kReduces;
    T trace_part[V] = {};
    for (int i = 0; i < op.chunks; ++i) {
      const int chunk = op.first_chunk + i;
      const Chunk c = chunks[chunk];
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
        multiply<Tangent, Indirect>(weights, cols, values, int(head.first) + part, int(head.first) + count, 1 << split, source, stride, sum);
        if (split == 0) {
          if (mine) finish<Layer, V, Tangent>(op, row, lane * V, sum, trace_part);
        } else {
          T one[Tangent ? 2 : 1];
          one[0] = meet(sum);
          if constexpr (Tangent) one[1] = meet(sum + V);
          if (mine && !stands_by()) finish<Layer, 1, Tangent>(op, row, sample_of_part(), one, trace_part);
        }
      }
    }
    if (reduces) add_to_trace(trace_part);
    else sync();
  }

  // Where rows go by fours, each activation is read once for four rows, and all groups of a warp read the same ones.
  template <bool Layer, bool Tangent>
  SF_DEVICE void run_dense(const DeviceOp& op) {
    constexpr int N = Tangent ? 2 * V : V;
    const T* const source = rows_of(op.source) + lane * V;
    const int stride = op.source.stride << tile_log, tangent = samples(), cols = op.cols;
    T trace_part[V] = {};
    for (int i = 0; i < op.chunks; ++i) {
      const int chunk = op.first_chunk + i;
      const Chunk c = chunks[chunk];
      const char* const at = acquire(chunk, c, i + 1 < op.chunks ? chunk + 1 : op.next_chunk);
      const RowHead* const heads = reinterpret_cast<const RowHead*>(at);
      const T* const weights = reinterpret_cast<const T*>(at + (c.rows * sizeof(RowHead) + 15) / 16 * 16);
      for (int base = 0; base < c.rows; base += groups) {
        const bool mine = base + group < c.rows;
        const RowHead head = mine ? heads[base + group] : RowHead{0xffffffffu, 0xffffffffu};
        const T* const w = weights + size_t(base + group) * cols * kQuad;
        T sum[kQuad][N] = {};
        if (mine) {
#pragma unroll 2
          for (int k = part; k < cols; k += 1 << split) {
            const Quad<T> four = load_quad(w + k * kQuad);
            const Samples<T, V> x = load<T, V>(source + k * stride);
#pragma unroll
            for (int r = 0; r < kQuad; ++r)
#pragma unroll
              for (int v = 0; v < V; ++v) sum[r][v] += four.v[r] * x.v[v];
            if constexpr (Tangent) {
              const Samples<T, V> p = load<T, V>(source + k * stride + tangent);
#pragma unroll
              for (int r = 0; r < kQuad; ++r)
#pragma unroll
                for (int v = 0; v < V; ++v) sum[r][V + v] += four.v[r] * p.v[v];
            }
          }
        }
#pragma unroll 1
        for (int r = 0; r < kQuad; ++r) {  // one copy of what follows a row
          const uint32_t two = r < 2 ? head.row_and_quads : head.first;
          const int row = (r & 1 ? two >> 16 : two) & 0xffff;
          T own[N];
#pragma unroll
          for (int v = 0; v < N; ++v) own[v] = r == 0 ? sum[0][v] : r == 1 ? sum[1][v] : r == 2 ? sum[2][v] : sum[3][v];
          if (split == 0) {
            if (row != kNoRow) finish<Layer, V, Tangent>(op, row, lane * V, own, trace_part);
          } else {
            T one[Tangent ? 2 : 1];
            one[0] = meet(own);
            if constexpr (Tangent) one[1] = meet(own + V);
            if (row != kNoRow && !stands_by()) finish<Layer, 1, Tangent>(op, row, sample_of_part(), one, trace_part);
          }
        }
      }
    }
    if (op.flags & kReduces) add_to_trace(trace_part);
    else sync();
  }

  template <bool Layer, int N, bool Tangent>
  SF_DEVICE void finish(const DeviceOp& op, int row, int sample, const T* sum, T* trace_part) const {
    if constexpr (Layer) finish_layer<N, Tangent>(op, row, sample, sum, trace_part);
    else finish_product<N>(op, row, sample, sum, trace_part);
  }

  // trace += the threads' parts, in a fixed order
  SF_DEVICE void add_to_trace(T* parts) {
    T* const to = red + (size_t(red_turn) * (blockDim.x / 32) << tile_log);
    red_turn ^= 1;
    const int bits = lanes_log + split, warp = threadIdx.x / 32;
    const bool first_group = (threadIdx.x & 31) >> bits == 0;
    if (split == 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        for (int bit = bits; bit < 5; ++bit) parts[v] += __shfl_xor_sync(kWarp, parts[v], 1 << bit);
        if (first_group) to[(warp << tile_log) + lane * V + v] = parts[v];
      }
    } else {
      for (int bit = bits; bit < 5; ++bit) parts[0] += __shfl_xor_sync(kWarp, parts[0], 1 << bit);
      if (first_group && !stands_by()) to[(warp << tile_log) + sample_of_part()] = parts[0];
    }
    sync();
    for (int s = threadIdx.x; s < samples(); s += blockDim.x) {
      T sum = T(0);
      for (int w = 0; w < int(blockDim.x) / 32; ++w) sum += to[(w << tile_log) + s];
      trace[s] += sum;  // always by the same thread; whoever else reads it does so behind the next operation's barrier, or sync_trace
    }
  }

  // sums[e] += the inner product over samples of two rows, for every entry e, always by the same thread
  SF_DEVICE void run_gradient(const DeviceOp& op, T* sums) const {
    const uint32_t* const pairs = in_image<uint32_t>(op.pairs);
    const T *const left = rows_of(op.factor), *const right = rows_of(op.source);
    const int left_stride = op.factor.stride << tile_log, right_stride = op.source.stride << tile_log;
    const int n = samples() * (op.flags & kCarries ? 2 : 1);
    for (int e = threadIdx.x; e < op.entries; e += blockDim.x) {
      const uint32_t pair = pairs[e];
      const T *const x = left + int(pair >> 16) * left_stride, *const y = right + int(pair & 0xffff) * right_stride;
      Samples<T, V> sum = {};
      // threads begin at different samples, and so at different banks
      for (int i = 0, s = int(threadIdx.x) * V & (n - 1); i < n; i += V, s = (s + V) & (n - 1)) {
        const Samples<T, V> p = load<T, V>(x + s), q = load<T, V>(y + s);
#pragma unroll
        for (int v = 0; v < V; ++v) sum.v[v] += p.v[v] * q.v[v];
      }
      T total = sum.v[0];
#pragma unroll
      for (int v = 1; v < V; ++v) total += sum.v[v];
      sums[op.sums + e] += total;
    }
    sync();
  }

  // A list of operations; `lasting` and `each_stage`: where gradients are added up. One copy of this for all who call it, on
  // a copy of the block that can live in registers.
  SF_CALLED void run(List list, T* lasting = nullptr, T* each_stage = nullptr) {
    Block here(*this);
    here.run_here(list, lasting, each_stage);
    ring_chunk[0] = here.ring_chunk[0], ring_chunk[1] = here.ring_chunk[1];
    ring_turn = here.ring_turn, red_turn = here.red_turn;
  }
  SF_DEVICE void run_here(List list, T* lasting, T* each_stage) {
    const int begin = program.list[list], end = program.list[list + 1];
    for (int i = begin; i < end; ++i) {
      const DeviceOp& op = ops[i];
      if (op.kind == int(OpKind::kGradient)) {
        run_gradient(op, op.flags & kEachStage ? each_stage : lasting);
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

// What follows a row: N samples from `sample` on, sum[0 .. N-1] of their values and sum[N ..] of their tangents.
template <class T, int V, bool Shared>
template <int N, bool Tangent>
SF_DEVICE void Block<T, V, Shared>::finish_layer(const DeviceOp& op, int row, int sample, const T* sum, T* trace_part) const {
  const int S = samples();
  T* const out = op.target.row < 0 ? nullptr : row_of(op.target, row) + sample;
  const OpKind kind = OpKind(op.kind);
  const T a = T(op.a), b = T(op.b);

  if (kind == OpKind::kAffine || kind == OpKind::kKeep) {
    const T s = scale[op.modulation + row], c = shift[op.modulation + row];
    const Activation which = Activation(op.activation);
    const Store how = kind == OpKind::kKeep ? (Tangent ? Store::kTangent : Store::kValue) : Store(op.store);
    T* const kept = kind == OpKind::kKeep && op.kept.row >= 0 ? row_of(op.kept, row) + sample : nullptr;
    const bool slopes = op.slope_from == 0;
    Activated<T> all[N];
    T z[N];
#pragma unroll
    for (int v = 0; v < N; ++v) z[v] = sum[v] * s + c;
    activate<T, N>(which, z, a, b, all);
#pragma unroll
    for (int v = 0; v < N; ++v) {
      const Activated<T> act = all[v];
      const T d = act.slope * s;
      out[v] = act.h;
      if (how == Store::kValueSlope) {
        out[S + v] = d;
      } else if (how == Store::kSeed || how == Store::kSeedReduce) {
        const T tangent = d * (row_of(op.seed, row) + sample)[v];
        if (how == Store::kSeed) out[S + v] = tangent;
        else trace_part[v] += (row_of(op.weight, row) + sample)[v] * tangent;
      } else if constexpr (Tangent) {
        const T tangent = act.slope * (s * sum[N + v]);
        if (how == Store::kTangent) out[S + v] = tangent;
        else trace_part[v] += (row_of(op.weight, row) + sample)[v] * tangent;
      }
      if (kept != nullptr) {
        T* to = kept + v;
        if (slopes) {
          *to = d, to += S;
          if (op.flags & kCurvature) *to = act.curvature * s * s * (Tangent ? sum[(Tangent ? N : 0) + v] : T(1)), to += S;
        }
        if (op.flags & kRaw) *to = sum[v];
      }
    }
    return;
  }

  const bool recovered = op.slope_from != 0, raw = op.flags & kRaw;
  const T s = scale[op.modulation + row];
  const T* const kept = op.kept.row < 0 ? nullptr : row_of(op.kept, row) + sample;
  const T* const h = op.value.row < 0 ? nullptr : row_of(op.value, row) + sample;  // and its tangent behind
  const T* const more = op.addend.row < 0 ? nullptr : row_of(op.addend, row) + sample;
  const T* const dbar = op.slope_cotangent.row < 0 ? nullptr : row_of(op.slope_cotangent, row) + sample;
  const int r_slot = recovered ? 0 : (op.flags & kCurvature ? 2 : 1);
#pragma unroll
  for (int v = 0; v < N; ++v) {
    T hbar = sum[v], pbar = T(0), d, e = T(0);
    if constexpr (Tangent) pbar = sum[N + v];
    if (more != nullptr) {
      hbar += more[v];
      if constexpr (Tangent) pbar += more[S + v];
    }
    if (!recovered) {
      d = kept[v];
      if constexpr (Tangent) e = kept[S + v];
    } else {
      T bend = T(0);
      if (op.slope_from == int(SlopeFrom::kTanh)) d = s * (T(1) - h[v] * h[v]), bend = T(-2) * s * h[v];
      else if (op.slope_from == int(SlopeFrom::kSigmoid)) d = s * (h[v] * (T(1) - h[v])), bend = s * (T(1) - (h[v] + h[v]));
      else d = s;
      if constexpr (Tangent) e = bend * h[S + v];
    }
    T u = hbar * d;
    if constexpr (Tangent) {
      u += pbar * e;
      out[S + v] = pbar * d;
    } else if (dbar != nullptr) {
      u += dbar[v] * kept[S + v];
    }
    out[v] = u;
    if (raw) {
      T gate = u * kept[r_slot * S + v];
      if constexpr (Tangent) gate += pbar * h[S + v];
      else if (dbar != nullptr) gate += dbar[v] * d;
      out[(Tangent ? 2 : 1) * S + v] = gate;
    }
  }
}

template <class T, int V, bool Shared>
template <int N>
SF_DEVICE void Block<T, V, Shared>::finish_product(const DeviceOp& op, int row, int sample, const T* sum, T* trace_part) const {
  const int S = samples();
  T* const out = op.target.row < 0 ? nullptr : row_of(op.target, row) + sample;
  const int i = op.factor_row < 0 ? row : in_image<int>(op.factor_row)[row];
  const int j = op.factor2_row < 0 ? row : in_image<int>(op.factor2_row)[row];
  const T* const factor = op.factor.row < 0 ? nullptr : row_of(op.factor, i) + sample;
  const T* const factor2 = op.factor2.row < 0 ? nullptr : row_of(op.factor2, j) + sample;
  if (OpKind(op.kind) == OpKind::kProduct) {
    const T* const more = op.addend.row < 0 ? nullptr : row_of(op.addend, row) + sample;
#pragma unroll
    for (int v = 0; v < N; ++v) {
      T first = sum[v];
      if (factor != nullptr) first *= factor[v];
      if (more != nullptr) first += more[v];
      if (op.flags & kSecond) out[S + v] = factor2 != nullptr ? factor2[v] * sum[v] : sum[v];
      out[v] = first;
    }
    return;
  }
  T coefficient = T(1);
  if (op.coefficient >= 0) coefficient = op.flags & kDynamicCoefficient ? dynamic[op.coefficient + row] : in_image<T>(op.coefficient)[row];
#pragma unroll
  for (int v = 0; v < N; ++v) {
    T term = sum[v] * coefficient;
    if (factor != nullptr) term *= factor[v];
    if (factor2 != nullptr) term *= factor2[v];
    trace_part[v] += term;
  }
}

}  // namespace sparseflow::cuda
