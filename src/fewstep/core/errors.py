"""The one exception for mistakes of the user: its text says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

KINDS = {int: "a number", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "a mapping"}
MOST, SOME = 24, 6  # names that a message lists in full; how many it lists of more


class UserError(Exception):
    """Shown by the command line as one paragraph without a traceback (``--debug`` shows the traceback)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'? (known: ...)"`` with the closest known name and all of them, or the closest of many;
    nothing if none is known."""
    known = list(known)
    if not known:
        return ""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if len(known) > MOST:
        known = [*difflib.get_close_matches(name, known, n=SOME, cutoff=0.0), "..."]
    return f"{hint} (known: {', '.join(known)})"


def kind_of(value: object) -> str:
    """What a value of a YAML or JSON file is, in words."""
    return "nothing" if value is None else KINDS.get(type(value), f"something else ({type(value).__name__})")
