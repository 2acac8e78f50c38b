// What the shim's files share: fibres, warps and blocks of the launch that runs, and who may go on. Everything happens on the
// thread that launches, so that plain variables do; a mutex keeps launches apart.
#pragma once

#include "shim.h"

#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>
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
#include "races.h"
#endif

#pragma GCC visibility push(hidden)  // as in shim.h

extern "C" void sparseflow_shim_enter() __attribute__((used));  // a fibre's life (launch.cpp)

namespace shim::machine {

using detail::Op;
using detail::Where;

constexpr int kWarp = 32;
constexpr std::size_t kSmallestStack = 16 * 1024;

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

// ------------------------------------------------------------------------------------------------- of the present launch

inline Statistics statistics;
inline Fibre host;
inline Fibre* current = nullptr;  // null: no launch
inline Ready ready;
inline std::vector<Fibre> fibres;
inline std::vector<Warp> warps;
inline std::vector<Block> blocks;
inline int alive = 0;
inline std::exception_ptr error;
inline bool cancelling = false;
inline std::size_t stack_bytes = 0, shared_bytes = 0;
inline long long spin_limit = 0;

// ------------------------------------------------------------------------------------------------------------ messages

std::string at(Op op, Where where);
std::string hexadecimal(unsigned x);
std::string lanes(unsigned mask);
std::string place(const Block& b);
std::string place(const Fibre& f);
std::string place(const Warp& w);
int number(const Warp& w);
std::string situation();  // what every live thread is doing
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void outside_a_kernel(const char* what);

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

inline void need_kernel(const char* what) {
  if (current == nullptr || current->block == nullptr) outside_a_kernel(what);
}

// ------------------------------------------------------------------------------------------------------- fibres (fibres.cpp)

std::size_t page();
void need_stacks(std::size_t count, std::size_t bytes);
char* stack_of(std::size_t fibre);
void prepare(Fibre& f);
void switch_to(Fibre& to, bool for_ever = false);  // returns when somebody goes on with the fibre that runs now
void begin_fibre();                                // what a fibre does first
void forget_host_stack();                          // another thread may launch

// ------------------------------------------------------------------------------------------------ scheduler (scheduler.cpp)

extern bool shuffled;
std::uint32_t random_below(std::uint32_t n);
void begin_order(std::uint64_t seed);
Fibre* next();  // null: nobody can go on
void report_deadlock();
void wait(State state);  // the fibre that runs waits until it is set free
bool set_free_goes_first();

// fibre(i) for i in [0, n): null, or one to be set free
template <class F>
void set_free(int n, F fibre) {
  detail::idle_yields = 0;
  if (!set_free_goes_first()) {
    for (int i = 0; i < n; ++i) {
      if (Fibre* f = fibre(i)) f->state = State::kReady, ready.push_back(f);
    }
  } else {
    for (int i = n - 1; i >= 0; --i) {
      if (Fibre* f = fibre(i)) f->state = State::kReady, ready.push_front(f);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ the rest

void complete(Block& b);  // a block barrier (barriers.cpp)

void make_shared(Block& b);  // shared memory and its guards (shared_memory.cpp)
void check_guards(Block& b);
void unguard(Block& b);

void touch(const void* address, std::size_t bytes, bool write, const void* pc);  // race_hooks.cpp
std::exception_ptr first_race();                                                 // null: none
void forget_races();

}  // namespace shim::machine

#pragma GCC visibility pop
