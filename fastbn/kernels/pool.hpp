// A thread pool for loops over units of work: see pool.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbn {

// The floating-point mode of this thread. The default one rounds to nearest, keeps subnormal numbers, traps nothing.
// A program may have set another, and threads inherit it from whoever makes them; results must not depend on that.
#if defined(__x86_64__)
constexpr std::uint32_t RAISED = 0x3f;  // flags of what has happened, which are no part of the mode
constexpr std::uint32_t DEFAULT_MODE = 0x1f80;
constexpr std::uint32_t MODES = 0xffff;  // bits that may be set without a fault
inline std::uint32_t read_mode() noexcept {
    std::uint32_t mode;
    asm volatile("stmxcsr %0" : "=m"(mode) : : "memory");
    return mode;
}
inline void write_mode(std::uint32_t mode) noexcept { asm volatile("ldmxcsr %0" : : "m"(mode) : "memory"); }
#elif defined(__aarch64__)
constexpr std::uint32_t RAISED = 0;
constexpr std::uint32_t DEFAULT_MODE = 0;
constexpr std::uint32_t MODES = 0xffffffff;
inline std::uint32_t read_mode() noexcept {
    std::uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode) : : "memory");
    return static_cast<std::uint32_t>(mode);
}
inline void write_mode(std::uint32_t mode) noexcept {
    asm volatile("msr fpcr, %0" : : "r"(std::uint64_t{mode}) : "memory");
}
#else
constexpr std::uint32_t RAISED = 0;
constexpr std::uint32_t DEFAULT_MODE = 0;
constexpr std::uint32_t MODES = 0xffffffff;
inline std::uint32_t read_mode() noexcept { return DEFAULT_MODE; }
inline void write_mode(std::uint32_t) noexcept {}
#endif

// The default mode from here on, and the mode until now, to be given back at the end. To read the mode costs a nanosecond
// or two; it is written, which waits for all arithmetic under way, only where the program has set another.
inline std::uint32_t enter_default_mode() noexcept {
    const std::uint32_t before = read_mode();
    if ((before & ~RAISED) != DEFAULT_MODE) write_mode(DEFAULT_MODE);
    return before;
}
inline void leave_default_mode(std::uint32_t before) noexcept {
    if ((before & ~RAISED) != DEFAULT_MODE) write_mode(before);
}

// The default mode for as long as this lives.
class FloatMode {
public:
    FloatMode() noexcept : before_(enter_default_mode()) {}
    ~FloatMode() { leave_default_mode(before_); }
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;

private:
    const std::uint32_t before_;
};

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
// thread starts with a range of neighboring units, first to last, or last to first where `backwards`.
// Any number of threads may call this at once. A unit must not throw, and must not call this. Units run in the default
// floating-point mode. With a host its threads run them, member i starting with range i, else those of the pool.
void parallel(unit_fn unit, void* job, std::ptrdiff_t units, int threads, bool backwards, const Host* host = nullptr) noexcept;

// At least `bytes` of memory, aligned to a cache line, that is this thread's until its next call of these functions;
// null if there is none.
void* scratch(std::size_t bytes) noexcept;

// At the end of a kernel's call: give back what is too much to keep for the next one.
void end_scratch() noexcept;

// Give back all of this thread's scratch memory at once, and that of other threads when they next need some; return how
// many bytes this thread gave.
std::size_t release_scratch() noexcept;

// Threads of the pool, and how many of them do not sleep, for tests and for the curious.
int workers() noexcept;
int awake() noexcept;

// Running means, in seconds: what it costs a caller to wake a worker, and how much later that runs.
struct Waking {
    double cost, delay;
};
Waking waking() noexcept;

}  // namespace fastbn
