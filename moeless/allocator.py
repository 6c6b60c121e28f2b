"""Keeping freed memory in the process.

glibc hands large buffers back to the kernel when they are freed, which then has to fill new ones with zeros: a layer
over thousands of tokens spent a fifth of its time on that. Long-running ranks and measurements keep what they freed.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Stop returning freed memory to the kernel; whether the C library understood."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
