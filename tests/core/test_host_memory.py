"""Freed memory stays with the process for the tensors that follow."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELD = """
import sys, torch
from pathlib import Path
from fewstep.core.host_memory import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()

def resident():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024

def several():
    tensors = [torch.ones(1 << 20) for _ in range(16)]  # 64 MiB

before = resident()
several(), several()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_the_memory_of_freed_tensors_is_kept_on_request_alone() -> None:
    held = {
        how: float(subprocess.run([sys.executable, "-c", HELD, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    }
    assert held["keep"] > 48
    assert held["return"] < 24
