// Who goes on: in order, or in the order of a seed.
#include <stdexcept>

#include "machine.h"

namespace shim {

int detail::until_preempted = 0;
long long detail::idle_yields = 0;

namespace machine {

bool shuffled = false;

namespace {

std::uint64_t random_state = 1;

// A shuffled launch changes its habit now and then, so that some threads run far ahead and others fall far behind.
enum class Habit { kAny, kOldest, kNewest } habit = Habit::kAny;
int habit_lasts = 0;

// How often in a row fibres that a barrier sets free may go first. First is quicker: their stacks are in the cache.
constexpr int kFirst = 4096;
int may_go_first = kFirst;

}  // namespace

std::uint32_t random_below(std::uint32_t n) {  // xorshift64*
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<std::uint32_t>((((random_state * 0x2545f4914f6cdd1dULL) >> 32) * n) >> 32);
}

// seed: 0 for in order.
void begin_order(std::uint64_t seed) {
  shuffled = seed != 0;
  random_state = seed * 0x9e3779b97f4a7c15ULL | 1;
  habit_lasts = 0;
  may_go_first = kFirst;
}

bool set_free_goes_first() {
  if (!shuffled && --may_go_first >= 0) return true;
  may_go_first = kFirst;
  return false;
}

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

}  // namespace machine

// ----------------------------------------------------------------------------------------------- spinning, preemption

using namespace machine;

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

}  // namespace shim
