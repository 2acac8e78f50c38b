#include "fork.h"

#include <pthread.h>

#include <vector>

namespace sparseflow {
namespace {

// Never destroyed: fields may outlive this module's statics when the interpreter ends.
struct Registry {
  std::mutex mutex;
  ForkLock* first = nullptr;
  std::vector<void (*)()> in_child;
};
Registry& registry() {
  static Registry* const one = new Registry;
  return *one;
}

}  // namespace

void child_of_fork() {
  for (ForkLock* lock = registry().first; lock != nullptr; lock = lock->after_) {
    if (lock->mine()) continue;  // by the thread that forked, which goes on here
    const bool held = !lock->mutex_.try_lock();
    new (&lock->mutex_) std::timed_mutex;
    lock->owner_.store(std::thread::id(), std::memory_order_relaxed);
    lock->depth_ = 0;
    if (held && lock->abandon_) lock->abandon_();
  }
  for (void (*call)() : registry().in_child) call();
  registry().mutex.unlock();
}

namespace {

void watch_forks() {
  static const int registered = pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); }, child_of_fork);
  static_cast<void>(registered);
}

}  // namespace

ForkLock::ForkLock(std::function<void()> abandon) : abandon_(std::move(abandon)) {
  watch_forks();
  const NoFork now;
  after_ = registry().first;
  if (after_) after_->before_ = this;
  registry().first = this;
}

ForkLock::~ForkLock() {
  const NoFork now;
  (before_ ? before_->after_ : registry().first) = after_;
  if (after_) after_->before_ = before_;
}

NoFork::NoFork() { registry().mutex.lock(); }
NoFork::~NoFork() { registry().mutex.unlock(); }

void after_fork(void (*in_child)()) {
  watch_forks();
  const NoFork now;
  registry().in_child.push_back(in_child);
}

}  // namespace sparseflow
