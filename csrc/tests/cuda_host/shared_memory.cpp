// The shared memory of a block, with guards around it, and asynchronous copies into it.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace shim {

using namespace machine;

namespace {

constexpr std::size_t kGuard = 256;  // bytes on both sides of a block's shared memory
constexpr unsigned char kGuardByte = 0xcb;

char* guard_before(Block& b) { return b.memory.get(); }
char* guard_after(Block& b, std::size_t bytes) { return b.shared + bytes; }
}  // namespace

void machine::make_shared(Block& b) {
  if (!b.memory) b.memory.reset(static_cast<char*>(::operator new(shared_bytes + 2 * kGuard, std::align_val_t(128))));
  b.shared = b.memory.get() + kGuard;
  std::fill_n(reinterpret_cast<std::uint32_t*>(b.shared), shared_bytes / 4, kPoison);
  std::memcpy(b.shared + shared_bytes / 4 * 4, &kPoison, shared_bytes % 4);
  for (char* guard : {guard_before(b), guard_after(b, shared_bytes)}) {
    std::memset(guard, kGuardByte, kGuard);
#ifdef SHIM_ASAN
    __asan_poison_memory_region(guard, kGuard);  // reads of it show as well
#endif
  }
}

void machine::check_guards(Block& b) {
  for (char* guard : {guard_before(b), guard_after(b, shared_bytes)}) {
#ifdef SHIM_ASAN
    __asan_unpoison_memory_region(guard, kGuard);
#endif
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (static_cast<unsigned char>(guard[i]) == kGuardByte) continue;
      fail(place(b) + " wrote outside its shared memory, at byte " + std::to_string(guard + i - b.shared) + " of " +
           std::to_string(shared_bytes));
    }
  }
}

void machine::unguard([[maybe_unused]] Block& b) {
#ifdef SHIM_ASAN
  if (b.memory) __asan_unpoison_memory_region(b.memory.get(), shared_bytes + 2 * kGuard);
#endif
}

char* dynamic_shared() {
  need_kernel("shared memory");
  return current->block->shared;
}

// ------------------------------------------------------------------------------------------------ asynchronous copies

namespace {

[[noreturn]] __attribute__((noinline, cold)) void changed_in_flight(const char* what) {
  fail(place(*current) + ": the " + what + " of an asynchronous copy was changed before it had arrived");
}

void perform(const Copy& copy) {
  touch(copy.from, copy.bytes, false, __builtin_return_address(0));
  touch(copy.to, copy.bytes, true, __builtin_return_address(0));
  const auto* bytes = static_cast<const unsigned char*>(copy.to);
  for (int i = 0; i < copy.bytes; i += 4) {
    if (std::memcmp(bytes + i, &kPoison, 4) != 0) changed_in_flight("destination");
  }
  if (std::memcmp(copy.seen, copy.from, copy.bytes) != 0) changed_in_flight("source");
  std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace

void async_copy(void* to, const void* from, int bytes) {
  need_kernel("an asynchronous copy");
  if (bytes != 4 && bytes != 8 && bytes != 16) {
    fail(place(*current) + ": asynchronous copy of " + std::to_string(bytes) + " bytes; 4, 8 or 16 can be");
  }
  if (reinterpret_cast<std::uintptr_t>(to) % bytes != 0 || reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
    fail(place(*current) + ": asynchronous copy of " + std::to_string(bytes) + " bytes that is not aligned to its size");
  }
  Copy copy{to, from, bytes, current->committed, {}};
  touch(from, bytes, false, __builtin_return_address(0));
  touch(to, bytes, true, __builtin_return_address(0));
  std::memcpy(copy.seen, from, bytes);
  for (int i = 0; i < bytes; i += 4) std::memcpy(static_cast<char*>(to) + i, &kPoison, 4);
  current->copies.push_back(copy);
}

void async_commit() {
  need_kernel("an asynchronous copy");
  ++current->committed;
}

void async_wait(int groups_left) {
  need_kernel("an asynchronous copy");
  Fibre& f = *current;
  while (f.first_copy < f.copies.size() && f.copies[f.first_copy].group < f.committed - groups_left) perform(f.copies[f.first_copy++]);
  if (f.first_copy == f.copies.size()) f.copies.clear(), f.first_copy = 0;
}

void async_wait_all() {
  async_commit();
  async_wait(0);
}

}  // namespace shim
