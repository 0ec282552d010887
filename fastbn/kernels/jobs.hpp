// What _jobs.pyx keeps for each kind of call that a thread has made: see there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastbn {

// A call without its arrays. No padding: compared as bytes.
struct Key {
    std::int64_t kind, dtype, outer, channels, inner, threads, activation;
    std::int64_t fresh, kept, residual, dresidual, undone;

    bool operator==(const Key& other) const noexcept { return std::memcmp(this, &other, sizeof(Key)) == 0; }

    std::size_t hash() const noexcept {
        std::uint64_t h = 0;
        for (const std::int64_t* p = &kind; p <= &undone; ++p) h = (h ^ static_cast<std::uint64_t>(*p)) * 0x9e3779b97f4a7c15ull;
        return static_cast<std::size_t>(h >> 32);
    }
};

enum { JOB_WORDS = 128, JOB_BYTES = 8 * JOB_WORDS };  // at most

// The job of such calls, the function that runs it, and the scratch memory that this needs.
struct Template {
    Key key;
    std::int64_t generation;  // 0: none
    std::size_t job_bytes, scratch_bytes;
    void (*run)(void* job);
    alignas(8) char job[JOB_BYTES];
};

// This thread's, for a key: that of another one, if they meet.
inline Template* place_of(const Key& key) noexcept {
    static thread_local Template places[16];
    return &places[key.hash() % 16];
}

}  // namespace fastbn
