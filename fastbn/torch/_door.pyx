# cython: freethreading_compatible=True
"""PyTorch's door to the kernels; the work is in door.cpp."""

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int64_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string

from fastbn.kernels._pool cimport end_scratch

cdef extern from "call.hpp" namespace "fastbn" nogil:
    cppclass Kernels:
        pass

cdef extern from "door.hpp" namespace "fastbn::torch" nogil:
    cppclass Counts:
        uint64_t[8][4][2] taken
        uint64_t[8][14] declined
    enum:
        OPERATIONS
        ANSWERS
    const char** TEXTS "fastbn::torch::REASONS"
    int order_of(int64_t dim, const int64_t* sizes, const int64_t* strides) noexcept
    Counts read_counts "fastbn::torch::counts"() noexcept
    void reset_counts() noexcept
    string attach_kernels "fastbn::torch::attach"(const Kernels* kernels, void (*end_scratch)() noexcept nogil) except +
    cbool start_taking "fastbn::torch::start"() except +
    void stop_taking "fastbn::torch::stop"(bint withdraw) except +
    cbool define_own_operators "fastbn::torch::define_operators"() except +
    cbool is_taking "fastbn::torch::is_on"() noexcept
    cbool takes_parts_too "fastbn::torch::takes_parts"() noexcept


# The names of what door.hpp numbers.
OPERATIONS_OF_TORCH = (
    "forward", "inference", "backward", "frozen backward",
    "layer norm forward", "layer norm backward", "group norm forward", "group norm backward",
)
DTYPES = ("float32", "float64", "bfloat16", "float16")
ORDERS = ("contiguous", "channels last", "channels last with gaps", "other")
REASONS = [TEXTS[i].decode() for i in range(ANSWERS)]
assert len(OPERATIONS_OF_TORCH) == OPERATIONS


def attach(kernels):
    """Bring the kernels that will run.

    Parameters
    ----------
    kernels : capsule
        The table of functions of a kernel module.

    Returns
    -------
    str
        Empty, or what the torch of this process lacks.
    """
    cdef const Kernels* table = <const Kernels*> PyCapsule_GetPointer(kernels, "fastbn.kernels.Kernels")
    return attach_kernels(table, end_scratch).decode()


def start():
    """Take ATen's normalizations from here on.

    Returns
    -------
    bool
        False if torch refused.
    """
    return start_taking()


def stop(bint withdraw):
    """Leave it to torch from here on.

    Parameters
    ----------
    withdraw : bool
        Whether no other thread can be on its way to the kernels, so that they may be withdrawn from torch.
    """
    stop_taking(withdraw)


def define_operators():
    """Define fastbn's own operators, fastbn::batch_norm_forward and fastbn::batch_norm_backward.

    Returns
    -------
    bool
        False if torch refused.
    """
    return define_own_operators()


def is_on():
    """Whether calls are taken.

    Returns
    -------
    bool
    """
    return is_taking()


def takes_parts():
    """Whether layer and group norm are taken, too, where the kernels are attached.

    Returns
    -------
    bool
        False if this torch lacks what is needed to leave calls to it.
    """
    return takes_parts_too()


def counts():
    """What ran where, and what was left to torch.

    Returns
    -------
    taken : dict
        (operation, dtype, order of memory) -> number of calls.
    declined : dict
        (operation, reason) -> number of calls.
    """
    cdef Counts now = read_counts()
    cdef int operation, dtype, order, reason
    taken, declined = {}, {}
    for operation in range(len(OPERATIONS_OF_TORCH)):
        for dtype in range(len(DTYPES)):
            for order in range(2):
                if now.taken[operation][dtype][order]:
                    taken[OPERATIONS_OF_TORCH[operation], DTYPES[dtype], ORDERS[order]] = now.taken[operation][dtype][order]
        for reason in range(len(REASONS)):
            if now.declined[operation][reason]:
                declined[OPERATIONS_OF_TORCH[operation], REASONS[reason]] = now.declined[operation][reason]
    return taken, declined


def reset():
    """Set all counts to 0."""
    reset_counts()


def order(sizes, strides):
    """How torch sees an order of memory.

    Parameters
    ----------
    sizes, strides : sequence of int
        In elements; of 16 dimensions at most.

    Returns
    -------
    str
        "contiguous", "channels last", or "channels last with gaps" and "other", which are copied before they are normalized.
    """
    cdef int64_t[16] n, s
    cdef int d, dim = len(sizes)
    if not dim == len(strides) <= 16:
        raise ValueError(f"sizes and strides must be of the same 16 dimensions at most, got {dim} and {len(strides)}")
    for d in range(dim):
        n[d], s[d] = sizes[d], strides[d]
    return ORDERS[order_of(dim, n, s)]
