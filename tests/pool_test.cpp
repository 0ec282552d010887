// Many callers, uneven units, different numbers of threads, floating-point modes, scratch memory, who is woken and where,
// hosts: to be built with a sanitizer.
#include "pool.hpp"
#include "scratch.hpp"

#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

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
    fastbn::parallel(unit, &job, units, threads, units % 2 == 0, units % 3 << 20);
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

void sleep_until_all_sleep() {
    while (fastbn::awake() > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

void short_work(void*, std::ptrdiff_t) {
    volatile long sink = 0;
    for (int k = 0; k < 500; ++k) sink = sink + k;
}

#if defined(__linux__)
bool has_one_core() {
    cpu_set_t mine;
    return sched_getaffinity(0, sizeof mine, &mine) == 0 && CPU_COUNT(&mine) == 1;
}
#else
bool has_one_core() { return false; }
#endif

// Work of microseconds wakes nobody; where such calls follow each other, a worker is woken in the end. A wake shows in
// what it has cost. Another process may make any unit long, and the pool may stay on one thread for a while.
int wakes() {
    auto woken_by = [](int most) {
        sleep_until_all_sleep();
        const double before = fastbn::waking().cost;
        for (int i = 0; i < most && fastbn::waking().cost == before; ++i) fastbn::parallel(short_work, nullptr, 3, 2, false);
        return fastbn::waking().cost != before;
    };
    int single = 0, loops = 0;
    for (int round = 0; round < 20; ++round) single += woken_by(1);
    for (int round = 0; round < 30 && loops < 3 && !has_one_core(); ++round) {
        const bool woken = woken_by(10000);
        loops += woken;
        if (!woken) std::this_thread::sleep_for(std::chrono::milliseconds(300));
    }
    const fastbn::Waking waking = fastbn::waking();
    const bool sound = waking.cost > 0 && waking.cost <= 1e-3 && waking.delay > 0 && waking.delay <= 1e-3;
    return (single > 10) + (loops < 3 && !has_one_core()) + !sound;
}

#if defined(__linux__)
// What a job sees of the worker that helps with it.
struct Sighting {
    std::thread::id caller = std::this_thread::get_id();
    std::mutex mutex;
    int from = -1;  // core of the caller after its first unit
    bool came = false;
    cpu_set_t cores{};
    const cpu_set_t* bind = nullptr;  // the worker to these
};

void look(void* data, std::ptrdiff_t) {
    Sighting& seen = *static_cast<Sighting*>(data);
    std::this_thread::sleep_for(std::chrono::microseconds(300));
    const std::lock_guard<std::mutex> lock(seen.mutex);
    if (std::this_thread::get_id() == seen.caller) {
        if (seen.from < 0) seen.from = sched_getcpu();
    } else if (!seen.came) {
        seen.came = true;
        sched_getaffinity(0, sizeof seen.cores, &seen.cores);
        if (seen.bind != nullptr) sched_setaffinity(0, sizeof *seen.bind, seen.bind);
    }
}

// Wake a worker and look at it; false where none comes in a second.
bool sight(Sighting& seen) {
    for (int round = 0; round < 200; ++round) {
        sleep_until_all_sleep();
        seen.from = -1;
        fastbn::parallel(look, &seen, 8, 2, false);
        if (seen.came) return true;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
}

// A woken worker may use the caller's cores but the one where the caller is; whom somebody else has bound stays there;
// a caller that is bound to one core wakes nobody, and finds workers as before when it is not any more.
int cores() {
    cpu_set_t all;
    if (sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) < 2) return 0;
    auto elsewhere = [&all] {
        for (int round = 0; round < 20; ++round) {  // the caller may have moved between its unit and the wake
            Sighting seen;
            cpu_set_t both;
            if (!sight(seen)) return false;
            CPU_AND(&both, &all, &seen.cores);
            if (CPU_COUNT(&both) > 0 && CPU_EQUAL(&both, &seen.cores) && !CPU_ISSET(seen.from, &seen.cores)) return true;
        }
        return false;
    };
    int wrong = !elsewhere();

    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    sleep_until_all_sleep();
    sched_setaffinity(0, sizeof one, &one);
    for (int round = 0; round < 5; ++round) {
        Sighting seen;
        fastbn::parallel(look, &seen, 8, 2, false);
        wrong += seen.came || fastbn::awake() != 0;
    }
    sched_setaffinity(0, sizeof all, &all);
    wrong += !elsewhere();

    Sighting before;
    if (!sight(before)) return wrong + 1;
    CPU_XOR(&one, &all, &before.cores);  // cores that the pool has not given it
    if (CPU_COUNT(&one) == 0) return wrong;
    before.came = false;
    before.bind = &one;
    if (!sight(before)) return wrong + 1;
    for (int round = 0; round < 10; ++round) {  // unless the pool had by then given it the very same
        Sighting after;
        wrong += !sight(after) || !(CPU_EQUAL(&after.cores, &one) || CPU_EQUAL(&before.cores, &one));
    }
    return wrong;
}
#else
int cores() { return 0; }
#endif

// A host that runs members on threads of its own, the last one first, and leaves out what `skip` divides.
struct Team {
    int skip, most = 0;
};

void run_team(void* data, int threads, fastbn::member_fn member, void* job) {
    Team& team = *static_cast<Team*>(data);
    std::vector<std::thread> members;
    team.most = threads;
    for (int i = threads - 1; i >= 0; --i)
        if (i % team.skip != 0)
            members.emplace_back([=] {
                set_another_mode();
                member(job, i);
            });
    for (auto& one : members) one.join();
}

// The units of a job run once each, whatever members come, in the default mode; the pool has no part in it.
int hosts() {
    int wrong = 0;
    const int before = fastbn::workers();
    for (int skip : {1, 2, 3, 100}) {
        for (int units : {2, 3, 17, 300}) {
            Team team{skip};
            const fastbn::Host host{run_team, &team};
            Job job;
            job.seen.assign(static_cast<std::size_t>(units), 0);
            fastbn::parallel(unit, &job, units, 5, skip == 2, 0, &host);
            for (int seen : job.seen) wrong += seen != 1;
            wrong += team.most != (units < 5 ? units : 5);
        }
        std::atomic<int> modes{0};
        Team team{skip};
        const fastbn::Host host{run_team, &team};
        fastbn::parallel(check_mode, &modes, 16, 4, false, 0, &host);
        wrong += modes;
        team.most = 0;
        fastbn::parallel(nothing, nullptr, 16, 1, false, 0, &host);  // one thread needs no team
        fastbn::parallel(nothing, nullptr, 1, 4, false, 0, &host);
        wrong += team.most;
        fastbn::parallel(nothing, nullptr, 1000, 1000, false, 0, &host);
        wrong += team.most > 256;
    }
    return wrong + (fastbn::workers() != before);
}

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
    return wrong + (pairs == 0 && !has_one_core());
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

    // What was withdrawn is there again afterwards, whatever was used and given back in between.
    char* outer = static_cast<char*>(fastbn::scratch(100));
    outer[0] = 7;
    void* withdrawn = fastbn::withdraw_scratch();
    use(100);
    fastbn::release_scratch();
    use(1000 * KIB);
    fastbn::restore_scratch(withdrawn);
    wrong += outer[0] != 7;  // and not freed: it is given back by the next call
    fastbn::release_scratch();

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
    // In this order: with more workers than cores the pool mostly stays on one thread.
    const int parts[] = {hosts(), wakes(), cores(), modes(), limits(), memory()};
    std::atomic<int> wrong{0};
    for (int part : parts) {
        std::printf("%d ", part);
        wrong += part;
    }
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
