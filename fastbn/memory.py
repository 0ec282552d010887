"""Recycled memory for large outputs.

A new large array costs several times the work that fills it: the system hands out its pages one fault at a time,
zeroes them, and takes them back when the array dies. Here a buffer outlives its array and serves the next one of
about the same size.

a) A buffer is lent to one plain array at a time. The array's base is the loan, which every view and every exported
   buffer of the array keeps alive; when the loan dies, nothing can reach the memory any more, and it becomes idle.
b) The buffers that come back, idle and lent ones together, take `FASTBN_POOL_BYTES` at most; of the idle ones those
   that are so for longest go first. What is lent beyond that is not recycled. By default it is a 32nd of the memory, so
   that the 8 workers of a service together hold no more than a quarter, and at most 1 GiB.
c) What was idle for `PERIOD` seconds goes back to the system. A thread sees to it, in a process that makes no more calls
   too; it is there only while there are buffers, sleeps all but a few microseconds, and ends with the process. Where there
   can be none, calls see to it.
d) No Python code runs where a loan dies: an interrupt that arrives there would be lost, because Python ignores what a
   finalizer raises. The ticket of the loan is put on a list, by a method of that list, and the next call looks there.
e) There is no lock. A loan may die anywhere, in a garbage collection or a signal handler in the middle of this
   module too, where a lock of any kind could wait for itself. Instead a buffer changes hands in one operation on a
   dict or list, which is atomic with and without the interpreter lock, and nothing else has to agree with it.
f) A signal handler may raise between any two operations. What is then in nobody's hands goes back to the system, when
   its last reference dies; what is told by a ticket that was lost on its way is found by a look at all that is lent.
g) Sizes are rounded up to an eighth of a power of two, so that batches which differ a little share buffers. At most
   an eighth of a buffer is never touched, and so takes address space but no memory.
"""

from __future__ import annotations

import _thread
import mmap
import os
import sys
import time
import weakref
from collections import deque
from contextlib import suppress
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastbn import cgroup
from fastbn.environment import settings
from fastbn.layout import Array

try:
    from fastbn.kernels import _pool
except ImportError:  # built without a compiler: nobody has scratch memory
    _pool = None

# Below this the memory allocator recycles by itself, and page faults are few.
SMALLEST = 1 << 20

# Seconds from one look at what is idle to the next. What was idle at both is given back.
PERIOD = 5.0

# Private, so that a child process does not write into its parent's arrays.
_PRIVATE: dict[str, Any] = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}

_limit: int | None = settings.pool_bytes  # None until it was looked up
_idle: dict[int, list[tuple[float, mmap.mmap]]] = {}  # by size: when each came back, oldest first
_lent: dict[int, _Ticket] = {}  # by identity
_returned: deque[_Ticket] = deque()
_next_look = 0.0  # when the thread that looks will have done so; 0 where there is none
_looker: object = None  # which thread that is
# The end of a subinterpreter aborts the process where a thread is left.
_has_threads: bool = _pool is None or _pool.in_main_interpreter()
_hits = 0
_misses = 0
_ALONE = 2  # references to a buffer: the ticket's, and that of who counts


class _Loan(Array):
    """All bytes of a buffer. Of a class of its own, because views of a plain array would have the buffer as their base."""


class _Ticket(weakref.ref[_Loan]):
    """What is left when a loan dies: how large it was, and the buffer, if it is to be recycled."""

    __slots__ = ("mapping", "size")
    size: int
    mapping: mmap.mmap | None


def empty_like(x: Array, order: Literal["K", "C"] = "K") -> Array:
    """Make an array of the shape and dtype of another; a large one in recycled memory.

    Parameters
    ----------
    x : ndarray
        Of a dtype without Python objects.
    order : "K" or "C"
        Memory order: that of `x`, or C.

    Returns
    -------
    ndarray
        As ``numpy.empty_like(x, order=order, subok=False)``. From 1 MiB to the pool's limit its memory is recycled:
        it starts on a page, and is reused once no array and no view needs it.

    Raises
    ------
    MemoryError
        If there is no memory.

    Examples
    --------
    >>> from fastbn import memory
    >>> x = np.zeros((2, 512, 1024), np.float32)
    >>> y = memory.empty_like(x)
    >>> y.shape, y.dtype, y.ctypes.data % 64
    ((2, 512, 1024), dtype('float32'), 0)
    """
    nbytes = x.nbytes
    if nbytes < SMALLEST:
        return np.empty_like(x, order=order, subok=False)
    size = _rounded(nbytes)
    if size > limit():
        return np.empty_like(x, order=order, subok=False)
    mapping, recycled = _mapping(size)
    loan = _Loan(size, np.uint8, mapping)
    ticket = _Ticket(loan, _returned.append)
    ticket.size, ticket.mapping = size, mapping if recycled else None
    _lent[id(ticket)] = ticket
    if time.monotonic() > _next_look:
        _start_to_look()
    strides = None if order == "C" else _strides(x.shape, x.strides, x.itemsize)
    return np.ndarray(x.shape, x.dtype, loan, 0, strides)


def _rounded(nbytes: int) -> int:
    step = 1 << (nbytes.bit_length() - 4)
    return -(-nbytes // step) * step


@lru_cache(maxsize=256)
def _strides(shape: tuple[int, ...], like: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides of a dense array whose axes lie in memory in the order that other strides say: NumPy's order "K"."""
    strides, step = [0] * len(shape), itemsize
    for axis in sorted(range(len(shape)), key=lambda axis: (abs(like[axis]), -axis)):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def _mapping(size: int) -> tuple[mmap.mmap, bool]:
    """Take an idle buffer, the one used last because caches may still hold it, or a new one; and whether it comes back."""
    global _hits, _misses
    _collect()
    try:
        _, mapping = _idle[size].pop()
    except (KeyError, IndexError):
        _misses += 1
        _collect_all()
        room = limit() - size - sum(ticket.size for ticket in _lent.copy().values() if ticket.mapping is not None)
        if room >= 0:
            _trim(room)
        return _new(size), room >= 0
    _hits += 1
    return mapping, True


def _collect() -> None:
    """Make idle what was returned."""
    while _returned:
        try:
            ticket = _returned.popleft()
        except IndexError:  # another thread was faster
            return
        _take_back(ticket)


def _collect_all() -> None:
    """Make idle what was returned, and whatever else of the lent is dead: an interrupt may have lost its ticket."""
    _collect()
    for ticket in _lent.copy().values():
        if ticket() is None:
            _take_back(ticket)


def _take_back(ticket: _Ticket) -> None:
    if _lent.pop(id(ticket), None) is not None and ticket.mapping is not None and _is_alone(ticket):
        _idle.setdefault(ticket.size, []).append((time.monotonic(), ticket.mapping))
        _trim(limit())  # calls that ran at the same time may together have lent too much


def _is_alone(ticket: _Ticket) -> bool:
    """Whether a ticket alone has the buffer: of what died in a cycle it tells before finalizers run, which may use or keep the loan."""
    return sys.getrefcount(ticket.mapping) <= _ALONE


def _start_to_look() -> None:
    """Start the thread that gives idle memory back; where it cannot be started, look here and now."""
    global _next_look, _looker
    _next_look = time.monotonic() + 2 * PERIOD
    _looker = me = object()
    with suppress(RuntimeError, MemoryError):
        if _has_threads:
            # Not a threading.Thread, which takes locks: a signal handler may be here because it interrupted one.
            _thread.start_new_thread(_keep_looking, (me,))
            return
    _look()


def ask_for_large_pages(address: int, nbytes: int) -> None:
    """Let an output that a framework has allocated have large pages, as the buffers here have, if it is large, and its memory new."""
    if _pool is not None:
        _pool.ask_for_large_pages(address, nbytes)


def _keep_looking(me: object) -> None:
    """Look again and again, until there are no buffers, or another thread does."""
    global _next_look
    while True:
        time.sleep(PERIOD)
        if _looker is not me:
            return
        _look()
        _next_look = 0  # before the question: whoever makes a buffer after it starts a thread
        if not _lent and not any(_idle.copy().values()):
            return
        _next_look = time.monotonic() + 2 * PERIOD


def _look() -> None:
    """Give back what was idle for a period."""
    before = time.monotonic() - PERIOD
    for stack in _idle.copy().values():
        while stack and stack[0][0] <= before:
            with suppress(IndexError):  # another thread was faster
                stack.pop(0)
    _collect_all()


def _new(size: int) -> mmap.mmap:
    mapping = _map(size)
    if mapping is None:
        release()
        mapping = _map(size)
    if mapping is None:
        raise MemoryError(f"no memory for an output of {size} bytes")
    return mapping


def _map(size: int) -> mmap.mmap | None:
    mapping = None
    try:
        mapping = mmap.mmap(-1, size, **_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:  # no memory; or a kernel without huge pages
        if error.errno is None:  # but this is none of the system's: a signal handler's, such as TimeoutError
            raise
    return mapping


def _trim(most: int) -> int:
    """Let go of the buffers that were idle for longest until at most so many bytes are idle."""
    freed = 0
    while _idle_bytes() > most:
        heads = [(when, stack) for stack in _idle.copy().values() for when, _ in stack[:1]]
        _, stack = min(heads, key=itemgetter(0), default=(0, []))
        with suppress(IndexError):  # another thread was faster
            freed += len(stack.pop(0)[1])
    return freed


def _idle_bytes() -> int:
    return sum(size * len(stack) for size, stack in _idle.copy().items())


def release() -> int:
    """Return all idle memory to the system: recycled buffers, and the scratch memory of this thread's calls.

    Other threads return their scratch memory at their next call.

    Returns
    -------
    int
        Number of bytes returned.

    Examples
    --------
    >>> import fastbn
    >>> freed = fastbn.release_memory()
    >>> fastbn.memory_statistics()["idle"]
    0
    """
    _collect_all()
    return _trim(0) + (0 if _pool is None else _pool.release_scratch())


def statistics() -> dict[str, int]:
    """Count the memory and the use of the pool.

    Returns
    -------
    dict
        The bytes "in_use" by arrays, the "idle" bytes, and their "limit"; "hits" and "misses", the numbers of large outputs
        that got recycled and new memory. Without the GIL, threads may lose a hit or a miss.

    Examples
    --------
    >>> import fastbn
    >>> sorted(fastbn.memory_statistics())
    ['hits', 'idle', 'in_use', 'limit', 'misses']
    """
    _collect_all()
    in_use = sum(ticket.size for ticket in _lent.copy().values())
    return {"in_use": in_use, "idle": _idle_bytes(), "limit": limit(), "hits": _hits, "misses": _misses}


def limit() -> int:
    """How many bytes may be idle.

    Returns
    -------
    int
        FASTBN_POOL_BYTES, or the smaller of 1 GiB and a 32nd of the memory that the machine or the cgroup has. Looked up
        once in a process.
    """
    global _limit
    if _limit is None:
        _limit = min(_available() // 32, 1 << 30)
    return _limit


def _available() -> int:
    """Bytes of memory this process may use, as far as one can find out."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        machine = 8 << 30
    group = group_limit()
    return machine if group is None else min(machine, group)


def group_limit(root: str = cgroup.ROOT, membership: str = cgroup.MEMBERSHIP) -> int | None:
    """Bytes of memory the cgroup may use, or None where there is no limit.

    Parameters
    ----------
    root : str
        Where the cgroup file systems are mounted.
    membership : str
        The file that names this process's groups.

    Returns
    -------
    int or None
        The smallest limit on the way from this process's group to the root, for cgroup v1 and v2.
    """
    found = cgroup.folders("memory", root, membership)
    limits = [_bytes(folder / name) for folder in found for name in ("memory.max", "memory.limit_in_bytes")]
    return min((limit for limit in limits if limit is not None), default=None)


def _bytes(file: Path) -> int | None:
    try:
        return int(file.read_text("utf-8"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _after_fork() -> None:
    """Start with nothing idle, because copies of the parent's pages would cost more than new ones, and no thread."""
    global _next_look
    _next_look = 0.0
    release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
