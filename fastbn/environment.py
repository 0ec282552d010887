"""The environment variables: which there are, what they may hold, and what they hold in this process.

They are read and checked once, when fastbn is imported, so that a wrong value stops a service where it starts and not
at its first large request. There is one exception: ``python -m fastbn``, the command that tells what is wrong, starts
all the same, with the wrong variable left out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from fastbn import caller
from fastbn.shown import short

# The rows of the table in dispatch.py, by name.
KERNELS = ("simd_v4", "simd_v3", "simd_v2", "simd_neon", "numba", "reference")
MOST_THREADS = 1 << 20
MOST_BYTES = (1 << 63) - 1
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

EXPECTED = {
    "FASTBN_NUM_THREADS": f"an integer from 1 to {MOST_THREADS}",
    "FASTBN_POOL_BYTES": "a number of bytes, such as 512M or 1G, 0 for no recycling",
    "FASTBN_KERNEL": f"one of {', '.join(KERNELS)}",
}
# What the build of the extensions reads.
OF_THE_BUILD = ("FASTBN_NO_EXTENSIONS", "FASTBN_REQUIRE_EXTENSIONS", "FASTBN_CXXFLAGS", "FASTBN_LDFLAGS")
# What `python -m bench` reads, in whose process fastbn is.
OF_THE_BENCHMARKS = ("FASTBN_BENCH_DNNL",)


class Settings(NamedTuple):
    """What the variables say; None where one is not set, or empty.

    Attributes
    ----------
    num_threads : int or None
        FASTBN_NUM_THREADS: the most threads of a call.
    pool_bytes : int or None
        FASTBN_POOL_BYTES: the most bytes of recycled memory. K, M, G and T are powers of 1024, as KB and KiB are.
    kernel : str or None
        FASTBN_KERNEL: the name of the only kernel that may run.
    """

    num_threads: int | None
    pool_bytes: int | None
    kernel: str | None


def integer(text: str, most: int) -> int | None:
    """Read an integer from 0 to `most` in ASCII digits; None where the text is anything else, of any length."""
    if not re.fullmatch("[0-9]+", text) or len(text.lstrip("0")) > len(str(most)):
        return None
    number = int(text.lstrip("0") or "0")
    return number if number <= most else None


def _bytes(text: str) -> int | None:
    match = re.fullmatch("([0-9]+)([KMGT]?)(I?B)?", text.upper()) if text.isascii() else None
    if match is None or (match[3] == "IB" and not match[2]):
        return None
    number = integer(match[1], MOST_BYTES // UNITS[match[2]])
    return None if number is None else number * UNITS[match[2]]


def read(environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """Read the variables.

    Parameters
    ----------
    environ : mapping of str to str
        Names and values, such as ``os.environ``.

    Returns
    -------
    settings : Settings
        A variable with a wrong value counts as one that is not set.
    problems : list of str
        A sentence for each wrong value: the variable, what is expected, what came.

    Examples
    --------
    >>> from fastbn import environment
    >>> environment.read({"FASTBN_POOL_BYTES": "64K", "FASTBN_NUM_THREADS": "two"})
    (Settings(num_threads=None, pool_bytes=65536, kernel=None),
    ["FASTBN_NUM_THREADS must be an integer from 1 to 1048576, got 'two'"])
    """
    texts = {name: environ.get(name, "") for name in EXPECTED}
    threads, memory, kernel = texts.values()
    settings = Settings(integer(threads, MOST_THREADS) or None, _bytes(memory), kernel if kernel in KERNELS else None)
    wrong = [name for (name, text), value in zip(texts.items(), settings, strict=True) if text and value is None]
    return settings, [f"{name} must be {EXPECTED[name]}, got {short(texts[name])}" for name in wrong]


def unknown(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that is named as ours are and is none of them, with the name it is nearest to."""
    known = (*EXPECTED, *OF_THE_BUILD, *OF_THE_BENCHMARKS)
    strange = sorted(name for name in environ if name.upper().startswith("FASTBN_") and name not in known)
    return [f"fastbn knows no environment variable {short(name)}; did you mean {_closest(name, known)}?" for name in strange]


def _closest(name: str, known: tuple[str, ...]) -> str:
    from difflib import get_close_matches  # not needed where all is well

    return get_close_matches(name.upper(), known, 1, 0)[0]


def problems() -> list[str]:
    """What is wrong with this process's variables.

    Returns
    -------
    list of str
        A sentence for each variable with a wrong value, as it was when fastbn was imported, and for each unknown name.

    Examples
    --------
    >>> from fastbn import environment
    >>> environment.problems()
    []
    """
    return [*_problems, *_unknown]


def _runs_the_command() -> bool:
    """Whether Python imports fastbn to find what ``python -m fastbn`` runs.

    Meanwhile the first of ``sys.argv`` is "-m", as Python's manual says; what stands before the arguments on the command
    line tells of which module.
    """
    if sys.argv[:1] != ["-m"]:
        return False
    before = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    return before[-1:] == ["-mfastbn"] or before[-1:] == ["fastbn"]


settings, _problems = read(os.environ)
_unknown = unknown(os.environ)

if not _runs_the_command():
    if _problems:
        raise ValueError("; ".join(_problems))
    for _sentence in _unknown:
        caller.warn(_sentence)
