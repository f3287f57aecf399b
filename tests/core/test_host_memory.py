"""Freed memory is used again without being returned to the system, which would clear it."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROUNDS = """
import resource, sys, torch
from fewstep.core.host_memory import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()

def several():
    tensors = [torch.ones(1 << 20) for _ in range(16)]  # 64 MiB

several(), several()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    several()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_the_pages_of_freed_tensors_are_not_faulted_in_again() -> None:
    """Ten times 64 MiB are 163,840 pages of 4 KiB; fewer faults where the system uses larger ones."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", ROUNDS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    }
    assert faults["return"] > 3 * faults["keep"]
