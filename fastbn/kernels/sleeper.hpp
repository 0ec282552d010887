// How a thread of the pool sleeps, and is woken.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace fastbn {

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

}  // namespace fastbn
