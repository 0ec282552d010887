"""What all layers share: their arrays and the state_dict of these, and what a backward needs of the forward before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fastbn import checks
from fastbn import layout as layouts
from fastbn.checks import Channels
from fastbn.floating import default_mode
from fastbn.hints import Self
from fastbn.layout import Array
from fastbn.sync import Communicator

# What each array of a layer holds at first.
FIRST = {"weight": 1.0, "bias": 0.0, "mix": 0.5, "running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
LONG, LONGEST = np.dtype(np.int64), 2**63 - 1
NO_FORWARD = "backward needs a forward before it: call the layer first (a copied or unpickled layer remembers none)"
OVERWRITTEN = "backward needs the input of the forward before it, which the output has overwritten: pass separate memory as out="


class LoadedKeys(NamedTuple):
    """The keys that `load_state_dict` did not find, and those that it did not use.

    Attributes
    ----------
    missing_keys, unexpected_keys : list of str
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


class Context(NamedTuple):
    """What a backward needs of the forward before it."""

    x: Array | weakref.ref[Array]  # a layer in eval keeps no array alive
    residual: weakref.ref[Array] | None
    saved: Any  # or how to have it, from x
    has_residual: bool
    from_output: bool = False
    communicator: Communicator | None = None  # of the processes that share the batch

    def found(self) -> tuple[Array, Any]:
        """The input of the forward, and what that saved."""
        x = self.x() if isinstance(self.x, weakref.ref) else self.x
        residual = None if self.residual is None else self.residual()
        if x is None or (self.residual is not None and residual is None):
            raise RuntimeError(
                "a layer in eval keeps no arrays: hold x and residual until the backward, or stay in training (a BatchNorm with freeze())"
            )
        if isinstance(self.saved, partial):
            return x, self.saved(x, residual=residual)[1]
        return x, self.saved

    def gradients(self, own: tuple[str, ...], layer: Layer) -> tuple[str, ...]:
        """The names of those that there are: of x, of the layer's own parameters, and of a residual."""
        own = tuple([name for name in own if getattr(layer, name, None) is not None])
        return ("x", *own, "residual") if self.has_residual else ("x", *own)


def is_written_over(out: Array | None, x: Array) -> bool:
    """Whether the output was written over the input."""
    if out is None or out is x or not np.may_share_memory(out, x):  # to ask for addresses takes longer
        return out is x and x.size > 0
    return out.ctypes.data == x.ctypes.data


def without_copy(residual: Array | None, activation: object, out: Array | None) -> bool:
    """Whether a layer in eval leaves a residual that the backward needs where it is: that may never come."""
    return residual is not None and activation is not None and not (out is not None and np.may_share_memory(out, residual))


class Layer:
    """What all layers share: whether they train, and the state_dict."""

    _keys: tuple[str, ...] = ("weight", "bias")
    training: bool
    dtype: np.dtype[Any]
    weight: Array | None
    bias: Array | None
    forward: Callable[..., Array]
    _context: Context | str | None = None  # of the last forward; a str says why there is none

    def __call__(self, x: Array, *residual: Array | None, **options: Any) -> Array:
        """As `forward`, which in a subclass may have other parameters."""
        return self.forward(x, *residual, **options)

    def __getstate__(self) -> dict[str, Any]:
        """The arrays of the last forward are no part of a layer's state."""
        return self.__dict__ | {"_context": None}

    def _check_dtype(self, x: Array) -> None:
        if x.dtype != self.dtype:
            raise TypeError(f"x must have the dtype of the layer, {self.dtype}, got {checks.came(x.dtype)}")

    def _remembered(self) -> Context:
        """What the last forward has left for a backward."""
        if not isinstance(self._context, Context):
            raise RuntimeError(self._context or NO_FORWARD)
        return self._context

    def _shown(self, arguments: str, **usual: Any) -> str:
        """The layer as it would be made: what is always said, and other arguments that are not as usual."""
        lacks_bias = "bias" in self._keys and self.weight is not None and self.bias is None
        arguments += ", bias=False" if lacks_bias else ""
        given = {name: getattr(self, name) for name in usual}
        arguments += "".join(f", {name}={value!r}" for name, value in given.items() if value != usual[name])
        arguments += "" if self.dtype == np.float32 else f", dtype='{self.dtype}'"
        return f"{type(self).__name__}({arguments}){'' if self.training else '.eval()'}"

    def reset_parameters(self) -> None:
        """Set the weight to 1, the bias to 0 and a mix to 0.5, and reset the running statistics, if there are any."""
        self._reset(*self._keys)

    def _reset(self, *names: str) -> None:
        """Set the arrays of the layer to what they were at first, all of them or none."""
        own = {name: a for name in names if (a := getattr(self, name)) is not None}
        check_writable(own)
        for name, a in own.items():
            a[...] = FIRST[name]

    def train(self, mode: bool = True) -> Self:
        """From now on, use the statistics of the input, if the layer has a choice; a frozen layer stays frozen.

        Parameters
        ----------
        mode : bool
            False is the same as `eval`.

        Returns
        -------
        The layer itself.
        """
        self.training = checks.switch("mode", mode)
        return self

    def eval(self) -> Self:
        """From now on, use the running statistics, if there are any.

        Returns
        -------
        The layer itself.
        """
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the parameters and running statistics, under PyTorch's names.

        Returns
        -------
        dict of str to ndarray
        """
        own = {key: value for key in self._keys if (value := getattr(self, key)) is not None}
        return {key: np.array(layouts.plain(f"{key} of the layer", value)) for key, value in own.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> LoadedKeys:
        """Load parameters and running statistics.

        Parameters
        ----------
        state_dict : mapping of str to array_like
            With the keys of `state_dict`; "num_batches_tracked" may be missing, as in old PyTorch files, and may have
            the shape (1,).
        strict : bool
            Whether a missing or an unknown key is an error.

        Returns
        -------
        LoadedKeys
            The keys that were missing, and those that were not used.

        Raises
        ------
        KeyError
            If a key is missing or unknown and `strict` is True.
        TypeError, ValueError
            If a shape does not fit, a value is not a number, or an array of the layer is read-only. Nothing is loaded in
            this case.
        """
        return loaded({key: value for key in self._keys if (value := getattr(self, key)) is not None}, state_dict, strict)


class Tracking(Layer):
    """A layer with running statistics, or without."""

    _keys: tuple[str, ...] = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    momentum: float | None
    num_batches_tracked: Array | None

    def reset_running_stats(self) -> None:
        """Reset the running statistics: mean 0, variance 1, no batches."""
        self._reset("running_mean", "running_var", "num_batches_tracked")

    def _check_count(self) -> None:
        """Check that a batch can be counted, before it moves the running statistics."""
        n: Any = self.num_batches_tracked
        if n is None:
            return
        if isinstance(n, np.ndarray) and not n.flags.writeable:
            raise ValueError("num_batches_tracked is updated in place but is read-only")
        if type(n) is np.ndarray and n.dtype is LONG and n.shape == () and 0 <= n.item() < LONGEST:  # as it was made
            return
        dtype = getattr(n, "dtype", LONG)
        most = np.iinfo(dtype).max if dtype.kind in "iu" else LONGEST
        checks.integer("num_batches_tracked", n, 0, most - 1)

    def _weight_of_new(self) -> float:
        """Momentum of the next batch; None is the cumulative average."""
        if self.momentum is not None:
            return self.momentum
        seen = 0 if self.num_batches_tracked is None else int(self.num_batches_tracked)
        if seen < 0:
            raise ValueError(f"num_batches_tracked must be at least 0, got {seen}")
        return 1.0 / (seen + 1)


def check_writable(own: Mapping[str, Array], of: str = "the layer") -> None:
    """Check that each of a layer's arrays can be written, before any is."""
    for key, a in own.items():
        checks.writable(key, layouts.plain(f"{key} of {of}", a), f"{key} of {of} is read-only")


def loaded(own: dict[str, Array], state_dict: Mapping[str, Any], strict: bool) -> LoadedKeys:
    """Load values into a layer's own arrays, all of them or none."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    missing = [key for key in own if key not in state_dict and key != "num_batches_tracked"]
    unknown = [key for key in state_dict if key not in own]
    if checks.switch("strict", strict) and (missing or unknown):
        lists = {"lacks": sorted(missing), "has unknown": sorted(map(str, unknown))}
        raise KeyError("state_dict " + " and ".join(f"{verb} {keys}" for verb, keys in lists.items() if keys))
    known = {key: value for key, value in own.items() if key in state_dict}
    check_writable(known)
    found = {key: loaded_array(key, state_dict[key], value) for key, value in known.items()}
    for key, value in found.items():
        own[key][...] = value
    return LoadedKeys(missing, unknown)


@default_mode
def loaded_array(key: str, value: Any, own: Array) -> Array:
    """A copy of what is loaded, in the type of what it replaces."""
    if own.ndim > 1:
        found = checks.real(key, value)
        if found.shape != own.shape:
            raise ValueError(f"{key} must have shape {own.shape}, got {found.shape}")
        return found.astype(own.dtype)
    if own.ndim:
        try:
            return checks.vector(key, value, Channels(len(own), f"{key} must have shape {own.shape}"), own.dtype).copy()
        except ValueError:
            shape = np.shape(value)
            raise ValueError(f"{key} must have shape {own.shape}, got {shape}") from None
    n = checks.real(key, value)
    if n.shape not in ((), (1,)):
        raise ValueError(f"{key} must have shape (), got {n.shape}")
    number = n.reshape(()).item()
    if n.dtype.kind == "f" and isinstance(number, float) and number.is_integer():
        number = int(number)
    return np.array(checks.integer(key, number, 0), own.dtype)
