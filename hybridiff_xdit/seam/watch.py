"""Methods of single objects that are answered by somebody else, for as long as they want.

A watched object gets a subclass of its class, of the same name, whose methods ask the handler first. Nothing is stored
in the object itself. So copies of it (`copy.copy`, `copy.deepcopy`, pickle) are of the original class and know nothing
of the handlers, and handlers can be removed in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial, partialmethod, wraps
from threading import get_ident
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

Handler = Callable[..., Any]


class _Watching(NamedTuple):
    """Handlers by name of the method, and the thread whose calls they answer; None: every thread's."""

    thread: int | None
    handlers: dict[str, Handler]

    def concerns(self, name: str) -> bool:
        """Whether a call of this method, made here, is to be answered."""
        return name in self.handlers and self.thread in (None, get_ident())

    def answer(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the caller gets."""
        return self.handlers[name](original, *args, **kwargs) if self.concerns(name) else original(*args, **kwargs)


#: Who watches an object, those that came last at the end.
_HANDLERS: WeakKeyDictionary[Any, list[_Watching]] = WeakKeyDictionary()


def watch(owner: Any, thread: int | None = None, **handlers: Handler) -> Callable[[], None]:
    """Have methods of an object answered by handlers.

    Args:
        owner: the object. Of two that watch it, the one that came last is asked.
        thread: whose calls are answered (`threading.get_ident`); None: every thread's.
        handlers: by name of the method; a name that the object does not have is left out. Each is called with the
            method as it would be without us, bound to the object, and then with the caller's arguments.

    Returns:
        What ends it.
    """
    # Not what the object hands on to another (`__getattr__`): who watches that one is told.
    names = frozenset(name for name in handlers if hasattr(type(owner), name) or name in vars(owner))
    watching = _Watching(thread, {name: handlers[name] for name in names})
    stack = _HANDLERS.setdefault(owner, [])
    if not stack:
        # Past the object's own __setattr__: a compiled module would hand the class on to the module in it.
        of_class = frozenset(name for name in names if hasattr(type(owner), name))
        object.__setattr__(owner, "__class__", _watched(owner.__class__, of_class))
    stack.append(watching)
    undo = ExitStack()
    for name in names & vars(owner).keys():  # somebody has put a function there, which goes before the class
        function = vars(owner)[name]
        vars(owner)[name] = wraps(function)(partial(watching.answer, name, function))
        undo.callback(vars(owner).__setitem__, name, function)

    def end() -> None:
        undo.close()
        stack.remove(watching)
        if not stack:
            _HANDLERS.pop(owner, None)
            object.__setattr__(owner, "__class__", type(owner).__mro__[1])

    return end


@cache
def _watched(cls: Any, names: frozenset[str]) -> type:
    methods = {name: _method(cls, name) for name in names}
    own = {"__reduce_ex__": partialmethod(_reduce, cls), "__module__": cls.__module__, "__doc__": cls.__doc__}
    if "step" in names and not hasattr(cls, "scale_model_input"):
        # Bria's pipeline asks whether a scheduler is of the class that has none, and not of one made from that.
        methods["scale_model_input"] = lambda self, sample, timestep=None: sample
    return type(cls.__name__, (cls,), {**methods, **own})


def _method(cls: Any, name: str) -> Any:
    @wraps(getattr(cls, name))  # pipelines look at the signatures of their scheduler's methods
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = getattr(cls, name)  # as it is now: this class outlives a run
        for watching in reversed(_HANDLERS.get(self, ())):
            if watching.concerns(name):
                return watching.answer(name, partial(original, self), *args, **kwargs)
        return original(self, *args, **kwargs)

    return method


def _reduce(owner: Any, cls: Any, protocol: int) -> Any:
    """What a copy is made from: an object of the original class."""
    _, arguments, *rest = cls.__reduce_ex__(owner, protocol)
    return (_new, (cls, *arguments[1:]), *rest)


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)
