"""Large outputs in new memory: the system is asked for large pages, and nothing is written past the caches there."""

from __future__ import annotations

import json
import mmap
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import cpu, memory
from fastbn.dispatch import Kernel

plans = pytest.importorskip("fastbn.kernels._plan", reason="built without a compiler")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are looked at on Linux alone")

SIZE = 40 << 20  # C libraries take so much from the system each time, and give it back
SHAPE = (5, 64, 128, 256)


def address_of(buffer: mmap.mmap) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data


def has_large_pages(address: int) -> bool:
    """Whether the memory in which an address lies was said to be worth large pages."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if limits := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(limits[1], 16) <= address < int(limits[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.fixture
def large_pages() -> None:
    buffer = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.ask_for_large_pages(address_of(buffer), SIZE)
    if not has_large_pages(address_of(buffer) + SIZE // 2):
        pytest.skip("this system has no large pages, or does not tell")


@pytest.mark.parametrize(("op", "dims"), [("normalize", (1, 64, 1 << 17)), ("forward", (8, 32, 1 << 15)), ("backward", (1 << 17, 64, 1))])
def test_new_memory_is_not_written_past_the_caches(op: str, dims: tuple[int, int, int]) -> None:
    size = 4 * dims[0] * dims[1] * dims[2]
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def streams(place: int) -> bool:
        plan = plans.plan(op, dims, 4, 1, place=place)
        return bool((plan["map"] or plan["sums"])["nontemporal"])

    plans.set_caches(32 << 10, 512 << 10, 8 << 20)
    try:
        assert streams(0)
        buffer[:64] = bytes(64)  # as an allocator's notes
        assert not streams(address_of(buffer))
        buffer[size // 2 : size // 2 + 1] = b"1"
        assert streams(address_of(buffer))
    finally:
        plans.set_caches(*cpu.caches())


def test_rows_are_mapped_from_the_first_cache_line_of_an_output() -> None:
    peels = [plans.plan("normalize", (1000, 64, 1), 4, 1, place=4096 + 4 * k)["map"]["peel"] for k in range(18)]
    assert peels == [0, *range(15, -1, -1), 15]


@pytest.mark.only(lambda kernel: kernel.name != "reference")
def test_results_are_the_same_in_new_memory(kernel: Kernel) -> None:
    x = np.random.default_rng(0).normal(size=(SIZE // 4 // 64, 64)).astype(np.float32)
    new, old = (np.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.float32).reshape(x.shape) for _ in "ab")
    old[:] = np.nan
    for out in (new, old):
        fastbn.batch_norm(x, np.zeros(64, np.float32), np.ones(64, np.float32), out=out)
    np.testing.assert_array_equal(new, old)
    np.testing.assert_allclose(new, x, rtol=1e-4)


@pytest.mark.usefixtures("large_pages")
def test_only_large_and_new_memory_gets_large_pages() -> None:
    buffers = [mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(3)]
    middles = [address_of(buffer) + SIZE // 2 for buffer in buffers]
    buffers[1][SIZE // 2 : SIZE // 2 + 1] = b"1"
    # What lies beside each other and is used alike is one for the system, so these do not.
    memory.ask_for_large_pages(address_of(buffers[0]) + 7, SIZE - 7)
    memory.ask_for_large_pages(address_of(buffers[1]), SIZE)
    memory.ask_for_large_pages(address_of(buffers[2]), 2 << 20)
    assert [has_large_pages(middle) for middle in middles] == [True, False, False]
    assert not has_large_pages(address_of(buffers[2]) + (1 << 20))


def calls() -> dict[str, Callable[[Any, Any], tuple[Any, ...]]]:
    """Ways to a large output in PyTorch, from x, which needs a gradient, and a vector of parameters."""
    import torch

    import fastbn.torch as ours

    functional = torch.nn.functional

    def statistics(x: Any) -> tuple[Any, Any]:
        return torch.zeros(x.shape[1]), torch.ones(x.shape[1])

    def converted(model: Any, x: Any) -> Any:
        model = torch.nn.Sequential(*model)
        ours.convert(model)
        return model(x)

    return {
        "batch norm": lambda x, v: functional.batch_norm(x, *statistics(x), v, v, True),
        "inference": lambda x, v: functional.batch_norm(x, *statistics(x), v, v),
        "channels last": lambda x, v: functional.batch_norm(x.contiguous(memory_format=torch.channels_last), *statistics(x), v, v, True),
        "layer norm": lambda x, v: functional.layer_norm(x, x.shape[-1:]),
        "group norm": lambda x, v: functional.group_norm(x, 4, v, v),
        "instance norm": lambda x, v: functional.instance_norm(x),
        "with ReLU": lambda x, v: ours.batch_norm(x, *statistics(x), v, v, True, activation="relu"),
        "instance norm with ReLU": lambda x, v: converted((torch.nn.InstanceNorm2d(x.shape[1]), torch.nn.ReLU()), x),
    }


def print_large_pages() -> None:
    """Whether the output and the gradient of each way are large and have large pages."""
    import torch

    import fastbn.torch

    found = {}
    for way, call in calls().items():
        x, v = torch.zeros(SHAPE).requires_grad_(), torch.ones(SHAPE[1])
        with fastbn.torch.enabled():
            y = call(x, v)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        found[way] = [t.nbytes == SIZE and has_large_pages(t.data_ptr() + SIZE // 2) for t in (y, dx)]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found_large_pages() -> dict[str, list[bool]]:
    """In a process of its own: the heap of this one may have used memory to give again."""
    pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_pages; test_pages.print_large_pages()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, list[bool]] = json.loads(done.stdout)
    return found


@pytest.mark.usefixtures("large_pages")
@pytest.mark.parametrize(
    "way",
    ["batch norm", "inference", "channels last", "layer norm", "group norm", "instance norm", "with ReLU", "instance norm with ReLU"],
)
def test_outputs_and_gradients_in_pytorch_have_large_pages(way: str, found_large_pages: dict[str, list[bool]]) -> None:
    assert found_large_pages[way] == [True, True]
