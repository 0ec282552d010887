"""Parameters that share one line of a docstring without a type have types of their own, not that of the first."""

from __future__ import annotations

from typing import Any

import griffe


class OwnAnnotations(griffe.Extension):
    """Give each such parameter the annotation that its function has for it."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Called by griffe for each function that it has read."""
        sections = func.docstring.parsed if func.docstring else []
        for section in sections:
            if section.kind is griffe.DocstringSectionKind.parameters:
                for parameter in section.value:
                    taken = any(parameter.annotation is other.annotation for other in func.parameters)
                    if taken and parameter.name in func.parameters:
                        parameter.annotation = func.parameters[parameter.name].annotation
