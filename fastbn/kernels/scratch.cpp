// Memory that a thread keeps from call to call: kept by thread, given back when asked.

#include "scratch.hpp"

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastbn {
namespace {

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

void* withdraw_scratch() noexcept {
    void* mine = scratch_key.get();
    scratch_key.set(nullptr);
    return mine;
}

void restore_scratch(void* withdrawn) noexcept {
    scratch_key.clear();
    scratch_key.set(static_cast<Scratch*>(withdrawn));
}

std::size_t release_scratch() noexcept {
    releases.fetch_add(1, std::memory_order_relaxed);
    const Scratch* mine = scratch_key.get();
    const std::size_t size = mine == nullptr ? 0 : mine->size;
    scratch_key.clear();
    return size;
}

}  // namespace fastbn
