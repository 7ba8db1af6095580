"""Predicted seconds of every route for a convolution's shape, and the choice made from them.

Pure functions of integers. Only the ratios of the constants matter; bench/micro/conv_routes.py measures them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

#: Bytes of the largest intermediate of one chunk. Twice this still fits a common last-level cache, and the C library
#: reuses blocks below 32 MiB.
CHUNK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Shape:
    """What the cost of a route depends on."""

    batch: int
    count: int  # K, gradients per sample
    groups: int
    inputs: int  # channels per group
    outputs: int
    pixels: int  # of the padded input
    image: tuple[int, ...]  # input size per axis without padding, as far as windows reach
    positions: tuple[int, ...]  # output size per axis
    kernel: tuple[int, ...]
    overlaps: bool  # see `fastgrad.ops.conv.geometry.Problem`
    itemsize: int  # bytes per element of the dtype computed in, 4 or 8
    guarded: bool  # whether the Gram route may look at values; if not it computes in float64
    budget: int  # bytes of one chunk's intermediates


# Measured on two cores of an AMD EPYC (AVX-512), torch 2.13 with oneDNN convolutions and MKL products.
#: Multiply-adds per second of ``torch.bmm``, and of the library's convolutions and weight gradients.
PRODUCT, CONVOLUTION = 105e9, 170e9
#: Elements per second of a strided copy, of an addition of strided views, and of the large blocks of a box filter.
GATHER, ADD, FILTER = 2.5e9, 2.5e9, 13e9
#: Elements per second that the library's weight gradient reads and writes.
STREAM = 2.5e9
#: Seconds per operator call, and per matrix of a batched product.
CALL, SAMPLE = 4e-6, 1e-6


def chunk_bytes(route: str, s: Shape) -> int:
    """Return the bytes of a route's largest intermediates for one sample."""
    taps, positions = math.prod(s.kernel), math.prod(s.positions)
    gradient, patches = s.count * s.outputs * s.inputs * taps, s.inputs * taps * positions
    if route == "patch":
        elements = patches + gradient
    elif route == "grouped":
        elements = gradient + s.inputs * s.pixels
    else:
        elements = math.prod(s.image) ** 2 if s.overlaps else patches + positions**2
        elements += s.count * _form(s)
    return max(1, elements * s.groups * 4 * _wide(route, s))


def _wide(route: str, s: Shape) -> int:
    """Return the size of a route's numbers in units of float32's."""
    return 2 if s.itemsize == 8 or (route == "gram" and not s.guarded) else 1


def _form(s: Shape) -> int:
    """Return how many elements a quadratic form writes per gradient."""
    positions = math.prod(s.positions)
    return positions * min(s.outputs, positions)


def chunk_size(route: str, s: Shape) -> int:
    """Return how many samples a route takes at a time."""
    fitting = max(1, min(s.batch, s.budget // chunk_bytes(route, s)))
    if route == "grouped" and fitting < s.batch:
        # The library gives each thread whole samples: a power of two leaves no thread idle.
        return 1 << (fitting.bit_length() - 1)
    return fitting


def candidates(s: Shape) -> tuple[str, ...]:
    """Return the routes that can serve a shape."""
    # oneDNN has no float64 convolution.
    return ("patch", "gram", "grouped") if s.itemsize == 4 else ("patch", "gram")


def seconds(route: str, s: Shape) -> float:
    """Return the predicted time of one route for the whole batch."""
    taps, positions = math.prod(s.kernel), math.prod(s.positions)
    gradient, patches = s.count * s.outputs * s.inputs * taps, s.inputs * taps * positions
    wide = _wide(route, s)
    product, memory = PRODUCT / wide, ADD / wide
    if route == "patch":
        work = gradient * positions / product + (patches if taps > 1 else 0) / GATHER + gradient / memory + SAMPLE
        calls = 8
    elif route == "grouped":
        moved = gradient + s.inputs * s.pixels + s.outputs * s.count * positions
        work = gradient * positions / CONVOLUTION + moved / STREAM
        calls = 12
    else:
        work = s.count * positions**2 * s.outputs / product + s.count * _form(s) / memory + SAMPLE * 2
        if s.overlaps:
            added, size = 0, list(s.image)
            for axis, places in enumerate(s.positions):
                size[axis] = places
                added += math.prod(size) ** 2 * s.kernel[axis]
            work += math.prod(s.image) ** 2 * s.inputs / product + added * wide / FILTER
            calls = 16 + sum(s.kernel)
        else:
            work += positions * patches / product + patches / GATHER
            calls = 16
    chunks = math.ceil(s.batch / chunk_size(route, s))
    return s.batch * s.groups * work + chunks * calls * CALL


@functools.lru_cache(maxsize=4096)
def choose_route(s: Shape) -> str:
    """Return the route with the least predicted time."""
    return min(candidates(s), key=lambda route: seconds(route, s))
