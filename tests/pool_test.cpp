// Many callers, uneven units, different numbers of threads: to be built with a sanitizer.
#include "pool.hpp"

#include <atomic>
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

}  // namespace

int main() {
    std::atomic<int> wrong{0};
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
