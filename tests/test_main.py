import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest

from fastbn import dispatch, reference
from fastbn.__main__ import main


def test_info_names_what_matters(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("numpy", "processor", "KiB", "threads", "reference: usable"):
        assert word in printed


def test_verify_passes(capsys):
    assert main(["verify"]) == 0
    printed = capsys.readouterr().out
    for kernel in dispatch.TABLE:
        assert kernel.name in printed
        assert kernel.unusable() is None or kernel.unusable() in printed
    assert "DIFFERS" not in printed
    assert ("bfloat16 is left out" in printed) == (find_spec("ml_dtypes") is None)


def test_verify_runs_one_kernel(capsys):
    assert main(["verify", "--kernel", "reference"]) == 0
    assert "simd" not in capsys.readouterr().out


def test_unknown_kernel_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--kernel", "fast"])
    assert "reference" in capsys.readouterr().err


def naive_variance(x, threads=1):
    x = x.astype(np.float32)
    mean, square = x.mean((0, 2)), np.square(x).mean((0, 2))
    count = x.shape[0] * x.shape[2]
    return mean.astype(np.float64), np.zeros(mean.size), (count * (square - mean**2)).astype(np.float64)


def not_centered(x, y, mean, scale, shift, threads=1, epilogue=None):
    scale, shift = scale[:, None], (shift - mean * scale)[:, None]
    y[...] = (x.astype(mean.dtype) * scale + shift).astype(y.dtype)


def forgets_the_last(x, y, *arguments):
    kept = y[-1, -1, -1].copy()
    reference.normalize(x, y, *arguments)
    y[-1, -1, -1] = kept


def forgets_a_sum(*arguments):
    sum_dy, sum_dy_xmu = reference.grad_sums(*arguments)
    return sum_dy, 0.999 * sum_dy_xmu


def gives_nan(dy, x, dx, *arguments):
    dx[...] = np.nan


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        ("stats", naive_variance),
        ("normalize", not_centered),
        ("normalize", forgets_the_last),
        ("grad_sums", forgets_a_sum),
        ("grad_input", gives_nan),
    ],
)
def test_verify_finds_a_broken_kernel(monkeypatch, capsys, operation, wrong):
    name = f"{operation}_{wrong.__name__}"  # dispatch remembers kernels by name
    module = ModuleType(name)
    for op in ("stats", "normalize", "grad_sums", "grad_input"):
        setattr(module, op, wrong if op == operation else getattr(reference, op))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(dispatch.KERNELS, name, dispatch.Kernel(name, name, dtypes=frozenset({"float32"})))
    assert main(["verify", "--kernel", name]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_verify_fails_where_the_kernel_cannot_run(monkeypatch, capsys):
    kernel = dispatch.Kernel("absent", "fastbn.kernels.absent", level="v2")
    monkeypatch.setitem(dispatch.KERNELS, "absent", kernel)
    assert main(["verify", "--kernel", "absent"]) == 1
    assert "cannot run: it was not built" in capsys.readouterr().out
