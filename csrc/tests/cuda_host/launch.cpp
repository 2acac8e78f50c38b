// A launch: its blocks, whose threads are fibres, from the first to the last.
#include <errno.h>
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {

using namespace machine;

namespace {

constexpr std::size_t kSharedLimit = 227 * 1024;  // of a block, on the largest card
#ifdef SHIM_ASAN
constexpr std::size_t kStackBytes = 512 * 1024;  // instrumented frames are large
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

std::mutex launches;
detail::Body body = nullptr;
const void* argument = nullptr;

// ------------------------------------------------------------------------------------------------------ life of a fibre

// The fibre that runs leaves the kernel; those that waited for the others only are set free.
void leave() {
  Fibre& self = *current;
  Block& b = *self.block;
  Warp& w = *self.warp;
  const unsigned bit = 1u << self.lane;
  self.state = State::kDone;
  w.alive &= ~bit;
  --b.alive;
  --alive;
  detail::idle_yields = 0;
  for (int s = 0; s < kWarp; ++s) {
    if ((w.mask[s] & bit) == 0) continue;
    fail(place(w) + ": lane " + std::to_string(self.lane) + " left the kernel, but " + lanes(w.arrived[s]) + " wait for it at " +
         at(w.op[s], w.where[s]) + ", mask " + hexadecimal(w.mask[s]));
  }
  if (b.alive == 0) {
    check_guards(b);
  } else if (b.arrived == b.alive) {
    complete(b);
  }
}

// What a fibre does; it never returns.
[[noreturn]] void live() {
  try {
    body(argument);
    leave();
  } catch (const Cancelled&) {
  } catch (...) {
    if (!error) error = std::current_exception();
  }
  current->state = State::kDone;
  Fibre* f = error ? &host : next();
  if (f == nullptr && alive > 0) {
    report_deadlock();
  }
  switch_to(f == nullptr ? host : *f, true);
  __builtin_unreachable();
}

// ------------------------------------------------------------------------------------------------------------- launch

// Runs blocks first to first + n - 1, all alive at once; an exception is left in `error`.
void run_blocks(int first, int n) {
  const int threads = static_cast<int>(blockDim.x), warps_each = (threads + kWarp - 1) / kWarp;
  alive = n * threads;
  for (int i = 0; i < n; ++i) {
    Block& b = blocks[i];
    b.index = static_cast<unsigned>(first + i);
    b.alive = threads;
    b.arrived = b.votes = 0;
    b.barriers = 0;
    b.waiting.clear();
    b.fibres = &fibres[static_cast<std::size_t>(i) * threads];
    b.warps = &warps[static_cast<std::size_t>(i) * warps_each];
    make_shared(b);
    for (int t = 0; t < threads; ++t) {
      Fibre& f = b.fibres[t];
      Warp& w = b.warps[t / kWarp];
      f.block = &b;
      f.warp = &w;
      f.thread = {static_cast<unsigned>(t), 0, 0};
      f.lane = t % kWarp;
      f.state = State::kFresh;
      f.stack = stack_of(static_cast<std::size_t>(&f - fibres.data()));
      f.copies.clear();
      f.first_copy = 0;
      f.committed = 0;
      if (f.lane == 0) w = Warp(), w.fibres = &f;
      w.alive = w.existing |= 1u << f.lane;
#ifdef SHIM_ASAN
      __asan_unpoison_memory_region(f.stack + stack_bytes - kSmallestStack, kSmallestStack);  // the frame the last fibre never left
#endif
      prepare(f);
      ready.push_back(&f);
    }
  }
  switch_to(*next());  // comes back when all have left, or one has failed
  if (!error) return;
  cancelling = true;
  for (Fibre& f : fibres) {
    if (f.state != State::kFresh && f.state != State::kDone) switch_to(f);
  }
}

// Leaves nothing behind, whatever happened.
struct Reset {
  ~Reset() {
    for (Block& b : blocks) unguard(b);
    blocks.clear();
    warps.clear();
    fibres.clear();
    current = nullptr;
    error = nullptr;
    forget_races();
    cancelling = false;
    body = nullptr;
  }
};

std::uint64_t seed_of(const Launch& options) {
  const char* text = std::getenv("SPARSEFLOW_SHIM_SEED");
  if (text == nullptr || *text == 0) return options.seed;
  char* end = nullptr;
  errno = 0;
  const unsigned long long seed = std::strtoull(text, &end, 10);
  if (errno != 0 || *end != 0 || *text == '-') fail(std::string("SPARSEFLOW_SHIM_SEED is '") + text + "'; it must be a whole number, 0 for in order");
  return seed;
}

thread_local bool launching = false;

}  // namespace

void detail::launch(Body kernel, const void* parameters, int n_blocks, int threads, std::size_t bytes, const Launch& options) {
  if (launching) fail("launch() inside a kernel");
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("CUDA host shim: " + what); };
  if (n_blocks < 1) refuse("launch of " + std::to_string(n_blocks) + " blocks");
  if (threads < 1 || threads > 1024) refuse("launch of " + std::to_string(threads) + " threads a block; 1 to 1024 can be");
  if (bytes > kSharedLimit) refuse("launch with " + std::to_string(bytes) + " bytes of shared memory; " + std::to_string(kSharedLimit) + " at most");

  std::lock_guard<std::mutex> lock(launches);
  const std::uint64_t seed = seed_of(options);
  const int together = options.cooperative ? n_blocks : 1;
  const std::size_t count = static_cast<std::size_t>(together) * threads;
  stack_bytes = options.stack_bytes != 0 ? (std::max(options.stack_bytes, kSmallestStack) + page() - 1) / page() * page() : kStackBytes;
  need_stacks(count, stack_bytes);

  struct Launching {
    Launching() { launching = true; }
    ~Launching() { launching = false; }
  } mark;
  Reset reset;
  statistics = {};
  begin_order(seed);
  until_preempted = 1;
  idle_yields = 0;
  spin_limit = options.spin_limit;
  forget_host_stack();
  body = kernel;
  argument = parameters;
  shared_bytes = bytes;
  blockDim = dim3(static_cast<unsigned>(threads));
  gridDim = dim3(static_cast<unsigned>(n_blocks));
  blockIdx = {0, 0, 0};
  blocks = std::vector<Block>(static_cast<std::size_t>(together));
  fibres = std::vector<Fibre>(count);
  warps = std::vector<Warp>(static_cast<std::size_t>(together) * ((threads + kWarp - 1) / kWarp));
  ready.reset(count);
  current = &host;
  for (int first = 0; first < n_blocks && !error; first += together) run_blocks(first, together);
  if (!error) error = first_race();
  if (error) std::rethrow_exception(error);
}

Statistics last_launch() { return statistics; }

}  // namespace shim

extern "C" void sparseflow_shim_enter() {
  shim::machine::begin_fibre();
  shim::live();
}

long long clock64() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}
