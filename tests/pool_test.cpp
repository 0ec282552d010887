// Many callers, uneven units, different numbers of threads, floating-point modes, scratch memory: to be built with a
// sanitizer.
#include "pool.hpp"

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

struct Job {
    std::vector<int> seen;      // plain memory: a unit that ran twice, or late, is a race
    std::atomic<long> total{0};
};

void unit(void* data, std::ptrdiff_t i) {
    Job* job = static_cast<Job*>(data);
    job->seen[static_cast<std::size_t>(i)] += 1;
    volatile long sink = 0;
    for (std::ptrdiff_t k = 0; k < 200 * (i % 7); ++k) sink = sink + k;
    job->total.fetch_add(i, std::memory_order_relaxed);
}

int call(std::ptrdiff_t units, int threads) {
    Job job;
    job.seen.assign(static_cast<std::size_t>(units), 0);
    fastbn::parallel(unit, &job, units, threads, units % 2 == 0);
    for (int seen : job.seen)
        if (seen != 1) return 1;
    return job.total != units * (units - 1) / 2;
}

// A mode that is not the default one, in all that a program can easily set.
void set_another_mode() {
    std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
    fastbn::write_mode(fastbn::read_mode() | 0x8040);  // subnormal numbers count as zero
#elif defined(__aarch64__)
    fastbn::write_mode(fastbn::read_mode() | 1 << 24);
#endif
}

bool in_default_mode() {
    volatile float tiny = 1e-39f, one = 1, third = 3;
    volatile float down = -one / third, up = one / third;
    return tiny * one != 0 && down == -up;
}

void check_mode(void* wrong, std::ptrdiff_t) {
    if (!in_default_mode()) ++*static_cast<std::atomic<int>*>(wrong);
    std::this_thread::sleep_for(std::chrono::microseconds(100));  // so that others take units too
}

// Units run in the default mode on the workers, which a thread in another mode made, and on that thread, which keeps it.
int modes() {
    std::atomic<int> wrong{0};
    set_another_mode();
    for (int threads : {4, 4, 1}) {
        fastbn::parallel(check_mode, &wrong, 16, threads, false);
        if (in_default_mode()) ++wrong;
    }
    {
        const fastbn::FloatMode mode;
        if (!in_default_mode()) ++wrong;
        const fastbn::FloatMode again;
        if (!in_default_mode()) ++wrong;
    }
    if (in_default_mode()) ++wrong;
    fastbn::write_mode(fastbn::DEFAULT_MODE);
    std::fesetround(FE_TONEAREST);
    return wrong;
}

struct Crowd {
    std::atomic<int> inside{0}, most{0};
};

void linger(void* data, std::ptrdiff_t) {
    Crowd* crowd = static_cast<Crowd*>(data);
    const int now = ++crowd->inside;
    for (int most = crowd->most; now > most && !crowd->most.compare_exchange_weak(most, now);) {}
    std::this_thread::sleep_for(std::chrono::microseconds(300));
    --crowd->inside;
}

void nothing(void*, std::ptrdiff_t) {}

// A job for two threads has no more, though the job before it woke eight, which come late.
int limits() {
    int wrong = 0, pairs = 0;
    for (int round = 0; round < 100 && pairs < 10; ++round) {
        Crowd crowd;
        fastbn::parallel(nothing, nullptr, 8, 8, false);
        fastbn::parallel(linger, &crowd, 16, 2, false);
        wrong += crowd.most > 2;
        pairs += crowd.most >= 2;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));  // so that the workers sleep
    }
    return wrong + (pairs == 0);
}

// What is too much to keep goes at the end of a call, the rest on demand: the caller's at once, another thread's when it
// next needs some, or ends.
int memory() {
    constexpr std::size_t KIB = 1 << 10;
    int wrong = 0;
    auto use = [&wrong](std::size_t bytes) {
        char* p = static_cast<char*>(fastbn::scratch(bytes));
        wrong += p == nullptr || reinterpret_cast<std::uintptr_t>(p) % 64 != 0;
        if (p != nullptr) p[0] = p[bytes - 1] = 1;
    };
    use(8 << 20);
    fastbn::end_scratch();
    wrong += fastbn::release_scratch() != 0;
    use(1000 * KIB);
    fastbn::end_scratch();
    use(10);
    wrong += fastbn::release_scratch() != 1024 * KIB;
    wrong += fastbn::release_scratch() != 0;
    wrong += fastbn::scratch(SIZE_MAX) != nullptr;

    std::atomic<int> turn{0};
    std::thread other([&] {
        use(1000 * KIB);
        turn = 1;
        while (turn != 2) std::this_thread::yield();
        use(10);
        wrong += fastbn::release_scratch() != 64 * KIB;
        use(10);
    });
    while (turn != 1) std::this_thread::yield();
    fastbn::release_scratch();
    turn = 2;
    other.join();
    return wrong;
}

}  // namespace

int main() {
    std::atomic<int> wrong{modes() + limits() + memory()};
    for (int round = 0; round < 20; ++round) {
        std::vector<std::thread> callers;
        for (int t = 0; t < 4; ++t)
            callers.emplace_back([&wrong, t] {
                for (int i = 0; i < 50; ++i) wrong += call(1 + (i * 13 + t * 7) % 97, 1 + (i + t) % 6);
            });
        for (auto& caller : callers) caller.join();
        std::this_thread::sleep_for(std::chrono::milliseconds(round % 3));
    }
    std::printf("wrong: %d, workers: %d\n", wrong.load(), fastbn::workers());
    return wrong.load() != 0;
}
