#include "pool.hpp"
#include <cstdlib>
namespace fastbn {
void parallel(unit_fn unit, void* job, std::ptrdiff_t units, int) {
    for (std::ptrdiff_t i = 0; i < units; ++i) unit(job, i);
}
struct Scratch { void* p = nullptr; std::size_t n = 0; ~Scratch() { std::free(p); } };
void* scratch(std::size_t bytes) {
    static thread_local Scratch s;
    if (bytes > s.n) { std::free(s.p); s.n = (bytes + 65535) / 65536 * 65536; s.p = std::aligned_alloc(64, s.n); }
    return s.p;
}
}
