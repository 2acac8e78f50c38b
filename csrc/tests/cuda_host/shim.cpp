// Fibres, their scheduler, and the barriers, warp operations and asynchronous copies they wait at. Everything happens on
// the thread that launches, so that plain variables do; a mutex keeps launches apart.
#include "shim.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SHIM_ASAN 1
#endif
#endif
#ifdef SHIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(SHIM_UCONTEXT)
#define SHIM_UCONTEXT
#endif
#ifdef SHIM_UCONTEXT
#include <ucontext.h>
#endif
#ifdef SHIM_RACES
#include <dlfcn.h>

#include "races.h"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {
namespace detail {

int until_preempted = 0;
long long idle_yields = 0;

}  // namespace detail

namespace {

using detail::Op;
using detail::Where;

constexpr int kWarp = 32;
constexpr std::size_t kGuard = 256;  // bytes on both sides of a block's shared memory
constexpr unsigned char kGuardByte = 0xcb;
constexpr std::size_t kSharedLimit = 227 * 1024;  // of a block, on the largest card
#ifdef SHIM_ASAN
constexpr std::size_t kStackBytes = 512 * 1024;  // instrumented frames are large
#else
constexpr std::size_t kStackBytes = 64 * 1024;
#endif

constexpr std::size_t kSmallestStack = 16 * 1024;

// ------------------------------------------------------------------------------------------------------------ parts

struct Copy {
  void* to;
  const void* from;
  int bytes;
  long long group;
  unsigned char seen[16];  // the source when the copy was issued
};

enum class State : unsigned char { kFresh, kRuns, kReady, kSpins, kAtBlockBarrier, kInWarpOperation, kDone };

struct Block;
struct Warp;

struct alignas(64) Fibre {
  void* context = nullptr;  // while it does not run: its stack pointer
  Block* block = nullptr;   // null: the host itself
  Warp* warp = nullptr;
  uint3 thread = {0, 0, 0};
  int lane = 0;
  unsigned waits_for = 0;  // mask of its warp operation
  State state = State::kFresh;
  Where where = {nullptr, 0};  // it waits
  char* stack = nullptr;       // its lowest byte
  void* fake_stack = nullptr;  // AddressSanitizer's
  std::vector<Copy> copies;    // issued and not finished, in order
  std::size_t first_copy = 0;
  long long committed = 0;  // groups
#ifdef SHIM_UCONTEXT
  ucontext_t registers;
#endif
};

// The operations a warp's lanes wait in: one per mask, so that parts of a warp go their own ways.
struct Warp {
  unsigned alive = 0, existing = 0;
  Fibre* fibres = nullptr;
  unsigned mask[kWarp] = {};  // 0: free
  unsigned arrived[kWarp];
  Op op[kWarp];
  Where where[kWarp];
  // by lane; a lane is in one operation at a time
  std::uint64_t value[kWarp], result[kWarp];
  signed char source[kWarp];
#ifdef SHIM_RACES
  WarpClocks clocks;
#endif
};

struct FreeAligned {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t(128)); }
};

struct Block {
  unsigned index = 0;
  int alive = 0, arrived = 0, votes = 0, result = 0;
  Op op = Op::kSyncThreads;
  Where where = {nullptr, 0};
  std::vector<Fibre*> waiting;
  Fibre* fibres = nullptr;
  Warp* warps = nullptr;
  std::unique_ptr<char, FreeAligned> memory;
  char* shared = nullptr;
  std::uint32_t barriers = 0;  // that were completed
};

// Fibres that can go on, each at most once: a ring, so that both ends and a random pick cost a few instructions.
class Ready {
 public:
  void reset(std::size_t fibres) {
    std::size_t capacity = 1;
    while (capacity < fibres) capacity *= 2;
    ring_.assign(capacity, nullptr);
    mask_ = capacity - 1;
    head_ = count_ = 0;
  }
  bool empty() const { return count_ == 0; }
  void push_back(Fibre* f) { ring_[(head_ + count_++) & mask_] = f; }
  void push_front(Fibre* f) { ring_[head_ = (head_ - 1) & mask_] = f, ++count_; }
  Fibre* pop_front() {
    Fibre* f = ring_[head_];
    head_ = (head_ + 1) & mask_;
    --count_;
    return f;
  }
  Fibre* pop_back() { return ring_[(head_ + --count_) & mask_]; }
  Fibre* pop(std::size_t i) {
    std::swap(ring_[head_], ring_[(head_ + i) & mask_]);
    return pop_front();
  }
  std::size_t size() const { return count_; }

 private:
  std::vector<Fibre*> ring_;
  std::size_t mask_ = 0, head_ = 0, count_ = 0;
};

struct Cancelled {};  // thrown through the fibres that a failed launch leaves behind, so that their frames end

std::mutex launches;
Statistics statistics;

Fibre host;
Fibre* current = nullptr;  // null: no launch
Ready ready;
std::vector<Fibre> fibres;
std::vector<Warp> warps;
std::vector<Block> blocks;
int alive = 0;
detail::Body body = nullptr;
const void* argument = nullptr;
std::exception_ptr error;
bool cancelling = false;
std::size_t stack_bytes = 0, shared_bytes = 0;
#ifdef SHIM_ASAN
const void* host_stack = nullptr;  // of the launching thread, asked for by AddressSanitizer
std::size_t host_stack_bytes = 0;
#endif
long long spin_limit = 0;

// ------------------------------------------------------------------------------------------------------------ chance

bool shuffled = false;
std::uint64_t random_state = 1;

std::uint32_t random_below(std::uint32_t n) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<std::uint32_t>((((random_state * 0x2545f4914f6cdd1dULL) >> 32) * n) >> 32);
}

// A shuffled launch changes its habit now and then, so that some threads run far ahead and others fall far behind.
enum class Habit { kAny, kOldest, kNewest } habit = Habit::kAny;
int habit_lasts = 0;

// ------------------------------------------------------------------------------------------------------------ errors

std::string named(Op op) {
  switch (op) {
    case Op::kSyncThreads: return "__syncthreads";
    case Op::kSyncThreadsOr: return "__syncthreads_or";
    case Op::kSyncThreadsAnd: return "__syncthreads_and";
    case Op::kSyncThreadsCount: return "__syncthreads_count";
    case Op::kSyncWarp: return "__syncwarp";
    case Op::kShuffle: return "__shfl_sync";
    case Op::kShuffleXor: return "__shfl_xor_sync";
    case Op::kShuffleUp: return "__shfl_up_sync";
    case Op::kShuffleDown: return "__shfl_down_sync";
    case Op::kBallot: return "__ballot_sync";
    case Op::kAny: return "__any_sync";
    case Op::kAll: return "__all_sync";
  }
  return "?";
}

std::string at(Op op, Where where) { return named(op) + " (" + where.file + ":" + std::to_string(where.line) + ")"; }

std::string hexadecimal(unsigned x) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", x);
  return text;
}

template <class F>
std::string ranges(int n, F contains) {  // "0-3, 7"
  std::string text;
  for (int i = 0; i < n; ++i) {
    if (!contains(i)) continue;
    int last = i;
    while (last + 1 < n && contains(last + 1)) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(i) + (last > i ? "-" + std::to_string(last) : "");
    i = last;
  }
  return text;
}

std::string lanes(unsigned mask) {
  return ((mask & (mask - 1)) == 0 ? "lane " : "lanes ") + ranges(kWarp, [mask](int i) { return mask >> i & 1; });
}

std::string place(const Block& b) { return "block " + std::to_string(b.index); }
std::string place(const Fibre& f) { return place(*f.block) + ", thread " + std::to_string(f.thread.x); }
int number(const Warp& w) { return static_cast<int>(w.fibres[0].thread.x) / kWarp; }
std::string place(const Warp& w) { return place(*w.fibres[0].block) + ", warp " + std::to_string(number(w)); }

[[noreturn]] __attribute__((noinline, cold)) void fail(const std::string& what) { throw std::runtime_error("CUDA host shim: " + what); }

// What every live thread is doing.
std::string situation() {
  constexpr int kShown = 6;
  std::string text;
  int shown = 0, hidden = 0;
  for (const Block& b : blocks) {
    if (b.alive == 0) continue;
    if (shown == kShown) {
      ++hidden;
      continue;
    }
    ++shown;
    text += "\n  " + place(b) + ":";
    const auto threads_that = [&](const char* do_what, auto condition) {
      const std::string which = ranges(static_cast<int>(blockDim.x), [&](int i) { return condition(b.fibres[i]); });
      if (!which.empty()) text += "\n    threads " + which + " " + do_what;
    };
    const std::string barrier = b.arrived > 0 ? "wait at " + at(b.op, b.where) : "";
    threads_that(barrier.c_str(), [](const Fibre& f) { return f.state == State::kAtBlockBarrier; });
    for (int i = 0; i < static_cast<int>(blockDim.x + kWarp - 1) / kWarp; ++i) {
      const Warp& w = b.warps[i];
      for (int s = 0; s < kWarp; ++s) {
        if (w.mask[s] == 0) continue;
        text += "\n    warp " + std::to_string(i) + ", " + lanes(w.arrived[s]) + " in " + at(w.op[s], w.where[s]) + ", mask " +
                hexadecimal(w.mask[s]) + ", waiting for " + lanes(w.mask[s] & ~w.arrived[s]);
      }
    }
    threads_that("spin (__nanosleep or atomics)", [](const Fibre& f) { return f.state == State::kSpins; });
    threads_that("could go on", [](const Fibre& f) { return f.state == State::kReady || f.state == State::kRuns; });
    threads_that("have not begun", [](const Fibre& f) { return f.state == State::kFresh; });
    threads_that("have left", [](const Fibre& f) { return f.state == State::kDone; });
  }
  if (hidden > 0) text += "\n  and " + std::to_string(hidden) + " more blocks";
  return text;
}

// ------------------------------------------------------------------------------------------------------------ stacks

std::vector<char*> stacks;  // kept from launch to launch
std::size_t stacks_bytes = 0;

std::size_t page() {
  static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

void need_stacks(std::size_t count, std::size_t bytes) {
  if (bytes != stacks_bytes) {
    for (char* stack : stacks) munmap(stack - page(), stacks_bytes + page());
    stacks.clear();
    stacks_bytes = bytes;
  }
  stacks.reserve(count);
  while (stacks.size() < count) {
    void* p = mmap(nullptr, bytes + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page(), PROT_NONE) != 0) {  // the guard page lies below
      const int reason = errno;
      if (p != MAP_FAILED) munmap(p, bytes + page());
      fail("no stacks for " + std::to_string(count) + " threads alive at once, only for " + std::to_string(stacks.size()) + " (" +
           std::strerror(reason) + "); launch fewer, or with cooperative = false");
    }
    stacks.push_back(static_cast<char*>(p) + page());
  }
}

// ---------------------------------------------------------------------------------------------------- context switch

extern "C" void sparseflow_shim_enter() __attribute__((used));

#ifdef SHIM_UCONTEXT

void prepare(Fibre& f) {
  getcontext(&f.registers);
  f.registers.uc_stack.ss_sp = f.stack;
  f.registers.uc_stack.ss_size = stack_bytes;
  f.registers.uc_link = nullptr;
  makecontext(&f.registers, sparseflow_shim_enter, 0);
}

void exchange(Fibre& from, Fibre& to) { swapcontext(&from.registers, &to.registers); }

#else

// The six registers that a function must preserve. Not the two control words of floating point, which would cost a third
// of the switch: CUDA cannot change them, so that they are the launching thread's everywhere. The return is predicted:
// fibres mostly wait at one place, behind the same calls.
asm(R"(
  .text
  .p2align 4
  .type sparseflow_shim_switch, @function
  .hidden sparseflow_shim_switch
  .globl sparseflow_shim_switch
sparseflow_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size sparseflow_shim_switch, .-sparseflow_shim_switch

  .p2align 4
  .type sparseflow_shim_start, @function
sparseflow_shim_start:
  .cfi_startproc
  .cfi_undefined rip
  call sparseflow_shim_enter
  ud2
  .cfi_endproc
  .size sparseflow_shim_start, .-sparseflow_shim_start
  .globl sparseflow_shim_start
  .hidden sparseflow_shim_start
)");
extern "C" void sparseflow_shim_switch(void** save, void* load);
extern "C" void sparseflow_shim_start();

void prepare(Fibre& f) {
  // Stacks begin at page boundaries: without an offset of their own their tops would share a few lines of the cache.
  const std::size_t colour = (f.thread.x * 11 + f.block->index * 5) % 32 * 128;
  auto* top = reinterpret_cast<std::uint64_t*>(f.stack + stack_bytes - colour);
  *--top = 0;
  *--top = 0;  // so that the call in sparseflow_shim_start finds the stack aligned
  *--top = reinterpret_cast<std::uint64_t>(&sparseflow_shim_start);
  for (int i = 0; i < 6; ++i) *--top = 0;  // the registers
  f.context = top;
}

void exchange(Fibre& from, Fibre& to) { sparseflow_shim_switch(&from.context, to.context); }

#endif

// Goes on with `to`, and returns when somebody goes on with the fibre that runs now.
void switch_to(Fibre& to, [[maybe_unused]] bool for_ever = false) {
  Fibre& from = *current;
  current = &to;
  if (to.block != nullptr) {
    threadIdx = to.thread;
    blockIdx.x = to.block->index;
    to.state = State::kRuns;
  }
  ++statistics.switches;
#ifdef SHIM_ASAN
  const bool to_host = to.block == nullptr;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack, to_host ? host_stack : to.stack,
                                 to_host ? host_stack_bytes : stack_bytes);
#endif
  exchange(from, to);
#ifdef SHIM_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// --------------------------------------------------------------------------------------------------------- scheduler

// How often in a row fibres that a barrier sets free may go first. First is quicker: their stacks are in the cache.
constexpr int kFirst = 4096;
int may_go_first = kFirst;

Fibre* next() {
  if (ready.empty()) return nullptr;
  if (!shuffled) return ready.pop_front();
  if (--habit_lasts < 0) {
    habit = static_cast<Habit>(random_below(3));
    habit_lasts = static_cast<int>(random_below(1024));
  }
  switch (habit) {
    case Habit::kOldest: return ready.pop_front();
    case Habit::kNewest: return ready.pop_back();
    case Habit::kAny: break;
  }
  return ready.pop(random_below(static_cast<std::uint32_t>(ready.size())));
}

__attribute__((noinline, cold)) void report_deadlock() {
  error = std::make_exception_ptr(std::runtime_error("CUDA host shim: deadlock, no thread can go on" + situation()));
}

// The fibre that runs waits until it is set free.
void wait(State state) {
  Fibre& self = *current;
  self.state = state;
  Fibre* f = next();
  if (f == nullptr) {
    report_deadlock();
    f = &host;
  }
  switch_to(*f);
  if (cancelling) throw Cancelled{};
}

// fibre(i) for i in [0, n): null, or one to be set free
template <class F>
void set_free(int n, F fibre) {
  detail::idle_yields = 0;
  if (shuffled || --may_go_first < 0) {
    may_go_first = kFirst;
    for (int i = 0; i < n; ++i) {
      if (Fibre* f = fibre(i)) f->state = State::kReady, ready.push_back(f);
    }
  } else {
    for (int i = n - 1; i >= 0; --i) {
      if (Fibre* f = fibre(i)) f->state = State::kReady, ready.push_front(f);
    }
  }
}

[[noreturn]] __attribute__((noinline, cold)) void outside_a_kernel(const char* what) { fail(std::string(what) + " outside a kernel"); }

inline void need_kernel(const char* what) {
  if (current == nullptr || current->block == nullptr) outside_a_kernel(what);
}

// ---------------------------------------------------------------------------------------------------- block barriers

bool same_place(Where a, Where b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

// A warp may leave early, part of one may not: its others would wait in divergent code.
__attribute__((noinline, cold)) void check_whole_warps(const Block& b) {
  for (unsigned i = 0; i * kWarp < blockDim.x; ++i) {
    const Warp& w = b.warps[i];
    if (w.alive == 0 || w.alive == w.existing) continue;
    fail("divergent barrier: " + place(w) + ", " + lanes(w.alive) + " at " + at(b.op, b.where) + ", but " +
         lanes(w.existing & ~w.alive) + " left the kernel");
  }
}

[[noreturn]] __attribute__((noinline, cold)) void divergent_barrier(const Block& b, Op op, Where where) {
  fail("divergent barrier: " + place(*current) + " is at " + at(op, where) + ", but threads " +
       ranges(static_cast<int>(blockDim.x), [&](int i) { return b.fibres[i].state == State::kAtBlockBarrier; }) + " wait at " +
       at(b.op, b.where));
}

void complete(Block& b) {
  if (b.alive < static_cast<int>(blockDim.x)) check_whole_warps(b);
  ++statistics.block_barriers;
  switch (b.op) {
    case Op::kSyncThreadsOr: b.result = b.votes > 0; break;
    case Op::kSyncThreadsAnd: b.result = b.votes == b.arrived; break;
    default: b.result = b.votes;
  }
  b.arrived = b.votes = 0;
  ++b.barriers;
  set_free(static_cast<int>(b.waiting.size()), [&](int i) { return b.waiting[i]; });
  b.waiting.clear();
}

}  // namespace

int detail::block_barrier(Op op, bool predicate, Where where) {
  need_kernel("a barrier");
  Block& b = *current->block;
  if (b.arrived == 0) {
    b.op = op;
    b.where = where;
  } else if (b.op != op || !same_place(b.where, where)) {
    divergent_barrier(b, op, where);
  }
  ++b.arrived;
  b.votes += predicate;
  if (b.arrived == b.alive) {
    complete(b);
  } else {
    b.waiting.push_back(current);
    wait(State::kAtBlockBarrier);
  }
  return b.result;  // nobody can be at the next barrier's end before all have read it
}

// --------------------------------------------------------------------------------------------------- warp operations

namespace {

[[noreturn]] __attribute__((noinline, cold)) void absent_lanes(const Warp& w, unsigned mask, Op op, Where where) {
  fail(place(*current) + ": " + at(op, where) + " with mask " + hexadecimal(mask) + " names " + lanes(mask & ~w.alive) +
       ((mask & ~w.existing) != 0 ? ", and the warp has only " + lanes(w.existing) : ", which left the kernel"));
}

[[noreturn]] __attribute__((noinline, cold)) void divergent_warp(const Warp& w, int slot, Op op, Where where) {
  fail("divergent warp: " + place(*current) + " is at " + at(op, where) + ", but " + lanes(w.arrived[slot]) + " of warp " +
       std::to_string(number(w)) + " wait for it at " + at(w.op[slot], w.where[slot]) + ", mask " + hexadecimal(w.mask[slot]));
}

[[noreturn]] __attribute__((noinline, cold)) void own_lane_missing(unsigned mask, Op op, Where where) {
  fail(place(*current) + ": " + at(op, where) + " with mask " + hexadecimal(mask) + " lacks its own lane");
}

[[noreturn]] __attribute__((noinline, cold)) void bad_width(int width) {
  fail(place(*current) + ": shuffle with width " + std::to_string(width) + "; it must be a power of two up to 32");
}

// The place of the operation that waits for this mask, or a new one.
int slot_of(Warp& w, unsigned mask, Op op, Where where) {
  const int home = __builtin_ctz(mask);
  int slot = home;
  if (w.mask[home] != mask) {
    unsigned* const end = w.mask + kWarp;
    unsigned* found = std::find(w.mask, end, mask);
    if (found == end && w.mask[home] != 0) found = std::find(w.mask, end, 0u);  // there is one: each waits for a lane of its own
    if (found != end) slot = static_cast<int>(found - w.mask);
  }
  if (w.mask[slot] == 0) {
    if ((mask & ~w.alive) != 0) absent_lanes(w, mask, op, where);
    w.mask[slot] = mask;
    w.arrived[slot] = 0;
    w.op[slot] = op;
    w.where[slot] = where;
  } else if (w.op[slot] != op || !same_place(w.where[slot], where)) {
    divergent_warp(w, slot, op, where);
  }
  return slot;
}

constexpr std::uint64_t kPoison64 = static_cast<std::uint64_t>(kPoison) << 32 | kPoison;

void finish(Warp& w, int slot) {
  const unsigned mask = w.mask[slot];
  const Op op = w.op[slot];
  if (op >= Op::kShuffle && op <= Op::kShuffleDown) {
    for (unsigned left = mask; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left), source = w.source[lane];
      w.result[lane] = mask >> source & 1 ? w.value[source] : kPoison64;
    }
  } else if (op != Op::kSyncWarp) {
    unsigned votes = 0;
    for (unsigned left = mask; left != 0; left &= left - 1) votes |= (w.value[__builtin_ctz(left)] != 0) ? left & -left : 0;
    for (unsigned left = mask; left != 0; left &= left - 1) w.result[__builtin_ctz(left)] = votes;
  }
#ifdef SHIM_RACES
  if (op == Op::kSyncWarp) w.clocks.join(mask);
#endif
  w.mask[slot] = 0;
  ++statistics.warp_operations;
  const unsigned others = mask & ~(1u << current->lane);
  set_free(kWarp, [&](int i) { return others >> i & 1 ? w.fibres + i : nullptr; });
}

}  // namespace

detail::Segment detail::segment(int width) {
  need_kernel("a shuffle");
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) bad_width(width);
  return {current->lane, current->lane & ~(width - 1)};
}

std::uint64_t detail::warp_operation(Op op, unsigned mask, std::uint64_t value, int source, Where where) {
  need_kernel("a warp operation");
  Fibre& self = *current;
  Warp& w = *self.warp;
  const unsigned self_bit = 1u << self.lane;
  if ((mask & self_bit) == 0) own_lane_missing(mask, op, where);
  const int slot = slot_of(w, mask, op, where);
  w.arrived[slot] |= self_bit;
  w.value[self.lane] = value;
  w.source[self.lane] = static_cast<signed char>(source);
  if (w.arrived[slot] == mask) {
    finish(w, slot);
  } else {
    wait(State::kInWarpOperation);
  }
  return w.result[self.lane];
}

// ----------------------------------------------------------------------------------------------- spinning, preemption

namespace {

[[noreturn]] __attribute__((noinline, cold)) void spun_too_long() {
  current->state = State::kSpins;
  fail("deadlock: threads spun " + std::to_string(spin_limit) + " times and nothing else happened" + situation());
}

}  // namespace

void detail::yield() {
  if (current == nullptr || current->block == nullptr) return;
  ++statistics.yields;
  if (++idle_yields > spin_limit) spun_too_long();
  if (ready.empty()) return;
  Fibre* f = shuffled ? ready.pop(random_below(static_cast<std::uint32_t>(ready.size()))) : ready.pop_front();
  current->state = State::kSpins;
  ready.push_back(current);
  switch_to(*f);
  if (cancelling) throw Cancelled{};
}

void detail::preempt() {
  until_preempted = shuffled ? 1 + static_cast<int>(random_below(64)) : 4096;
  yield();
}

void detail::trap() { fail(place(*current) + ": __trap()"); }

// ------------------------------------------------------------------------------------------------------------- races

namespace {

#ifdef SHIM_RACES
Races races;
std::exception_ptr race;  // the first; thrown when the launch is over, as what the compiler puts in may not throw

std::string at_address(const void* pc) {
  Dl_info info;
  if (dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return "?";
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<std::size_t>(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1));
  return std::string("addr2line -e ") + info.dli_fname + " " + text;
}

__attribute__((noinline, cold)) void report_race(const Fibre& f, const char* address, const Access& then, const Access& now) {
  const Block& b = *f.block;
  const std::ptrdiff_t offset = address - b.shared;
  const bool in_shared = offset >= 0 && offset < static_cast<std::ptrdiff_t>(shared_bytes);
  const auto did = [](const Access& a) {
    return "thread " + std::to_string(a.thread) + (a.write ? " writes (" : " reads (") + at_address(a.pc) + ")";
  };
  const std::string what = in_shared ? "byte " + std::to_string(offset) + " of shared memory" : "global memory";
  const std::string since = b.barriers == 0 ? "before any barrier" : "after barrier " + std::to_string(b.barriers) + ", " + at(b.op, b.where);
  race = std::make_exception_ptr(std::runtime_error("CUDA host shim: race in " + place(b) + ": " + did(then) + " and " + did(now) + " " + what +
                                                    " with nothing in between that orders them, " + since));
}

void touch(const void* address, std::size_t bytes, bool write, const void* pc) {
  if (current == nullptr || current->block == nullptr || race || cancelling) return;
  const Fibre& f = *current;
  const auto first = reinterpret_cast<std::uintptr_t>(address), end = first + bytes;
  if (first - reinterpret_cast<std::uintptr_t>(f.stack) < stack_bytes) return;  // its own locals
  Access now;
  now.epoch = f.block->barriers + 1;
  now.clock = f.warp->clocks.at[f.lane][f.lane];
  now.thread = static_cast<std::uint16_t>(f.thread.x);
  now.write = write;
  now.pc = pc;
  for (std::uintptr_t word = first / 4; word * 4 < end; ++word) {
    const unsigned below = word * 4 < first ? static_cast<unsigned>(first % 4) : 0;
    const unsigned above = word * 4 + 4 > end ? static_cast<unsigned>(end % 4) : 4;
    now.bytes = static_cast<std::uint8_t>(((1u << above) - 1) & ~((1u << below) - 1));
    const Access then = races.note(word, f.block->index, now, f.warp->clocks);
    if (then.epoch != 0) return report_race(f, reinterpret_cast<const char*>(word * 4 + below), then, now);
  }
}
#else
void touch(const void*, std::size_t, bool, const void*) {}
#endif

}  // namespace

// ------------------------------------------------------------------------------------------------ asynchronous copies

namespace {

[[noreturn]] __attribute__((noinline, cold)) void changed_in_flight(const char* what) {
  fail(place(*current) + ": the " + what + " of an asynchronous copy was changed before it had arrived");
}

void perform(const Copy& copy) {
  touch(copy.from, copy.bytes, false, __builtin_return_address(0));
  touch(copy.to, copy.bytes, true, __builtin_return_address(0));
  const auto* bytes = static_cast<const unsigned char*>(copy.to);
  for (int i = 0; i < copy.bytes; i += 4) {
    if (std::memcmp(bytes + i, &kPoison, 4) != 0) changed_in_flight("destination");
  }
  if (std::memcmp(copy.seen, copy.from, copy.bytes) != 0) changed_in_flight("source");
  std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace

void async_copy(void* to, const void* from, int bytes) {
  need_kernel("an asynchronous copy");
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    fail(place(*current) + ": asynchronous copy of " + std::to_string(bytes) + " bytes; 4, 8 or 16 can be");
  }
  if (reinterpret_cast<std::uintptr_t>(to) % bytes != 0 || reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
    fail(place(*current) + ": asynchronous copy of " + std::to_string(bytes) + " bytes that is not aligned to its size");
  }
  Copy copy{to, from, bytes, current->committed, {}};
  touch(from, bytes, false, __builtin_return_address(0));
  touch(to, bytes, true, __builtin_return_address(0));
  std::memcpy(copy.seen, from, bytes);
  for (int i = 0; i < bytes; i += 4) std::memcpy(static_cast<char*>(to) + i, &kPoison, 4);
  current->copies.push_back(copy);
}

void async_commit() {
  need_kernel("an asynchronous copy");
  ++current->committed;
}

void async_wait(int groups_left) {
  need_kernel("an asynchronous copy");
  Fibre& f = *current;
  while (f.first_copy < f.copies.size() && f.copies[f.first_copy].group < f.committed - groups_left) perform(f.copies[f.first_copy++]);
  if (f.first_copy == f.copies.size()) f.copies.clear(), f.first_copy = 0;
}

void async_wait_all() {
  async_commit();
  async_wait(0);
}

// ------------------------------------------------------------------------------------------------------ shared memory

namespace {

char* guard_before(Block& b) { return b.memory.get(); }
char* guard_after(Block& b, std::size_t bytes) { return b.shared + bytes; }
void make_shared(Block& b) {
  if (!b.memory) b.memory.reset(static_cast<char*>(::operator new(shared_bytes + 2 * kGuard, std::align_val_t(128))));
  b.shared = b.memory.get() + kGuard;
  std::fill_n(reinterpret_cast<std::uint32_t*>(b.shared), shared_bytes / 4, kPoison);
  std::memcpy(b.shared + shared_bytes / 4 * 4, &kPoison, shared_bytes % 4);
  for (char* guard : {guard_before(b), guard_after(b, shared_bytes)}) {
    std::memset(guard, kGuardByte, kGuard);
#ifdef SHIM_ASAN
    __asan_poison_memory_region(guard, kGuard);  // reads of it show as well
#endif
  }
}

void check_guards(Block& b) {
  for (char* guard : {guard_before(b), guard_after(b, shared_bytes)}) {
#ifdef SHIM_ASAN
    __asan_unpoison_memory_region(guard, kGuard);
#endif
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (static_cast<unsigned char>(guard[i]) == kGuardByte) continue;
      fail(place(b) + " wrote outside its shared memory, at byte " + std::to_string(guard + i - b.shared) + " of " +
           std::to_string(shared_bytes));
    }
  }
}

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

}  // namespace

extern "C" void sparseflow_shim_enter() {
#ifdef SHIM_ASAN
  const void* from = nullptr;
  std::size_t from_bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &from, &from_bytes);
  if (host_stack == nullptr) host_stack = from, host_stack_bytes = from_bytes;  // the first comes from there
#endif
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

namespace {

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
      f.stack = stacks[static_cast<std::size_t>(&f - fibres.data())];
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
#ifdef SHIM_ASAN
    for (Block& b : blocks) {
      if (b.memory) __asan_unpoison_memory_region(b.memory.get(), shared_bytes + 2 * kGuard);
    }
#endif
    blocks.clear();
    warps.clear();
    fibres.clear();
    current = nullptr;
    error = nullptr;
#ifdef SHIM_RACES
    race = nullptr;
    races.reset();
#endif
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
  shuffled = seed != 0;
  random_state = seed * 0x9e3779b97f4a7c15ULL | 1;
  habit_lasts = 0;
  may_go_first = kFirst;
  until_preempted = 1;
  idle_yields = 0;
  spin_limit = options.spin_limit;
#ifdef SHIM_ASAN
  host_stack = nullptr;
#endif
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
#ifdef SHIM_RACES
  if (race && !error) error = race;
#endif
  if (error) std::rethrow_exception(error);
}

Statistics last_launch() { return statistics; }

char* dynamic_shared() {
  need_kernel("shared memory");
  return current->block->shared;
}

}  // namespace shim

long long clock64() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

#ifdef SHIM_RACES
// What -fsanitize=thread makes the compiler call.
#define SHIM_TOUCH(name, bytes, write) \
  extern "C" void __tsan_##name(void* at) { shim::touch(at, bytes, write, __builtin_return_address(0)); }
#define SHIM_TOUCHES(bytes)                        \
  SHIM_TOUCH(read##bytes, bytes, false)            \
  SHIM_TOUCH(write##bytes, bytes, true)            \
  SHIM_TOUCH(unaligned_read##bytes, bytes, false)  \
  SHIM_TOUCH(unaligned_write##bytes, bytes, true)
SHIM_TOUCHES(1)
SHIM_TOUCHES(2)
SHIM_TOUCHES(4)
SHIM_TOUCHES(8)
SHIM_TOUCHES(16)
extern "C" {
void __tsan_read_range(void* at, std::size_t bytes) { shim::touch(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, std::size_t bytes) { shim::touch(at, bytes, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#endif
