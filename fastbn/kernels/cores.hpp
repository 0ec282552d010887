// The cores that threads may run on, and where a worker is to wake.
//
// Where the system cannot say, or has more cores than fit in here, all calls do nothing.
#pragma once

#if defined(__linux__)
#include <fcntl.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#endif

namespace fastbn {

#if defined(__linux__)
inline int this_thread() noexcept { return static_cast<int>(syscall(SYS_gettid)); }

class Cores {
public:
    static constexpr int MOST = 2 * CPU_SETSIZE;

    bool read(int thread) noexcept {
        CPU_ZERO_S(sizeof set_, set_);
        return sched_getaffinity(thread, sizeof set_, set_) == 0;
    }
    bool give(int thread) const noexcept { return sched_setaffinity(thread, sizeof set_, set_) == 0; }
    int count() const noexcept { return CPU_COUNT_S(sizeof set_, set_); }
    void leave_out(int core) noexcept { CPU_CLR_S(core, sizeof set_, set_); }
    bool operator==(const Cores& other) const noexcept { return CPU_EQUAL_S(sizeof set_, set_, other.set_) != 0; }
    Cores operator&(const Cores& other) const noexcept {
        Cores both;
        CPU_AND_S(sizeof set_, both.set_, set_, other.set_);
        return both;
    }

private:
    cpu_set_t set_[MOST / CPU_SETSIZE];
};

// The cores that are one physical core with this one, itself included. The system's file is read once for each core.
struct Siblings {
    static constexpr int MOST = 8;
    bool known;
    int count;
    short core[MOST];

    static const Siblings& of(int core) noexcept {
        static Siblings all[Cores::MOST];
        Siblings& found = all[core];
        if (!found.known) {
            found.read(core);
            found.known = true;
        }
        return found;
    }

private:
    // A list such as "0,64" or "0-3".
    void read(int own) noexcept {
        char text[128];
        std::snprintf(text, sizeof text, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", own);
        const int file = open(text, O_RDONLY | O_CLOEXEC);
        const ssize_t length = file < 0 ? 0 : ::read(file, text, sizeof text - 1);
        if (file >= 0) close(file);
        text[length > 0 ? length : 0] = 0;
        count = 0;
        for (const char* p = text; *p >= '0' && *p <= '9';) {
            char* end;
            const long first = std::strtol(p, &end, 10);
            const long last = *end == '-' ? std::strtol(end + 1, &end, 10) : first;
            for (long c = first; c <= last && c < Cores::MOST && count < MOST; ++c) core[count++] = static_cast<short>(c);
            p = *end == ',' ? end + 1 : end;
        }
    }
};

// Where workers are to wake: on the cores that the caller may use, but its own.
class Steering {
public:
    explicit Steering(int helpers) noexcept {
        works_ = allowed_.read(0);
        wanted_ = allowed_;
        const int core = sched_getcpu();
        if (!works_ || core < 0 || core >= Cores::MOST) return;
        Cores others = allowed_;
        others.leave_out(core);
        if (others.count() < helpers) return;
        wanted_ = others;
        const Siblings& siblings = Siblings::of(core);
        for (int i = 0; i < siblings.count; ++i) others.leave_out(siblings.core[i]);
        if (others.count() >= helpers) wanted_ = others;
    }

    // Whether the caller may use one core only.
    bool bound() const noexcept { return works_ && allowed_.count() == 1; }

    // Send a worker there, or give it all cores of the caller's. `given` is what it was given last, by the pool or by
    // whoever made it.
    void apply(int worker, Cores& given) const noexcept { move(worker, given, wanted_); }
    void undo(int worker, Cores& given) const noexcept { move(worker, given, allowed_); }

private:
    Cores allowed_;
    Cores wanted_;
    bool works_;

    // Cores that are neither all of the caller's, nor what the pool gave as far as they are still allowed, are
    // somebody else's choice.
    void move(int worker, Cores& given, const Cores& to) const noexcept {
        Cores now;
        if (!works_ || worker == 0 || !now.read(worker) || now == to) return;
        if (!(now == allowed_) && !((now & allowed_) == (given & allowed_))) return;
        if (to.give(worker)) given = to;
    }
};
#else
inline int this_thread() noexcept { return 0; }

struct Cores {
    bool read(int) noexcept { return false; }
};

struct Steering {
    explicit Steering(int) noexcept {}
    bool bound() const noexcept { return false; }
    void apply(int, Cores&) const noexcept {}
    void undo(int, Cores&) const noexcept {}
};
#endif

}  // namespace fastbn
