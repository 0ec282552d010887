"""Python threads for the units of a call, where the compiled pool was not built.

They run the units without the GIL, and claim them from an atomic counter. Numba's own threads would save these few lines, but
cannot be made safe from here: a launch through workqueue that meets one of the user's own code aborts the process, a launch
through OpenMP in a forked child kills the child, and OpenMP waits for a thread that is preempted before it has begun.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache, partial
from queue import SimpleQueue
from typing import Any

from numba import types
from numba.core.compiler_lock import global_compiler_lock

from fastbn.kernels import numba_cache
from fastbn.kernels.numba_lanes import call2, claim

try:
    from fastbn.kernels import _pool
except ImportError:  # built without a compiler
    _pool = None


# ---- The door: a C function that runs units ----

_RUN = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3, *[ctypes.c_int] * 2, *[ctypes.c_int64] * 2)
_WORK = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)
_local = threading.local()


@cache
def address() -> int:
    """The C function ``parallel(unit, job, units, threads, reverse, nbytes, host)``: the compiled pool's, or `_parallel`."""
    if _pool is None:
        return ctypes.cast(_parallel, ctypes.c_void_p).value or 0
    capsule = _pool.__pyx_capi__["parallel"]
    name, pointer = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(pointer(capsule, name(capsule)))


def _take(unit: int, job: int, units: int, reverse: int, counter: int) -> None:
    """Run units until none is left."""
    number = claim(counter)
    while number < units:
        call2(unit, job, units - 1 - number if reverse else number)
        number = claim(counter)


@cache
def _taker() -> Callable[..., None]:
    return _WORK(numba_cache.compiled(_take, types.void(*[types.intp] * 5), "take"))


def _run_units(unit: int, job: int, units: int, threads: int, reverse: int, nbytes: int, host: int) -> None:
    counter = ctypes.c_int64()
    try:
        _share(partial(_taker(), unit, job, units, reverse, ctypes.addressof(counter)), min(threads, units) - 1)
    except BaseException as error:  # an interrupt: raised where Python goes on
        _local.error = error
    if counter.value < units:
        _taker()(unit, job, units, reverse, ctypes.addressof(counter))


_parallel = _RUN(_run_units)


def raise_interrupt() -> None:
    """Raise what interrupted this thread's last call."""
    error, _local.error = getattr(_local, "error", None), None
    if error is not None:
        raise error


# ---- The threads ----


class _Ticket:
    """A share in a job, for one other thread: who holds the lock runs the job, or ends it."""

    def __init__(self, run: Callable[[], Any], errors: list[BaseException]):
        self._run: Callable[[], Any] | None = run
        self._errors = errors
        self._lock = threading.Lock()

    def help(self) -> None:
        with self._lock:
            try:
                if self._run is not None:
                    self._run()
            except BaseException as error:  # the caller's to handle: this thread goes on
                self._errors.append(error)

    def end(self) -> None:
        """Wait for a thread that has begun; one that has not will do nothing. Twice is as good as once."""
        with self._lock:
            self._run = None


_tickets: SimpleQueue[_Ticket] = SimpleQueue()
_hiring = threading.Lock()
_workers = 0


def _work(tickets: SimpleQueue[_Ticket]) -> None:
    while True:
        tickets.get().help()


def _hire(wanted: int) -> int:
    """Start threads until there are as many as are wanted; how many of these there are."""
    global _workers
    if _workers < wanted:
        with _hiring:
            try:
                while _workers < wanted:
                    threading.Thread(target=_work, args=(_tickets,), name=f"fastbn-numba-{_workers}", daemon=True).start()
                    _workers += 1
            except RuntimeError:  # too many threads, or the interpreter is shutting down: those there are will do
                pass
    return min(_workers, wanted)


def _share(run: Callable[[], Any], helpers: int) -> None:
    """Call `run` here and, at the same time, in other threads; return or raise when all that began have ended.

    Threads that work for someone else come later, or not at all. What one of them raises is raised here.
    """
    if helpers < 1:
        run()
        return
    errors: list[BaseException] = []
    pending: list[_Ticket] = []
    try:
        for _ in range(_hire(helpers)):
            pending.append(_Ticket(run, errors))
            _tickets.put(pending[-1])
        run()
    except BaseException as error:  # raised below, when no thread writes to the caller's arrays any more
        errors.append(error)
    while pending:
        try:
            pending[-1].end()
            pending.pop()
        except BaseException as interrupt:  # noqa: PERF203  what a signal's handler raises; few tickets
            errors.append(interrupt)
    if errors:
        try:
            raise next((error for error in errors if not isinstance(error, Exception)), errors[0])
        finally:
            errors.clear()  # else the traceback and this list keep each other, and the arrays


def _after_fork() -> None:
    """Forget the threads, which are the parent's."""
    global _tickets, _hiring, _workers
    _tickets, _hiring, _workers = SimpleQueue(), threading.Lock(), 0
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles could never compile.
    os.register_at_fork(before=global_compiler_lock.acquire, after_in_parent=global_compiler_lock.release, after_in_child=_after_fork)
