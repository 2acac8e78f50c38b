// What a fork leaves behind. A child has the memory of its parent as it was at that moment, but of its threads only the one
// that forked: locks that others held would stay locked for ever, and what they were changing is half changed.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

namespace sparseflow {

// A recursive lock that a child of a fork finds free if another thread held it. `abandon` is called there, and makes good
// what the lock guards.
class ForkLock {
 public:
  explicit ForkLock(std::function<void()> abandon);
  ~ForkLock();
  ForkLock(const ForkLock&) = delete;

  void lock() {
    if (!again()) mutex_.lock(), take();
  }
  bool try_lock() { return again() || (mutex_.try_lock() && take()); }
  template <class Duration>
  bool try_lock_for(const Duration& duration) {
    return again() || (mutex_.try_lock_for(duration) && take());
  }
  void unlock() {
    if (--depth_ > 0) return;
    owner_.store(std::thread::id(), std::memory_order_relaxed);
    mutex_.unlock();
  }

 private:
  friend void child_of_fork();
  bool mine() const { return owner_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }
  bool again() { return mine() && ++depth_ > 0; }
  bool take() {
    owner_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    depth_ = 1;
    return true;
  }

  std::timed_mutex mutex_;
  std::atomic<std::thread::id> owner_{};
  int depth_ = 0;
  const std::function<void()> abandon_;
  ForkLock *before_ = nullptr, *after_ = nullptr;  // all that there are
};

// While one of these lives, nobody forks. For changes that a child must see whole; they may wait for nothing.
class NoFork {
 public:
  NoFork();
  ~NoFork();
  NoFork(const NoFork&) = delete;
};

// Called in every child from now on.
void after_fork(void (*in_child)());

// An empty one in the place of a container that may be half changed, whose memory is given up.
template <class Container>
void abandon(Container& container) {
  new (&container) Container;
}

}  // namespace sparseflow
