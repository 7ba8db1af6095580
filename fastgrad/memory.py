"""Scratch memory that one call leaves for the next, and errors that say that memory ran out.

PyTorch takes CPU memory from the C library. glibc returns freed memory above a limit to the system, and gets it back
page by page, each cleared. This takes a tenth to a quarter of the time of a network with large activations. glibc
itself raises the limit to twice the largest block that was freed, of at most 32 MiB.
"""

from __future__ import annotations

import functools

import torch

#: The largest block that counts, less what the C library keeps beside it.
_BLOCK = (32 << 20) - (64 << 10)


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB: allocate and free the largest block that counts, untouched, once.

    This holds for the whole process, so the plain network and its training profit as well.
    """
    torch.empty(_BLOCK, dtype=torch.uint8, device="cpu")


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, which says nothing about the model and may not happen again."""
    words = ("out of memory", "allocate memory", "not enough memory")
    says_so = isinstance(error, RuntimeError) and any(each in str(error).lower() for each in words)
    return says_so or isinstance(error, (MemoryError, torch.OutOfMemoryError))
