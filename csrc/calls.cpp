#include "calls.h"

namespace sparseflow {
namespace {

thread_local Call call;
thread_local int64_t done = 0;  // since the last look

}  // namespace

Interruption::Interruption(std::function<void()> ask)
    : ask_(std::move(ask)), caller_(std::this_thread::get_id()), outer_(call.interruption), asked_(std::chrono::steady_clock::now()) {}

Interruption::Entered::Entered(Interruption* which) : before(std::exchange(call.interruption, which)) {}
Interruption::Entered::~Entered() { call.interruption = before; }

void Interruption::look() {
  for (const Interruption* one = this; one != nullptr; one = one->outer_)
    if (one->stopped_.load(std::memory_order_acquire)) throw Stopped();
  if (std::this_thread::get_id() != caller_) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - asked_ < kAskEvery) return;
  asked_ = now;
  try {
    ask_();
  } catch (...) {
    reason_ = std::current_exception();
    stopped_.store(true, std::memory_order_release);
    throw Stopped();
  }
  asked_ = std::chrono::steady_clock::now();
}

void Interruption::give_reason() const {
  if (reason_) std::rethrow_exception(reason_);
  for (const Interruption* one = outer_; one != nullptr; one = one->outer_)
    if (one->stopped_.load(std::memory_order_acquire)) throw std::runtime_error("interrupted");  // its own call says why
}

void worked(int64_t amount) {
  done += amount;
  if (done >= kWorkPerLook) look();
}

void look() {
  done = 0;
  if (call.interruption != nullptr) call.interruption->look();
}

Exclusive::Hold::Hold(Exclusive& what) : what_(what), before_(call.held) {
  for (const Hold* one = call.held; one != nullptr; one = one->before_)
    if (&one->what_ == &what)
      throw std::runtime_error(
          "a function of time may not run the same compiled field (or layer) that is asking it, and neither may anything else that Python runs "
          "meanwhile, a signal handler say: compile another one for it");
  if (!what.mutex_.try_lock())
    while (!what.mutex_.try_lock_for(kAskEvery)) look();
  call.held = this;
}

Exclusive::Hold::~Hold() {
  call.held = before_;
  what_.mutex_.unlock();
}

Call this_call() { return call; }

Helping::Helping(const Call& other) : before_(std::exchange(call, other)) {}
Helping::~Helping() { call = before_; }

}  // namespace sparseflow
