// The barriers of a block, and the operations of a warp.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace shim {

using namespace machine;

namespace {

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

}  // namespace

void machine::complete(Block& b) {
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

}  // namespace shim
