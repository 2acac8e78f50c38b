// What goes wrong, in words.
#include <cstdio>
#include <stdexcept>

#include "machine.h"

namespace shim::machine {
namespace {

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

}  // namespace

std::string at(Op op, Where where) { return named(op) + " (" + where.file + ":" + std::to_string(where.line) + ")"; }

std::string hexadecimal(unsigned x) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", x);
  return text;
}

std::string lanes(unsigned mask) {
  return ((mask & (mask - 1)) == 0 ? "lane " : "lanes ") + ranges(kWarp, [mask](int i) { return mask >> i & 1; });
}

std::string place(const Block& b) { return "block " + std::to_string(b.index); }
std::string place(const Fibre& f) { return place(*f.block) + ", thread " + std::to_string(f.thread.x); }
int number(const Warp& w) { return static_cast<int>(w.fibres[0].thread.x) / kWarp; }
std::string place(const Warp& w) { return place(*w.fibres[0].block) + ", warp " + std::to_string(number(w)); }

__attribute__((noinline, cold)) void fail(const std::string& what) { throw std::runtime_error("CUDA host shim: " + what); }
__attribute__((noinline, cold)) void outside_a_kernel(const char* what) { fail(std::string(what) + " outside a kernel"); }

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

}  // namespace shim::machine
