"""Information about fastbn: how a call runs, and what was found on this machine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from fastbn import checks, cpu, environment, memory, threads
from fastbn.dispatch import KERNELS, TABLE, Kernel, passed_over, pinned, select
from fastbn.dtypes import DTYPES
from fastbn.layout import Array, LayoutName, channel_axis, view
from fastbn.tables import counted

OPS = ("stats", "normalize", "forward", "backward")
ALSO = {"inference": "normalize"}  # as the bench and the documentation call it


def explain(op: str, x: Array, layout: LayoutName | None = None, *, axis: int | None = None) -> str:
    """Say how a call would run: which kernel, memory pattern, tiles and threads, and why not a better kernel.

    Parameters
    ----------
    op : str
        "stats", "normalize" or its synonym "inference", "forward" (training) or "backward".
    x : ndarray
        The input.
    layout, axis
        As in `batch_norm_forward`.

    Returns
    -------
    str
        A few lines. A kernel that is not compiled has only the first three and the last:

        - the head: operation, memory (ncsp: channels first, nspc: channels last), dtype, and the chosen kernel;
        - memory: the array as runs of channels; "copied first" if it has gaps;
        - threads: how many a call of this size uses, and for how much work a sleeping thread is woken (`show_config`:
          waking);
        - tiles: pieces in which sums are added up; they, and so the bits of the result, depend only on the shape;
        - units: pieces of work for the threads; "on resident data" where the map of a piece finds in the cache what its sums
          have read;
        - streaming: whether the output is written past the caches, unless its memory is new;
        - traffic: how often x and arrays of its size are read and written, if only resident data stay in a cache;
        - why each better kernel was passed over.

    Raises
    ------
    TypeError, ValueError
        If there is no such operation, or fastbn does not take x.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.use_kernel("reference"):
    ...     print(fastbn.explain("normalize", np.zeros((2, 3, 4, 4), np.float32)))
    normalize_ncsp_f32: kernel reference
      memory: 2 x 3 x 16 (outer x channels x inner)
      threads: 1
      reference is pinned
    """
    if not isinstance(op, str) or (op := ALSO.get(op, op)) not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {checks.short(op)}")
    x, dtype = checks.array(x)
    v = view(x, channel_axis(layout, x.ndim, axis))
    kernel = select(dtype.storage)
    n = threads.for_call(op, x)
    outer, channels, inner = v.dims
    copied, besides = ("", "") if v.dense else (", copied first: not dense", ", besides the copy")
    lines = [
        f"{op}_{v.pattern}_{dtype.name}: kernel {kernel.name}",
        f"  memory: {outer} x {channels} x {inner} (outer x channels x inner)" + copied,
        f"  threads: {n}" + _who_sleeps(kernel, n),
    ]
    if kernel.level is not None and x.size:
        lines += [f"  {key}: {value}" for key, value in _in_words(op, v.dims, x.itemsize, n).items()]
        lines[-1] += besides
    return "\n".join(lines + [f"  {line}" for line in passed_over(dtype.storage)])


def _who_sleeps(kernel: Kernel, n: int) -> str:
    """What decides whether a call on several threads wakes those of the pool that sleep."""
    waking = threads.waking() if n > 1 and kernel.level is not None else None
    return "" if waking is None else f"; those that sleep are woken for {1e6 * waking['worth']:.0f} us of work each"


def _in_words(op: str, dims: tuple[int, int, int], itemsize: int, n: int) -> dict[str, str]:
    """The plan of a call: tiles, units of work, streaming and traffic."""
    from fastbn.kernels import _plan

    plan = _plan.plan(op, dims, itemsize, n)
    sums, mapped, reads = plan["sums"], plan["map"], _plan.TRAFFIC[op][0]
    first, last = sums or mapped, mapped or sums
    if first["by_columns"]:
        tiles = f"{min(first['rows'], _plan.ROWS)} rows of {plan['columns']} columns"
    elif plan["pieces"] > 1:
        tiles = f"{plan['piece']} elements for each channel"
    else:
        tiles = f"{min(plan['images'], dims[0])} images for each channel"
    work, written = f"{last['units']}", int(op != "stats")
    if plan["resident"]:
        work += f" of {sums['channels_per_unit']} channels, sums and map on resident data"
        resident = reads * sums["channels_per_unit"] * dims[0] * dims[2] * itemsize <= cpu.caches().l2
        reads *= 1 if resident else 2
    elif sums and mapped:
        work, reads = f"{sums['units']}, then backwards {work}", 2 * reads
    elif mapped:
        reads = 1
    size = (reads + written) * dims[0] * dims[1] * dims[2] * itemsize
    return {
        "tiles": f"{counted(plan['tiles'], 'tile')} of {tiles}",
        "units": work,
        "streaming": "yes" if last["nontemporal"] else "no",
        "traffic": f"at most {counted(reads, 'read')} and {counted(written, 'write')} of x, {size} bytes",
    }


class Processor(TypedDict):
    """What is known of the processor."""

    machine: str
    model: str | None
    features: list[str]


class Config(TypedDict):
    """What `show_config` returns."""

    fastbn: str
    numpy: str
    python: str
    place: str
    processor: Processor
    caches: dict[str, int]
    threads: dict[str, Any]
    waking: dict[str, float] | None
    memory: dict[str, Any]
    kernels: dict[str, str]
    selected: dict[str, str]
    pinned: str | None


def show_config() -> Config:
    """Return what fastbn found on this machine, and what it will use.

    Returns
    -------
    dict
        Versions, the folder of the package, the processor and its features, caches in bytes, threads, what waking
        one costs in seconds (`threads.waking`), recycled memory,
        for each kernel "usable" or the reason why not, for each dtype the kernel that is selected (empty while one is
        pinned), and the pinned kernel or None.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.show_config()["kernels"]["reference"]
    'usable'
    """
    from fastbn import __version__  # stands above this module; a packed application has no metadata

    return {
        "fastbn": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "place": str(Path(__file__).resolve().parent),
        "processor": {"machine": platform.machine(), "model": cpu.model(), "features": sorted(cpu.features())},
        "caches": cpu.caches()._asdict(),
        "threads": {"used": threads.get_num_threads(), **threads.limits()},
        "waking": threads.waking(),
        "memory": memory.statistics(),
        "kernels": {k.name: k.unusable() or "usable" for k in TABLE},
        "selected": {dtype: select(dtype).name for dtype in DTYPES if pinned() is None},
        "pinned": pinned(),
    }


def problems() -> list[str]:
    """What is wrong with the environment, a sentence each."""
    found: list[str] = environment.problems()
    name = pinned()
    if name is not None and name not in KERNELS:
        found.append(f"FASTBN_KERNEL must be one of {', '.join(KERNELS)}, got {name!r}")
    elif name is not None and (reason := KERNELS[name].unusable()):
        found.append(f"FASTBN_KERNEL is {name}, which cannot run here: {reason}")
    elif name is None and select("float32").name == "reference":
        found.append("only the reference can run, which is slow: install fastbn with a C++ compiler, or Numba (pip install numba)")
    return found
