"""What a test runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import fastbn


def run(
    command: Iterable[str | Path], environment: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, with what it prints, for the fastbn that is tested."""
    place = str(Path(fastbn.__file__).parents[1])
    path = os.pathsep.join([*filter(None, [environment.get("PYTHONPATH")]), place])
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
