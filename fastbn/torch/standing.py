"""Something in place of a tensor. Functions, methods and operators of torch that meet it follow a rule, or get the tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

RULES: dict[Any, Callable[..., Any]] = {}  # by function of torch's; None from a rule lets torch do it with tensors


class Standing:
    """Functions, methods and operators of torch that meet it come to `__torch_function__`."""

    __array_priority__ = Tensor.__array_priority__  # NumPy leaves sums to it
    __hash__ = object.__hash__

    def tensor(self) -> Tensor:
        """The tensor."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what a rule says, or let torch do it with tensors."""
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None:
            found = rule(*args, **kwargs)
            if found is not None:
                return found
        return func(*(tensor_of(a) for a in args), **{name: tensor_of(a) for name, a in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        """An attribute of the tensor; a method goes through the rules."""
        if name.startswith("__"):
            raise AttributeError(name)
        method = getattr(Tensor, name, None)
        if callable(method):
            return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)
        return getattr(self.tensor(), name)

    def __deepcopy__(self, memo: Any) -> Any:
        """A copy of the tensor."""
        return copy.deepcopy(self.tensor(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle holds the tensor."""
        tensor: Any = self.tensor()  # it has no types
        return tensor.__reduce_ex__(protocol)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def operator(self: Standing, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(function, (), (self, *args), kwargs)

    return operator


def _attribute(name: str) -> property:
    return property(lambda self: getattr(self.tensor(), name), lambda self, value: setattr(self.tensor(), name, value))


_OPERATORS = (
    "abs add and bool complex contains eq float floordiv ge getitem gt iadd iand idiv ifloordiv ilshift imod imul index int invert ior "
    "ipow irshift isub iter itruediv ixor le len lshift lt matmul mod mul ne neg or pos pow radd rand rdiv rfloordiv rlshift rmatmul "
    "rmod rmul ror rpow rrshift rshift rsub rtruediv rxor setitem sub truediv xor array array_wrap dlpack dlpack_device repr format "
    "reversed"
)
for _name in (f"__{name}__" for name in _OPERATORS.split()):
    if hasattr(Tensor, _name):
        setattr(Standing, _name, _operator(_name))
for _name in ("data", "grad", "requires_grad", "real", "imag"):
    setattr(Standing, _name, _attribute(_name))


def tensor_of(a: Any) -> Any:
    """An argument with tensors for what stands for them."""
    if isinstance(a, Standing):
        return a.tensor()
    if type(a) in (list, tuple):
        return type(a)(tensor_of(item) for item in a)
    return a
