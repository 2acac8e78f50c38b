// The stacks of fibres, and the switch from one to another.
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "machine.h"

namespace shim::machine {
namespace {

std::vector<char*> stacks;  // kept from launch to launch
std::size_t stacks_bytes = 0;
#ifdef SHIM_ASAN
const void* host_stack = nullptr;  // of the launching thread, asked for by AddressSanitizer
std::size_t host_stack_bytes = 0;
#endif

}  // namespace

std::size_t page() {
  static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

void need_stacks(std::size_t count, std::size_t bytes) {
  if (bytes != stacks_bytes) {
    for (char* stack : stacks) munmap(stack - page(), stacks_bytes + page());
    stacks.clear();
    stacks_bytes = bytes;
  }
  stacks.reserve(count);
  while (stacks.size() < count) {
    void* p = mmap(nullptr, bytes + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (p == MAP_FAILED || mprotect(p, page(), PROT_NONE) != 0) {  // the guard page lies below
      const int reason = errno;
      if (p != MAP_FAILED) munmap(p, bytes + page());
      fail("no stacks for " + std::to_string(count) + " threads alive at once, only for " + std::to_string(stacks.size()) + " (" +
           std::strerror(reason) + "); launch fewer, or with cooperative = false");
    }
    stacks.push_back(static_cast<char*>(p) + page());
  }
}

char* stack_of(std::size_t fibre) { return stacks[fibre]; }

// ---------------------------------------------------------------------------------------------------- context switch

#ifdef SHIM_UCONTEXT

void prepare(Fibre& f) {
  getcontext(&f.registers);
  f.registers.uc_stack.ss_sp = f.stack;
  f.registers.uc_stack.ss_size = stack_bytes;
  f.registers.uc_link = nullptr;
  makecontext(&f.registers, sparseflow_shim_enter, 0);
}

static void exchange(Fibre& from, Fibre& to) { swapcontext(&from.registers, &to.registers); }

#else

// The six registers that a function must preserve. Not the two control words of floating point, which would cost a third
// of the switch: CUDA cannot change them, so that they are the launching thread's everywhere. The return is predicted:
// fibres mostly wait at one place, behind the same calls.
asm(R"(
  .text
  .p2align 4
  .type sparseflow_shim_switch, @function
  .hidden sparseflow_shim_switch
  .globl sparseflow_shim_switch
sparseflow_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size sparseflow_shim_switch, .-sparseflow_shim_switch

  .p2align 4
  .type sparseflow_shim_start, @function
sparseflow_shim_start:
  .cfi_startproc
  .cfi_undefined rip
  call sparseflow_shim_enter
  ud2
  .cfi_endproc
  .size sparseflow_shim_start, .-sparseflow_shim_start
  .globl sparseflow_shim_start
  .hidden sparseflow_shim_start
)");
extern "C" void sparseflow_shim_switch(void** save, void* load);
extern "C" void sparseflow_shim_start();

void prepare(Fibre& f) {
  // Stacks begin at page boundaries: without an offset of their own their tops would share a few lines of the cache.
  const std::size_t colour = (f.thread.x * 11 + f.block->index * 5) % 32 * 128;
  auto* top = reinterpret_cast<std::uint64_t*>(f.stack + stack_bytes - colour);
  *--top = 0;
  *--top = 0;  // so that the call in sparseflow_shim_start finds the stack aligned
  *--top = reinterpret_cast<std::uint64_t>(&sparseflow_shim_start);
  for (int i = 0; i < 6; ++i) *--top = 0;  // the registers
  f.context = top;
}

static void exchange(Fibre& from, Fibre& to) { sparseflow_shim_switch(&from.context, to.context); }

#endif

void switch_to(Fibre& to, [[maybe_unused]] bool for_ever) {
  Fibre& from = *current;
  current = &to;
  if (to.block != nullptr) {
    threadIdx = to.thread;
    blockIdx.x = to.block->index;
    to.state = State::kRuns;
  }
  ++statistics.switches;
#ifdef SHIM_ASAN
  const bool to_host = to.block == nullptr;
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack, to_host ? host_stack : to.stack,
                                 to_host ? host_stack_bytes : stack_bytes);
#endif
  exchange(from, to);
#ifdef SHIM_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void forget_host_stack() {
#ifdef SHIM_ASAN
  host_stack = nullptr;
#endif
}

void begin_fibre() {
#ifdef SHIM_ASAN
  const void* from = nullptr;
  std::size_t from_bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &from, &from_bytes);
  if (host_stack == nullptr) host_stack = from, host_stack_bytes = from_bytes;  // the first comes from there
#endif
}

}  // namespace shim::machine
