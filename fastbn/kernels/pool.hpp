// A thread pool for loops over units of work: see pool.cpp.
#pragma once

#include <cstddef>

namespace fastbn {

using unit_fn = void (*)(void* job, std::ptrdiff_t unit);

// Run unit(job, 0) ... unit(job, units - 1), each once, on at most `threads` threads; return when all are done. Each
// thread starts with a range of neighboring units, first to last, or last to first where `backwards`.
// Any number of threads may call this at once. A unit must not throw, and must not call this.
void parallel(unit_fn unit, void* job, std::ptrdiff_t units, int threads, bool backwards) noexcept;

// At least `bytes` of memory, aligned to a cache line, that is this thread's until its next call; null if there is none.
void* scratch(std::size_t bytes) noexcept;

// Threads of the pool, for tests and for the curious.
int workers() noexcept;

}  // namespace fastbn
