#include "thread_pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../calls.h"

namespace sparseflow {
namespace {

constexpr int64_t kWorkOfBody = 1 << 10;  // what every piece counts for, whatever it does

class Pool {
 public:
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void run(int count, int threads, const std::function<void(int, int)>& body) {
    while (static_cast<int>(workers_.size()) < threads - 1) {
      const int number = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back([this, number, seen = generation_] { work(number, seen); });
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      count_ = count;
      limit_ = threads;
      next_.store(0, std::memory_order_relaxed);
      busy_ = static_cast<int>(workers_.size());
      error_ = nullptr;
      call_ = this_call();
      ++generation_;
    }
    wake_.notify_all();
    drain(0);
    std::unique_lock<std::mutex> lock(mutex_);
    while (!done_.wait_for(lock, kAskEvery, [this] { return busy_ == 0; })) {
      lock.unlock();
      give_up_on_error([] { look(); });
      lock.lock();
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void drain(int number) {
    give_up_on_error([&] {
      for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_; worked(kWorkOfBody)) (*body_)(i, number);
    });
  }

  template <class Work>
  void give_up_on_error(Work work) {
    try {
      work();
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(count_, std::memory_order_relaxed);
    }
  }

  void work(int number, long seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
      const bool mine = number < limit_;
      lock.unlock();
      if (mine) {
        const Helping helping(call_);
        drain(number);
      }
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int, int)>* body_ = nullptr;
  int count_ = 0, limit_ = 0, busy_ = 0;
  std::atomic<int> next_{0};
  long generation_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
  Call call_;  // of the thread that has the pool
};

thread_local bool inside = false;

}  // namespace

void parallel_for(int count, int threads, const std::function<void(int, int)>& body) {
  if (threads > count) threads = count;
  // One caller at a time has the pool; a second Python thread solving meanwhile works alone.
  static std::mutex owner;
  std::unique_lock<std::mutex> lock(owner, std::defer_lock);
  if (threads <= 1 || inside || !lock.try_lock()) {
    for (int i = 0; i < count; ++i, worked(kWorkOfBody)) body(i, 0);
    return;
  }
  // Threads do not survive a fork: a child starts a pool of its own and leaves the parent's alone.
  static Pool* pool = nullptr;
  static pid_t pool_process = 0;
  if (pool_process != getpid()) {
    pool = new Pool;
    pool_process = getpid();
  }
  inside = true;
  try {
    pool->run(count, threads, [&body](int index, int worker) {
      inside = true;
      body(index, worker);
    });
  } catch (...) {
    inside = false;
    throw;
  }
  inside = false;
}

}  // namespace sparseflow
