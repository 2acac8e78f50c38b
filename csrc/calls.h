// Calls into native code: how one that takes long is interrupted, and how two that must not meet are kept apart.
//
// A thread that calls may get help from others (cpu/thread_pool.h); they work for its call. Whoever works says now and then
// how much was done (`worked`). When that has come to a fraction of a millisecond, the calling thread looks at the clock,
// and every `kAskEvery` it asks whether to go on. Helpers, and whatever waits, look at what it was told.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "fork.h"

namespace sparseflow {

inline constexpr std::chrono::milliseconds kAskEvery{50};
inline constexpr int64_t kWorkPerLook = 1 << 18;  // multiply-adds, or what takes as long

struct Stopped {};  // thrown through work that is to be given up

class Interruption {
 public:
  // `ask` is called on this thread, while `during` runs, and may throw.
  explicit Interruption(std::function<void()> ask);

  // work(), or what `ask` threw.
  template <class Work>
  auto during(Work work) {
    Entered entered(this);
    try {
      return work();
    } catch (...) {
      give_reason();
      throw;
    }
  }

  // Asks, if it is time, on the thread that may; throws Stopped if the work, or work that this is a part of, is over.
  void look();

 private:
  struct Entered {
    explicit Entered(Interruption* which);
    ~Entered();
    Interruption* before;
  };
  void give_reason() const;  // throws what `ask` threw, if it did

  const std::function<void()> ask_;
  const std::thread::id caller_;
  Interruption* const outer_;  // of the call that this one is made within
  std::chrono::steady_clock::time_point asked_;
  std::atomic<bool> stopped_{false};
  std::exception_ptr reason_;
};

void worked(int64_t amount);
void look();  // now; where nobody asks, neither does anything

// What only one call at a time may use. Waiting for it can be interrupted.
class Exclusive {
 public:
  class Hold {
   public:
    // Throws std::runtime_error where this thread's call, or one that it is a part of, has it already.
    explicit Hold(Exclusive& what);
    ~Hold();
    Hold(const Hold&) = delete;

   private:
    Exclusive& what_;
    const Hold* const before_;
  };

  // `abandon` makes good what is guarded in a child that was forked while another thread had it.
  explicit Exclusive(std::function<void()> abandon = {}) : mutex_(std::move(abandon)) {}

 private:
  ForkLock mutex_;
};

// What a thread works for. A pool hands the caller's to its helpers.
struct Call {
  Interruption* interruption = nullptr;
  const Exclusive::Hold* held = nullptr;  // the latest; with those before it
};
Call this_call();

class Helping {
 public:
  explicit Helping(const Call& call);
  ~Helping();
  Helping(const Helping&) = delete;

 private:
  const Call before_;
};

}  // namespace sparseflow
