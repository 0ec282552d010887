// The thread pool.
//
// What it must do, and how:
//
// - Never wait for a thread that has nothing of ours. Units are claimed one by one, and the calling thread claims too.
//   The call returns when all are claimed and every thread that entered the job has left it; a worker that wakes late
//   finds the job closed. So a worker costs time only if it loses its processor while it holds a unit, and then the
//   caller sleeps instead of spinning: the idle processor takes over the worker.
//
// - Keep data where they are. Each thread has a range of neighboring units and claims from the others' only when its own
//   is used up. So calls that follow each other on the same arrays find them in the cache of the same core.
//
// - Wake fast, cost nothing when idle. A worker that ran out of work spins for SPIN, so that calls that follow each
//   other find it awake, and then sleeps on a word of its own (a futex where there are futexes). To wake a sleeping
//   worker costs the caller system calls; nobody waits for it to arrive.
//
// - Wake nobody for little. Workers that spin join any job. Before it wakes one that sleeps, the caller runs one unit:
//   the time of that, times the units that are left, is what there is to share. What a wake costs, and how much later
//   the worker runs, is measured as it happens; so the decision knows the machine, the kernel and the state of the caches.
//   Where calls follow each other while a worker would spin, it would be awake for the next ones: what they have to share
//   adds up. Where a thread has but one unit there would be nothing left to share, and workers are woken first.
//
// - Wake on another core. The kernel likes to put a woken thread on the core of who wakes it, where it takes the time
//   of the caller until it is moved, milliseconds later. So a sleeping worker is first given the cores that the caller
//   may use, but the one where it runs; or, if enough are left, its physical core. A caller that is about to sleep gives
//   its core to the workers. A worker that somebody else has bound to cores is left alone, and a caller that is bound
//   to one core wakes nobody.
//
// - Step back on a busy machine. With another process on the processors, spinning and claiming lead to waits of a
//   scheduler's time slice, milliseconds for a call of 100 microseconds. Signs of it are a worker that was descheduled
//   while it spun, and a caller that waited long for the last units. After such a sign calls stay on their own thread
//   for a while, which doubles with each sign that follows soon and starts again after a quiet time.
//
// - Survive fork. The child has the memory of the pool but none of its threads, so it forgets the pool and makes a new
//   one when it needs one. No lock is shared between the two pools.
//
// - Serve many callers. The pool works on one job at a time. Whoever finds it taken runs all units itself: correct, no
//   deadlock, and no more threads than processors.
//
// - Be a guest. Where a host brings threads of its own, they run the units: each member of its team has a range, and
//   what no member came for is left to the others and the caller.
//
// - Compute in one mode. Units run in the default floating-point mode, whatever the caller's is, which is restored.
//   Workers are made in it, and threads inherit the mode in which they are made.
//
// - Leave quietly. Workers are detached, block all signals, touch nothing of Python, and use only the pool, which is
//   never destroyed: neither interpreter exit nor Ctrl-C has to wait for them.

#include "pool.hpp"

#include <pthread.h>
#include <signal.h>

#if defined(__linux__)
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

namespace fastbn {
namespace {

using Clock = std::chrono::steady_clock;
using Time = Clock::duration;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr Time SPIN = microseconds(100);        // how long a worker without work stays awake
constexpr Time DESCHEDULED = microseconds(50);  // a gap in spinning that means another process had the processor
constexpr Time LONG_WAIT = microseconds(200);   // a wait for the last units, beyond the length of two
constexpr Time FIRST_REST = milliseconds(4);    // how long to stay on one thread after the first sign
constexpr Time LAST_REST = milliseconds(256);   // ... and after the last doubling
constexpr Time WAKE_COST = microseconds(5);     // of the caller's time, until it was measured
constexpr Time WAKE_DELAY = microseconds(50);   // until the worker runs, likewise
constexpr Time LONGEST_DELAY = milliseconds(1);  // more says something about the moment, and nothing about the machine
constexpr int WORTH = 2;                        // how many times the price of a wake there must be to share
constexpr std::int64_t MANY = 1 << 20;          // units, so that the product with a time does not overflow
constexpr int MOST_WORKERS = 255;

inline void pause() noexcept {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

std::int64_t ticks() noexcept { return Clock::now().time_since_epoch().count(); }

// A thread that sleeps until another wakes it. Both must see each other's change: the sleeper says that it sleeps, and
// then asks whether there is a reason not to; the other makes the reason, and then asks whether it sleeps. All four are
// seq_cst.
class Sleeper {
public:
    template <class Reason>
    void sleep_unless(Reason reason) noexcept {
        asleep_.store(1, std::memory_order_seq_cst);
        if (reason())
            asleep_.store(0, std::memory_order_relaxed);
        else
            while (asleep_.load(std::memory_order_acquire)) wait();
    }

    bool asleep() const noexcept { return asleep_.load(std::memory_order_seq_cst) != 0; }

    // False where it was awake.
    bool wake() noexcept {
        if (!asleep()) return false;
#if !defined(__linux__)
        const std::lock_guard<std::mutex> lock(mutex_);
#endif
        if (asleep_.exchange(0, std::memory_order_acq_rel) == 0) return false;
#if defined(__linux__)
        syscall(SYS_futex, &asleep_, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
#else
        changed_.notify_one();
#endif
        return true;
    }

private:
    std::atomic<std::uint32_t> asleep_{0};

#if defined(__linux__)
    void wait() noexcept { syscall(SYS_futex, &asleep_, FUTEX_WAIT_PRIVATE, 1, nullptr, nullptr, 0); }
#else
    std::mutex mutex_;
    std::condition_variable changed_;

    void wait() noexcept {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return asleep_.load(std::memory_order_acquire) == 0; });
    }
#endif
};

// The cores that a thread may run on. Where the system cannot say, or has more of them, all calls here do nothing.
#if defined(__linux__)
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

int this_thread() noexcept { return static_cast<int>(syscall(SYS_gettid)); }
#else
int this_thread() noexcept { return 0; }
#endif

// A loop over units, cut into a range for each thread.
struct Job {
    struct alignas(64) Range {
        std::ptrdiff_t first, size;
        std::atomic<std::ptrdiff_t> claimed;
    };

    unit_fn unit;
    void* data;
    bool backwards;
    int ranges;
    Range range[MOST_WORKERS + 1];

    void set(unit_fn run, void* job, std::ptrdiff_t units, int threads, bool last_first) noexcept {
        unit = run;
        data = job;
        backwards = last_first;
        ranges = threads;
        for (int r = 0; r < ranges; ++r) {
            range[r].first = units * r / ranges;
            range[r].size = units * (r + 1) / ranges - range[r].first;
            range[r].claimed.store(0, std::memory_order_relaxed);
        }
    }

    // Claim units and run them, from one's own range first, until none are left or one has run `most`; return how many.
    std::ptrdiff_t claim(int own, std::ptrdiff_t most = PTRDIFF_MAX) noexcept {
        std::ptrdiff_t done = 0;
        for (int r = 0; r < ranges; ++r) {
            Range& mine = range[(own + r) % ranges];
            while (done < most) {
                const std::ptrdiff_t i = mine.claimed.fetch_add(1, std::memory_order_relaxed);
                if (i >= mine.size) break;
                unit(data, mine.first + (backwards ? mine.size - 1 - i : i));
                ++done;
            }
        }
        return done;
    }
};

class Pool {
public:
    // False where the pool is taken, or better left alone.
    bool run(unit_fn unit, void* job, std::ptrdiff_t units, int threads, bool backwards) noexcept {
        if (resting() || taken_.exchange(true, std::memory_order_acquire)) return false;
        if (threads > units) threads = static_cast<int>(units);
        const int helpers = grow(threads - 1);
        if (helpers == 0) {  // no thread could be started
            taken_.store(false, std::memory_order_release);
            return false;
        }
        job_.set(unit, job, units, helpers + 1, backwards);
        state_.store(OPEN | static_cast<std::uint64_t>(helpers) << LIMIT, std::memory_order_release);
        calls_.fetch_add(1, std::memory_order_seq_cst);

        const auto start = Clock::now();
        std::ptrdiff_t mine = 0;
        const int team = 1 + workers() - sleepers_.load(std::memory_order_seq_cst);
        if (team <= helpers) {
            std::int64_t to_share = INT64_MAX;
            if (units > threads) {
                mine = job_.claim(0, 1);
                const std::int64_t earlier = start - last_end_ < SPIN ? not_shared_ : 0;
                const std::int64_t left = units <= MANY ? units - 1 : MANY;
                to_share = (Clock::now() - start).count() * left + earlier;
            }
            not_shared_ = wake(helpers, team, to_share) ? 0 : to_share;
        }
        mine += job_.claim(0);
        const auto done = Clock::now();
        state_.fetch_and(~OPEN, std::memory_order_seq_cst);
        wait_until_left(helpers);
        last_end_ = Clock::now();
        const auto waited = last_end_ - done;
        if (waited > LONG_WAIT + (mine > 0 ? 2 * (done - start) / mine : done - start)) rest();
        taken_.store(false, std::memory_order_release);
        return true;
    }

    int workers() const noexcept { return workers_.load(std::memory_order_relaxed); }
    int awake() const noexcept { return workers() - sleepers_.load(std::memory_order_relaxed); }
    std::int64_t wake_cost() const noexcept { return wake_cost_.load(std::memory_order_relaxed); }
    std::int64_t wake_delay() const noexcept { return wake_delay_.load(std::memory_order_relaxed); }

private:
    // state_: whether the job is open, how many workers may enter it, and how many are in it.
    static constexpr std::uint64_t OPEN = std::uint64_t{1} << 63;
    static constexpr int LIMIT = 32;
    static constexpr std::uint64_t INSIDE = 0xffffffff;

    alignas(64) std::atomic<std::uint64_t> state_{0};
    alignas(64) std::atomic<std::uint32_t> calls_{0};
    std::atomic<bool> taken_{false};
    std::atomic<int> workers_{0};
    std::atomic<std::int64_t> rest_until_{0};
    std::atomic<std::int64_t> rest_length_{0};

    Job job_;  // the open one
    Clock::time_point last_end_{};
    std::int64_t not_shared_ = 0;  // time of calls up to then that might have been shared with workers that slept

    struct alignas(64) Worker {
        Sleeper sleeper;
        std::atomic<int> thread{0};            // the system's number of it
        std::atomic<std::int64_t> woken_at{0};  // 0 once it runs
#if defined(__linux__)
        Cores given;  // by the pool, or by whoever made it
#endif
    };

    Worker worker_[MOST_WORKERS];
    Sleeper caller_;  // until the last worker has left a closed job
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<std::int64_t> wake_cost_{Time(WAKE_COST).count()};
    std::atomic<std::int64_t> wake_delay_{Time(WAKE_DELAY).count()};

    bool enter() noexcept {
        std::uint64_t state = state_.load(std::memory_order_relaxed);
        do {
            if (!(state & OPEN) || (state & INSIDE) >= (state & ~OPEN) >> LIMIT) return false;
        } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_relaxed));
        return true;
    }

    void leave() noexcept {
        const std::uint64_t before = state_.fetch_sub(1, std::memory_order_seq_cst);
        if (!(before & OPEN) && (before & INSIDE) == 1) caller_.wake();
    }

    bool empty() const noexcept { return (state_.load(std::memory_order_seq_cst) & INSIDE) == 0; }

    void wait_until_left(int helpers) noexcept {
        for (const auto start = Clock::now(); Clock::now() - start < SPIN / 4; pause())
            if (empty()) return;
        give_cores(helpers);
        while (!empty()) caller_.sleep_unless([this] { return empty(); });
    }

    // Wake workers for a job of so many helpers, of whom team - 1 are awake, as long as there is enough to share; false
    // where there is too little for any.
    bool wake(int helpers, int team, std::int64_t to_share) noexcept {
        const std::int64_t cost = wake_cost(), delay = wake_delay(), worth = WORTH * (cost + delay);
        if (to_share / team < worth) {  // forget what was measured, little by little: it may have been a bad time
            const std::int64_t first = Time(WAKE_DELAY).count();
            if (delay > first) wake_delay_.store(delay - (delay - first) / 16 - 1, std::memory_order_relaxed);
            return false;
        }
        const Steering steering(helpers);
        if (steering.bound()) return true;
        team = 1;  // counted again, with those that were woken and do not run yet
        for (int i = 0, count = workers(); i < count; ++i) team += !worker_[i].sleeper.asleep();
        for (int i = 0, count = workers(); i < count && team <= helpers && to_share / team >= worth; ++i) {
            Worker& worker = worker_[i];
            if (!worker.sleeper.asleep()) continue;
            const std::int64_t before = ticks();
            steering.apply(worker);
            worker.woken_at.store(before, std::memory_order_relaxed);
            if (!worker.sleeper.wake()) continue;
            learn(wake_cost_, ticks() - before);
            ++team;
        }
        return true;
    }

    // A running mean, of which threads may lose each other's part.
    static void learn(std::atomic<std::int64_t>& mean, std::int64_t sample) noexcept {
        if (sample > Time(LONGEST_DELAY).count()) sample = Time(LONGEST_DELAY).count();
        const std::int64_t before = mean.load(std::memory_order_relaxed);
        mean.store(before + (sample - before) / 8, std::memory_order_relaxed);
    }

#if defined(__linux__)
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
        void apply(Worker& worker) const noexcept { move(worker, wanted_); }
        void undo(Worker& worker) const noexcept { move(worker, allowed_); }

    private:
        Cores allowed_;
        Cores wanted_;
        bool works_;

        // Cores that are neither all of the caller's, nor what the pool gave as far as they are still allowed, are
        // somebody else's choice.
        void move(Worker& worker, const Cores& to) const noexcept {
            const int thread = worker.thread.load(std::memory_order_relaxed);
            Cores now;
            if (!works_ || thread == 0 || !now.read(thread) || now == to) return;
            if (!(now == allowed_) && !((now & allowed_) == (worker.given & allowed_))) return;
            if (to.give(thread)) worker.given = to;
        }
    };
#else
    struct Steering {
        explicit Steering(int) noexcept {}
        bool bound() const noexcept { return false; }
        void apply(Worker&) const noexcept {}
        void undo(Worker&) const noexcept {}
    };
#endif

    // The caller is about to sleep, and a worker may have lost its own core to another process.
    void give_cores(int helpers) noexcept {
        const Steering steering(helpers);
        for (int i = 0, count = workers(); i < count; ++i)
            if (!worker_[i].sleeper.asleep()) steering.undo(worker_[i]);
    }

    // Start workers until there are `wanted`; return how many there are, at most `wanted`.
    int grow(int wanted) noexcept {
        if (wanted > MOST_WORKERS) wanted = MOST_WORKERS;
        int count = workers();
        if (count >= wanted) return wanted;
        sigset_t all, old;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        try {
            for (; count < wanted; ++count) {
#if defined(__linux__)
                if (!worker_[count].given.read(0)) worker_[count].given = Cores{};
#endif
                std::thread(&Pool::work, this, count).detach();
            }
        } catch (...) {  // no more threads, or no memory for them: fewer will do
        }
        pthread_sigmask(SIG_SETMASK, &old, nullptr);
        workers_.store(count, std::memory_order_relaxed);
        return count;
    }

    void work(int index) noexcept {
        Worker& self = worker_[index];
        self.thread.store(this_thread(), std::memory_order_relaxed);
#if defined(__linux__)
        prctl(PR_SET_NAME, "fastbn");
#endif
        std::uint32_t seen = calls_.load(std::memory_order_acquire) - 1;
        for (;;) {
            await_call(self, seen);
            seen = calls_.load(std::memory_order_acquire);
            if (enter()) {
                job_.claim(1 + index % (job_.ranges - 1));
                leave();
            }
        }
    }

    // Return when there was a call after the one that was seen.
    void await_call(Worker& self, std::uint32_t seen) noexcept {
        const auto start = Clock::now();
        for (auto last = start; last - start < SPIN;) {
            for (int i = 0; i < 16; ++i) {
                if (calls_.load(std::memory_order_acquire) != seen) return;
                pause();
            }
            const auto now = Clock::now();
            if (now - last > DESCHEDULED) {
                rest();
                break;
            }
            last = now;
        }
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        self.woken_at.store(0, std::memory_order_relaxed);
        self.sleeper.sleep_unless([&] { return calls_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        if (const std::int64_t woken = self.woken_at.load(std::memory_order_relaxed)) learn(wake_delay_, ticks() - woken);
    }

    bool resting() const noexcept {
        const std::int64_t until = rest_until_.load(std::memory_order_relaxed);
        return until != 0 && ticks() < until;
    }

    void rest() noexcept {
        const std::int64_t now = ticks(), until = rest_until_.load(std::memory_order_relaxed);
        std::int64_t length = rest_length_.load(std::memory_order_relaxed);
        if (now < until) return;
        length = until == 0 || now - until > 4 * length ? Time(FIRST_REST).count() : 2 * length;
        if (length > Time(LAST_REST).count()) length = Time(LAST_REST).count();
        rest_length_.store(length, std::memory_order_relaxed);
        rest_until_.store(now + length, std::memory_order_relaxed);
    }
};

void run_member(void* data, int member) {
    Job* job = static_cast<Job*>(data);
    const FloatMode mode;
    job->claim(member % job->ranges);
}

void run_on(const Host& host, unit_fn unit, void* data, std::ptrdiff_t units, int threads, bool backwards) noexcept {
    if (threads > MOST_WORKERS + 1) threads = MOST_WORKERS + 1;
    if (threads > units) threads = static_cast<int>(units);
    Job job;
    job.set(unit, data, units, threads, backwards);
    host.run(host.team, threads, run_member, &job);
    job.claim(0);
}

std::atomic<Pool*> the_pool{nullptr};

// In the child of a fork; the old pool's memory is left alone, because its locks may be held by threads that are gone.
void forget() { the_pool.store(nullptr, std::memory_order_relaxed); }
const int registered = pthread_atfork(nullptr, nullptr, forget);

Pool* pool() noexcept {
    Pool* found = the_pool.load(std::memory_order_acquire);
    if (found != nullptr) return found;
    Pool* made = new (std::nothrow) Pool;
    if (made == nullptr || the_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return made;
    delete made;
    return found;
}

// Scratch memory: a header of a cache line, and `size` bytes that a kernel may use. It is kept under a key of its thread
// and not in a thread_local variable, for whose destructor the C library ends the process when there is no memory.
struct alignas(64) Scratch {
    std::size_t size;
    unsigned releases;  // how many there had been when it was made
};
constexpr std::size_t SCRATCH_STEP = 64 << 10;
constexpr std::size_t SCRATCH_KEPT = 1 << 20;  // more than this goes back after each call

std::atomic<unsigned> releases{0};

void free_scratch(void* memory) { std::free(memory); }

struct ScratchKey {
    pthread_key_t key{};
    const bool made = pthread_key_create(&key, free_scratch) == 0;

    Scratch* get() const noexcept { return made ? static_cast<Scratch*>(pthread_getspecific(key)) : nullptr; }
    bool set(Scratch* mine) const noexcept { return made && pthread_setspecific(key, mine) == 0; }
    void clear() const noexcept {
        std::free(get());
        set(nullptr);
    }
};
const ScratchKey scratch_key;

}  // namespace

void parallel(unit_fn unit, void* job, std::ptrdiff_t units, int threads, bool backwards, const Host* host) noexcept {
    const bool shared = threads > 1 && units > 1;
    const FloatMode mode;
    if (shared && host != nullptr) return run_on(*host, unit, job, units, threads, backwards);
    Pool* p = shared ? pool() : nullptr;
    if (p != nullptr && p->run(unit, job, units, threads, backwards)) return;
    for (std::ptrdiff_t i = 0; i < units; ++i) unit(job, backwards ? units - 1 - i : i);
}

void* scratch(std::size_t bytes) noexcept {
    Scratch* mine = scratch_key.get();
    const unsigned now = releases.load(std::memory_order_relaxed);
    if (mine == nullptr || mine->size < bytes || mine->releases != now) {
        scratch_key.clear();
        if (bytes > SIZE_MAX - SCRATCH_STEP - sizeof(Scratch)) return nullptr;
        const std::size_t size = (bytes + SCRATCH_STEP - 1) / SCRATCH_STEP * SCRATCH_STEP;
        void* memory = std::aligned_alloc(alignof(Scratch), sizeof(Scratch) + size);
        if (memory == nullptr) return nullptr;
        mine = new (memory) Scratch{size, now};
        if (!scratch_key.set(mine)) {
            std::free(memory);
            return nullptr;
        }
    }
    return mine + 1;
}

void end_scratch() noexcept {
    const Scratch* mine = scratch_key.get();
    if (mine != nullptr && mine->size > SCRATCH_KEPT) scratch_key.clear();
}

std::size_t release_scratch() noexcept {
    releases.fetch_add(1, std::memory_order_relaxed);
    const Scratch* mine = scratch_key.get();
    const std::size_t size = mine == nullptr ? 0 : mine->size;
    scratch_key.clear();
    return size;
}

int workers() noexcept {
    Pool* p = the_pool.load(std::memory_order_acquire);
    return p == nullptr ? 0 : p->workers();
}

int awake() noexcept {
    Pool* p = the_pool.load(std::memory_order_acquire);
    return p == nullptr ? 0 : p->awake();
}

Waking waking() noexcept {
    Pool* p = the_pool.load(std::memory_order_acquire);
    const Time cost = p == nullptr ? WAKE_COST : Time(p->wake_cost()), delay = p == nullptr ? WAKE_DELAY : Time(p->wake_delay());
    using Seconds = std::chrono::duration<double>;
    return {Seconds(cost).count(), Seconds(delay).count()};
}

}  // namespace fastbn

// The one name that the module exports: threadpoolctl knows the library of the pool by it.
extern "C" __attribute__((visibility("default"))) int fastbn_workers() { return fastbn::workers(); }
