"""Which fastbn is tested; fixtures: every kernel that can run here, and every dtype it takes; what CI counts.

The tests are for the fastbn that is installed: after ``pip install .`` that is not the source tree that lies beside
them, which holds no compiled kernels. So the checkout, where `bench` lies too, comes last in the search for modules.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != ROOT), str(ROOT)]

import numpy as np  # noqa: E402

import fastbn  # noqa: E402
from fastbn.dispatch import KERNELS, TABLE, Kernel  # noqa: E402
from fastbn.dtypes import DTYPES  # noqa: E402

PLACE = Path(fastbn.__file__).resolve().parents[1]

hypothesis.settings.register_profile(
    "fastbn",
    derandomize=True,
    deadline=None,
    max_examples=30,
    # The pin is the same for all examples of a test.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("fastbn")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What CI knows of the machine it runs on; without these options nothing is asserted."""
    group = parser.getgroup("fastbn")
    group.addoption("--expect-kernels", metavar="NAMES", default="", help="kernels that must be usable here, separated by commas")
    group.addoption("--skip-budget", metavar="N", type=int, help="how many tests may be skipped before the run fails")


def pytest_report_header() -> str:
    """Say what is tested."""
    usable = [kernel.name for kernel in TABLE if not kernel.unusable()]
    return f"fastbn {fastbn.__version__} from {PLACE}: {', '.join(usable)}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Stop at once where a kernel that must be there is missing: its tests would not even be collected."""
    names = [name for name in session.config.getoption("--expect-kernels").split(",") if name]
    missing = {name: KERNELS[name].unusable() if name in KERNELS else "there is no such kernel" for name in names}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items() if reason)
    if reasons:
        raise pytest.UsageError(f"kernels that must run here cannot ({reasons})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A dtype that a kernel does not take makes no test of that kernel; `test_dispatch` holds which it must take.

    Nor do parameters for which a function says no that a test is marked with: ``@pytest.mark.only(lambda kernel, dtype: ...)``.
    """

    def is_one(item: pytest.Item) -> bool:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        kernel, dtype = given.get("kernel"), given.get("dtype")
        if isinstance(kernel, Kernel) and isinstance(dtype, str) and kernel.declines(dtype) is not None:
            return False
        wanted = [mark.args[0] for mark in item.iter_markers("only")]
        return all(want(**{name: given[name] for name in inspect.signature(want).parameters}) for want in wanted)

    items[:] = [item for item in items if is_one(item)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a run that skipped more than it may."""
    budget = session.config.getoption("--skip-budget")
    if budget is not None and exitstatus == pytest.ExitCode.OK and _skipped(session) > budget:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say so; pytest itself lists the reasons."""
    budget = config.getoption("--skip-budget")
    skipped = len(terminalreporter.stats.get("skipped", ()))
    if budget is not None and skipped > budget:
        terminalreporter.write_line(f"ERROR {skipped} tests were skipped, and no more than {budget} may be", red=True)


def _skipped(session: pytest.Session) -> int:
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")  # workers of pytest-xdist have none
    return 0 if reporter is None else len(reporter.stats.get("skipped", ()))


@pytest.fixture(autouse=True, scope="session")
def _same_fastbn_in_other_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Python looks in the current directory first, so what a test starts must not start in the checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        if PLACE == ROOT:
            patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        yield


@pytest.fixture(params=[kernel for kernel in TABLE if not kernel.unusable()], ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Every kernel that can run here, pinned. `test_dispatch` shows which others there are, and why they cannot."""
    with fastbn.use_kernel(request.param.name):
        yield request.param


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, kernel: Kernel) -> np.dtype[Any]:
    """Every dtype that the kernel takes; `indirect` parametrization chooses some of them."""
    if request.param == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(request.param)
