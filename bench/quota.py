"""A part of a processor: this process in a control group of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastbn import cgroup

PERIOD = 100_000  # µs


def _limit(group: Path, processors: float) -> None:
    quota = round(PERIOD * processors)
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{quota} {PERIOD}")
    else:
        (group / "cpu.cfs_period_us").write_text(str(PERIOD))
        (group / "cpu.cfs_quota_us").write_text(str(quota))


def _make(processors: float) -> tuple[Path, Path] | None:
    """Make a limited group below that of this process; return both, or None where the system does not let us."""
    for own in cgroup.folders("cpu"):
        group = own / f"fastbn-bench-{os.getpid()}"
        if not (own / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            _limit(group, processors)
        except OSError:
            group.rmdir()
            continue
        return own, group
    return None


def unavailable() -> str | None:
    """Why there can be no quota here, or None."""
    made = _make(1.0)
    if made is None:
        return "this process may make no control group with a limit on processors"
    made[1].rmdir()
    return None


@contextmanager
def quota(processors: float) -> Iterator[None]:
    """Give this process so many processors, its threads together.

    Raises
    ------
    RuntimeError
        If the system does not let it.
    """
    made = _make(processors)
    if made is None:
        raise RuntimeError(unavailable())
    own, group = made
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (own / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
