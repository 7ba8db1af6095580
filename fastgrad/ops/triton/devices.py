"""What every launcher needs: the architecture, alignments and memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from fastgrad.ops.dispatch import interpreting
from fastgrad.ops.tune import INTERPRETER, Architecture

# Compiler options of every launch: fused multiply-adds, for which Triton 3.9 warns unless they are asked for.
OPTIONS = {"enable_fp_fusion": True}


@functools.lru_cache
def _architecture(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        digits = "".join(c for c in properties.gcnArchName.split(":")[0] if c.isdigit())
        shared = 160 << 10 if digits == "950" else 64 << 10
        return Architecture("hip", int(digits or 0), properties.multi_processor_count, shared)
    version = 10 * properties.major + properties.minor
    shared = int(getattr(properties, "shared_memory_per_block_optin", 99 << 10))
    return Architecture("cuda", version, properties.multi_processor_count, shared)


def architecture(tensor: torch.Tensor) -> Architecture:
    """Return the architecture of the tensor's device; the interpreter's for a CPU tensor."""
    return INTERPRETER if tensor.device.type == "cpu" else _architecture(tensor.device.index)


def alignment(value: int) -> int:
    """Return the largest power of two up to 16 that divides ``value``."""
    return math.gcd(value, 16)


def strides(rows: torch.Tensor) -> tuple[tuple[int, int], int]:
    """Return the strides of a matrix, the rows' in units of the second result, a power of two up to 16."""
    factor = alignment(rows.stride(0))
    return (rows.stride(0) // factor, rows.stride(-1)), factor


def empty(shape: Sequence[int], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised contiguous tensor on ``like``'s device; launchers allocate nowhere else."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def upcast(tensor: torch.Tensor) -> bool:
    """Whether operands of a product must become float32 first: the interpreter multiplies bfloat16 wrongly."""
    return interpreting() and tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16
