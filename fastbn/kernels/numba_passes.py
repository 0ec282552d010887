"""What Numba does to compile a function of the kernels: less than it does for any function, because it takes most of a first call.

Nothing of the code that comes out depends on it. The kernels have no closures to inline, no arrays to fuse, no literals to unroll
and no `with`, so the passes that look for these are left out. And parts of functions are never called from Python, so that they
need no entry for it.
"""

from __future__ import annotations

from typing import Any

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
