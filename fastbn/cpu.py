"""What the processor is: its family, its ISA level and the sizes of its caches."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

_unknown: str | None = None  # why features cannot be looked up
try:
    import fastbn.kernels._cpu as _cpu
except ImportError as error:  # built without a compiler
    _cpu = None
    _unknown = str(error)


# psABI levels, as far as the kernels use them; NEON is part of every aarch64. setup.py compiles for these, no more.
LEVELS = {
    "v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "v3": {"avx2", "fma", "f16c", "bmi2"},
    "v2": {"sse4.2", "popcnt"},
    "neon": {"neon"},
}
_FAMILIES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "ARM", "arm64": "ARM"}


def family() -> str:
    """The processor's family as the kernels know it, "x86-64" or "ARM"; else what the machine calls itself."""
    machine = platform.machine()
    return _FAMILIES.get(machine.lower(), machine or "unknown")


def family_of(level: str) -> str:
    """The family of processors that an ISA level belongs to."""
    return "ARM" if level == "neon" else "x86-64"


@cache
def model() -> str | None:
    """The processor's name as Linux knows it, or None."""
    try:
        found = re.search(r"^model name\s*:\s*(.*\S)", Path("/proc/cpuinfo").read_text("utf-8", "replace"), re.MULTILINE)
    except OSError:
        return None
    return found and found[1]


def features() -> frozenset[str]:
    """Features of the processor that kernels may need; none are known to be safe where no detector was built."""
    return frozenset() if _cpu is None else frozenset(_cpu.features())


def unsupported(level: str) -> str | None:
    """Why this processor cannot run the kernels of an ISA level, or None where it can."""
    if _unknown is not None:
        return f"what this processor supports could not be looked up ({_unknown})"
    needed = {"v4": LEVELS["v4"] | LEVELS["v3"]}.get(level, LEVELS[level])
    missing = sorted(needed - features())
    return f"this processor lacks {', '.join(missing)}" if missing else None


class Caches(NamedTuple):
    """Data cache sizes in bytes; L3 is what all cores share."""

    l1: int
    l2: int
    l3: int


@cache
def caches() -> Caches:
    """Sizes of the data caches of the first processor.

    Returns
    -------
    Caches
        From sysfs where it exists, else from sysconf, else 32 KiB, 512 KiB and 8 MiB.
    """
    found = {1: 0, 2: 0, 3: 0}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, *numbers = ((index / name).read_text("utf-8").strip() for name in ("type", "level", "size"))
            level, size = (int(number.removesuffix("K")) for number in numbers)
        except (OSError, ValueError):
            continue
        if kind != "Instruction" and level in found:
            found[level] = size * 1024
    names = {1: "SC_LEVEL1_DCACHE_SIZE", 2: "SC_LEVEL2_CACHE_SIZE", 3: "SC_LEVEL3_CACHE_SIZE"}
    defaults = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}
    for level, name in names.items():
        if found[level] <= 0 and name in getattr(os, "sysconf_names", {}):
            found[level] = os.sysconf(name)
        if found[level] <= 0:
            found[level] = defaults[level]
    return Caches(found[1], found[2], found[3])
