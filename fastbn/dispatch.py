"""Which kernel runs: one ordered table, the first that accepts wins, the reference is last."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastbn import caller, checks, cpu
from fastbn.dtypes import DTYPES
from fastbn.environment import settings
from fastbn.layout import LAYOUTS, pattern
from fastbn.shown import short

if TYPE_CHECKING:
    from fastbn.kernels.protocol import Operations

ALL = frozenset(DTYPES)
NOT_BUILT = "it was not built"


@dataclass(eq=False)
class Kernel:
    """One row of the table: a module that holds the four operations.

    Parameters
    ----------
    name : str
        What `use_kernel` and FASTBN_KERNEL call it.
    path : str
        The module.
    level : str, optional
        ISA level (a key of `cpu.LEVELS`) it is compiled for.
    package : str, optional
        Package it needs at run time.
    dtypes : frozenset of str
        Names of the NumPy dtypes it takes.
    custom : bool
        Whether it takes activations that are functions of the user's.
    """

    name: str
    path: str
    _: KW_ONLY
    level: str | None = None
    package: str | None = None
    dtypes: frozenset[str] = ALL
    custom: bool = False

    @cache  # noqa: B019  the table's rows live as long as the process
    def unusable(self) -> str | None:
        """Why this kernel cannot run on this machine, or None where it can."""
        if self.level is not None:
            if cpu.family() != cpu.family_of(self.level):
                return f"it is for {cpu.family_of(self.level)}"
            if find_spec(self.path) is None:
                return NOT_BUILT
            if reason := cpu.unsupported(self.level):
                return reason
        if self.package is not None and find_spec(self.package) is None:
            return f"{self.package} is not installed (pip install {self.package})"
        try:
            self.module()
        except (MemoryError, RecursionError):  # which say nothing of the module
            raise
        except Exception as error:
            if not isinstance(error, ImportError) and self._can_be_imported():
                raise
            return f"it cannot be imported: {str(error) or repr(error)}"
        return None

    def _can_be_imported(self) -> bool:
        """Whether the module comes when it is asked for once more.

        A broken package of another's may raise anything, again and again. What the handler of a signal raised, to end a call that
        takes too long, is its caller's, and must not decide for the rest of the process.
        """
        try:
            self.module()
        except Exception:
            return False
        return True

    def declines(self, dtype: str, custom: bool = False) -> str | None:
        """Why this kernel does not take arrays of a dtype, or functions of the user's; None where it does."""
        if custom and not self.custom:
            return "it takes no functions of the user's"
        return None if dtype in self.dtypes else f"it has no {DTYPES[dtype].name}"

    @cache  # noqa: B019
    def module(self) -> Operations:
        """The module, imported when first used; of an ISA's kernels, NumPy's doors to them."""
        module: Any = import_module(self.path)
        if self.level is None:
            if hasattr(module, "set_caches"):
                module.set_caches(*cpu.caches())
            return cast("Operations", module)
        from fastbn.kernels import _calls, _plan

        _plan.set_caches(*cpu.caches())
        return cast("Operations", _calls.Calls(module.KERNELS))


TABLE = (
    Kernel("simd_v4", "fastbn.kernels._simd_v4", level="v4"),
    Kernel("simd_v3", "fastbn.kernels._simd_v3", level="v3"),
    Kernel("simd_v2", "fastbn.kernels._simd_v2", level="v2"),
    Kernel("simd_neon", "fastbn.kernels._simd_neon", level="neon"),
    Kernel("numba", "fastbn.kernels.numba", package="numba", custom=True),
    Kernel("reference", "fastbn.reference"),
)
KERNELS = {kernel.name: kernel for kernel in TABLE}


def _imports_for_packagers() -> None:
    """Import what TABLE names, in words that PyInstaller and its like can read; nothing calls this.

    The Numba kernels are not among them, or every application would be packed with Numba.
    """
    import fastbn.kernels._calls
    import fastbn.kernels._cpu
    import fastbn.kernels._jobs
    import fastbn.kernels._plan
    import fastbn.kernels._pool
    import fastbn.kernels._simd_neon
    import fastbn.kernels._simd_v2
    import fastbn.kernels._simd_v3
    import fastbn.kernels._simd_v4
    import fastbn.reference  # noqa: F401


PIN: ContextVar[str | None] = ContextVar("fastbn_kernel")  # by `use_kernel`
_from_environment = settings.kernel


def pinned() -> str | None:
    """Name of the pinned kernel: by `use_kernel`, else by FASTBN_KERNEL when fastbn was imported, else None."""
    return PIN.get(_from_environment)


def _check(name: str, pin: str = "kernel") -> None:
    if not isinstance(name, str) or name not in KERNELS:
        raise ValueError(f"{pin} must be one of {', '.join(KERNELS)}, got {short(name)}")
    if reason := KERNELS[name].unusable():
        raise RuntimeError(f"{pin} {name!r} cannot run here: {reason}")


@contextmanager
def use_kernel(name: str | None) -> Iterator[None]:
    """Run one kernel and no other inside the `with` block, in this thread or task.

    Parameters
    ----------
    name : str or None
        Name of a kernel, as listed by `show_config`. None removes the pin of an outer block, or of FASTBN_KERNEL.

    Raises
    ------
    ValueError
        If there is no such kernel.
    RuntimeError
        If the kernel cannot run on this machine; the message says why.

    Examples
    --------
    >>> import fastbn
    >>> import numpy as np
    >>> with fastbn.use_kernel("reference"):
    ...     fastbn.batch_norm_stats(np.array([[1.0], [3.0]])).mean
    array([2.])
    """
    if name is not None:
        _check(name)
    token = PIN.set(name)
    try:
        yield
    finally:
        PIN.reset(token)


def select(dtype: str, custom: bool = False) -> Kernel:
    """The kernel that runs on arrays of a dtype.

    Parameters
    ----------
    dtype : str
        Name of a NumPy dtype.
    custom : bool
        Whether the activation is a function of the user's.

    Returns
    -------
    Kernel

    Raises
    ------
    ValueError, RuntimeError
        If the pinned kernel does not exist, cannot run here or does not take the dtype or the function.
    TypeError
        If no kernel takes functions of the user's for the dtype.
    ImportError
        If not even the reference can be imported, as in an application that was packed without it.
    """
    name = pinned()
    return _best(dtype, custom) if name is None else _pin(name, dtype, custom)


@cache
def _pin(name: str, dtype: str, custom: bool) -> Kernel:
    pin = "kernel" if PIN.get(None) else "FASTBN_KERNEL"
    _check(name, pin)
    if reason := KERNELS[name].declines(dtype, custom):
        raise RuntimeError(f"{pin} {name!r} is pinned but cannot run: {reason}")
    return KERNELS[name]


@cache
def _best(dtype: str, custom: bool) -> Kernel:
    kernel = next((k for k in TABLE if not (k.unusable() or k.declines(dtype, custom))), None)
    if kernel is None and custom:
        reasons = "; ".join(f"{k.name}: {k.unusable() or k.declines(dtype, custom)}" for k in TABLE if k.custom)
        raise TypeError(f"no kernel can run a function as activation on {dtype} ({reasons})")
    if kernel is None:
        reasons = "; ".join(f"{k.name}: {k.unusable() or k.declines(dtype)}" for k in TABLE)
        raise ImportError(f"no kernel of fastbn can run ({reasons})")
    if kernel.level is None and not custom:
        _announce(kernel.name)
    return kernel


@cache  # once
def _announce(name: str) -> None:
    """Warn that no compiled kernel can run."""
    # Those for other processors would not run here if they had been built.
    mine = [k for k in TABLE if k.level is not None and cpu.family() == cpu.family_of(k.level)]
    reasons = "; ".join(f"{k.name}: {k.unusable()}" for k in mine) or f"there is none for {cpu.family()} processors"
    message = f"fastbn runs its slower {name!r} kernel, because no compiled one can run ({reasons})"
    if mine and all(k.unusable() == NOT_BUILT for k in mine):
        message += _why_not_built()
    caller.warn(message)


def _why_not_built() -> str:
    """A sentence about where this package lies and how to have its kernels; empty if nothing is known."""
    here = Path(__file__).resolve().parents[1]
    if not (here / "setup.py").is_file():
        return ". Its Python part is installed alone, as there was no C++ compiler or FASTBN_NO_EXTENSIONS was set: install it with one"
    others = (Path(entry).resolve() for entry in sys.path)
    installed = next((other for other in others if other != here and (other / "fastbn" / "dispatch.py").is_file()), None)
    advice = "run `pip install -e .` there"
    if installed is not None:
        advice = f"start Python in another folder to import the fastbn in {installed}, or {advice}"
    return f". It was imported from the source tree {here}, where nothing was compiled: {advice}"


def passed_over(dtype: str) -> list[str]:
    """A line for each kernel that stands before the selected one: its name, and why it does not run."""
    chosen = select(dtype)
    if pinned() is not None:
        return [f"{chosen.name} is pinned"]
    better = TABLE[: TABLE.index(chosen)]
    return [f"{k.name}: {k.unusable() or k.declines(dtype)}" for k in better]


def warmup(
    dtypes: Iterable[str] = ("float32",), layouts: Iterable[str] = ("NCHW", "NHWC"), activations: Iterable[object] = (None,)
) -> None:
    """Compile now what the first calls would have to wait for. Only the Numba kernels have anything to compile.

    Parameters
    ----------
    dtypes : iterable of str
        Names of the dtypes that will be used.
    layouts : iterable of str
        Names of the layouts that will be used.
    activations : iterable
        Activations that will be used, as for `batch_norm`; None means calls without one.

    Raises
    ------
    TypeError
        If a name or an activation has the wrong type, or if no kernel can run a function of yours.
    ValueError
        If a layout, a dtype or an activation is unknown.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.warmup(["float32"], ["NCHW"])
    """
    patterns = {pattern(layout) for layout in _names("layouts", layouts, LAYOUTS)}
    names = _names("dtypes", dtypes, tuple(DTYPES))
    if isinstance(activations, str) or not checks.is_iterable(activations):
        activations = (activations,)
    chosen = [checks.activation(activation) for activation in activations]
    for dtype in names:
        for activation in chosen:
            module: Any = select(dtype, activation is not None and activation.custom).module()
            if hasattr(module, "warmup"):
                module.warmup(dtype, patterns, activation)


def _names(name: str, given: object, known: tuple[str, ...]) -> tuple[str, ...]:
    """Check one name or several."""
    try:
        names = (given,) if isinstance(given, str) else tuple(given)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be names among {', '.join(known)}, got {short(given)}") from None
    for one in names:
        if not isinstance(one, str) or one not in known:
            raise ValueError(f"{name} must be among {', '.join(known)}, got {short(one)}")
    return names
