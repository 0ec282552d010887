"""What Numba does to compile a function of the kernels: less than it does for any function, because it takes most of a first call.

Nothing of the code that comes out depends on it. The kernels have no closures to inline, no arrays to fuse, no literals to unroll
and no `with`, so the passes that look for these are left out. And parts of functions are never called from Python, so that they
need no entry for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import types
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager

_NEEDLESS = {
    "WithLift", "InlineClosureLikes", "RewriteDynamicRaises", "MakeFunctionToJitFunction", "InlineInlinables", "FindLiterallyCalls",
    "LiteralUnroll", "LiteralPropagationSubPipelinePass", "InlineOverloads", "NopythonRewrites", "DumpParforDiagnostics",
}  # fmt: skip


class Passes(CompilerBase):  # type: ignore[misc]
    """Numba's passes without the needless ones."""

    def define_pipelines(self) -> list[Any]:
        """One pipeline."""
        passes = PassManager("fastbn")
        for name, description in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
            if name.__name__ not in _NEEDLESS:
                passes.add_pass(name, description)
        passes.finalize()
        return [passes]


FUNCTION: dict[str, Any] = {"error_model": "numpy", "pipeline_class": Passes}  # options of a function
PART: dict[str, Any] = {**FUNCTION, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # and of a part of one


@contextmanager
def remembering() -> Iterator[None]:
    """Remember what a function or an operator of some types is: Numba tries a dozen for each `a + b`, three times.

    For who holds the compiler's lock.
    """
    function: Any = types.Function
    find, found = function.get_call_type, dict[Any, Any]()

    def get_call_type(self: Any, context: Any, arguments: Any, keywords: Any) -> Any:
        if keywords:
            return find(self, context, arguments, keywords)
        key = id(self), arguments
        if key not in found:
            found[key] = self, find(self, context, arguments, keywords)  # an object that is kept keeps its id
        return found[key][1]

    function.get_call_type = get_call_type
    try:
        yield
    finally:
        function.get_call_type = find
