"""Batch norm over MPI processes, for NumPy users: a communicator for `fastbn.sync` and the layers.

Start programs with ``mpirun -n 4 python -m mpi4py program.py``. Then an exception on one process ends all of them; without
``-m mpi4py`` the others would wait for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # the latter where there is an mpi4py and no MPI
    raise ImportError(f"fastbn.mpi needs mpi4py (pip install mpi4py) and an MPI library: {error}") from error

from fastbn import sync
from fastbn.checks import short
from fastbn.layout import Array


class Communicator(sync.OfProcess):
    """Carries numbers between the processes of an MPI communicator.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        The processes that share a batch; None means all, ``MPI.COMM_WORLD``. Make groups with ``comm.Split``.

    Raises
    ------
    TypeError
        If comm is something else.

    Examples
    --------
    Started as one process:

    >>> import fastbn, fastbn.mpi, numpy as np
    >>> bn = fastbn.BatchNorm1d(1, eps=0.0, communicator=fastbn.mpi.Communicator())
    >>> bn(np.array([[1.0], [3.0]], np.float32))
    array([[-1.],
           [ 1.]], dtype=float32)
    """

    def __init__(self, comm: Any = None):
        self.comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(self.comm, MPI.Intracomm):
            raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, got {short(comm)}")

    def all_gather(self, array: Array) -> Array:
        """Return the arrays of all processes, in the order of the ranks."""
        found = np.empty((self.comm.Get_size(), *array.shape), array.dtype)
        # As bytes: MPI must not look at them as numbers.
        self.comm.Allgather([array, MPI.BYTE], [found, MPI.BYTE])
        return found

    def all_reduce(self, array: Array) -> Array:
        """Return the sum of the arrays of all processes."""
        found = np.empty_like(array)
        self.comm.Allreduce(array, found)
        return found
