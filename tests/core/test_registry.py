"""Names: built in, registered, installed, dotted; and what a saved model may cause."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fewstep
from fewstep.core import registry
from fewstep.core.errors import UserError
from fewstep.core.registry import Registry, dotted_name, is_dotted

NUMBERS: Registry[int] = Registry(
    "reward", lambda: {"one": 1, "maximum": "sys:maxsize"}, lambda value: isinstance(value, int), "an integer"
)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's, importable but not imported."""
    (tmp_path / "my_module.py").write_text("SEVEN = 7\n\n\nclass Thing(int):\n    pass\n")
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_module"
    for name in ("my_module", "broken_module"):
        sys.modules.pop(name, None)


def test_built_in_names_are_objects_or_dotted_names() -> None:
    assert NUMBERS.resolve("one") == 1
    assert NUMBERS.resolve("maximum") == sys.maxsize
    assert NUMBERS.names() == ["maximum", "one"]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"Unknown reward 'won'; did you mean 'one'\? \(known: maximum, one\)"):
        NUMBERS.resolve("won")


def test_a_registered_name_is_found_by_every_use() -> None:
    fewstep.register("reward", "two")(2)
    assert NUMBERS.resolve("two") == NUMBERS.resolve("two", from_file=True) == 2
    assert "two" in NUMBERS
    assert "two" in NUMBERS.names()
    fewstep.register("reward", "two")(registry._registered["reward", "two"])  # the same object again is no conflict
    with pytest.raises(ValueError, match="registered twice"):
        fewstep.register("reward", "two")([2])
    with pytest.raises(ValueError, match="unknown kind 'rewards'"):
        fewstep.register("rewards", "three")  # type: ignore[arg-type]


def test_names_belong_to_their_kind() -> None:
    fewstep.register("solver", "three")(3)
    with pytest.raises(UserError, match="Unknown reward 'three'"):
        NUMBERS.resolve("three")


def test_a_dotted_name_is_imported_where_the_user_gives_it(module: str) -> None:
    assert NUMBERS.resolve(f"{module}:SEVEN") == 7


def test_a_name_from_a_file_is_never_imported(module: str) -> None:
    with pytest.raises(UserError, match=r"has not been imported.*import my_module first.*--import my_module"):
        NUMBERS.resolve(f"{module}:Thing", from_file=True)
    assert module not in sys.modules
    things: Registry[type[int]] = Registry("backbone", dict, lambda value: isinstance(value, type), "a class")
    __import__(module)
    assert things.resolve(f"{module}:Thing", from_file=True).__name__ == "Thing"


@pytest.mark.parametrize("name", ["os:system", "builtins:eval", "my_module:missing"])
def test_a_name_from_a_file_must_be_defined_in_its_module(name: str) -> None:
    """``os.system`` is imported by everybody and comes from ``posix``."""
    anything: Registry[object] = Registry("backbone", dict, lambda value: isinstance(value, type), "a class")
    with pytest.raises(UserError, match=r"has not been imported|is not a class"):
        anything.resolve(name, from_file=True)


def test_a_name_from_a_file_triggers_no_lazy_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some modules, torch and fewstep among them, import an attribute when it is first asked for."""
    (tmp_path / "lazy_module.py").write_text("def __getattr__(name):\n    raise SystemExit(f'{name} was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("lazy_module")
    anything: Registry[object] = Registry("backbone", dict, lambda value: True, "anything")
    with pytest.raises(UserError, match="has not been imported"):
        anything.resolve("lazy_module:thing", from_file=True)


def test_errors_of_the_users_module_are_reported(module: str) -> None:
    for name, reason in (
        ("broken_module:X", "ZeroDivisionError: division by zero"),
        (f"{module}:missing", "AttributeError"),
        ("no_such_module:X", "ModuleNotFoundError: No module named 'no_such_module'"),
    ):
        with pytest.raises(UserError, match=f"The reward '{name}' cannot be imported: {reason}"):
            NUMBERS.resolve(name)


def test_an_object_of_the_wrong_type_is_refused(module: str) -> None:
    with pytest.raises(UserError, match="The reward 'my_module:__name__' is not an integer"):
        NUMBERS.resolve(f"{module}:__name__")


def test_the_form_of_dotted_names() -> None:
    assert is_dotted("a:b")
    assert is_dotted("package.module_1:Class")
    for text in ("", "a", "a.b", "a:b:c", "a/b:c", "../a:b", "a:b.c", "C:\\models", "owner/name", " a:b", "a:b\n"):
        assert not is_dotted(text)
    assert dotted_name(Path) == "pathlib:Path"


def test_the_name_of_a_built_in_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {("reward", "one"): 7})
    numbers: Registry[int] = Registry("reward", lambda: {"one": 1}, lambda value: isinstance(value, int), "an integer")
    with pytest.raises(UserError, match="The reward 'one' is built in: register yours under another name"):
        numbers.resolve("one")


def test_a_name_from_a_file_must_be_the_modules_own_function() -> None:
    """Otherwise a saved model could call any function that some imported module imports."""
    anything: Registry[object] = Registry("backbone", dict, lambda value: True, "anything")
    with pytest.raises(UserError, match="has not been imported"):
        anything.resolve("os:getcwd", from_file=True)
