"""What takes long in other processes and needs no core of its own: it runs beside the tests that come before its own.

A test marked ``@pytest.mark.beside(errand=errand)`` gets what `errand()` returned from the fixture `beside`. Errands start when the
tests are collected, one after the other in the order of the tests, in one thread; what they run is nice to everything else.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fastbn

Errand = Callable[[], Any]
NICE = ["nice", "-n", "19"] if shutil.which("nice") else []


class Errands:
    """Those of a session."""

    def __init__(self, wanted: Iterable[Errand]):
        self.pool = ThreadPoolExecutor(1)
        self.futures: dict[Hashable, Future[Any]] = {errand: self.pool.submit(errand) for errand in dict.fromkeys(wanted)}

    def end(self) -> None:
        """Leave nothing behind, also where the session ends before its time."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_running):
            os.killpg(process.pid, signal.SIGKILL)


_running: set[subprocess.Popen[str]] = set()


def run(
    command: Iterable[str | Path], environment: Mapping[str, str] = os.environ, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, with what it prints, for the fastbn that is tested."""
    place = str(Path(fastbn.__file__).parents[1])
    variables = dict(environment)
    variables["PYTHONPATH"] = os.pathsep.join([*filter(None, [variables.get("PYTHONPATH")]), place])
    with tempfile.TemporaryDirectory() as elsewhere:  # not in the checkout, where other modules lie
        process = subprocess.Popen(
            [*NICE, *map(str, command)], cwd=cwd or elsewhere, env=variables, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        _running.add(process)
        out, err = process.communicate()
        _running.discard(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
