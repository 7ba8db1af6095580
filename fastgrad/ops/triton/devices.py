"""What every launcher needs: the architecture, alignments and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastgrad.ops.dispatch import gpu, interpreting
from fastgrad.ops.tune import INTERPRETER, Architecture

# Compiler options of every launch: fused multiply-adds, for which Triton 3.9 warns unless they are asked for.
OPTIONS = {"enable_fp_fusion": True}


def architecture(tensor: torch.Tensor) -> Architecture:
    """Return the architecture of the tensor's device; the interpreter's for a CPU tensor."""
    return (gpu(tensor.device.index) if tensor.device.type == "cuda" else None) or INTERPRETER


def alignment(value: int) -> int:
    """Return the largest power of two up to 16 that divides ``value``."""
    return math.gcd(value, 16)


def empty(shape: Sequence[int], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Return an uninitialised contiguous tensor on ``like``'s device; launchers allocate nowhere else."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def upcast(tensor: torch.Tensor) -> bool:
    """Whether operands of a product must become float32 first: the interpreter multiplies bfloat16 wrongly."""
    return interpreting() and tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16
