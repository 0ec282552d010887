// The floating-point mode in which all arithmetic of the kernels runs.
#pragma once

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

}  // namespace fastbn
