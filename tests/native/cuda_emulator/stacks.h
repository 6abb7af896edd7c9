// Stacks, and the change from one to another. For x86-64.
#pragma once

namespace emulator {

// Ends at a page that must not be touched: a stack that grows too large stops the program.
void* make_stack();

// The place from which switch_stacks begins `body`, which must not return, on a stack of make_stack.
void* fresh_stack(void* stack, void (*body)());

// Keeps this stack's place and goes on from the other's; returns when somebody comes back to this one. (setjmp and
// longjmp do more than that, and swapcontext asks the system.)
extern "C" void switch_stacks(void** place, void* other);

}  // namespace emulator
