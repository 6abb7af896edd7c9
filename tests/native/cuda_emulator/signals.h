// Faults of the processor as failures of the kernel that runs. Included by emulator.cpp alone.
#pragma once
#include <signal.h>

#include <cstdio>

#include "emulator.h"

namespace emulator {

inline void on_signal(int number, siginfo_t* info, void*) {
  char text[120];
  snprintf(text, sizeof text, "%s at %p",
           number == SIGSEGV || number == SIGBUS ? "access outside of memory"
                                                 : "undefined behaviour (misaligned access, index or arithmetic)",
           info->si_addr);
  fail(text);
}

// While kernels run, faults are theirs.
class Signals {
 public:
  Signals() {
    static uint8_t* const stack = map_pages(64 * 1024);
    stack_t alternative{};
    alternative.ss_sp = stack;
    alternative.ss_size = 64 * 1024;
    sigaltstack(&alternative, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    for (int i = 0; i < kCount; ++i) sigaction(kNumbers[i], &action, &before_[i]);
  }
  ~Signals() {
    for (int i = 0; i < kCount; ++i) sigaction(kNumbers[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  static constexpr int kCount = 4;
  static constexpr int kNumbers[kCount] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  struct sigaction before_[kCount];
  stack_t stack_before_;
};

}  // namespace emulator
