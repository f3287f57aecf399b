"""Freed memory stays with the process: the settings that glibc gets, and accepts."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest

from fewstep.core.host_memory import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_glibc_accepts_both_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """M_TRIM_THRESHOLD is -1 and M_MMAP_THRESHOLD -3 in malloc.h, the latter at most 32 MiB; mallopt returns 1."""
    real, calls = ctypes.CDLL(None).mallopt, []

    def mallopt(parameter: int, value: int) -> int:
        calls.append((parameter, value, real(parameter, value)))
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert calls == [(-1, 2**31 - 1, 1), (-3, 32 * 2**20, 1)]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    keep_freed_memory()
