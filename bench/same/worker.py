"""One build in a process of its own: ``python worker.py BUILD``, then one request a line, one answer a line, as JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from time import perf_counter
from typing import Any


def plain(value: Any) -> Any:
    """Bring a result into a form whose bits can be compared: which NaN it is does not count."""
    import numpy as np

    if value is None or isinstance(value, (int, float, str)):
        return str(value)
    a = np.ascontiguousarray(value)
    if a.dtype.kind not in "iub" and (missing := np.isnan(a)).any():
        a = np.where(missing, a.dtype.type("nan"), a)
    return a


def digest(value: Any) -> str:
    """Describe a result: its bits, dtype, shape, and the order of its axes in memory."""
    a = plain(value)
    if isinstance(a, str):
        return a
    strides = [stride for n, stride in zip(value.shape, value.strides, strict=True) if n > 1] if a.size else []
    return f"{a.dtype} {a.shape} {strides} {blake2b(a.tobytes(), digest_size=12).hexdigest()}"


def attempt(case: Any) -> dict[str, Any]:
    """Run a case; an exception is a result, too."""
    from bench.same import cases

    try:
        return dict(cases.run(case))
    except Exception as error:  # whatever it is, the other build must do the same
        return {"raises": f"{type(error).__name__}: {error}"}


class Worker:
    """The requests, each a method that answers with what JSON can hold."""

    def __init__(self) -> None:
        from bench.same import cases

        self.cases = list(cases.cases())
        self.calls: dict[str, Callable[[], object]] = {}

    def runs(self, kernel: str) -> bool:
        """Whether a kernel can run here."""
        import numpy as np

        import fastbn

        try:
            with fastbn.use_kernel(kernel):
                fastbn.batch_norm_stats(np.ones((2, 2), np.float32))
        except (ValueError, RuntimeError):
            return False
        return True

    def run(self, kernel: str, indices: list[int]) -> list[dict[str, str]]:
        """Digests of the results of some cases."""
        import fastbn

        with fastbn.use_kernel(kernel):
            return [{name: digest(value) for name, value in attempt(self.cases[i]).items()} for i in indices]

    def save(self, kernel: str, index: int, path: str) -> None:
        """Write the results of a case to a file of arrays."""
        import numpy as np

        import fastbn

        with fastbn.use_kernel(kernel):
            found = {name: plain(value) for name, value in attempt(self.cases[index]).items()}
        np.savez(path, **{k: v if isinstance(v, str) or v.dtype.kind in "iub" else v.astype(np.float64) for k, v in found.items()})

    def time(self, name: str, seconds: float) -> float:
        """Seconds of one small call, on average over a burst."""
        from bench import calls

        self.calls = self.calls or calls.small()
        call, done, start = self.calls[name], 0, perf_counter()
        while (taken := perf_counter() - start) < seconds:
            for _ in range(20):
                call()
            done += 20
        return taken / done

    def small(self) -> list[str]:
        """Names of the small calls."""
        from bench import calls

        return list(calls.small())


def serve(build: str) -> None:
    """Import the build's package, then answer until there is no more request."""
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # where Python has put the folder of this file
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    warnings.simplefilter("ignore")
    import numpy as np

    from bench.build import use

    use(build)
    np.seterr(all="ignore")
    worker = Worker()
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, request)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
