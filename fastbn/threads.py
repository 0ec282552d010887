"""How many threads, and whether a call is big enough for them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from fastbn import cgroup

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
        maximum, period = (folder / "cpu.max").read_text().split()  # v2
    except (OSError, ValueError):
        try:
            maximum, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))  # v1
        except (OSError, ValueError):
            return None
    return None if maximum in ("max", "-1") else int(maximum) / int(period)


def limits() -> dict[str, float | None]:
    """What bounds the number of threads: CPU affinity, cgroup quota, FASTBN_NUM_THREADS; None is no limit."""
    wanted = os.environ.get("FASTBN_NUM_THREADS") or None
    if wanted is not None and not (wanted.isdecimal() and int(wanted) > 0):
        raise ValueError(f"FASTBN_NUM_THREADS must be a positive integer, got {wanted!r}")
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"affinity": affinity, "quota": quota(), "FASTBN_NUM_THREADS": None if wanted is None else int(wanted)}


def _positive(n: int) -> int:
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n must be an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return n


def set_num_threads(n: int) -> None:
    """Set the number of threads for the whole process.

    Parameters
    ----------
    n : int
        At least 1; it may exceed the default.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_num_threads(fastbn.get_num_threads())
    """
    global _threads
    _threads = _positive(n)


def get_num_threads() -> int:
    """Number of threads a large call made here would use.

    Returns
    -------
    int
        From `num_threads` if inside such a block, else from `set_num_threads`, else the default: the smallest of
        the CPU affinity, the cgroup's CPU quota rounded up, and FASTBN_NUM_THREADS. The default is read once in a
        process, and again after a fork.
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
def num_threads(n: int) -> Iterator[None]:
    """Set the number of threads inside the `with` block, in this thread or task only.

    Parameters
    ----------
    n : int
        At least 1.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.num_threads(3):
    ...     fastbn.get_num_threads()
    3
    """
    token = _scoped.set(_positive(n))
    try:
        yield
    finally:
        _scoped.reset(token)


# Bytes of x from which two threads beat one, by operation. Where calls follow each other within 100 microseconds the
# workers are awake, and two threads win from about 96 KiB; later they must be woken, which costs the caller 3 to 8
# microseconds, and win from about 1 MiB. Between the two lie these.
WORTH_THREADS = {"normalize": 256 << 10, "stats": 256 << 10, "forward": 192 << 10, "backward": 96 << 10}


def for_call(op: str, nbytes: int) -> int:
    """Choose the number of threads for one call of an operation on an array of `nbytes`."""
    return 1 if nbytes < WORTH_THREADS[op] else get_num_threads()
