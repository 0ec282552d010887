// Pages of large outputs.
//
// New memory has no pages. The system makes each when it is first written: a fault, and a page of zeros, which are in the
// caches then. So what is written to new memory is written there, too, and not past them. And 512 faults for pages of
// 4 KiB take several times as long as one for a page of 2 MiB.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastbn {

constexpr std::ptrdiff_t LARGE = 4 << 20;  // bytes of an output that gets large pages; NumPy's arrays do from there, too

#if defined(__linux__)
inline std::uintptr_t page_size() noexcept {
    static const auto size = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    return size;
}
#endif

// Whether memory was written before, or nobody can say. Its middle speaks for it: at the begin an allocator keeps notes.
inline bool has_pages(std::uintptr_t begin, std::ptrdiff_t bytes) noexcept {
#if defined(__linux__)
    unsigned char found = 0;
    const std::uintptr_t middle = (begin + static_cast<std::uintptr_t>(bytes) / 2) / page_size() * page_size();
    return begin == 0 || mincore(reinterpret_cast<void*>(middle), 1, &found) != 0 || (found & 1) != 0;
#else
    (void)begin, (void)bytes;
    return true;
#endif
}

// Ask for large pages where large memory is new. A system that has none leaves it as it is.
inline void ask_for_large_pages(void* memory, std::ptrdiff_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const auto begin = reinterpret_cast<std::uintptr_t>(memory);
    if (bytes < LARGE || has_pages(begin, bytes)) return;
    const std::uintptr_t page = page_size(), first = (begin + page - 1) / page * page;
    (void)madvise(reinterpret_cast<void*>(first), begin + static_cast<std::uintptr_t>(bytes) - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

}  // namespace fastbn
