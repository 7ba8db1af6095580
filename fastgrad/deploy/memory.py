"""What a process that runs one model for long does with memory that is freed."""

from __future__ import annotations

import contextlib
import ctypes

# Of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: The most that glibc takes for a threshold of mapping, and more than a batch needs.
_MAPPED, _KEPT = 32 << 20, 1 << 30


def keep_memory() -> None:
    """Keep up to a gibibyte of freed memory for the next batch. Does nothing where the C library is not glibc.

    By itself glibc gives large blocks back to the system after every operation, which clears each page anew for the
    next one: of a small network's batch of 16 that is half of the time.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _MAPPED)
        mallopt(_TRIM_THRESHOLD, _KEPT)
