#include "thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "../calls.h"
#include "../fork.h"
#include "cores.h"

namespace sparseflow {
namespace {

constexpr int64_t kWorkOfBody = 1 << 10;  // what every piece counts for, whatever it does
constexpr int kMostHelpers = 1023;
constexpr double kGrain = 4e-6;           // of work for every thread: sharing it out costs a tenth of that
constexpr double kWorthWaking = 250e-6;   // of work to come: a helper takes up to 50 us to wake, and the call of it up to 20
constexpr double kLeastHope = 2e-3;       // of work, where waking helpers has not paid several times
constexpr double kLongestClaim = 200e-6;  // a thread may be taken off its core with what it has claimed

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
constexpr auto kSpin = std::chrono::microseconds(200);      // before a helper goes to sleep: a few times what waking costs
constexpr auto kPolite = std::chrono::microseconds(200);    // a helper asks that often whether someone else wants its core
constexpr auto kLongYield = std::chrono::microseconds(300);  // someone else did
constexpr auto kShortRest = std::chrono::milliseconds(2), kLongRest = std::chrono::milliseconds(500);
constexpr auto kTrusted = std::chrono::milliseconds(20);  // of help without being disturbed

double seconds_between(Time begin, Time end) { return std::chrono::duration<double>(end - begin).count(); }

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

std::atomic<bool> forced{false};

// The affinity is asked for now and then only: it is a system call.
int cores_for(Time now) {
  static std::atomic<int> cores{0};
  static std::atomic<int64_t> asked{0};
  const int64_t millis = std::chrono::duration_cast<std::chrono::milliseconds>(now.time_since_epoch()).count();
  if (cores.load(std::memory_order_relaxed) == 0 || millis - asked.load(std::memory_order_relaxed) >= 100) {
    asked.store(millis, std::memory_order_relaxed);
    cores.store(usable_cores(), std::memory_order_relaxed);
  }
  return cores.load(std::memory_order_relaxed);
}

struct alignas(64) Helper {
  // read by callers
  std::atomic<bool> asleep{true};
  std::atomic<Clock::rep> rests_until{0};
  // its own
  Clock::duration rest = kShortRest, undisturbed{0};
  Time last_yield{};
  // its bed
  std::mutex mutex;
  std::condition_variable alarm;
  bool called = false;

  bool resting(Time now) const { return !forced && rests_until.load(std::memory_order_relaxed) > now.time_since_epoch().count(); }

  void call() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      called = true;
    }
    alarm.notify_one();
  }
  void sleep() {
    std::unique_lock<std::mutex> lock(mutex);
    asleep.store(true, std::memory_order_relaxed);
    alarm.wait(lock, [this] { return called; });
    called = false;
    asleep.store(false, std::memory_order_relaxed);
  }

  // Another thread wants this core. Whoever helps there is in its way, and may be stopped with a piece in hand that a
  // caller waits for: this helper stays away for a while, twice as long every time.
  void disturbed(Time now) {
    rests_until.store((now + rest).time_since_epoch().count(), std::memory_order_relaxed);
    rest = std::min<Clock::duration>(2 * rest, kLongRest);
    undisturbed = {};
  }
  // Lets anybody else run who wants to, and says whether nobody did.
  bool yield() {
    const Time before = Clock::now();
    sched_yield();
    last_yield = Clock::now();
    if (last_yield - before < kLongYield || forced) return true;
    disturbed(last_yield);
    return false;
  }
  void helped(Clock::duration time) {
    undisturbed += time;
    if (undisturbed > kTrusted) rest = kShortRest;
  }
};

// One caller at a time has the pool, and shares out one loop: `claims_` is its number and how many of its pieces nobody has
// claimed yet. The other fields of a loop change only when all its pieces are done. A helper reads `claims_`, then these, and
// then claims on condition that `claims_` is what it was: so what it read belongs to the loop that its piece is of, which
// will not end before that piece is done.
class Pool {
 public:
  std::mutex owner;

  void run(int count, int threads, const Work& work, LoopBody body, const void* context) {
    const Time begin = Clock::now();
    int first = 0;
    if (!work.cost.known() && !forced) {
      body(context, first++, 0);
      work.cost.learn(seconds_between(begin, Clock::now()) / work.units);
    }
    const int left = count - first;
    const double each = forced ? 0 : work.cost.seconds() * work.units;
    const int limit = gather(each * left, std::min(threads, left), begin);
    if (limit == 0) {
      for (int i = first; i < count; ++i, worked(kWorkOfBody)) body(context, i, 0);
      last_end_ = Clock::now();
      if (first == 0) work.cost.learn(seconds_between(begin, last_end_) / (count * work.units));
      return;
    }
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    limit_.store(limit, std::memory_order_relaxed);
    each_.store(each, std::memory_order_relaxed);
    largest_claim_.store(each > 0 ? std::max(1, int(std::min(1e9, kLongestClaim / each))) : 1, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    interruption_.store(this_call().interruption, std::memory_order_relaxed);
    held_.store(this_call().held, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    claims_.store(++loops_ << 32 | uint32_t(left), std::memory_order_release);

    const Time start = Clock::now();
    const int own = serve(0, nullptr);
    const Time end = Clock::now();
    wait(left - own);
    last_end_ = Clock::now();
    if (own > 0 && !failed_) work.cost.learn(seconds_between(start, end) / (own * work.units));
    if (failed_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  int at_hand(double seconds, double total, int threads) {
    if (forced) return threads;
    return 1 + count(seconds, threads, Clock::now(), std::max(seconds, total) >= worth_waking_);
  }

  void expect(double total, int threads) {
    if (!forced && total >= worth_waking_) gather(total, threads, Clock::now());
  }

 private:
  // Helpers that a loop could have: those awake, or all that may be woken. `last`: the number of the last one of them.
  int count(double seconds, int threads, Time now, bool wake, int* last = nullptr) const {
    const int most = std::min({threads, cores_for(now), kMostHelpers + 1}) - 1;
    const int wanted = static_cast<int>(std::min(double(most), seconds / kGrain - 1));
    int found = 0;
    for (int number = 1; number <= most && found < wanted; ++number) {
      const Helper* const helper = helpers_[number].load(std::memory_order_acquire);
      if (helper == nullptr ? !wake : helper->resting(now) || (!wake && helper->asleep.load(std::memory_order_relaxed))) continue;
      ++found;
      if (last != nullptr) *last = number;
    }
    return found;
  }

  // The number of the last helper that is to help with a loop; wakes those that it takes, if that pays.
  int gather(double seconds, int threads, Time now) {
    if (forced) return muster(threads - 1);
    int last_awake = 0, last = 0;
    const int awake = count(seconds, threads, now, false, &last_awake);
    if (count(seconds, threads, now, true, &last) <= awake) {
      alone_ = 0;
      return last_awake;
    }
    if (now - last_end_ > kSpin) alone_ = 0;
    alone_ += seconds;
    if (alone_ < worth_waking_) return last_awake;
    alone_ = 0;
    // Waking that nobody gained by was for loops that are over too soon.
    worth_waking_ = helped_.exchange(true, std::memory_order_relaxed) ? kWorthWaking : std::min(2 * worth_waking_, kLeastHope);
    helped_.store(false, std::memory_order_relaxed);
    start(last);
    last_called_.store(last, std::memory_order_relaxed);
    call_below(0, now);
    return last;
  }

  int muster(int helpers) {  // all of them, awake
    helpers = std::min(helpers, kMostHelpers);
    start(helpers);
    last_called_.store(helpers, std::memory_order_relaxed);
    const Time begin = Clock::now();
    for (int number = 1; number <= helpers; ++number)
      while (Helper* const helper = helpers_[number].load()) {
        if (!helper->asleep || Clock::now() - begin > std::chrono::milliseconds(2)) break;
        helper->call();
        sched_yield();
      }
    return helpers;
  }

  void start(int last) {
    for (int number = 1; number <= last; ++number) {
      if (helpers_[number].load(std::memory_order_relaxed) != nullptr) continue;
      Helper* const helper = new Helper;  // as long-lived as the process, like its thread
      try {
        std::thread([this, number, helper] { work(number, *helper); }).detach();
      } catch (const std::system_error&) {  // no more threads are to be had: do without
        delete helper;
        return;
      }
      helpers_[number].store(helper, std::memory_order_release);
    }
  }

  // Each wakes two others, so that many are awake soon.
  void call_below(int number, Time now) {
    for (int child = 2 * number + 1; child <= 2 * number + 2 && child <= last_called_.load(std::memory_order_relaxed); ++child) {
      Helper* const helper = helpers_[child].load(std::memory_order_acquire);
      if (helper == nullptr || helper->resting(now)) call_below(child, now);
      else if (helper->asleep.load(std::memory_order_relaxed)) helper->call();
    }
  }

  bool has_work(int number) const {
    return uint32_t(claims_.load(std::memory_order_acquire)) > 0 && number <= limit_.load(std::memory_order_relaxed);
  }

  void work(int number, Helper& self) {
    inside_ = true;
    for (;;) {
      self.sleep();
      if (!self.yield()) continue;
      call_below(number, self.last_yield);
      Time idle_since = self.last_yield;
      for (bool up = true; up;) {
        if (has_work(number)) {
          const Time begin = Clock::now();
          serve(number, &self);
          idle_since = Clock::now();
          self.helped(idle_since - begin);
          up = !self.resting(idle_since);
          continue;
        }
        for (int i = 0; i < 32 && !has_work(number); ++i) pause();
        if (has_work(number)) continue;
        up = self.yield() && (forced || self.last_yield - idle_since < kSpin);
      }
    }
  }

  // Pieces of the loop at hand while there are any; how many there were. Large claims first, single pieces at the end.
  int serve(int number, Helper* helper) {
    int served = 0;
    for (;;) {
      uint64_t claims = claims_.load(std::memory_order_acquire);
      const int left = static_cast<int>(uint32_t(claims));
      const int limit = limit_.load(std::memory_order_relaxed);
      if (left == 0 || number > limit || (helper && helper->resting(helper->last_yield))) break;
      const LoopBody body = body_.load(std::memory_order_relaxed);
      const void* const context = context_.load(std::memory_order_relaxed);
      const int begin = count_.load(std::memory_order_relaxed) - left;
      const double each = each_.load(std::memory_order_relaxed);
      const Call call{interruption_.load(std::memory_order_relaxed), held_.load(std::memory_order_relaxed)};
      const int claim = std::clamp(left / (4 * (limit + 1)), 1, largest_claim_.load(std::memory_order_relaxed));
      if (!claims_.compare_exchange_weak(claims, claims - claim, std::memory_order_acq_rel, std::memory_order_relaxed)) continue;
      const Time from = helper ? Clock::now() : Time();
      {
        const Helping helping(call);  // with these pieces only: then the call may be over
        for (int i = begin; i < begin + claim && !failed_.load(std::memory_order_relaxed); ++i)
          or_fail([&] {
            body(context, i, number);
            worked(kWorkOfBody);
          });
      }
      served += claim;
      if (helper == nullptr) continue;
      done_.fetch_add(claim, std::memory_order_release);  // before anything that may take long
      helped_.store(true, std::memory_order_relaxed);
      const Time to = Clock::now();
      if (seconds_between(from, to) > 4 * each * claim + 1e-3 && !forced) helper->disturbed(helper->last_yield = to);
      else if (to - helper->last_yield > kPolite && uint32_t(claims_.load(std::memory_order_relaxed)) > 0) helper->yield();
    }
    return served;
  }

  // Pieces that nobody has begun are left out when one has failed.
  template <class Piece>
  void or_fail(Piece piece) {
    try {
      piece();
    } catch (...) {
      std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      failed_.store(true, std::memory_order_relaxed);
    }
  }

  // For pieces that helpers have claimed. One may share this thread's core: it gets a turn.
  void wait(int pieces) {
    Time looked = Clock::now();
    for (int i = 0; done_.load(std::memory_order_acquire) != pieces; ++i) {
      if (i < 200) {
        pause();
        continue;
      }
      sched_yield();
      if (Clock::now() - looked < kAskEvery) continue;
      looked = Clock::now();
      or_fail([] { look(); });
    }
  }

  static thread_local bool inside_;
  friend bool inside_loop();
  friend struct Inside;

  alignas(64) std::atomic<uint64_t> claims_{0};  // the loop's number, and how many of its pieces are not claimed
  alignas(64) std::atomic<int> done_{0};         // pieces, by helpers
  alignas(64) std::atomic<LoopBody> body_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int> count_{0}, limit_{0}, largest_claim_{1};
  std::atomic<double> each_{0};
  std::atomic<bool> failed_{false};
  std::atomic<Interruption*> interruption_{nullptr};  // of the owner's call
  std::atomic<const Exclusive::Hold*> held_{nullptr};
  alignas(64) std::atomic<bool> helped_{true};
  std::atomic<int> last_called_{0};
  std::atomic<Helper*> helpers_[kMostHelpers + 1] = {};
  std::mutex error_mutex_;
  std::exception_ptr error_;
  // the owner's
  uint64_t loops_ = 0;
  double alone_ = 0;  // seconds of work done since helpers were last enough, or idle
  std::atomic<double> worth_waking_{kWorthWaking};
  Time last_end_{};
};

thread_local bool Pool::inside_ = false;
bool inside_loop() { return Pool::inside_; }
struct Inside {
  Inside() { Pool::inside_ = true; }
  ~Inside() { Pool::inside_ = false; }
};

// Threads do not survive a fork: a child makes a pool of its own and leaves its parent's alone.
std::atomic<Pool*> pool_of_process{nullptr};

Pool& pool() {
  Pool* one = pool_of_process.load(std::memory_order_acquire);
  if (one != nullptr) return *one;
  static const bool watching = (after_fork([] { pool_of_process.store(nullptr); }), true);
  static_cast<void>(watching);
  auto made = std::make_unique<Pool>();
  if (pool_of_process.compare_exchange_strong(one, made.get())) return *made.release();
  return *one;
}

}  // namespace

void Cost::learn(double seconds) {
  const double before = this->seconds();  // what disturbed the measurement made it longer, never shorter
  seconds_.store(before < 0 ? seconds : seconds < before ? (before + seconds) / 2 : before + std::min(seconds - before, before) / 8,
                 std::memory_order_relaxed);
}

void parallel_for(int count, int threads, const Work& each, LoopBody body, const void* context) {
  if (std::min(threads, count) > 1 && !inside_loop()) {
    Pool& shared = pool();
    std::unique_lock<std::mutex> lock(shared.owner, std::try_to_lock);
    if (lock) {
      const Inside inside;
      return shared.run(count, threads, each, body, context);
    }
  }
  for (int i = 0; i < count; ++i, worked(kWorkOfBody)) body(context, i, 0);
}

int threads_at_hand(double seconds, double total, int threads) {
  return threads <= 1 || inside_loop() ? 1 : pool().at_hand(seconds, total, threads);
}

void expect_work(double total, int threads) {
  if (threads <= 1 || inside_loop()) return;
  std::unique_lock<std::mutex> lock(pool().owner, std::try_to_lock);
  if (lock) pool().expect(total, threads);
}

void force_threads(bool on) { forced.store(on); }

}  // namespace sparseflow
