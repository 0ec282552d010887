# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, freethreading_compatible=True
"""From a Call to a job of the Numba kernels: a table of C functions, so that NumPy's doors serve these as they serve SIMD's.

All of a job that does not depend on the arrays is made by Python, which compiles what it needs, when a thread first makes such
a call; then it is copied. No Python runs in the calls that follow.
"""

from cpython.exc cimport PyErr_SetObject
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport sqrt
from libc.stdint cimport int64_t, uint32_t, uintptr_t
from libc.string cimport memcpy, memset

from fastbn.kernels._call cimport DONE, FLOAT32, FLOAT64, LEFT, NO_MEMORY, Call, Kernels, Status
from fastbn.kernels._pool cimport (
    end_scratch, enter_default_mode, leave_default_mode, restore_scratch, scratch, withdraw_scratch,
)

cdef extern from "pages.hpp" namespace "fastbn" nogil:
    bint has_pages(uintptr_t begin, Py_ssize_t nbytes) noexcept

cdef extern from "jobs.hpp" namespace "fastbn" nogil:
    enum:
        JOB_WORDS, JOB_BYTES

    cppclass Key:
        int64_t kind, dtype, outer, channels, inner, threads, activation, fresh, kept, residual, dresidual, undone
        bint operator==(const Key&)

    cppclass Template:
        Key key
        int64_t generation
        size_t job_bytes, scratch_bytes
        void (*run)(void*) noexcept nogil
        char* job

    Template* place_of(const Key&)

# The kinds of jobs.
cdef enum:
    STATS, FORWARD, INFERENCE, NORMALIZE, GRAD_SUMS, GRAD_INPUT, BACKWARD

# How each job begins; 0 is NULL, and below 0 is a place in its scratch memory.
HEAD = (
    "x", "dy", "dz", "out", "residual", "dresidual", "kept", "weight", "bias", "mean_lo", "invstd", "var", "mean", "scale", "shift",
    "offset", "slope", "running_mean", "running_var", "batch_mean", "batch_m2", "batch_mean_lo", "sum_dy", "sum_dy_xmu",
    "scratch", "wide_mean", "wide_var", "unusual",
)

cdef struct Head:
    int64_t x, dy, dz, out, residual, dresidual, kept, weight, bias, mean_lo, invstd, var, mean, scale, shift
    int64_t offset, slope, running_mean, running_var, batch_mean, batch_m2, batch_mean_lo, sum_dy, sum_dy_xmu
    int64_t scratch, wide_mean, wide_var, unusual

# How each job ends.
cdef struct Tail:
    int64_t nontemporal, raised
    double eps, momentum, correction, parameter

ctypedef fused C:
    float
    double

cdef enum:
    CUSTOM = 1000  # codes of activations from which they are functions of the user's
    BLOCK = 128  # bytes: the last of the scratch memory, where a function of the user's raised

cdef object make = None, blame = None
cdef int64_t generation = 1
cdef Kernels table


def kernels(maker not None, blamer not None):
    """The table of functions, as a capsule.

    Parameters
    ----------
    maker : callable
        Of the fields of a Key, in their order: returns a job as bytes, the address of what runs it, and bytes of scratch memory.
    blamer : callable
        Of the code of a function of the user's, the kind of the call, its dtype and a block of bytes that the function raised for:
        raises the same.
    """
    global make, blame
    make, blame = maker, blamer
    memset(&table, 0, sizeof(Kernels))
    table.stats, table.normalize, table.inference = stats, normalize, inference
    table.forward, table.backward, table.move_running = forward, backward, move_nothing
    return PyCapsule_New(&table, "fastbn.kernels.Kernels", NULL)


def forget():
    """Make all jobs anew when they are next needed."""
    global generation
    generation += 1


cdef bint learn(Template* t, const Key* k) noexcept with gil:
    """Have a template made; what that raises is left for who runs the call."""
    try:
        job, address, size = make(
            k.kind, k.dtype, k.outer, k.channels, k.inner, k.threads, k.activation, k.fresh, k.kept, k.residual, k.dresidual, k.undone
        )
        t.generation = 0
        t.job_bytes, t.scratch_bytes = len(job), size
        if not sizeof(Head) + sizeof(Tail) < t.job_bytes <= JOB_BYTES or not address:
            raise ValueError(f"a job of {len(job)} bytes, with {size} of scratch memory, run by what lies at {address}")
        memcpy(t.job, <const char*> job, t.job_bytes)
        t.run = <void (*)(void*) noexcept nogil> <size_t> address
        t.key, t.generation = k[0], generation
        return True
    except BaseException as error:
        PyErr_SetObject(type(error), error)
        return False


cdef void tell(const Key* k, const char* block) noexcept with gil:
    """Raise what a function of the user's raised; it is left for who runs the call."""
    try:
        blame(k.activation, k.kind, k.dtype, block[:BLOCK])
    except BaseException as error:
        PyErr_SetObject(type(error), error)


cdef inline int64_t at(const void* p) noexcept nogil:
    return <int64_t> p


cdef bint is_fresh(const Call* call, int64_t dy) noexcept nogil:
    """Whether the outputs are memory of their own, whose cache lines begin at the same elements."""
    cdef int64_t out = at(call.out), second = at(call.dresidual), x = at(call.x), residual = at(call.residual)
    if out == 0 or out == x or out == dy or out == residual:
        return False
    return second == 0 or ((second - out) % 64 == 0 and second != x and second != dy and second != residual)


cdef inline Py_ssize_t size_of(const Call* call) noexcept nogil:
    """Bytes of x, and of the output."""
    return call.outer * call.channels * call.inner * (8 if call.dtype == FLOAT64 else 4 if call.dtype == FLOAT32 else 2)


cdef void enter(const Call* call, int kind, int64_t kept, Head* head) noexcept nogil:
    """What differs from call to call; what the call does not bring stays in scratch memory."""
    cdef int64_t dy = at(call.dy) if kind >= GRAD_SUMS else 0
    head.x, head.dy, head.dz, head.out, head.kept = at(call.x), dy, kept if kept != 0 else dy, at(call.out), kept
    head.residual, head.dresidual = at(call.residual), at(call.dresidual)
    head.weight, head.bias = at(call.weight), at(call.bias)
    head.mean, head.mean_lo, head.invstd, head.var = at(call.mean), at(call.mean_lo), at(call.invstd), at(call.var)
    if call.scale != NULL:
        head.scale = at(call.scale)
    if call.shift != NULL:
        head.shift = at(call.shift)
    if call.batch_mean != NULL:
        head.batch_mean, head.batch_m2, head.batch_mean_lo = at(call.batch_mean), at(call.batch_m2), at(call.batch_mean_lo)
    if call.sum_dy != NULL:
        head.sum_dy, head.sum_dy_xmu = at(call.sum_dy), at(call.sum_dy_xmu)
    if kind == FORWARD:
        head.running_mean, head.wide_mean = at(call.running_mean.data), call.running_mean.is_double
        head.running_var, head.wide_var = at(call.running_var.data), call.running_var.is_double


cdef Status run(Call* call, int kind, Head* found, size_t room, char** more) noexcept nogil:
    """Run a job of a kind; `found` is its head, afterwards. Scratch memory, with `room` bytes at `more`, is the caller's to end."""
    cdef Key key
    cdef Template* t
    cdef int64_t[JOB_WORDS] words
    cdef char* job = <char*> words
    cdef Tail* tail
    cdef char* memory
    cdef char* block
    cdef void* withdrawn
    cdef uint32_t mode
    cdef int64_t kept = 0
    cdef bint fresh = is_fresh(call, at(call.dy) if kind >= GRAD_SUMS else 0), frozen = call.frozen and kind != GRAD_SUMS
    if kind == BACKWARD and fresh and call.activation.is_smooth() and call.dtype <= FLOAT64:  # 16 bits would lose digits
        kept = at(call.dresidual if call.dresidual != NULL else call.out)
    key.kind, key.dtype, key.threads, key.activation = kind, call.dtype, call.threads, call.activation.kind
    key.outer, key.channels, key.inner = call.outer, call.channels, call.inner
    key.fresh, key.kept, key.residual, key.dresidual = fresh, kept != 0, call.residual != NULL, call.dresidual != NULL
    key.undone = call.from_output
    t = place_of(key)
    if (t.generation != generation or not t.key == key) and not learn(t, &key):
        return NO_MEMORY
    memory = <char*> scratch(t.scratch_bytes + room + (16 * call.channels if frozen else 0))
    if memory == NULL:
        return NO_MEMORY
    if more != NULL:
        more[0] = memory + t.scratch_bytes
    memcpy(job, t.job, t.job_bytes)
    enter(call, kind, kept, <Head*> job)
    (<Head*> job).scratch = at(memory)
    if frozen:
        set_constants(call, kind, <Head*> job, memory + t.scratch_bytes)
    tail = <Tail*> (job + t.job_bytes - sizeof(Tail))
    tail.eps, tail.momentum, tail.correction, tail.parameter = call.eps, call.momentum, call.correction, call.activation.parameter
    if tail.nontemporal and not has_pages(<uintptr_t> call.out, size_of(call)):
        tail.nontemporal = 0
    block = memory + t.scratch_bytes - BLOCK
    mode = enter_default_mode()
    if key.activation >= CUSTOM:  # a function of the user's may call fastbn itself: from here on `t` may be another's, too
        withdrawn = withdraw_scratch()
        t.run(job)
        restore_scratch(withdrawn)
    else:
        t.run(job)
    leave_default_mode(mode)
    if found != NULL:
        found[0] = (<Head*> job)[0]
    if key.activation >= CUSTOM and tail.raised:
        tell(&key, block)
        return NO_MEMORY
    return LEFT if (<Head*> job).unusual else DONE


cdef Status stats(Call* call) noexcept nogil:
    """Channels whose sums leave the range are NaN."""
    cdef Status status = run(call, STATS, NULL, 0, NULL)
    end_scratch()
    return NO_MEMORY if status == NO_MEMORY else DONE


cdef Status normalize(Call* call) noexcept nogil:
    cdef Status status = run(call, NORMALIZE, NULL, 0, NULL)
    end_scratch()
    return status


cdef Status inference(Call* call) noexcept nogil:
    cdef Status status
    cdef void* invstd = call.invstd
    if call.var != NULL:
        call.invstd = NULL
    status = run(call, INFERENCE, NULL, 0, NULL)
    end_scratch()
    call.invstd = invstd
    if call.var != NULL and invstd != NULL:
        if call.dtype == FLOAT64:
            find_deviations(<const double*> call.var, <double*> invstd, call)
        else:
            find_deviations(<const float*> call.var, <float*> invstd, call)
    return status


cdef void find_deviations(const C* var, C* invstd, const Call* call) noexcept nogil:
    cdef Py_ssize_t c
    cdef uint32_t mode = enter_default_mode()
    for c in range(call.channels):
        invstd[c] = <C> (1 / sqrt(<double> var[c] + call.eps))
    leave_default_mode(mode)


cdef Status forward(Call* call) noexcept nogil:
    """All channels are left, if one is."""
    cdef Head head
    cdef char* left
    cdef Status status = run(call, FORWARD, &head, call.channels, &left)
    if status == LEFT:
        memset(left, 1, call.channels)
        call.left, call.batch_mean, call.batch_m2 = left, <double*> head.batch_mean, <double*> head.batch_m2
    else:
        end_scratch()
    return status


cdef void move_nothing(Call* call) noexcept nogil:
    """Move what is not of channels that were left, of which there are none."""


cdef Status backward(Call* call) noexcept nogil:
    cdef Head head
    cdef Status status = DONE
    cdef Call sums
    cdef bint summed = call.dweight != NULL or call.dbias != NULL or call.sum_dy != NULL
    if not call.frozen and call.out != NULL:
        status = run(call, BACKWARD, &head, 0, NULL)
        if status == DONE:
            finish(call, &head)
    elif summed or not call.frozen:
        sums = call[0]
        sums.out = sums.dresidual = NULL
        status = run(&sums, GRAD_SUMS, &head, 0, NULL)
        if status == DONE:
            finish(call, &head)
    if status == DONE and call.frozen and call.out != NULL:
        status = map_frozen(call)
    end_scratch()
    return status


cdef Status map_frozen(Call* call) noexcept nogil:
    """dx and the residual's gradient, through statistics that are constants."""
    cdef Call after = call[0]
    if call.activation.kind != 0:
        return run(&after, GRAD_INPUT, NULL, 0, NULL)
    after.x, after.dy, after.residual = call.dy, NULL, NULL
    return run(&after, NORMALIZE, NULL, 0, NULL)


cdef void set_constants(const Call* call, int kind, Head* head, char* room) noexcept nogil:
    """The vectors of `map_frozen` that the call does not have."""
    cdef size_t item = 8 if call.dtype == FLOAT64 else 4
    cdef Py_ssize_t c
    memset(room, 0, 2 * call.channels * item)
    if kind == NORMALIZE:  # scale * (dy - 0) + 0
        head.mean = head.shift = at(room)
        return
    for c in range(call.channels):  # scale * (dz - 0 - (x - mean) * 0), where -0 leaves the sign of dz
        room[(call.channels + c + 1) * item - 1] = <char> 0x80
    head.offset, head.slope = at(room), at(room + call.channels * item)


cdef void finish(Call* call, const Head* head) noexcept nogil:
    """The gradients of weight and bias, from the sums."""
    cdef uint32_t mode = enter_default_mode()
    if call.dtype == FLOAT64:
        round_sums(call, <const double*> call.invstd, head, <double*> call.dweight, <double*> call.dbias)
    else:
        round_sums(call, <const float*> call.invstd, head, <float*> call.dweight, <float*> call.dbias)
    leave_default_mode(mode)


cdef void round_sums(const Call* call, const C* invstd, const Head* head, C* dweight, C* dbias) noexcept nogil:
    cdef const double* sum_dy = <const double*> head.sum_dy
    cdef const double* sum_dy_xmu = <const double*> head.sum_dy_xmu
    cdef Py_ssize_t c
    for c in range(call.channels):
        if dbias != NULL:
            dbias[c] = <C> sum_dy[c]
        if dweight != NULL:
            dweight[c] = <C> (sum_dy_xmu[c] * invstd[c])
