"""Which build of fastbn a process runs."""

from __future__ import annotations

import sys
from pathlib import Path


def use(folder: str) -> None:
    """Import fastbn from the folder of a build, and from nowhere else.

    A build may be a source tree with a package bench of its own. This one stays, because it is imported already.
    """
    sys.path.insert(0, folder)
    import fastbn

    found = Path(fastbn.__file__).resolve().parent.parent
    if found != Path(folder).resolve():
        raise SystemExit(f"fastbn came from {found} and not from {folder}")
