"""A process that dies at one of its calls of some functions, without a process."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest


class Killed(BaseException):
    """Stands for SIGKILL: nothing that comes later runs."""


def kill_at(patch: pytest.MonkeyPatch, calls: int, functions: Iterable[tuple[object, str]]) -> None:
    """Makes call number ``calls`` (from 0) of these functions, (owner, name), raise ``Killed``, and all later ones."""
    left = iter(range(calls))

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **settings: object) -> object:
            if next(left, None) is None:
                raise Killed
            return function(*arguments, **settings)

        return call

    for owner, name in functions:
        patch.setattr(owner, name, counted(getattr(owner, name)))
