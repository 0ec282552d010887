"""C functions compiled by Numba, and kept on disk, each in files of its own.

Numba keeps an index of all signatures of a function, which two processes may write at the same time: one could find the other's
code under its own key. Here every function has one signature and a name of its own, which also tells the processor, Python, and the
state of the sources: whoever writes last, what is read is right.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import config
from numba.core import sigutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from fastbn.kernels.numba_passes import Passes

PATIENCE = 1.0  # seconds of compiling before the user is told
compiled_here: list[str] = []  # names of what was compiled, and of what was read from disk
read_here: list[str] = []


# What else in Numba's configuration changes the code: debugging in one process must not make another one slow.
_SWITCHES = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "DEBUGINFO_DEFAULT", "USING_SVML")


@cache
def _stamp() -> str:
    """What compiled code depends on besides its name."""
    here = Path(__file__).parent
    python = f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"
    parts = [python, numba.__version__, llvmlite.__version__, *cpu_target.target_context.codegen().magic_tuple()]
    parts += [f"{name} {getattr(config, name)}" for name in _SWITCHES]
    parts += [str(file.read_bytes()) for file in sorted(here.glob("numba*.py"))]  # none in a zip file: Numba looks at its time
    return sha256("\n".join(parts).encode()).hexdigest()[:16]


class _Cache(FunctionCache):  # type: ignore[misc]
    """One function's place on disk."""

    def __init__(self, function: Callable[..., None], name: str):
        class Named(CompileResultCacheImpl):  # type: ignore[misc]
            def get_filename_base(self, fullname: str, abiflags: str) -> str:
                return f"{name}-{_stamp()}"

        self._impl_class = Named
        super().__init__(function)

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return sig, codegen.magic_tuple()

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        """What Numba reads and writes in: the disk may be full, a file damaged or another user's; then there is no cache."""
        try:
            yield
        except Exception:  # a damaged file may raise anything
            self.disable()


@cache
def _tell() -> None:
    print("fastbn: compiling Numba kernels, once ...", file=sys.stderr, flush=True)


def _is_at_a_terminal() -> bool:
    try:
        return bool(sys.stderr.isatty())
    except (AttributeError, ValueError):  # there is none, it is closed, or in its place is something that only writes
        return False


@contextmanager
def announced() -> Iterator[None]:
    """Say what takes so long, once, and to a terminal only."""
    if not _is_at_a_terminal():
        yield
        return
    timer = threading.Timer(PATIENCE, _tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: compiling makes many objects, and looking through them takes a tenth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


made: dict[str, Any] = {}  # by name; code lives as long as its owner


def compiled(function: Callable[..., None], signature: Any, name: str, keep: bool = True) -> int:
    """Compile a C function, or read it from disk, once in a process; its address.

    Parameters
    ----------
    function : function
    signature : numba signature
    name : str
        Unlike that of any other function.
    keep : bool
        Whether the name tells all, so that the code may be kept on disk.
    """
    options = {"nopython": True, "error_model": "numpy"}  # no contraction: variants of a loop have the same bits
    with global_compiler_lock, announced(), _uncollected():  # of a name that was read twice, LLVM might link either
        if name not in made:
            found: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options, pipeline_class=Passes)
            if keep:
                with suppress(RuntimeError, OSError):  # no directory can be written
                    found._cache = _Cache(function, name)
            found.compile()
            if keep:
                (read_here if found.cache_hits else compiled_here).append(name)
            made[name] = found
        return int(made[name].address)
