#pragma once
#include <cstddef>

namespace fastbn {

using unit_fn = void (*)(void* job, std::ptrdiff_t unit);

// Run unit(job, 0) ... unit(job, units - 1), each once, on at most `threads` threads; return when all are done.
void parallel(unit_fn unit, void* job, std::ptrdiff_t units, int threads);

// At least `bytes` of memory, aligned to a cache line, that is this thread's until its next call.
void* scratch(std::size_t bytes);

}  // namespace fastbn
