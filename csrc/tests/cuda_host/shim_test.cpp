// The shim itself: what it must compute, and what it must refuse. Also prints what a switch costs. Three builds: plain,
// with the address and undefined-behaviour sanitizers, and for races (races.h).
#include "shim.h"

#include <cstdio>
#include <ctime>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAILED: %s\n", what.c_str());
}

// What body throws, or "".
std::string thrown(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

void refused(const std::function<void()>& body, const std::vector<std::string>& words) {
  const std::string message = thrown(body);
  for (const std::string& word : words) check(message.find(word) != std::string::npos, "'" + word + "' in the error '" + message + "'");
}

shim::Launch seeded(std::uint64_t seed) {
  shim::Launch options;
  options.seed = seed;
  return options;
}

constexpr std::uint64_t kSeeds = 12;

// ----------------------------------------------------------------------------------------------------------- kernels

struct Sum {
  const float* x;
  float* total;
  int n;
};

__global__ void __launch_bounds__(256) block_sum(const __grid_constant__ Sum p) {
  float* partial = reinterpret_cast<float*>(shim::dynamic_shared());
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x) sum += p.x[i];
  for (int d = warpSize / 2; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (threadIdx.x % warpSize == 0) partial[threadIdx.x / warpSize] = sum;
  __syncthreads();
  if (threadIdx.x < warpSize) {
    sum = threadIdx.x < blockDim.x / warpSize ? partial[threadIdx.x] : 0;
    for (int d = warpSize / 2; d > 0; d /= 2) sum += __shfl_down_sync(0xffffffffu, sum, d);
    if (threadIdx.x == 0) atomicAdd(p.total, sum);
  }
}

struct Shuffles {
  int* out;  // [12][32]
};

__global__ void all_shuffles(Shuffles p) {
  const int lane = static_cast<int>(threadIdx.x);
  const unsigned quarter = 0xffu << (lane & ~7);  // four parts that go their own ways
  auto put = [&](int row, long long value) { p.out[row * 32 + lane] = static_cast<int>(value); };
  put(0, __shfl_sync(0xffffffffu, lane * 10, 3));
  put(1, __shfl_sync(0xffffffffu, lane * 10u, 9, 8));
  put(2, __shfl_up_sync(0xffffffffu, static_cast<long long>(lane), 3));
  put(3, static_cast<long long>(__shfl_down_sync(0xffffffffu, lane + 0.5, 3, 16)));
  put(4, static_cast<long long>(__shfl_xor_sync(0xffffffffu, lane + 0.5f, 5, 4)));
  for (int turn = 0; turn <= lane / 8; ++turn) put(5, __shfl_xor_sync(quarter, lane + 100 * turn, 1));
  put(6, __popc(__ballot_sync(0xffffffffu, lane % 3 == 0)));
  put(7, __any_sync(quarter, lane == 9));
  put(8, __all_sync(quarter, lane < 16));
  put(9, __syncthreads_or(lane == 31));
  put(10, __syncthreads_and(lane != 31));
  put(11, __syncthreads_count(lane % 4 == 0));
}

// Lane 0 meets lanes 1 and 2 one after another, who wait for it at masks with the same lowest bit.
__global__ void overlapping(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane <= 1) out[lane] = __shfl_sync(0x3u, lane + 1, 1);
  if (lane == 0 || lane == 2) out[4 + lane] = __shfl_sync(0x5u, lane + 10, 2);
}

struct Spin {
  unsigned* arrived;     // one count for ever: generation g is over at g * blocks
  int* cells;            // [blocks]
  int rounds;
  int* wrong;
};

__device__ void grid_barrier(unsigned* arrived, unsigned generation) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1);
    while (__ldcg(arrived) < generation * gridDim.x) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

__global__ void grid_rounds(Spin p) {
  unsigned generation = 0;
  for (int round = 1; round <= p.rounds; ++round) {
    if (threadIdx.x == blockDim.x - 1) p.cells[blockIdx.x] = round;
    grid_barrier(p.arrived, ++generation);
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
      if (p.cells[b] != round) atomicAdd(p.wrong, 1);
    }
    grid_barrier(p.arrived, ++generation);
  }
}

struct Reverse {
  int* out;
  bool barrier;
};

__global__ void reverse(Reverse p) {
  int* cells = reinterpret_cast<int*>(shim::dynamic_shared());
  cells[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (p.barrier) __syncthreads();
  p.out[threadIdx.x] = cells[blockDim.x - 1 - threadIdx.x];
}

struct Rows {
  const float4* source;
  float* out;
  int wait;  // for groups: as many may be left
};

__global__ void copied(Rows p) {
  float4* rows = reinterpret_cast<float4*>(shim::dynamic_shared());
  const unsigned t = threadIdx.x;
  for (unsigned group = 0; group < 2; ++group) {
    shim::async_copy(rows + group * blockDim.x + t, p.source + group * blockDim.x + t, 16);
    shim::async_commit();
  }
  if (p.wait >= 0) shim::async_wait(p.wait);
  for (unsigned group = 0; group < 2; ++group) p.out[group * blockDim.x + t] = rows[group * blockDim.x + t].y;
}

__global__ void counted(int* out) {
  int* count = reinterpret_cast<int*>(shim::dynamic_shared());
  if (threadIdx.x == 0) count[0] = count[1] = 0;
  __syncthreads();
  atomicAdd(count, 1);
  atomicMax(count + 1, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) *out = count[0] + 1000 * count[1] + 1000000 * atomicCAS(count, 64, 0);
}

#if defined(__SANITIZE_THREAD__)
struct Exchange {
  float* global;  // null: through shared memory
  int order;      // what stands between write, read and write again: 0 nothing, 1 a shuffle, 2 __syncwarp, 3 __syncthreads
  bool again;
};

__global__ void exchange(Exchange p) {
  float* cells = p.global != nullptr ? p.global + blockIdx.x * blockDim.x : reinterpret_cast<float*>(shim::dynamic_shared());
  const auto in_order = [&] {
    if (p.order == 1) __shfl_sync(0xffffffffu, 1, 0);
    if (p.order == 2) __syncwarp();
    if (p.order == 3) __syncthreads();
  };
  if (!p.again) cells[threadIdx.x] = 1;
  in_order();
  const float read = cells[threadIdx.x ^ 1];
  if (p.again) {
    in_order();
    cells[threadIdx.x] = read + 1;
  }
}

__global__ void copied_for_a_neighbour(Rows p) {
  float4* rows = reinterpret_cast<float4*>(shim::dynamic_shared());
  shim::async_copy(rows + threadIdx.x, p.source + threadIdx.x, 16);
  shim::async_commit();
  shim::async_wait(0);
  if (p.wait > 0) __syncthreads();
  p.out[threadIdx.x] = rows[threadIdx.x ^ 1].x;
}
#endif

// What a missing wait leads to in a double buffer: the buffer is filled again while it is still read.
__global__ void overwritten(float4* source) {
  float4* row = reinterpret_cast<float4*>(shim::dynamic_shared());
  shim::async_copy(row, source, 16);
  shim::async_commit();
  row->x = 1;
  shim::async_wait(0);
}

__global__ void odd_threads_leave(int*) {
  if (threadIdx.x % 2 == 0) __syncthreads();
}
__global__ void a_warp_leaves(int* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  const int count = __syncthreads_count(1);
  if (threadIdx.x == 0) *out = count;
}
__global__ void two_places(int*) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void warp_against_block(int*) {
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void lane_has_left(int*) {
  if (threadIdx.x == 7) return;
  __syncwarp(0xff);
}
__global__ void no_such_lane(int*) { __syncwarp(); }
__global__ void not_oneself(int*) { __syncwarp(0xfffffffe); }
__global__ void two_shuffles(int* out) {
  out[threadIdx.x] = threadIdx.x < 3 ? __shfl_up_sync(0xffffffffu, 1, 1) : __shfl_down_sync(0xffffffffu, 1, 1);
}
__global__ void spins_for_ever(volatile int* flag) {
  if (threadIdx.x == 0 && blockIdx.x == 1) {
    while (*flag == 0) __nanosleep(10);
  }
  __syncthreads();
}
__global__ void locked_for_ever(unsigned* lock) {
  while (atomicCAS(lock, 1u, 2u) != 1u) {
  }
}

#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize("address")))  // the guard zones are to find it, too
#endif
__global__ void overruns(int at) {
  if (threadIdx.x == 3) static_cast<volatile char*>(shim::dynamic_shared())[at] = 1;
}

struct Refusal : std::exception {
  const char* what() const noexcept override { return "thrown in a kernel"; }
};
struct Counted {
  int* count;
  explicit Counted(int* count) : count(count) { ++*count; }
  ~Counted() { --*count; }
};
__global__ void throws(int* frames) {
  Counted counted(frames);
  __syncthreads();
  if (threadIdx.x == 17) throw Refusal();
  __syncthreads();
}
__global__ void traps(int*) { __trap(); }

struct Locals {
  char* out;
  std::size_t bytes;
};
__global__ void deep(Locals p) {
  volatile char local[40 * 1024];
  for (std::size_t i = 0; i < sizeof local; i += 512) local[i] = static_cast<char>(i >> 9);
  __syncthreads();
  char sum = 0;
  for (std::size_t i = 0; i < sizeof local; i += 512) sum = static_cast<char>(sum + local[i]);
  p.out[threadIdx.x] = sum;
}

struct Bench {
  int rounds;
  double* out;
};
__global__ void bench_block(Bench p) {
  for (int i = 0; i < p.rounds; ++i) __syncthreads();
}
__global__ void bench_warp(Bench p) {
  double x = threadIdx.x;
  for (int i = 0; i < p.rounds; ++i) x += __shfl_xor_sync(0xffffffffu, x, 1 << i % 5);
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = x;
}
__global__ void bench_spin(Bench p) {
  for (int i = 0; i < p.rounds; ++i) __nanosleep(1);
}

// ------------------------------------------------------------------------------------------------------------- tests

void test_results() {
  std::vector<float> x(5000);
  double exact = 0;
  for (std::size_t i = 0; i < x.size(); ++i) exact += x[i] = static_cast<float>(i % 7);
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    for (bool cooperative : {true, false}) {
      shim::Launch options = seeded(seed);
      options.cooperative = cooperative;
      float total = 0;
      shim::launch(block_sum, {x.data(), &total, static_cast<int>(x.size())}, 5, 96, 3 * sizeof(float), options);
      check(total == exact, "block reduction");
    }

    std::vector<int> out(12 * 32, -1);
    shim::launch(all_shuffles, {out.data()}, 1, 32, 0, seeded(seed));
    bool right = true;
    for (int lane = 0; lane < 32; ++lane) {
      const int quad = lane & ~3, other = lane ^ 5;
      const int expected[12] = {30,
                                ((lane & ~7) + 1) * 10,
                                lane < 3 ? lane : lane - 3,
                                lane % 16 < 13 ? lane + 3 : lane,
                                other < quad + 4 ? other : lane,
                                (lane ^ 1) + 100 * (lane / 8),
                                11,
                                lane / 8 == 1,
                                lane < 16,
                                1,
                                0,
                                8};
      for (int row = 0; row < 12; ++row) {
        if (out[row * 32 + lane] == expected[row]) continue;
        right = false;
        std::printf("row %d lane %d: %d, not %d\n", row, lane, out[row * 32 + lane], expected[row]);
      }
    }
    check(right, "shuffles and votes, seed " + std::to_string(seed));

    int count = 0;
    shim::launch(counted, &count, 1, 64, 8, seeded(seed));
    check(count == 64063064, "atomics");

    int met[8] = {};
    shim::launch(overlapping, met, 1, 3, 0, seeded(seed));
    check(met[0] == 2 && met[1] == 2 && met[4] == 12 && met[6] == 12, "overlapping masks");
  }

  int left = 0;
  shim::launch(a_warp_leaves, &left, 1, 64, 0);
  check(left == 32, "a barrier counts the threads that are left");

  std::vector<char> sums(256);
  shim::launch(deep, {sums.data(), sums.size()}, 1, 256, 0);
  check(std::all_of(sums.begin(), sums.end(), [&](char c) { return c == sums[0]; }), "40 KiB of locals");
}

void test_grid_barrier() {
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    unsigned arrived = 0;
    int cells[5] = {}, wrong = 0;
    shim::launch(grid_rounds, {&arrived, cells, 200, &wrong}, 5, 64, 0, seeded(seed));
    check(arrived == 2000 && wrong == 0, "grid barrier, seed " + std::to_string(seed));
  }
  refused([] {
    unsigned arrived = 0;
    int cells[2] = {}, wrong = 0;
    shim::Launch options;
    options.cooperative = false;
    options.spin_limit = 10000;
    shim::launch(grid_rounds, {&arrived, cells, 1, &wrong}, 2, 32, 0, options);
  }, {"deadlock", "block 0", "threads 0 spin", "threads 1-31 wait at __syncthreads"});
}

void test_order() {
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    const auto wrong = [seed](bool barrier) {
      std::vector<int> out(64);
      shim::launch(reverse, {out.data(), barrier}, 1, 64, 64 * sizeof(int), seeded(seed));
      int n = 0;
      for (int i = 0; i < 64; ++i) n += out[i] != 63 - i;
      return n;
    };
    check(wrong(true) == 0, "reversal");
#if defined(__SANITIZE_THREAD__)
    refused([&] { wrong(false); }, {"race in block 0", "of shared memory"});
#else
    check(wrong(false) > 0, "a missing __syncthreads shows");
    check(wrong(false) == wrong(false), "the same order from the same seed");
#endif
  }
#if !defined(__SANITIZE_THREAD__)
  std::vector<int> out(64);
  shim::launch(reverse, {out.data(), false}, 1, 64, 64 * sizeof(int));
  check(std::isnan(__int_as_float(out[0])), "shared memory is poisoned at first");
#endif
}

void test_races() {
#if defined(__SANITIZE_THREAD__)
  std::vector<float> global(128);
  std::vector<float4> source(64, make_float4(1, 2, 3, 4));
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    for (bool in_global : {false, true}) {
      for (bool again : {false, true}) {
        for (int order = 0; order <= 3; ++order) {
          const auto run = [&] {
            shim::launch(exchange, {in_global ? global.data() : nullptr, order, again}, 2, 64, 64 * sizeof(float), seeded(seed));
          };
          if (order < 2) {  // a shuffle puts no memory in order
            refused(run, {"race in block ", "reads", "writes", in_global ? "global memory" : "of shared memory"});
          } else {
            check(thrown(run).empty(), "what barriers part is no race: " + thrown(run));
          }
        }
      }
    }
    for (int barrier : {0, 1}) {
      const std::string message = thrown([&] {
        shim::launch(copied_for_a_neighbour, {source.data(), global.data(), barrier}, 1, 64, 64 * sizeof(float4), seeded(seed));
      });
      check((barrier == 0) == (message.find("race") != std::string::npos), "a neighbour's copy: '" + message + "'");
    }
  }
#endif
}

void test_copies() {
  std::vector<float4> source(64, make_float4(1, 2, 3, 4));
  for (std::uint64_t seed : {0, 3}) {
    const auto column = [&](int wait) {
      std::vector<float> out(64);
      shim::launch(copied, {source.data(), out.data(), wait}, 1, 32, 64 * sizeof(float4), seeded(seed));
      return out;
    };
    const auto all = [](const std::vector<float>& x, int from, int to, auto is) {
      return std::all_of(x.begin() + from, x.begin() + to, is);
    };
    const auto arrived = [](float x) { return x == 2; };
    const auto poison = [](float x) { return std::isnan(x); };
    check(all(column(0), 0, 64, arrived), "copies waited for");
    check(all(column(-1), 0, 64, poison), "copies not waited for");
    check(all(column(1), 0, 32, arrived) && all(column(1), 32, 64, poison), "one group waited for");
  }
  refused([&] { shim::launch(overwritten, source.data(), 1, 1, 64); }, {"destination of an asynchronous copy", "block 0, thread 0"});
  auto* const askew = reinterpret_cast<float4*>(reinterpret_cast<char*>(source.data()) + 4);
  refused([&] { shim::launch(copied, {askew, nullptr, 0}, 1, 1, 64); }, {"not aligned"});
}

void test_refusals() {
  std::vector<int> out(64);
  for (std::uint64_t seed : {0, 1, 2}) {
    const shim::Launch options = seeded(seed);
    const auto run = [&](void (*kernel)(int*), int blocks, int threads) {
      return [=, &out] { shim::launch(kernel, out.data(), blocks, threads, 0, options); };
    };
    refused(run(odd_threads_leave, 2, 64), {"divergent barrier", "lanes 0, 2, 4", "left the kernel", "shim_test.cpp"});
    refused(run(two_places, 2, 64), {"divergent barrier", "block ", "__syncthreads", "wait at"});
    refused(run(warp_against_block, 1, 32), {"deadlock", "threads 5 wait at __syncthreads", "waiting for lane 5", "lanes 0-4, 6-31"});
    refused(run(lane_has_left, 1, 8), {"__syncwarp", "left the kernel", "0x000000ff"});
    refused(run(no_such_lane, 1, 40), {"names lanes 8-31", "has only lanes 0-7"});
    refused(run(not_oneself, 1, 32), {"thread 0", "lacks its own lane"});
    refused(run(two_shuffles, 1, 32), {"divergent warp", "__shfl_up_sync", "__shfl_down_sync"});
    refused(run(traps, 3, 8), {"__trap"});
  }
  for (std::uint64_t seed : {0, 1}) {
    shim::Launch options = seeded(seed);
    options.spin_limit = 50000;
    int flag = 0;
    refused([&] { shim::launch<volatile int*>(spins_for_ever, &flag, 2, 64, 0, options); },
            {"deadlock", "block 1", "threads 0 spin", "threads 1-63 wait at __syncthreads"});
    unsigned lock = 0;
    refused([&] { shim::launch(locked_for_ever, &lock, 1, 4, 0, options); }, {"deadlock", "spin"});
  }

  refused([] { shim::launch(overruns, 100, 2, 32, 100); }, {"wrote outside its shared memory", "block ", "at byte 100 of 100"});
  refused([] { shim::launch(overruns, -1, 1, 32, 100); }, {"at byte -1"});
  check(thrown([] { shim::launch(overruns, 99, 2, 32, 100); }).empty(), "the last byte is inside");

  int frames = 0;
  bool as_it_was = false;
  try {
    shim::launch(throws, &frames, 3, 64, 16);
  } catch (const Refusal&) {
    as_it_was = true;
  }
  check(as_it_was && frames == 0, "an exception comes out as it was, and every frame is unwound");

  refused([&] { shim::launch(traps, out.data(), 1, 1025, 0); }, {"1025 threads"});
  refused([&] { shim::launch(traps, out.data(), 0, 32, 0); }, {"0 blocks"});
  refused([&] { shim::launch(traps, out.data(), 1, 32, 300000); }, {"300000 bytes"});
  refused([] { __syncthreads(); }, {"outside a kernel"});
  setenv("SPARSEFLOW_SHIM_SEED", "one", 1);
  refused([&] { shim::launch(traps, out.data(), 1, 32, 0); }, {"SPARSEFLOW_SHIM_SEED", "'one'"});
  unsetenv("SPARSEFLOW_SHIM_SEED");
}

void measure() {
#if defined(__SANITIZE_ADDRESS__)
  const int rounds = 500;
#else
  const int rounds = 5000;
#endif
  std::vector<double> out(1024);
  const auto report = [&](const char* what, void (*kernel)(Bench), int blocks, int threads, std::uint64_t seed) {
    const std::clock_t begin = std::clock();  // processor time
    shim::launch(kernel, {rounds, out.data()}, blocks, threads, 1024, seeded(seed));
    const double ns = 1e9 * static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    const shim::Statistics s = shim::last_launch();
    std::printf("%-16s %d x %3d threads, seed %d: %6.1f ns per switch, %6.1f ns per thread and operation\n", what, blocks, threads,
                static_cast<int>(seed), ns / static_cast<double>(s.switches), ns / (1.0 * rounds * blocks * threads));
  };
  for (std::uint64_t seed : {0, 1}) {
    report("__syncthreads", bench_block, 1, 64, seed);
    report("__syncthreads", bench_block, 4, 256, seed);
    report("__shfl_xor_sync", bench_warp, 1, 32, seed);
    report("__shfl_xor_sync", bench_warp, 4, 256, seed);
    report("__nanosleep", bench_spin, 1, 2, seed);
    report("__nanosleep", bench_spin, 4, 256, seed);
  }
}

}  // namespace

int main() {
  unsetenv("SPARSEFLOW_SHIM_SEED");
  test_results();
  test_grid_barrier();
  test_order();
  test_races();
  test_copies();
  test_refusals();
  std::thread(test_results).join();  // from another thread
  test_results();                    // and all still works after the failures
  measure();
  std::printf("%d checks passed, %d failed\n", passed, failed);
  return failed > 0;
}
