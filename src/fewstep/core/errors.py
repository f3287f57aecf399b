"""The one exception for mistakes of the user: its text says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
