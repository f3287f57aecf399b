"""Memory of the host: what tensors free is kept for the tensors that follow."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MOST, LARGEST = 2**31 - 1, 32 << 20  # bytes that are kept; of a block that is kept, as large as glibc allows


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, in this process, instead of returning it to the system, which would clear it
    again page by page: training on a CPU gets faster. Does nothing with another C library."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(TRIM_THRESHOLD, MOST)
    mallopt(MMAP_THRESHOLD, LARGEST)
