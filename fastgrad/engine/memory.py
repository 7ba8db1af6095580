"""Scratch memory that one call leaves for the next, and what is raised where there is none.

PyTorch takes a CPU's memory from the C library. That of Linux gives freed memory back to the system above a limit, and
gets it again page by page, each cleared: a tenth to a quarter of the time of a network with large activations. It
raises the limit by itself to twice the largest block that the program freed, of at most 32 MiB.
"""

from __future__ import annotations

import functools

import torch

#: The largest block that counts, less what the C library keeps beside it.
_BLOCK = (32 << 20) - (64 << 10)


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library keep up to 64 MiB: free a block of the size that it learns most from, untouched, once.

    Any program that frees such a block does the same; the plain network and its training profit as well.
    """
    torch.empty(_BLOCK, dtype=torch.uint8, device="cpu")


def lacks_memory(error: Exception) -> bool:
    """Whether memory ran out, which tells nothing about a model and may not happen again."""
    words = ("out of memory", "allocate memory", "not enough memory")
    told = isinstance(error, RuntimeError) and any(each in str(error).lower() for each in words)
    return told or isinstance(error, (MemoryError, torch.OutOfMemoryError))
