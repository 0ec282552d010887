"""Warnings at the line that called fastbn, by a function or by an import."""

from __future__ import annotations

import sys
import warnings
from itertools import chain
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parent
IMPORTERS = ("importlib", "_frozen_importlib", "_frozen_importlib_external", "runpy")


def warn(message: str) -> None:
    """Give a RuntimeWarning at the line that stands above the outermost frame of fastbn's.

    Between that and here are frames of NumPy's decorators and of Python's import, so that no number of levels is the right one.
    """
    frames = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    outermost = max(i for i, one in enumerate(frames) if PACKAGE in Path(one.f_code.co_filename).parents)
    above = (one for one in frames[outermost + 1 :] if str(one.f_globals.get("__name__")).partition(".")[0] not in IMPORTERS)
    place = next(chain(above, [frames[outermost]]))
    registry = place.f_globals.setdefault("__warningregistry__", {})
    module = place.f_globals.get("__name__")
    warnings.warn_explicit(message, RuntimeWarning, place.f_code.co_filename, place.f_lineno, module, registry)
