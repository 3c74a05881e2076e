// Fibers: many stacks in one thread of the host, and a switch between them.
//
// The switch is a dozen instructions on x86-64; elsewhere (or with LLMLOSS_SIMT_UCONTEXT) it is
// swapcontext, which also saves the signal mask by a system call and is some thirty times slower.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && !defined(LLMLOSS_SIMT_UCONTEXT)
#define LLMLOSS_SIMT_ASM 1
// void llmloss_simt_switch(void** save, void* load): the callee-saved registers go on the stack
// that is left, and come from the one that is entered.
asm(R"(
.pushsection .text
.weak llmloss_simt_switch
.hidden llmloss_simt_switch
.type llmloss_simt_switch, @function
llmloss_simt_switch:
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
.size llmloss_simt_switch, . - llmloss_simt_switch
.popsection
)");
extern "C" __attribute__((visibility("hidden"))) void llmloss_simt_switch(void** save, void* load);
#else
#include <ucontext.h>
#endif

namespace llmloss::simt::emulator {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr size_t stack_bytes = size_t{256} << 10;
#else
inline constexpr size_t stack_bytes = size_t{64} << 10;
#endif

// A place to go on from. The host's own stack is one too.
class Context {
 public:
  // Starts `entry`, which never returns, on the given stack.
  void prepare(char* stack, void (*entry)()) {
    bottom_ = stack;
    size_ = stack_bytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, stack_bytes);  // left by a fiber that was given up
    fake_stack_ = nullptr;
#endif
#if defined(LLMLOSS_SIMT_ASM)
    // As the switch leaves it: six registers, the address to go to, and the return address that a
    // function expects, so that at its entry the stack is 8 past a multiple of 16.
    auto* top = reinterpret_cast<uintptr_t*>(stack + stack_bytes);
    *--top = 0;
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = stack_bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves `from` and goes on with `to`. A context that ends says so: nothing comes back to it.
  static void switch_to(Context& from, Context& to, bool from_ends = false) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack_, to.bottom_, to.size_);
#else
    (void)from_ends;
#endif
#if defined(LLMLOSS_SIMT_ASM)
    llmloss_simt_switch(&from.pointer_, to.pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    from.arrived(to);
  }

  // To be called first thing in an entry function, with the context that was left.
  void arrived(Context& left) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &left.bottom_, &left.size_);
#else
    (void)left;
#endif
  }

 private:
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
#endif
#if defined(LLMLOSS_SIMT_ASM)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

// Stacks are kept from launch to launch: fresh pages cost more than a small kernel.
class Stacks {
 public:
  char* operator[](size_t i) {
    while (stacks_.size() <= i) {
      void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for a thread's stack");
      stacks_.push_back(static_cast<char*>(memory));
    }
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;
};

}  // namespace llmloss::simt::emulator
