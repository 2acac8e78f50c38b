// Finds accesses to one place by two threads of a block that no barrier puts in order, at least one of them a write. The
// compiler tells of every access: sources built with -fsanitize=thread call __tsan_read4 and its like, which race_hooks.cpp
// defines when the shim is built with SHIM_RACES (and linked without -fsanitize=thread then).
//
// In order are: what __syncthreads parts, for the whole block, and what __syncwarp parts, for the lanes of its mask.
// Shuffles and votes put no memory in order, as CUDA says. Atomics are left out, and so are threads of different
// blocks. Of the reads of a place only two are remembered, the last and the last of another warp, so that a race may be
// missed; what is reported is one.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <unordered_map>

namespace shim {

// What each lane of a warp knows of the others: it comes after all that lane j did up to at[own][j].
struct WarpClocks {
  std::uint32_t at[32][32];

  WarpClocks() {
    for (int i = 0; i < 32; ++i)
      for (int j = 0; j < 32; ++j) at[i][j] = i == j;
  }
  void join(unsigned mask) {  // __syncwarp
    std::uint32_t all[32] = {};
    for (unsigned left = mask; left != 0; left &= left - 1) {
      const int i = __builtin_ctz(left);
      for (int j = 0; j < 32; ++j) all[j] = at[i][j] > all[j] ? at[i][j] : all[j];
    }
    for (unsigned left = mask; left != 0; left &= left - 1) {
      const int i = __builtin_ctz(left);
      std::memcpy(at[i], all, sizeof all);
      ++at[i][i];
    }
  }
};

struct Access {
  std::uint32_t epoch = 0;  // block barriers before it; counted from 1, 0: no access
  std::uint32_t clock = 0;  // the lane's own
  std::uint16_t thread = 0;
  std::uint8_t bytes = 0;  // mask of four
  bool write = false;
  const void* pc = nullptr;
};

class Races {
 public:
  void reset() {
    pages_.clear();
    for (Cached& c : cache_) c = {};
  }

  // Remembers an access within one word of four bytes; gives back an earlier one that it races with, if there is.
  Access note(std::uintptr_t word, unsigned block, const Access& now, const WarpClocks& clocks) {
    Cell& cell = cell_of(word);
    if (cell.block != block) cell = {}, cell.block = block;
    Access found;
    const std::uint32_t warp = now.thread / 32;
    const auto races = [&](const Access& then) {
      if (then.epoch != now.epoch || then.thread == now.thread || (then.bytes & now.bytes) == 0) return false;
      return then.thread / 32u != warp || clocks.at[now.thread % 32][then.thread % 32] < then.clock;
    };
    if (races(cell.written)) found = cell.written;
    if (now.write) {
      if (races(cell.read)) found = cell.read;
      if (races(cell.other)) found = cell.other;
      cell.written = now;
    } else {
      // the last reader of another warp stays beside the last of all
      if (cell.read.epoch == now.epoch && cell.read.thread / 32u != warp) cell.other = cell.read;
      cell.read = now;
    }
    return found;
  }

 private:
  static constexpr int kPageLog = 12, kWords = 1 << (kPageLog - 2), kCached = 64;
  struct Cell {
    unsigned block = ~0u;
    Access written, read, other;
  };
  using Page = std::unique_ptr<Cell[]>;
  struct Cached {
    std::uintptr_t number = 0;
    Cell* cells = nullptr;
  };

  Cell& cell_of(std::uintptr_t word) {
    const std::uintptr_t number = word >> (kPageLog - 2);
    Cached& c = cache_[number % kCached];
    if (c.cells == nullptr || c.number != number) {
      Page& page = pages_[number];
      if (!page) page.reset(new Cell[kWords]);
      c = {number, page.get()};
    }
    return c.cells[word % kWords];
  }

  std::unordered_map<std::uintptr_t, Page> pages_;
  Cached cache_[kCached];
};

}  // namespace shim
