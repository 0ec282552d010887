# cython: freethreading_compatible=True
"""What the processor and the operating system support, by code compiled for the baseline.

The processor is asked itself: what compilers offer for it knows other names in each of them.
"""

cdef extern from *:
    """
    struct Feature { const char* name; bool present; };
    #if defined(__x86_64__)
    #include <cpuid.h>
    static int fastbn_features(Feature* found) {
        unsigned a, b, c, d, b7, c7, d7;
        // Leaves the processor does not have read as 0.
        if (!__get_cpuid(1, &a, &b, &c, &d)) c = 0;
        if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) b7 = 0;
        const auto bit = [](unsigned word, int i) { return (word >> i & 1) != 0; };
        // Registers that the operating system does not save for a process must not be used: it says so in XCR0, which
        // may be read where OSXSAVE is set.
        unsigned saved = 0, high = 0;
        if (bit(c, 27)) __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
        const bool ymm = (saved & 0x06) == 0x06;  // xmm and the upper halves of ymm
        const bool zmm = (saved & 0xe6) == 0xe6;  // and masks, the upper halves of zmm, 16 more registers
        const Feature all[] = {
            { "sse4.2", bit(c, 20) },
            { "popcnt", bit(c, 23) },
            { "avx2", ymm && bit(c, 28) && bit(b7, 5) },
            { "fma", ymm && bit(c, 12) },
            { "f16c", ymm && bit(c, 29) },
            { "bmi2", bit(b7, 8) },
            { "avx512f", zmm && bit(b7, 16) },
            { "avx512dq", zmm && bit(b7, 17) },
            { "avx512bw", zmm && bit(b7, 30) },
            { "avx512vl", zmm && bit(b7, 31) },
        };
        int count = 0;
        for (const Feature& feature : all) found[count++] = feature;
        return count;
    }
    #elif defined(__aarch64__)
    static int fastbn_features(Feature* found) {
        found[0] = { "neon", true };  // part of every one
        return 1;
    }
    #else
    static int fastbn_features(Feature*) { return 0; }
    #endif
    """
    cdef struct Feature:
        const char* name
        bint present
    int fastbn_features(Feature* found)


def features():
    """Names of the features that the kernels may need and this processor has.

    Returns
    -------
    frozenset of str
    """
    cdef Feature[10] found
    cdef int count = fastbn_features(found)
    return frozenset([found[i].name.decode() for i in range(count) if found[i].present])
