"""Statistics of an array that is larger than a chunk, by Dask: one small value a chunk, merged in a tree.

No worker ever holds more than a chunk of data. What travels is a `fastbn.Stats`: a count and four vectors.
"""

from __future__ import annotations

import argparse
import sys

import dask
import dask.array as da
import numpy as np
from dask.delayed import Delayed

import fastbn

CHANNELS = 32


def stats_of(x: da.Array, axis: int = -1) -> Delayed:
    """Statistics of each channel of a Dask array, which is not cut along its channels."""
    leaves = [dask.delayed(fastbn.batch_norm_stats)(block, axis=axis) for block in x.to_delayed().ravel()]
    while len(leaves) > 1:  # eight by eight, so that no worker waits for all
        leaves = [dask.delayed(fastbn.Stats.merge)(*leaves[i : i + 8]) for i in range(0, len(leaves), 8)]
    return leaves[0]


def main() -> int:
    """Find them, and compare with NumPy's in float64."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000, help="of the array (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=9_000, help="rows of a chunk (default: %(default)s)")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if value < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")
    random = da.random.default_rng(0)
    x = random.normal(1e4, 1.0, (args.rows, CHANNELS), chunks=(args.chunk, CHANNELS)).astype(np.float32)
    found = stats_of(x).compute(scheduler="threads")
    print(f"{x.nbytes / 2**20:.0f} MiB in {x.npartitions} chunks: {found.count} values in each of {found.mean.size} channels")
    mean, var = dask.compute(x.astype(np.float64).mean(0), x.astype(np.float64).var(0), scheduler="threads")
    off = np.abs(found.var / var - 1).max()
    print(f"mean {found.mean[0]:.4f} +- {found.standard_error[0]:.4f}, variance {found.var[0]:.4f}")
    print(f"off from float64: mean {np.abs(found.mean.astype(float) + found.mean_lo - mean).max():.1e}, variance {off:.1e}")

    bn = fastbn.BatchNorm1d(CHANNELS)
    bn.running_mean[:], bn.running_var[:] = found.to_running()
    print(f"a layer with them gives {bn.eval()(x[:1000].compute()).std():.3f} as standard deviation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
