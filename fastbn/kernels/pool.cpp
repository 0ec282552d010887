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
//   other find it awake, and then sleeps on a condition variable. To wake a sleeping worker costs the caller a system
//   call; nobody waits for it to arrive.
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
// - Compute in one mode. Units run in the default floating-point mode, whatever the caller's is, which is restored.
//   Workers are made in it, and threads inherit the mode in which they are made.
//
// - Leave quietly. Workers are detached, block all signals, touch nothing of Python, and use only the pool, which is
//   never destroyed: neither interpreter exit nor Ctrl-C has to wait for them.

#include "pool.hpp"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
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
constexpr int MOST_WORKERS = 255;

inline void pause() noexcept {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

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
        unit_ = unit;
        job_ = job;
        backwards_ = backwards;
        ranges_ = helpers + 1;
        for (int r = 0; r < ranges_; ++r) {
            range_[r].first = units * r / ranges_;
            range_[r].size = units * (r + 1) / ranges_ - range_[r].first;
            range_[r].claimed.store(0, std::memory_order_relaxed);
        }
        state_.store(OPEN | static_cast<std::uint64_t>(helpers) << LIMIT, std::memory_order_release);
        wake(helpers);

        const auto start = Clock::now();
        const std::ptrdiff_t mine = claim(0);
        const auto done = Clock::now();
        state_.fetch_and(~OPEN, std::memory_order_acq_rel);
        wait_until_left();
        const auto waited = Clock::now() - done;
        if (waited > LONG_WAIT + (mine > 0 ? 2 * (done - start) / mine : done - start)) rest();
        taken_.store(false, std::memory_order_release);
        return true;
    }

    int workers() const noexcept { return workers_.load(std::memory_order_relaxed); }

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

    struct alignas(64) Range {
        std::ptrdiff_t first, size;
        std::atomic<std::ptrdiff_t> claimed;
    };

    unit_fn unit_ = nullptr;  // of the open job, as is what follows
    void* job_ = nullptr;
    bool backwards_ = false;
    int ranges_ = 0;
    Range range_[MOST_WORKERS + 1];

    std::mutex mutex_;
    std::condition_variable call_;  // calls_ went up
    std::condition_variable left_;  // the last worker left a closed job
    std::atomic<int> sleepers_{0};
    bool waiting_ = false;

    // Claim units and run them, from one's own range first, until none are left; return how many they were.
    std::ptrdiff_t claim(int own) noexcept {
        std::ptrdiff_t done = 0;
        for (int r = 0; r < ranges_; ++r) {
            Range& range = range_[(own + r) % ranges_];
            for (std::ptrdiff_t i; (i = range.claimed.fetch_add(1, std::memory_order_relaxed)) < range.size; ++done)
                unit_(job_, range.first + (backwards_ ? range.size - 1 - i : i));
        }
        return done;
    }

    bool enter() noexcept {
        std::uint64_t state = state_.load(std::memory_order_relaxed);
        do {
            if (!(state & OPEN) || (state & INSIDE) >= (state & ~OPEN) >> LIMIT) return false;
        } while (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_relaxed));
        return true;
    }

    void leave() noexcept {
        const std::uint64_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
        if ((before & OPEN) || (before & INSIDE) != 1) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (waiting_) left_.notify_one();
    }

    bool empty() const noexcept { return (state_.load(std::memory_order_acquire) & INSIDE) == 0; }

    void wait_until_left() noexcept {
        for (const auto start = Clock::now(); Clock::now() - start < SPIN / 4; pause())
            if (empty()) return;
        std::unique_lock<std::mutex> lock(mutex_);
        waiting_ = true;
        left_.wait(lock, [this] { return empty(); });
        waiting_ = false;
    }

    void wake(int helpers) noexcept {
        calls_.fetch_add(1, std::memory_order_seq_cst);
        const int asleep = sleepers_.load(std::memory_order_seq_cst);
        if (asleep == 0) return;
        const int awake = workers() - asleep;
        { const std::lock_guard<std::mutex> lock(mutex_); }  // whoever saw the old count of calls sleeps by now
        for (int i = awake; i < helpers; ++i) call_.notify_one();
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
            for (; count < wanted; ++count) std::thread(&Pool::work, this, count).detach();
        } catch (...) {  // no more threads, or no memory for them: fewer will do
        }
        pthread_sigmask(SIG_SETMASK, &old, nullptr);
        workers_.store(count, std::memory_order_relaxed);
        return count;
    }

    void work(int index) noexcept {
        std::uint32_t seen = calls_.load(std::memory_order_acquire) - 1;
        for (;;) {
            await_call(seen);
            seen = calls_.load(std::memory_order_acquire);
            if (enter()) {
                claim(1 + index % (ranges_ - 1));
                leave();
            }
        }
    }

    // Return when there was a call after the one that was seen.
    void await_call(std::uint32_t seen) noexcept {
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
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        call_.wait(lock, [&] { return calls_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }

    static std::int64_t ticks() noexcept { return Clock::now().time_since_epoch().count(); }

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

void parallel(unit_fn unit, void* job, std::ptrdiff_t units, int threads, bool backwards) noexcept {
    Pool* p = threads > 1 && units > 1 ? pool() : nullptr;
    const FloatMode mode;
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

}  // namespace fastbn

// The one name that the module exports: threadpoolctl knows the library of the pool by it.
extern "C" __attribute__((visibility("default"))) int fastbn_workers() { return fastbn::workers(); }
