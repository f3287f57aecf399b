"""Implementations by name: built in, registered in Python, installed as an entry point, or given by a dotted name.

A dotted name is ``package.module:attribute``. It is imported where the user wrote it (a config, an option, an
argument). A name that was read from a saved model never causes an import: its module must have been imported before.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Literal, TypeVar, get_args

from fewstep.core.errors import UserError, nearest

Kind = Literal[
    "teacher", "backbone", "objective", "data", "solver", "reward", "prompt_reward", "metric", "network", "family"
]  # fmt: skip
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
T = TypeVar("T")

_registered: dict[tuple[Kind, str], Any] = {}


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """Decorator that gives an implementation a short name: ``@register("objective", "sid")``.

    Raises ``ValueError`` on an unknown kind and on a name that another object has.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(get_args(Kind))}")

    def add(value: T) -> T:
        if _registered.setdefault((kind, name), value) is not value:
            raise ValueError(f"the {kind} {name!r} is registered twice")
        return value

    return add


def is_dotted(name: str) -> bool:
    """Whether ``name`` has the form ``package.module:attribute``."""
    return DOTTED.fullmatch(name) is not None


def dotted_name(value: Any) -> str:
    """``package.module:attribute`` of a class or function."""
    return f"{value.__module__}:{value.__qualname__}"


class Registry(Generic[T]):
    """All implementations of one kind. ``builtins`` returns those of fewstep by name, each as the object or as its
    dotted name; ``accepts`` tells whether an object is one, and ``expected`` says in words what it must be.

    Entry points belong to the group ``fewstep.KIND``, for example ``fewstep.objective``.
    """

    def __init__(
        self, kind: Kind, builtins: Callable[[], Mapping[str, T | str]], accepts: Callable[[Any], bool], expected: str
    ) -> None:
        self.kind: Kind = kind
        self._builtins = builtins
        self._accepts = accepts
        self._expected = expected

    def names(self) -> list[str]:
        """The short names that ``resolve`` accepts."""
        registered = (name for kind, name in _registered if kind == self.kind)
        return sorted({*self._builtins(), *registered, *self._installed()})

    def __contains__(self, name: str) -> bool:
        """Whether ``name`` is a short name or has the form of a dotted one."""
        return is_dotted(name) or name in self.names()

    def resolve(self, name: str, *, from_file: bool = False) -> T:
        """The implementation called ``name``; ``from_file``: the name was read from a saved model, so that nothing is
        imported for it. Raises ``UserError`` if it is unknown, cannot be imported, or is of the wrong type."""
        value = self._find(name, from_file)
        if not self._accepts(value):
            raise UserError(f"The {self.kind} {name!r} is not {self._expected}.")
        return value  # type: ignore[no-any-return]

    def _find(self, name: str, from_file: bool) -> Any:
        builtins = self._builtins()
        if (self.kind, name) in _registered:
            if name in builtins:
                raise UserError(f"The {self.kind} {name!r} is built in: register yours under another name.")
            return _registered[self.kind, name]
        if name in builtins:
            value = builtins[name]
            return _imported(value, self.kind) if isinstance(value, str) else value
        if installed := self._installed().get(name):
            return _loaded(installed, self.kind)
        if not is_dotted(name):
            own = " If it is yours, import its module first: fewstep --import MODULE …" if from_file else ""
            raise UserError(f"Unknown {self.kind} {name!r}{nearest(name, self.names())}.{own}")
        return require_imported(name, self.kind) if from_file else _imported(name, self.kind)

    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"fewstep.{self.kind}")}


def _imported(name: str, kind: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is the user's: anything can go wrong in it
        raise UserError(f"The {kind} {name!r} cannot be imported: {type(error).__name__}: {error}.") from error


def _loaded(point: EntryPoint, kind: str) -> Any:
    try:
        return point.load()
    except Exception as error:  # of another package
        raise UserError(
            f"The {kind} {point.name!r} of an installed package cannot be imported: {type(error).__name__}: {error}."
        ) from error


def require_imported(name: str, kind: str) -> Any:
    """What a dotted name from a file stands for. Raises ``UserError`` unless its module is already imported."""
    module, _, attribute = name.partition(":")
    known = vars(sys.modules[module]) if module in sys.modules else {}  # getattr may import lazily
    value = known.get(attribute)
    if value is None or (callable(value) and getattr(value, "__module__", None) != module):
        raise UserError(
            f"The saved model or run uses the {kind} {name!r}, which has not been imported; neither ever causes an "
            f"import. If you trust it, import {module} first: in Python, or with fewstep --import {module} ...."
        )
    return value
