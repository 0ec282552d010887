// Memory that a thread keeps from call to call: see scratch.cpp.
#pragma once

#include <cstddef>

namespace fastbn {

// At least `bytes` of memory, aligned to a cache line, that is this thread's until its next call of these functions;
// null if there is none.
void* scratch(std::size_t bytes) noexcept;

// At the end of a kernel's call: give back what is too much to keep for the next one.
void end_scratch() noexcept;

// Take this thread's scratch memory out of reach of the calls that it makes until `restore_scratch`: what a kernel calls may call
// kernels itself.
void* withdraw_scratch() noexcept;
void restore_scratch(void* withdrawn) noexcept;

// Give back all of this thread's scratch memory at once, and that of other threads when they next need some; return how
// many bytes this thread gave.
std::size_t release_scratch() noexcept;

}  // namespace fastbn
