"""Checks of fastbn.mpi, run by mpirun as a program: it writes a file for each rank, in a folder, with what was raised."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import numpy as np
from mpi4py import MPI
from processes import as_one, cuts
from truth import SHAPES, axis_of, problem

import fastbn
import fastbn.mpi
from fastbn import sync

WORLD = MPI.COMM_WORLD
RANK, RANKS = WORLD.Get_rank(), WORLD.Get_size()


def parts_give_what_the_whole_gives(layout: str, dtype: object) -> None:
    axis = axis_of(layout)
    p = problem((9, *SHAPES[layout][1:]), dtype, axis, mean=5.0)
    cut = cuts(9, RANKS)[RANK]
    communicator = fastbn.mpi.Communicator()
    moved, own = ([p.mean.copy(), p.var.copy()] for _ in range(2))
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, *moved, layout=layout, activation="silu")
    g = fastbn.batch_norm_backward(p.dy, p.x, saved)
    x, dy = p.x[cut].copy(), p.dy[cut].copy()
    part, kept = sync.batch_norm_forward(
        x, p.weight, p.bias, *own, layout=layout, activation="silu", communicator=communicator
    )
    back = sync.batch_norm_backward(dy, x, kept, communicator=communicator)
    as_one(part, y[cut])
    as_one(back.dx, g.dx[cut], np.abs(g.dx.astype(np.float64)).max())
    count = np.sqrt(p.x.size / p.x.shape[axis])
    for name in ("dweight", "dbias"):
        as_one(np.sum(WORLD.allgather(getattr(back, name)), 0), getattr(g, name), count)
    for mine, whole in zip(own, moved, strict=True):
        np.testing.assert_allclose(mine, whole, rtol=1e-6)
        assert set(WORLD.allgather(mine.tobytes())) == {mine.tobytes()}


def groups_of_processes() -> None:
    """The last process is alone."""
    group = WORLD.Split(RANK == RANKS - 1)
    x = np.random.default_rng(0).standard_normal((RANKS, 2, 3))
    bn = fastbn.BatchNorm1d(3, momentum=1.0, dtype="float64", communicator=fastbn.mpi.Communicator(group))
    bn(x[RANK])
    mine = x[-1:] if RANK == RANKS - 1 else x[:-1]
    np.testing.assert_allclose(bn.running_mean, mine.mean((0, 1)), rtol=1e-12)


def layers() -> None:
    x = np.random.default_rng(0).standard_normal((9, 4))
    bn, whole = fastbn.BatchNorm1d(4, dtype="float64", communicator=fastbn.mpi.Communicator()), fastbn.BatchNorm1d(4, dtype="float64")
    cut = cuts(9, RANKS)[RANK]
    np.testing.assert_allclose(bn(x[cut]), whole(x)[cut], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(bn.backward(x[cut] ** 2).dx, whole.backward(x**2).dx[cut], rtol=1e-11, atol=1e-11)


def main(folder: Path, wanted: str) -> None:
    if wanted == "dies":
        fastbn.batch_norm_stats(np.ones((2, 3)))
        if RANK == 1:
            raise RuntimeError("this process had an accident")
        sync.batch_norm_stats(np.ones((2, 3)), fastbn.mpi.Communicator())
        return
    import ml_dtypes

    try:
        for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
            for layout in ("NC", "NCHW", "NHWC"):
                parts_give_what_the_whole_gives(layout, dtype)
        groups_of_processes()
        layers()
    except BaseException:
        (folder / f"rank {RANK} of {RANKS}").write_text(traceback.format_exc())
        os._exit(1)
    (folder / f"rank {RANK} of {RANKS}").write_text("")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
