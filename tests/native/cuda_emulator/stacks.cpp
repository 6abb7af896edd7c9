#include "stacks.h"

#include <sys/mman.h>

#include "emulator.h"

// The registers that a function must leave as they were go onto the stack, whose pointer is its place.
asm(R"(
.text
.globl switch_stacks
.hidden switch_stacks
.type switch_stacks, @function
switch_stacks:
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
.size switch_stacks, . - switch_stacks
)");

namespace emulator {

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kRegisters = 6;  // that switch_stacks keeps

}  // namespace

void* make_stack() {
  uint8_t* const stack = map_pages(kStack + kPage) + kPage;
  mprotect(stack - kPage, kPage, PROT_NONE);
  return stack;
}

// What switch_stacks takes from it, and then returns into `body` as if that had been called.
void* fresh_stack(void* stack, void (*body)()) {
  auto** const top = reinterpret_cast<void**>(static_cast<uint8_t*>(stack) + kStack);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(body);
  return top - 2 - kRegisters;
}

}  // namespace emulator
