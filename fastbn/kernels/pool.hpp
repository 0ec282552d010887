// A thread pool for loops over units of work: see pool.cpp.
#pragma once

#include <cstddef>

#include "float_mode.hpp"

namespace fastbn {

using unit_fn = void (*)(void* job, std::ptrdiff_t unit);
using member_fn = void (*)(void* data, int member);

// Threads that a caller brings: run(team, threads, member, data) calls member(data, i) for numbers i from 0 to
// threads - 1, on threads of its own or on this one, and returns when all these calls have. It may leave numbers out.
// It must not throw.
struct Host {
    void (*run)(void* team, int threads, member_fn member, void* data);
    void* team;
};

// Run unit(job, 0) ... unit(job, units - 1), each once, on at most `threads` threads; return when all are done. Each
// thread starts with a range of neighboring units, first to last, or last to first where `reverse`.
// Any number of threads may call this at once. A unit must not throw, and must not call this. Units run in the default
// floating-point mode. With a host its threads run them, member i starting with range i, else those of the pool.
void parallel(unit_fn unit, void* job, std::ptrdiff_t units, int threads, bool reverse, std::ptrdiff_t bytes = 0, const Host* host = nullptr) noexcept;

// Threads of the pool, and how many of them do not sleep, for tests and for the curious.
int workers() noexcept;
int awake() noexcept;

// Running means, in seconds: what it costs a caller to wake a worker, and how much later that runs; and what a call must
// have to share for each thread before it wakes one.
struct Waking {
    double cost, delay, worth;
};
Waking waking() noexcept;

}  // namespace fastbn
