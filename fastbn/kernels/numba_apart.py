"""Functions of the user's, compiled once more for the kernels alone."""

from __future__ import annotations

from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from numba import jit
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher

from fastbn.kernels import numba_math

_aparts: dict[Any, Any] = {}


@global_compiler_lock  # type: ignore[untyped-decorator, unused-ignore]
def apart(function: Any) -> Any:
    """The same function, and with it those that it calls by a name, itself among them.

    A function takes the error model of whoever compiles it first: divisions by zero would raise here if the user had called it
    before, and would give infinities to the user, too, if not. It starts none of Numba's threads: several of ours call it at the
    same time, which ends the process in some of Numba's thread layers. Compiled for one signature, it stays as it is.
    """
    if function not in _aparts:
        _aparts[function] = function
        compiles = function._can_compile and not function.targetoptions.get("forceobj")
        if compiles and function.py_func.__module__ != numba_math.__name__:
            options = {"error_model": "numpy", **function.targetoptions, "parallel": False}
            code = _with_own_names(function.py_func)
            _aparts[function] = jit(locals=function.locals, pipeline_class=function._compiler.pipeline_class, **options)(code)
            if code is not function.py_func:  # now that what calls itself is known
                names = _names(code.__code__)
                code.__globals__.update({name: _swapped(value, names) for name, value in code.__globals__.items()})
                for cell in code.__closure__ or ():
                    for value in _content(cell):
                        cell.cell_contents = _swapped(value, names)
    return _aparts[function]


def _holds(value: Any, names: set[str]) -> bool:
    """Whether a value is a compiled function, or a tuple or a module in which a function that looks up these names finds one."""
    if isinstance(value, tuple):
        return any(_holds(part, names) for part in value)
    if isinstance(value, ModuleType):
        return any(_holds(vars(value)[name], names - {name}) for name in names & vars(value).keys())
    return isinstance(value, CPUDispatcher)


def _swapped(value: Any, names: set[str]) -> Any:
    """The value with the functions apart in the place of those that it holds; a module's stand-in is one for Numba alone."""
    if not _holds(value, names):
        return value
    if isinstance(value, tuple):
        parts = [_swapped(part, names) for part in value]
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    if isinstance(value, ModuleType):
        known = vars(value)
        standing = ModuleType(value.__name__)
        vars(standing).update(known | {name: _swapped(known[name], names - {name}) for name in names & known.keys()})
        return standing
    return apart(value)


def _content(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # there is none yet
        return ()


def _names(code: CodeType) -> set[str]:
    """Every name that a function and those in it may look up."""
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _with_own_names(function: FunctionType) -> FunctionType:
    """A copy whose globals and cells can be changed; the function itself where none of them is a compiled function."""
    names = _names(function.__code__)
    known = {name: function.__globals__[name] for name in names if name in function.__globals__}
    contents = [_content(cell) for cell in function.__closure__ or ()]
    defaults = function.__defaults__ or ()
    if not any(_holds(value, names) for value in (*known.values(), *sum(contents, ()), *defaults)):
        return function
    known["__name__"] = function.__module__
    cells = tuple(CellType(*content) for content in contents) or None
    copy = FunctionType(function.__code__, known, function.__name__, _swapped(defaults, names) or None, cells)
    copy.__qualname__, copy.__kwdefaults__ = function.__qualname__, function.__kwdefaults__
    return copy
