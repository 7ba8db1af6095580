"""Predicted seconds of every route for a convolution, and the choice made from them.

Pure functions of shapes and dtypes. Only the ratios of the constants matter; bench/micro/conv_routes.py measures them.
"""

from __future__ import annotations

import math

import torch

from fastgrad.ops.conv.geometry import Problem

#: Bytes of the largest intermediate of one chunk. Twice this still fits a common last-level cache, and the C library
#: reuses blocks below 32 MiB.
CHUNK_BYTES = 8 * 2**20

# Measured on two cores of an AMD EPYC (AVX-512), torch 2.13 with oneDNN convolutions and MKL products.
#: Multiply-adds per second of ``torch.bmm``, and of the library's convolutions and weight gradients.
PRODUCT, CONVOLUTION = 105e9, 170e9
#: Elements per second of a strided copy, of an addition of strided views, and of the large blocks of a box filter.
GATHER, ADD, FILTER = 2.5e9, 2.5e9, 13e9
#: Elements per second that the library's weight gradient reads and writes.
STREAM = 2.5e9
#: Seconds per operator call, and per matrix of a batched product.
CALL, SAMPLE = 4e-6, 1e-6


def _sizes(p: Problem) -> tuple[int, int, int]:
    """Return the number of positions, and elements of the gradients and patches of a group of a sample."""
    taps, positions = math.prod(p.kernel), math.prod(p.positions)
    return positions, len(p.g) * p.outputs * p.inputs * taps, p.inputs * taps * positions


def chunk_bytes(route: str, p: Problem) -> int:
    """Return the bytes of a route's largest intermediates for one sample."""
    positions, gradient, patches = _sizes(p)
    if route == "patch":
        elements = patches + gradient
    elif route == "grouped":
        elements = gradient + p.inputs * p.pixels
    else:
        elements = math.prod(p.image) ** 2 if p.overlaps else patches + positions**2
        elements += _form(p)
    return max(1, elements * p.groups * 4 * _wide(route, p))


def _wide(route: str, p: Problem) -> int:
    """Return the size of a route's numbers in units of float32's."""
    return 2 if p.a.dtype == torch.float64 or (route == "gram" and not p.guarded) else 1


def _form(p: Problem) -> int:
    """Return how many elements the quadratic forms of a group of a sample write."""
    positions = math.prod(p.positions)
    return len(p.g) * positions * min(p.outputs, positions)


def chunk_size(route: str, p: Problem, budget: int) -> int:
    """Return how many samples a route takes at a time, whose intermediates fit ``budget`` bytes."""
    batch = len(p.a)
    fitting = max(1, min(batch, budget // chunk_bytes(route, p)))
    if route == "grouped" and fitting < batch:
        # The library gives each thread whole samples: a power of two leaves no thread idle.
        return 1 << (fitting.bit_length() - 1)
    return fitting


def candidates(p: Problem) -> tuple[str, ...]:
    """Return the routes that can serve a problem."""
    # oneDNN has no float64 convolution.
    return ("patch", "gram") if p.a.dtype == torch.float64 else ("patch", "gram", "grouped")


def seconds(route: str, p: Problem, budget: int) -> float:
    """Return the predicted time of one route for the whole batch, in chunks of ``budget`` bytes."""
    positions, gradient, patches = _sizes(p)
    wide = _wide(route, p)
    product, memory = PRODUCT / wide, ADD / wide
    if route == "patch":
        gathered = patches if math.prod(p.kernel) > 1 else 0
        work = gradient * positions / product + gathered / GATHER + gradient / memory + SAMPLE
        calls = 8
    elif route == "grouped":
        moved = gradient + p.inputs * p.pixels + p.outputs * len(p.g) * positions
        work = gradient * positions / CONVOLUTION + moved / STREAM
        calls = 12
    else:
        work = len(p.g) * positions**2 * p.outputs / product + _form(p) / memory + SAMPLE * 2
        if p.overlaps:
            added, size = 0, list(p.image)
            for axis, places in enumerate(p.positions):
                size[axis] = places
                added += math.prod(size) ** 2 * p.kernel[axis]
            work += math.prod(p.image) ** 2 * p.inputs / product + added * wide / FILTER
            calls = 16 + sum(p.kernel)
        else:
            work += positions * patches / product + patches / GATHER
            calls = 16
    chunks = math.ceil(len(p.a) / chunk_size(route, p, budget))
    return len(p.a) * p.groups * work + chunks * calls * CALL


def choose_route(p: Problem) -> str:
    """Return the route with the least predicted time."""
    return min(candidates(p), key=lambda route: seconds(route, p, CHUNK_BYTES))
