"""Where the limits of this process's control groups stand, for cgroup v1 and v2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = "/sys/fs/cgroup"
MEMBERSHIP = "/proc/self/cgroup"


def folders(controller: str, root: str = ROOT, membership: str = MEMBERSHIP) -> Iterator[Path]:
    """Folders with a controller's limits, from this process's groups up to the mounts.

    Parameters
    ----------
    controller : str
        "cpu" or "memory".
    root : str
        Where the cgroup file systems are mounted.
    membership : str
        The file that names this process's groups.

    Yields
    ------
    Path
        A limit in any of them holds for this process.
    """
    try:
        text = os.fsdecode(Path(membership).read_bytes())  # a group's name may be any bytes, as a file's
    except OSError:
        text = ""
    places = {(Path(root), "/"), (Path(root) / controller, "/")}  # in a container the path may be the host's
    for line in text.split("\n"):
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            places.add((Path(root), path))
        elif controller in controllers.split(","):
            places |= {(Path(root) / name, path) for name in (controllers, controller)}
    for base, path in places:
        below = base / path.lstrip("/")
        for folder in (below, *below.parents):
            yield folder
            if folder == base:
                break
