"""The table of whole calls that the module exports: which is chosen by dtype, and by whether something follows."""

ctypedef Status (*work_fn)(Work* job) noexcept nogil

# Of each dtype, plain and active.
cdef work_fn[<int> DTYPES][1] STATS
cdef work_fn[<int> DTYPES][2] GRAD_SUMS, NORMALIZE, GRAD_INPUT, INFERENCE, FORWARD, BACKWARD, PARTS_FORWARD, PARTS_BACKWARD


cdef void register(T* tag, Dtype dtype) noexcept:
    STATS[<int> dtype][:] = [<work_fn> sum_call[Stats, T]]
    GRAD_SUMS[<int> dtype][:] = [<work_fn> sum_call[GradSums, T], <work_fn> sum_call[FusedGradSums, T]]
    NORMALIZE[<int> dtype][:] = [<work_fn> map_call[Normalize, T], <work_fn> map_call[FusedNormalize, T]]
    GRAD_INPUT[<int> dtype][:] = [<work_fn> map_call[GradInput, T], <work_fn> map_call[FusedGradInput, T]]
    INFERENCE[<int> dtype][:] = [<work_fn> inference_call[Normalize, T], <work_fn> inference_call[FusedNormalize, T]]
    FORWARD[<int> dtype][:] = [<work_fn> forward_call[Normalize, T], <work_fn> forward_call[FusedNormalize, T]]
    BACKWARD[<int> dtype][:] = [<work_fn> backward_call[GradInput, T], <work_fn> backward_call[FusedGradInput, T]]
    PARTS_FORWARD[<int> dtype][:] = [<work_fn> forward_parts[Normalize, T], <work_fn> forward_parts[FusedNormalize, T]]
    PARTS_BACKWARD[<int> dtype][:] = [<work_fn> backward_parts[GradInput, T], <work_fn> backward_parts[FusedGradInput, T]]

register[float](NULL, Dtype.FLOAT32)
register[double](NULL, Dtype.FLOAT64)
register[bf16](NULL, Dtype.BFLOAT16)
register[f16](NULL, Dtype.FLOAT16)


cdef Status run(work_fn function, Call* call) noexcept nogil:
    """Run a call, in the default floating-point mode; it leaves nothing in the scratch memory that its caller does not need."""
    cdef uint32_t mode = enter_default_mode()
    cdef Work job
    cdef Status status
    memset(&job, 0, sizeof(Work))
    (<Call*> &job)[0] = call[0]
    status = function(&job)
    if status == LEFT:
        call.batch_mean, call.batch_m2, call.left = job.batch_mean, job.batch_m2, job.left
    else:
        end_scratch()
    leave_default_mode(mode)
    return status


cdef Status stats(Call* call) noexcept nogil:
    return run(STATS[<int> call.dtype][0], call)


cdef Status normalize(Call* call) noexcept nogil:
    return run(NORMALIZE[<int> call.dtype][is_fused(call)], call)


cdef Status grad_sums(Call* call) noexcept nogil:
    return run(GRAD_SUMS[<int> call.dtype][is_fused(call)], call)


cdef Status grad_input(Call* call) noexcept nogil:
    return run(GRAD_INPUT[<int> call.dtype][is_fused(call)], call)


cdef Status inference(Call* call) noexcept nogil:
    return run(INFERENCE[<int> call.dtype][is_fused(call)], call)


cdef Status forward(Call* call) noexcept nogil:
    return run(FORWARD[<int> call.dtype][is_fused(call)], call)


cdef Status backward(Call* call) noexcept nogil:
    return run(BACKWARD[<int> call.dtype][is_fused(call)], call)


cdef Status parts_forward(Call* call) noexcept nogil:
    return run(PARTS_FORWARD[<int> call.dtype][is_fused(call)], call)


cdef Status parts_backward(Call* call) noexcept nogil:
    return run(PARTS_BACKWARD[<int> call.dtype][is_fused(call)], call)


cdef Kernels TABLE
TABLE.parts_forward, TABLE.parts_backward = parts_forward, parts_backward
TABLE.stats, TABLE.normalize, TABLE.grad_sums, TABLE.grad_input = stats, normalize, grad_sums, grad_input
TABLE.inference, TABLE.forward, TABLE.backward, TABLE.move_running = inference, forward, backward, move_running
KERNELS = PyCapsule_New(&TABLE, "fastbn.kernels.Kernels", NULL)
