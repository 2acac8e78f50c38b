// Races: what the compiler tells of every access (-fsanitize=thread), where the shim is built with SHIM_RACES.
#include "machine.h"

#ifdef SHIM_RACES
#include <dlfcn.h>

#include <cstdio>
#include <stdexcept>
#endif

namespace shim::machine {

#ifdef SHIM_RACES
namespace {

Races races;
std::exception_ptr race;  // the first; thrown when the launch is over, as what the compiler puts in may not throw

std::string at_address(const void* pc) {
  Dl_info info;
  if (dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return "?";
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<std::size_t>(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase) - 1));
  return std::string("addr2line -e ") + info.dli_fname + " " + text;
}

__attribute__((noinline, cold)) void report_race(const Fibre& f, const char* address, const Access& then, const Access& now) {
  const Block& b = *f.block;
  const std::ptrdiff_t offset = address - b.shared;
  const bool in_shared = offset >= 0 && offset < static_cast<std::ptrdiff_t>(shared_bytes);
  const auto did = [](const Access& a) {
    return "thread " + std::to_string(a.thread) + (a.write ? " writes (" : " reads (") + at_address(a.pc) + ")";
  };
  const std::string what = in_shared ? "byte " + std::to_string(offset) + " of shared memory" : "global memory";
  const std::string since = b.barriers == 0 ? "before any barrier" : "after barrier " + std::to_string(b.barriers) + ", " + at(b.op, b.where);
  race = std::make_exception_ptr(std::runtime_error("CUDA host shim: race in " + place(b) + ": " + did(then) + " and " + did(now) + " " + what +
                                                    " with nothing in between that orders them, " + since));
}

}  // namespace

void touch(const void* address, std::size_t bytes, bool write, const void* pc) {
  if (current == nullptr || current->block == nullptr || race || cancelling) return;
  const Fibre& f = *current;
  const auto first = reinterpret_cast<std::uintptr_t>(address), end = first + bytes;
  if (first - reinterpret_cast<std::uintptr_t>(f.stack) < stack_bytes) return;  // its own locals
  Access now;
  now.epoch = f.block->barriers + 1;
  now.clock = f.warp->clocks.at[f.lane][f.lane];
  now.thread = static_cast<std::uint16_t>(f.thread.x);
  now.write = write;
  now.pc = pc;
  for (std::uintptr_t word = first / 4; word * 4 < end; ++word) {
    const unsigned below = word * 4 < first ? static_cast<unsigned>(first % 4) : 0;
    const unsigned above = word * 4 + 4 > end ? static_cast<unsigned>(end % 4) : 4;
    now.bytes = static_cast<std::uint8_t>(((1u << above) - 1) & ~((1u << below) - 1));
    const Access then = races.note(word, f.block->index, now, f.warp->clocks);
    if (then.epoch != 0) return report_race(f, reinterpret_cast<const char*>(word * 4 + below), then, now);
  }
}
std::exception_ptr first_race() { return race; }

void forget_races() {
  race = nullptr;
  races.reset();
}
#else
void touch(const void*, std::size_t, bool, const void*) {}
std::exception_ptr first_race() { return nullptr; }
void forget_races() {}
#endif

}  // namespace shim::machine

#ifdef SHIM_RACES
// What -fsanitize=thread makes the compiler call.
#define SHIM_TOUCH(name, bytes, write) \
  extern "C" void __tsan_##name(void* at) { shim::machine::touch(at, bytes, write, __builtin_return_address(0)); }
#define SHIM_TOUCHES(bytes)                        \
  SHIM_TOUCH(read##bytes, bytes, false)            \
  SHIM_TOUCH(write##bytes, bytes, true)            \
  SHIM_TOUCH(unaligned_read##bytes, bytes, false)  \
  SHIM_TOUCH(unaligned_write##bytes, bytes, true)
SHIM_TOUCHES(1)
SHIM_TOUCHES(2)
SHIM_TOUCHES(4)
SHIM_TOUCHES(8)
SHIM_TOUCHES(16)
extern "C" {
void __tsan_read_range(void* at, std::size_t bytes) { shim::machine::touch(at, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, std::size_t bytes) { shim::machine::touch(at, bytes, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#endif
