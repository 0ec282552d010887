"""How many threads, and whether a call is big enough for them."""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from fastbn import cgroup
from fastbn.environment import MOST_THREADS, integer, settings

_threads: int | None = None  # by set_num_threads
_default: int | None = None  # what the machine allows, once it was looked up
_scoped: ContextVar[int | None] = ContextVar("fastbn_threads", default=None)


def quota(root: str = cgroup.ROOT, membership: str = cgroup.MEMBERSHIP) -> float | None:
    """Processors the cgroup's CPU quota allows, or None where there is no limit.

    Parameters
    ----------
    root : str
        Where the cgroup file systems are mounted.
    membership : str
        The file that names this process's groups.

    Returns
    -------
    float or None
        The smallest quota on the way from this process's group to the root, for cgroup v1 and v2.
    """
    found = [limit for folder in cgroup.folders("cpu", root, membership) if (limit := _quota_of(folder)) is not None]
    return min(found, default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        maximum, period = (folder / "cpu.max").read_text("utf-8").split()  # v2
    except (OSError, ValueError):
        try:
            maximum, period = ((folder / f"cpu.cfs_{name}_us").read_text("utf-8").strip() for name in ("quota", "period"))  # v1
        except (OSError, ValueError):
            return None
    try:
        return None if maximum in ("max", "-1") else int(maximum) / int(period)
    except (ValueError, ZeroDivisionError):  # not what Linux writes
        return None


def limits() -> dict[str, float | None]:
    """What bounds the default number of threads.

    Returns
    -------
    dict
        By name: the CPU affinity, the cgroup's quota, FASTBN_NUM_THREADS and, where the latter is not set,
        OMP_NUM_THREADS; None is no limit.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "affinity": affinity,
        "quota": quota(),
        "FASTBN_NUM_THREADS": settings.num_threads,
        "OMP_NUM_THREADS": _of_openmp() if settings.num_threads is None else None,
    }


def _of_openmp() -> int | None:
    """What OMP_NUM_THREADS asks for; of a list of numbers for nested levels, the first. Like OpenMP, ignore what is wrong."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return integer(first, MOST_THREADS) or None


def _checked(n: SupportsIndex) -> int:
    try:
        number = operator.index("" if isinstance(n, bool) else n)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"n must be an int, got {type(n).__name__}") from None
    if not 1 <= number <= MOST_THREADS:
        got = number if number.bit_length() < 64 else f"one of {number.bit_length()} bits"
        raise ValueError(f"n must be an int from 1 to {MOST_THREADS}, got {got}")
    return number


def set_num_threads(n: SupportsIndex) -> None:
    """Set the number of threads for the whole process.

    Parameters
    ----------
    n : int
        From 1 to 1048576; it may exceed the default. The pool has 255 threads at most.

    Raises
    ------
    TypeError, ValueError
        If n is not such a number.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_num_threads(fastbn.get_num_threads())
    """
    global _threads
    _threads = _checked(n)


def get_num_threads() -> int:
    """Return the number of threads that a large call made here would use.

    Returns
    -------
    int
        Inside a `num_threads` block, the number of the block; else that of `set_num_threads`; else the default: the minimum
        of the CPU affinity, the cgroup's CPU quota rounded up, and FASTBN_NUM_THREADS or else OMP_NUM_THREADS. The default
        is determined once in a process, and again after a fork.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.num_threads(2):
    ...     fastbn.get_num_threads()
    2
    """
    global _default
    if (scoped := _scoped.get()) is not None:
        return scoped
    if _threads is not None:
        return _threads
    if _default is None:
        _default = max(1, math.ceil(min(limit for limit in limits().values() if limit is not None)))
    return _default


def _forget_default() -> None:
    global _default
    _default = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_default)


@contextmanager
def num_threads(n: SupportsIndex) -> Iterator[None]:
    """Set the number of threads inside the `with` block, in this thread or task only.

    Parameters
    ----------
    n : int
        From 1 to 1048576.

    Raises
    ------
    TypeError, ValueError
        If n is not such a number.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.num_threads(3):
    ...     fastbn.get_num_threads()
    3
    """
    token = _scoped.set(_checked(n))
    try:
        yield
    finally:
        _scoped.reset(token)


# Bytes of x, in the type of the arithmetic, from which two threads beat one, by operation, where calls follow each other within
# 100 microseconds and the workers are awake. Whether a call is worth waking them is the pool's decision, which knows how long its
# units take.
WORTH_THREADS = {"normalize": 256 << 10, "stats": 256 << 10, "forward": 192 << 10, "backward": 96 << 10}


def for_call(op: str, x: object) -> int:
    """Choose the number of threads for one call of an operation on x: one where that is no array, which the checks will say."""
    nbytes = x.size * max(x.itemsize, 4) if isinstance(x, np.ndarray) else 0
    return 1 if nbytes < WORTH_THREADS[op] else get_num_threads()


def waking() -> dict[str, float] | None:
    """What it has cost lately, in this process, to wake a thread.

    Returns
    -------
    dict or None
        Seconds, by name: the "cost" to the caller, the "delay" until the thread runs, and the "worth": what a call must
        have to share for each thread that takes part, before any that sleeps is woken. Until one was woken, what is
        common. None where the thread pool is not compiled.
    """
    try:
        from fastbn.kernels import _pool
    except ImportError:
        return None
    measured: dict[str, float] = _pool.waking()
    return measured


def register_with_threadpoolctl() -> None:
    """Let threadpoolctl see and limit fastbn's threads; done at import where threadpoolctl was imported before fastbn.

    A limit holds as `num_threads` does: in the thread or task that sets it. It needs the compiled thread pool, by which
    threadpoolctl finds fastbn.

    Raises
    ------
    ImportError
        If there is no threadpoolctl.

    Examples
    --------
    >>> import threadpoolctl
    >>> import fastbn.threads
    >>> fastbn.threads.register_with_threadpoolctl()
    >>> with threadpoolctl.threadpool_limits(1):
    ...     fastbn.get_num_threads()
    1
    """
    global _registered
    if _registered:
        return
    import threadpoolctl  # type: ignore[import-untyped, import-not-found, unused-ignore]

    class Controller(threadpoolctl.LibController):  # type: ignore[misc, unused-ignore]  # it has no types
        user_api = "fastbn"
        internal_api = "fastbn"
        filename_prefixes = ("_pool.",)
        check_symbols = ("fastbn_workers",)

        def get_num_threads(self) -> int:
            return get_num_threads()

        def set_num_threads(self, num_threads: Any) -> None:
            # threadpoolctl restores what it found by setting it: then nothing of its own is to stay.
            _scoped.set(None)
            if num_threads != get_num_threads():
                _scoped.set(min(max(1, num_threads), MOST_THREADS))

        def get_version(self) -> str:
            return str(sys.modules["fastbn"].__version__)

    threadpoolctl.register(Controller)
    _registered = True


_registered = False
if hasattr(sys.modules.get("threadpoolctl"), "register"):
    register_with_threadpoolctl()
