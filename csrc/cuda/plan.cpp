#include "plan.h"

#include "solve.h"

#include <algorithm>
#include <cmath>

namespace sparseflow::cuda {

// Many samples to a tile use every weight that is read more often; few spread a small batch over the chip. Parts pay where
// rows are long or few. One sample to a tile: for a step size per sample.
const Shape kShapes[] = {
    {32, 4, 4, 512}, {32, 4, 4, 256}, {16, 4, 4, 512}, {16, 4, 4, 256}, {16, 4, 8, 512}, {16, 4, 4, 128},              //
    {8, 4, 4, 512},  {8, 4, 4, 256},  {8, 4, 4, 128},  {8, 4, 8, 512},  {8, 4, 16, 512}, {8, 4, 8, 256},               //
    {4, 4, 4, 256},  {4, 4, 4, 128},  {4, 4, 8, 256},  {4, 4, 16, 512}, {4, 4, 32, 512},                               //
    {32, 1, 1, 512}, {16, 1, 1, 256}, {16, 1, 2, 512}, {8, 1, 1, 256},  {8, 1, 4, 512},  {4, 1, 8, 512}, {4, 1, 2, 128},  //
    {8, 1, 1, 512},  {4, 1, 1, 256},                                                                                   //
    {1, 1, 1, 64},   {1, 1, 1, 128},  {1, 1, 4, 256},  {1, 1, 16, 512},
};
const int kShapeCount = int(sizeof kShapes / sizeof kShapes[0]);

namespace {

int log2_of(int n) {
  int log = 0;
  while ((1 << log) < n) ++log;
  return log;
}
size_t aligned(size_t n, size_t to = 16) { return (n + to - 1) / to * to; }

// A rough model of an evaluation of one tile, in cycles: what its threads wait for, operation after operation, and what keeps
// the multiprocessor busy, whoever runs on it: instructions, shared memory (128 bytes a cycle), memory beyond. Counts of
// instructions are the machine code's (bench/sass.py); the other constants are estimates until they are measured.
struct Cost {
  double latency = 0, busy = 0;
};
template <class T>
Cost cost_of_tile(const Image<T>& image, const Shape& s, bool work_in_shared, bool gathered, bool resident, int blocks) {
  constexpr double kBarrier = 60, kRowLatency = 250, kQuadLatency = 60, kRowInstructions = 90, kQuadInstructions = 39, kTangentInstructions = 24, kPerInstruction = 30,
                   kSharedRate = 128, kMemoryRate = 24, kSlowMemoryRate = 12, kCache = 40e6;
  // the parts of a warp read different rows at once, from different banks where the row has a choice (csrc/cuda/image.cpp)
  const double lanes = double(s.tile) / s.per_thread, conflicts = s.per_thread == 1 || lanes >= 8 ? 1.0 : lanes == 4 ? 1.1 : lanes == 2 ? 1.2 : 1.45;
  const double groups = s.threads / (lanes * s.parts), warps = s.threads / 32.0;
  const double sums = double(image.program.lasting_sums + image.program.totals) * sizeof(T) * blocks;
  double instructions = 0, shared = 0, memory = 0, passed = 0, latency = 2 * kBarrier;  // passed: rows as they lie, once each
  for (const auto& w : image.work) {
    if (w.instructions > 0) {  // every thread reads its operands and is told what to do, number by number
      const double passes = std::ceil(w.rows * s.tile / s.threads);
      instructions += passes * warps * w.instructions * kPerInstruction;
      shared += w.rows * s.tile * w.instructions * sizeof(T);
      passed += w.rows * s.tile * w.instructions * sizeof(T);
      latency += kBarrier + passes * w.instructions * kPerInstruction * 4;
      continue;
    }
    if (w.gradient) {  // an inner product for every entry, and its sum read and written
      const double entries = w.quads * kQuad;
      passed += (w.cols + w.rows) * s.tile * sizeof(T) * w.lanes;
      shared += 2 * entries * s.tile * sizeof(T) * w.lanes * 1.5;
      instructions += entries / 32 * (30 + 8.0 * lanes * w.lanes);
      memory += entries * (2 * sizeof(T) + 4) * (sums > kCache ? kMemoryRate / kSlowMemoryRate : 1);
      latency += kBarrier + kRowLatency;
      continue;
    }
    const double rows = w.dense ? w.rows / kQuad : w.rows, passes = std::ceil(rows / groups), quads = rows > 0 ? std::ceil(w.quads / rows / s.parts) : 0;
    latency += kBarrier + passes * (kRowLatency * (w.dense ? 2 : 1) + quads * kQuadLatency);
    const double per_quad = kQuadInstructions + kTangentInstructions * (w.lanes - 1);
    instructions += passes * warps * (kRowInstructions * (w.dense ? kQuad : 1) + quads * per_quad * (w.dense ? 0.55 : 1));
    passed += (w.cols + 4 * w.rows) * s.tile * sizeof(T) * w.lanes;  // what a layer keeps, or reads of what was kept
    const double products = w.quads * kQuad * s.tile * w.lanes;
    shared += (w.dense ? products / kQuad / 2 : products * conflicts) * sizeof(T) + w.quads * kQuad * (sizeof(T) + 2.0) + w.rows * s.tile * sizeof(T);
  }
  if (!resident) memory += image.program.stream_bytes, latency += 60.0 * image.program.n_chunks;
  if (!work_in_shared) memory += gathered ? passed : shared, latency *= gathered ? 1.5 : 2;
  return {latency, std::max({instructions / 4, work_in_shared || gathered ? shared / kSharedRate : 0, memory / kMemoryRate})};
}

}  // namespace

template <class T>
Plan plan_for(const Image<T>& image, const Shape& shape, const Device& device, int batch, int stages, bool adjoint, bool per_tile, bool& fits) {
  const DeviceProgram& p = image.program;
  Plan out;
  out.shape = shape;
  BlockPlan& b = out.block;
  b.tile_log = log2_of(shape.tile);
  b.split_log = log2_of(shape.parts);
  b.threads = shape.threads;
  out.tiles = (batch + shape.tile - 1) / shape.tile;
  fits = false;

  size_t at = 0;
  auto take = [&](size_t bytes) {
    const size_t here = at;
    at = aligned(at + bytes, 128);
    return static_cast<int32_t>(here);
  };
  b.ops = take(aligned(p.n_ops * sizeof(DeviceOp)) + p.n_chunks * sizeof(Chunk));
  b.modulation = take(2 * size_t(p.modulation_rows) * sizeof(T));
  // the trace and its parts, the parts of error norms, what the block knows in common (csrc/cuda/solve.cuh)
  b.reduce = take(aligned(size_t(shape.tile) * (1 + 2 * (shape.threads / 32)) * sizeof(T)) + size_t(shape.threads) * sizeof(double) + sizeof(Common<T>));
  const size_t limit = device.shared_per_block;
  const size_t work = size_t(p.workspace_rows) * shape.tile * sizeof(T), dynamic = size_t(p.dynamic_values) * sizeof(T);
  const size_t arrays = adjoint ? 3 * size_t(stages) + 3 : 5 + size_t(stages);
  const size_t state = arrays * (p.dim + p.divergence) * shape.tile * sizeof(T);
  const size_t ring = 2 * aligned(p.largest_chunk, 128), all = p.stream_bytes;
  if (at + std::min(ring, all) > limit) {
    out.reason = "a block's tables and the longest piece of its weights take " + std::to_string(at + std::min(ring, all)) + " bytes of shared memory, the device has " +
                 std::to_string(limit);
    return out;
  }

  // Activations first, then the solver's state, then path sums, then weights: each while there is room for those that have
  // nowhere else to go.
  size_t room = limit - at - std::min(ring, all);
  auto place = [&](size_t bytes, int32_t& offset, int64_t& global) {
    if (aligned(bytes, 128) + 128 <= room) {
      room -= aligned(bytes, 128) + 128;
      offset = take(bytes);
      return true;
    }
    offset = -1;
    global = b.global_bytes;
    b.global_bytes += static_cast<int64_t>(aligned(bytes, 128));
    return false;
  };
  out.work_in_shared = place(work, b.work, b.work_global);
  if (!out.work_in_shared) {  // there is no other place for it: without one, rows are read where they are
    int64_t nowhere = 0;
    const int64_t before = b.global_bytes;
    place(size_t(p.gathered_rows) * shape.tile * sizeof(T), b.gathered, nowhere);
    b.global_bytes = before;
  }
  place(state, b.state, b.state_global);
  place(dynamic, b.dynamic, b.dynamic_global);
  b.resident = at + all <= limit;
  b.streams = static_cast<int32_t>(at);
  b.shared_bytes = static_cast<int32_t>(at + (b.resident ? all : ring));

  if (shape.per_thread == 1 && shape.tile == 1 && !out.work_in_shared) {
    out.reason = "one sample's activations do not fit into shared memory";
    return out;
  }
  if (p.slabs && shape.threads / (shape.tile / shape.per_thread * shape.parts) < kSlabGroups) {
    out.reason = "it has fewer groups of threads than a slab of a dense layer has rows for";
    return out;
  }
  constexpr int kRegisters = 65536 / 128;  // threads that a multiprocessor has registers for
  out.blocks_per_multiprocessor = std::max(1, std::min({device.threads_per_multiprocessor / shape.threads, kRegisters / shape.threads,
                                                        device.shared_per_multiprocessor / std::max<int>(1024, b.shared_bytes + 1024), 16}));
  const int most = out.blocks_per_multiprocessor * device.multiprocessors;
  out.blocks = std::max(1, std::min(out.tiles, most));
  const double per_sm = std::ceil(double(out.tiles) / device.multiprocessors), beside = std::min<double>(out.blocks_per_multiprocessor, per_sm);
  const Cost tile = cost_of_tile(image, shape, out.work_in_shared, b.gathered >= 0, b.resident, out.blocks);
  out.cycles = std::max(per_sm * tile.busy, std::ceil(per_sm / beside) * tile.latency);
  if (!per_tile && out.tiles > most) out.cycles *= 1.1;  // states come and go
  out.reason = std::to_string(shape.tile) + " samples to a tile, " + std::to_string(shape.threads) + " threads, " + std::to_string(shape.parts) +
               (shape.parts == 1 ? " part" : " parts") + " to a row; activations in " + (out.work_in_shared ? "shared" : "global") + " memory" +
               (b.gathered >= 0 ? ", an operation's sources in shared" : "") + ", weights " +
               (b.resident ? "resident there" : "streamed through it") + " (" + std::to_string(all) + " bytes), " + std::to_string(b.shared_bytes) +
               " bytes of shared memory a block";
  fits = true;
  return out;
}

template <class T>
std::vector<Plan> plans(const Image<T>& image, const Device& device, int batch, int stages, bool adjoint, bool per_tile, bool per_sample) {
  std::vector<Plan> found;
  for (int i = 0; i < kShapeCount; ++i) {
    const Shape& shape = kShapes[i];
    if ((shape.tile == 1) != per_sample) continue;
    if ((shape.per_thread == 1) != (sizeof(T) == 8 || per_sample)) continue;  // double: one sample to a thread
    bool fits = false;
    Plan plan = plan_for(image, shape, device, batch, stages, adjoint, per_tile, fits);
    if (fits) found.push_back(std::move(plan));
  }
  std::stable_sort(found.begin(), found.end(), [](const Plan& a, const Plan& b) { return a.cycles < b.cycles; });
  return found;
}

template Plan plan_for(const Image<float>&, const Shape&, const Device&, int, int, bool, bool, bool&);
template Plan plan_for(const Image<double>&, const Shape&, const Device&, int, int, bool, bool, bool&);
template std::vector<Plan> plans(const Image<float>&, const Device&, int, int, bool, bool, bool);
template std::vector<Plan> plans(const Image<double>&, const Device&, int, int, bool, bool, bool);

}  // namespace sparseflow::cuda
