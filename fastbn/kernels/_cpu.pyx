# cython: freethreading_compatible=True
"""What the processor and the operating system support, by code compiled for the baseline."""

cdef extern from *:
    """
    #include <cstddef>
    #if defined(__x86_64__)
    #define FASTBN_FEATURE(name) { name, __builtin_cpu_supports(name) != 0 }
    #endif
    struct Feature { const char* name; bool present; };
    static size_t fastbn_features(const Feature** found) {
    #if defined(__x86_64__)
        static const Feature all[] = {
            FASTBN_FEATURE("sse4.2"), FASTBN_FEATURE("popcnt"), FASTBN_FEATURE("avx2"), FASTBN_FEATURE("fma"),
            FASTBN_FEATURE("f16c"), FASTBN_FEATURE("bmi2"), FASTBN_FEATURE("avx512f"), FASTBN_FEATURE("avx512bw"),
            FASTBN_FEATURE("avx512dq"), FASTBN_FEATURE("avx512vl"),
        };
    #elif defined(__aarch64__)
        static const Feature all[] = { { "neon", true } };
    #else
        static const Feature all[] = { { "", false } };
    #endif
        *found = all;
        return sizeof all / sizeof all[0];
    }
    """
    cdef struct Feature:
        const char* name
        bint present
    size_t fastbn_features(const Feature** found)


def features():
    """Names of the features that the kernels may need and this processor has.

    Returns
    -------
    frozenset of str
    """
    cdef const Feature* found = NULL
    cdef size_t count = fastbn_features(&found)
    return frozenset([found[i].name.decode() for i in range(count) if found[i].present])
