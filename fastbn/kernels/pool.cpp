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
// - Wake nobody for little. Workers that spin join any job. Before it wakes one that sleeps, the caller asks what there is
//   to share: the bytes of the call, at the least time that a byte took of late. Where that is too little, it runs two
//   units: the time of the second, times the units that are left. What a wake costs, and how much later the worker runs, is
//   measured as it happens; so the decision knows the machine, the kernel and the state of the caches.
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
//   scheduler's time slice, milliseconds for a call of 100 microseconds. The sign of it is a caller that waited long for
//   the last units, so long that it had better done them itself. After such a sign, where workers have cost more than they
//   saved of late, calls stay on their own thread for a while, which doubles with each sign that follows soon and starts
//   again after a quiet time. A worker that loses its processor while it spins costs nothing, and goes to sleep.
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
#include <sys/prctl.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>
#include <thread>

#include "cores.hpp"
#include "sleeper.hpp"

namespace fastbn {
namespace {

using Clock = std::chrono::steady_clock;
using Time = Clock::duration;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr Time SPIN = microseconds(100);        // how long a worker without work stays awake
constexpr Time DESCHEDULED = microseconds(50);  // a gap in spinning that means another thread had the processor
constexpr Time LONG_WAIT = microseconds(200);   // for the last units
constexpr Time FIRST_BACKOFF = milliseconds(4);    // how long to stay on one thread after the first sign
constexpr Time LAST_BACKOFF = milliseconds(256);   // ... and after the last doubling
constexpr Time WAKE_COST = microseconds(5);     // of the caller's time, until it was measured
constexpr Time WAKE_DELAY = microseconds(50);   // until the worker runs, likewise
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

// A loop over units, cut into a range for each thread.
struct Job {
    struct alignas(64) Range {
        std::ptrdiff_t first, size;
        std::atomic<std::ptrdiff_t> claimed;
    };

    unit_fn unit;
    void* data;
    bool reverse;
    int ranges;
    Range range[MOST_WORKERS + 1];

    void set(unit_fn run, void* job, std::ptrdiff_t units, int threads, bool last_first) noexcept {
        unit = run;
        data = job;
        reverse = last_first;
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
                unit(data, mine.first + (reverse ? mine.size - 1 - i : i));
                ++done;
            }
        }
        return done;
    }
};

class Pool {
public:
    // False where the pool is taken, or better left alone.
    bool run(unit_fn unit, void* job, std::ptrdiff_t units, int threads, bool reverse, std::ptrdiff_t bytes) noexcept {
        if (backing_off() || taken_.exchange(true, std::memory_order_acquire)) return false;
        if (threads > units) threads = static_cast<int>(units);
        const int helpers = grow(threads - 1);
        if (helpers == 0) {  // no thread could be started
            taken_.store(false, std::memory_order_release);
            return false;
        }
        job_.set(unit, job, units, helpers + 1, reverse);
        state_.store(OPEN | static_cast<std::uint64_t>(helpers) << LIMIT, std::memory_order_release);
        calls_.fetch_add(1, std::memory_order_seq_cst);

        const auto start = Clock::now();
        const int team = 1 + workers() - sleepers_.load(std::memory_order_seq_cst);
        const std::ptrdiff_t first = team <= helpers ? wake_for(units, bytes, helpers, team, start) : 0;
        const auto woken = Clock::now();
        const std::ptrdiff_t others = job_.claim(0), mine = first + others;
        const auto done = Clock::now();
        if (team <= helpers && others > 0 && bytes > 0) learn_pace(done - woken, static_cast<double>(bytes) / units * others);
        state_.fetch_and(~OPEN, std::memory_order_seq_cst);
        wait_until_left(helpers);
        last_end_ = Clock::now();
        const Time took = last_end_ - start, alone = mine > 0 ? (done - start) * units / mine : done - start;
        gain_ += (static_cast<double>((alone - took).count()) - gain_) / 8;
        if (last_end_ - done > LONG_WAIT && took > alone && gain_ < 0) back_off();
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
    std::atomic<std::int64_t> backoff_until_{0};
    std::atomic<std::int64_t> backoff_length_{0};

    Job job_;  // the open one
    Clock::time_point last_end_{};
    double pace_ = 0;              // of callers without workers, in nanoseconds for a byte; 0 until it was measured
    double gain_ = 0;              // what the workers saved a call of late, in nanoseconds
    std::int64_t not_shared_ = 0;  // time of calls up to then that might have been shared with workers that slept

    struct alignas(64) Worker {
        Sleeper sleeper;
        std::atomic<int> thread{0};             // the system's number of it
        std::atomic<std::int64_t> woken_at{0};  // 0 once it runs
        Cores given;                            // by the pool, or by whoever made it
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

    // Wake workers for a job, or not: by the pace of earlier calls, or where that says no, by a unit that is run first; by
    // the second, because the first one waits for its instructions. Return how many were run.
    std::ptrdiff_t wake_for(std::ptrdiff_t units, std::ptrdiff_t bytes, int helpers, int team, Clock::time_point start) noexcept {
        const bool one_each = units <= helpers + 1;
        if (wake(helpers, team, one_each ? INT64_MAX : static_cast<std::int64_t>(pace_ * static_cast<double>(bytes)))) {
            not_shared_ = 0;
            return 0;
        }
        std::ptrdiff_t first = job_.claim(0, 1);
        const auto warm = Clock::now();
        first += job_.claim(0, 1);
        const std::int64_t earlier = start - last_end_ < SPIN ? not_shared_ : 0;
        const std::int64_t to_share = (Clock::now() - warm).count() * ((units <= MANY ? units : MANY) - 2) + earlier;
        not_shared_ = wake(helpers, team, to_share) ? 0 : to_share;
        if (not_shared_ != 0) {  // what was measured was measured at a bad time, perhaps: forget it little by little
            forget(wake_cost_, Time(WAKE_COST).count());
            forget(wake_delay_, Time(WAKE_DELAY).count());
        }
        return first;
    }

    // Wake workers for a job of so many helpers, of whom team - 1 are awake, as long as there is enough to share; false
    // where there is too little for any.
    bool wake(int helpers, int team, std::int64_t to_share) noexcept {
        const std::int64_t worth = WORTH * (wake_cost() + wake_delay());
        if (to_share / team < worth) return false;
        const Steering steering(helpers);
        if (steering.bound()) return true;
        team = 1;  // counted again, with those that were woken and do not run yet
        for (int i = 0, count = workers(); i < count; ++i) team += !worker_[i].sleeper.asleep();
        for (int i = 0, count = workers(); i < count && team <= helpers && to_share / team >= worth; ++i) {
            Worker& worker = worker_[i];
            if (!worker.sleeper.asleep()) continue;
            const std::int64_t before = ticks();
            steering.apply(worker.thread.load(std::memory_order_relaxed), worker.given);
            worker.woken_at.store(before, std::memory_order_relaxed);
            if (!worker.sleeper.wake()) continue;
            learn(wake_cost_, ticks() - before);
            ++team;
        }
        return true;
    }

    // Nanoseconds for a byte: the least of late, so that nobody is woken in vain by a call that takes less.
    void learn_pace(Time took, double bytes) noexcept {
        const double pace = static_cast<double>(took.count()) / bytes;
        pace_ = pace_ == 0 || pace < pace_ ? pace : pace_ + (pace - pace_) / 16;
    }

    // A running mean, of which threads may lose each other's part. One sample moves it by an eighth at most: a caller that
    // was descheduled while it woke says nothing about waking.
    static void learn(std::atomic<std::int64_t>& mean, std::int64_t sample) noexcept {
        const std::int64_t before = mean.load(std::memory_order_relaxed);
        if (sample > 2 * before) sample = 2 * before;
        mean.store(before + (sample - before) / 8, std::memory_order_relaxed);
    }

    static void forget(std::atomic<std::int64_t>& mean, std::int64_t first) noexcept {
        const std::int64_t before = mean.load(std::memory_order_relaxed);
        if (before > first) mean.store(before - (before - first) / 16 - 1, std::memory_order_relaxed);
    }

    // The caller is about to sleep, and a worker may have lost its own core to another process.
    void give_cores(int helpers) noexcept {
        const Steering steering(helpers);
        for (int i = 0, count = workers(); i < count; ++i)
            if (Worker& worker = worker_[i]; !worker.sleeper.asleep())
                steering.undo(worker.thread.load(std::memory_order_relaxed), worker.given);
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
                if (!worker_[count].given.read(0)) worker_[count].given = Cores{};
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
            if (now - last > DESCHEDULED) break;
            last = now;
        }
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        self.woken_at.store(0, std::memory_order_relaxed);
        self.sleeper.sleep_unless([&] { return calls_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        if (const std::int64_t woken = self.woken_at.load(std::memory_order_relaxed)) learn(wake_delay_, ticks() - woken);
    }

    bool backing_off() const noexcept {
        const std::int64_t until = backoff_until_.load(std::memory_order_relaxed);
        return until != 0 && ticks() < until;
    }

    void back_off() noexcept {
        const std::int64_t now = ticks(), until = backoff_until_.load(std::memory_order_relaxed);
        std::int64_t length = backoff_length_.load(std::memory_order_relaxed);
        if (now < until) return;
        length = until == 0 || now - until > 4 * length ? Time(FIRST_BACKOFF).count() : 2 * length;
        if (length > Time(LAST_BACKOFF).count()) length = Time(LAST_BACKOFF).count();
        backoff_length_.store(length, std::memory_order_relaxed);
        backoff_until_.store(now + length, std::memory_order_relaxed);
    }
};

void run_member(void* data, int member) {
    Job* job = static_cast<Job*>(data);
    const FloatMode mode;
    job->claim(member % job->ranges);
}

void run_on(const Host& host, unit_fn unit, void* data, std::ptrdiff_t units, int threads, bool reverse) noexcept {
    if (threads > MOST_WORKERS + 1) threads = MOST_WORKERS + 1;
    if (threads > units) threads = static_cast<int>(units);
    Job job;
    job.set(unit, data, units, threads, reverse);
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

}  // namespace

void parallel(unit_fn unit, void* job, std::ptrdiff_t units, int threads, bool reverse, std::ptrdiff_t bytes, const Host* host) noexcept {
    const bool shared = threads > 1 && units > 1;
    const FloatMode mode;
    if (shared && host != nullptr) return run_on(*host, unit, job, units, threads, reverse);
    Pool* p = shared ? pool() : nullptr;
    if (p != nullptr && p->run(unit, job, units, threads, reverse, bytes)) return;
    for (std::ptrdiff_t i = 0; i < units; ++i) unit(job, reverse ? units - 1 - i : i);
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
    return {Seconds(cost).count(), Seconds(delay).count(), WORTH * Seconds(cost + delay).count()};
}

}  // namespace fastbn

// The one name that the module exports: threadpoolctl knows the library of the pool by it.
extern "C" __attribute__((visibility("default"))) int fastbn_workers() { return fastbn::workers(); }
