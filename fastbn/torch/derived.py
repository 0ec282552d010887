"""Modules of a class that is derived from their own: the same objects, with something else in a call."""

from __future__ import annotations

from typing import Any, NoReturn
from weakref import WeakValueDictionary

OWN = "_fastbn_converted"  # of a derived class: the class that it is derived from

_classes: WeakValueDictionary[tuple[type, type], type] = WeakValueDictionary()  # of other packages' classes, some live for one object


class Derived:
    """What stands before a module's own class among the bases of the derived one."""

    def __init_subclass__(cls) -> None:
        """Nobody's business: a class that lists its subclasses need not know."""

    def __prepare_scriptable__(self) -> Any:
        """Say what to do before `torch.jit.script`, which would compile the code of the derived class."""
        refuse_script("a converted model", "call fastbn.torch.revert(model) first")

    @classmethod
    def members(cls, kind: Any) -> dict[str, Any]:
        """What else a class has that is derived from a kind."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle names the module's own class, of which this one is derived again."""
        made: Any = super().__reduce_ex__(max(protocol, 2))
        if made[1][:1] != (type(self),) or is_overlaid(self):  # it says itself how it is made, or has a name
            return made
        mixin, kind = type(self).__bases__
        return _make, (made[0], mixin, kind, *made[1][1:]), *made[2:]


def refuse_script(what: str, instead: str) -> NoReturn:
    """Raise an error where `torch.jit.script` asks a module what to compile."""
    raise RuntimeError(f"torch.jit.script cannot compile {what}: {instead}")


def derive(mixin: type[Derived], kind: Any) -> type:
    """The class that is derived from a kind."""
    found = _classes.get((mixin, kind))
    if found is None:
        same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        found = _classes[mixin, kind] = type(kind.__name__, (mixin, kind), same | mixin.members(kind) | {OWN: kind})
    return found


def become(module: object, kind: type) -> None:
    """Make a module one of another class, also where its own code refuses new values of attributes, or passes them on."""
    object.__setattr__(module, "__class__", kind)


def release(module: object) -> None:
    """Give a module its own class again. Where somebody has derived another one from ours since, as parametrizations do, that stays."""
    become(module, own_class(module))


def is_overlaid(module: object) -> bool:
    """Whether somebody has derived another class from ours since."""
    return isinstance(module, Derived) and OWN not in vars(type(module))


def own_class(module: object) -> Any:
    """The class that a module had, or has."""
    return vars(type(module)).get(OWN, type(module))


def own_method(module: object, name: str) -> Any:
    """A method of the class that a module had, or of one that somebody has derived from ours since."""
    for kind in type(module).__mro__:
        if OWN in vars(kind):
            return getattr(vars(kind)[OWN], name)
        if name in vars(kind):
            return vars(kind)[name]
    return None


def _make(make: Any, mixin: type[Derived], kind: type, *arguments: Any) -> Any:
    """Make an empty object, for a pickle."""
    return make(derive(mixin, kind), *arguments)
