"""Warnings at the line that called fastbn, by a function or by an import."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

IMPORTERS = ("importlib", "_frozen_importlib", "_frozen_importlib_external", "runpy", "pyimod02_importers")  # the last: PyInstaller's


def warn(message: str) -> None:
    """Give a RuntimeWarning at the line that stands above the outermost frame of fastbn's.

    Between that and here are frames of NumPy's decorators and of Python's import, so that no number of levels is the right one.
    Frames are known by the names of their modules: where the sources were not packed, code names other files than these.
    """
    frames = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        frames.append((frame, str(frame.f_globals.get("__name__")).partition(".")[0]))
        frame = frame.f_back
    outermost = max(i for i, (_, package) in enumerate(frames) if package == "fastbn")
    above = (one for one, package in frames[outermost + 1 :] if package not in IMPORTERS)
    place = next(above, frames[outermost][0])
    registry = place.f_globals.setdefault("__warningregistry__", {})
    module = place.f_globals.get("__name__")
    warnings.warn_explicit(message, RuntimeWarning, place.f_code.co_filename, place.f_lineno, module, registry)
