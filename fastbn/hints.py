"""Types of hints that exist at run time, too: jsonargparse, Sphinx and others ask `typing.get_type_hints` for them."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self as Self
else:
    Self = getattr(typing, "Self", Any)  # Python 3.10 has none
