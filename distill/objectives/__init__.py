"""One file per objective: one subclass of ``ObjectiveConfig``, whose ``build`` returns the ``Objective``.

Objectives are found by file name: to add one, add a file. No other module depends on any of these files.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from fewstep.core.registry import Registry
from fewstep.distill.stage import ObjectiveConfig


class _BuiltinObjectives(Mapping[str, type[ObjectiveConfig]]):
    """The classes in ``distill/objectives`` by file name, imported on access."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(module.name for module in pkgutil.iter_modules(__path__)))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> type[ObjectiveConfig]:
        if name not in list(self):
            raise KeyError(name)
        module = importlib.import_module(f"{__name__}.{name}")
        return next(
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, ObjectiveConfig) and value.__module__ == module.__name__
        )


OBJECTIVES: Registry[type[ObjectiveConfig]] = Registry(
    "objective", _BuiltinObjectives, lambda value: isinstance(value, type) and issubclass(value, ObjectiveConfig),
    "a subclass of fewstep.distill.stage.ObjectiveConfig",
)  # fmt: skip
