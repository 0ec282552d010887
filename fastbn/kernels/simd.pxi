"""The SIMD kernels: one source for every ISA level and every dtype.

Each `_simd_*.pyx` includes this file and is compiled with the flags of its ISA. What it consists of lies in simd/, from
the bottom up:

register_*.hpp   one register of each ISA, the same names in each; lanes.hpp is what they share
storage.hpp      the storage types in registers, and which register_*.hpp it is
activation.hpp   activations and their derivatives, on registers
block.hpp        the Block that all loops are made of
types.hpp, .pxi  the types of a call, in C++ and as Cython sees them
tiles.pxi        the numbers of the loops, and where a tile lies
block_ops.pxi    what is summed and what is mapped, for one block
planes.pxi, columns.pxi  the four loops
fold.pxi         from sums to parameters: the one place that knows eps and momentum
run.pxi          units of work, and whole calls
parts.pxi, rows.pxi  whole calls where images, groups or rows have statistics of their own
table.pxi        the table of whole calls that the module exports

What is the same for every ISA is compiled once: the entry (call.hpp), how a call is cut (plan.hpp, _plan.pyx), NumPy's
doors (_calls.pyx) and the pool.

The design:

a) Two patterns. *Planes* (ncsp): each channel of each image is a run of `inner` elements. *Columns* (nspc): rows of
   channels, each channel a column. Rows whose number of channels does not fill whole blocks are gathered, several to
   one long row (`repeats`), so that only the last row of the array has a tail.

b) Four operations, two kinds. `Stats` and `GradSums` reduce to two sums per channel; `Normalize` and `GradInput`
   map to an output. So there are four loops over elements: `sum_planes`, `sum_columns`, `map_planes`, `map_columns`.
   What is summed or mapped stands in `accumulate` and `mapped`. An operation with an activation or a residual is a
   `Fused` one. Which activation it is, is decided block by block, which costs next to nothing.

c) Sums run over fixed tiles that depend on the shape alone, in the lanes of one block (block.hpp), and are merged in
   double in a fixed order: the same bits for any number of threads. Statistics are sums of x - k and (x - k)^2, where
   the pivot k is the mean of a sample of the tile. M2 = sum (x - k)^2 - (sum (x - k))^2 / n loses digits where k is far
   from the mean: a tile where it turns out to be more than a deviation away is summed again, around the mean that was
   found; so is one channel in 10,000 for exponential data. The mean of the sample is added in pairs, so that constant
   data give exactly zero; it is rounded to an element of the sample plus a number of few bits, so that data in a few
   low bits give exact sums, and a value that is frequent, like the zeros behind a ReLU, adds a number of few bits, or
   all its roundings would go in one direction. Chan, Golub and LeVeque, The American Statistician 37 (1983).

d) A tile whose sums leave the range of its arithmetic (values near 1e30, or 1e-30) is summed again in double. Channels
   that leave the range of double as well, or whose map would leave that of its arithmetic, are left by a forward: it
   does not map their group, and its caller computes them from the operations, in units of their own (extremes.py).
   What a backward is given says beforehand whether it has such channels.

e) Units of work are whole numbers of tiles, sized for the caches, claimed by the threads of the pool. Where one
   channel's planes stay in the cache, sums and map run on them one after the other, on so many channels as fit L1; so they
   do on columns of a few rows. Elsewhere a second sweep runs backwards: what was read last is still in the cache. Where
   the arrays do not stay in L3, rows are read in one stream of memory, not in one for each row.

f) Large outputs are written with streaming stores, which do not read the line first; whole aligned lines only. Planes
   of a few lines are mapped to a buffer, and the lines that they make together are streamed from there.
"""

from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport fabs, isfinite, sqrt
from libc.stdint cimport uint32_t, uintptr_t
from libc.string cimport memchr, memcpy, memset

from fastbn.kernels._call cimport DONE, DTYPES, LEFT, NO_MEMORY, Activation, Call, Dtype, Kernels, Running, Status
from fastbn.kernels._plan cimport (
    BLOCK, CHAIN, COLUMNS, LINE, MAP_ROWS, MOST_TILES, PLANES, TILE_ROWS, Plan, Task, Tiles, Units, div_up, make_plan
)
from fastbn.kernels._pool cimport end_scratch, enter_default_mode, leave_default_mode, parallel, scratch, unit_fn

include "simd/types.pxi"
include "simd/tiles.pxi"
include "simd/block_ops.pxi"
include "simd/planes.pxi"
include "simd/columns.pxi"
include "simd/fold.pxi"
include "simd/run.pxi"
include "simd/parts.pxi"
include "simd/rows.pxi"
include "simd/table.pxi"
