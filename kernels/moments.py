"""From logits to moments, tile by tile and part by part, and from moments to the squared norms of all contrasts.

``losses`` says what the moments are; here they are tuples of any length.
"""

import triton
import triton.language as tl

from .losses import contrast_coefficients, empty_moments, reduce_moments, rest_value


@triton.jit
def merge_moments(moments, others, LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr):
    """Merge the moments ``[R]`` of two parts of each row."""
    COUNT: tl.constexpr = len(moments)
    pairs = (tl.join(moments[0], others[0]),)
    for i in tl.static_range(1, COUNT):
        pairs += (tl.join(moments[i], others[i]),)
    return reduce_moments(pairs, pairs[0] == pairs[0], LOSS, LOG, STATS, True)


@triton.jit
def add_tile(moments, z, valid, LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr):
    """Add a tile of logits ``[R, C]`` to the moments ``[R]`` of its rows."""
    return merge_moments(moments, reduce_moments((z,), valid, LOSS, LOG, STATS, False), LOSS, LOG, STATS)


@triton.jit
def load_block(
    ptrs, stride, n, stop, valid, BLOCK_N: tl.constexpr, other: tl.constexpr, KEEP: tl.constexpr = False
):  # fmt: skip
    """Return columns ``[n, n + BLOCK_N)`` of rows in float32, and which of them exist; ``KEEP`` keeps them cached."""
    cols = n + tl.arange(0, BLOCK_N)
    inside = valid[:, None] & (cols < stop)[None, :]
    at = ptrs[:, None] + cols.to(tl.int64)[None, :] * stride
    block = tl.load(at, mask=inside, other=other, eviction_policy="evict_last" if KEEP else "")
    return block.to(tl.float32), inside


@triton.jit
def sweep_moments(
    z_rows, stride_n, start, stop, valid,
    LOSS: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return moments ``[ROWS]`` of columns ``[start, stop)`` of rows, which stay in the cache for a second sweep."""
    moments = empty_moments(ROWS, LOSS, False)
    for n in range(start, stop, BLOCK_N):
        z, inside = load_block(z_rows, stride_n, n, stop, valid, BLOCK_N, float("-inf"), True)
        moments = add_tile(moments, z, inside, LOSS, LOG, False)
    return moments


@triton.jit
def store_part(at, plane, mask, moments, features):
    """Write partial moments and the features' partial square, each to a plane of ``plane`` elements."""
    COUNT: tl.constexpr = len(moments)
    for i in tl.static_range(COUNT):
        tl.store(at + i * plane, moments[i], mask=mask)
    tl.store(at + COUNT * plane, features, mask=mask)


@triton.jit
def merge_parts(
    at, parts, plane, LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Return ``(moments, features)`` of a row from the parts, at most ``PARTS``, that ``store_part`` wrote."""
    empty = columns(empty_moments(1, LOSS, STATS))
    COUNT: tl.constexpr = len(empty)
    part = tl.arange(0, PARTS)[None, :]
    exists = part < parts
    found = (tl.load(at + part, mask=exists, other=empty[0]),)
    for i in tl.static_range(1, COUNT):
        found += (tl.load(at + i * plane + part, mask=exists, other=empty[i]),)
    features = tl.sum(tl.load(at + COUNT * plane + part, mask=exists, other=0.0), 1)
    return reduce_moments(found, exists, LOSS, LOG, STATS, True), features


@triton.jit
def columns(values):
    """Return ``[R]`` values as ``[R, 1]``."""
    COUNT: tl.constexpr = len(values)
    found = (values[0][:, None],)
    for i in tl.static_range(1, COUNT):
        found += (values[i][:, None],)
    return found


@triton.jit
def contrast_values(z, factor, coefficients, LOSS: tl.constexpr, LOG: tl.constexpr):
    """Return squared norms (or logarithms) of contrasts with logits ``z`` ``[R, C]``; ties count as the maximum."""
    row = columns(coefficients)
    v = tl.where(z == row[0], row[1], rest_value(z, row, LOSS, LOG))
    return v + factor[:, None] if LOG else v * factor[:, None]


@triton.jit
def write_values(
    z_rows, stride_n, out_rows, start, stop, valid, factor, moments,
    LOSS: tl.constexpr, LOG: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Turn the columns ``[start, stop)`` of rows of logits into squared norms."""
    coefficients = contrast_coefficients(moments, LOSS, LOG)
    for n in range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        inside = valid[:, None] & (cols < stop)[None, :]
        offs = cols.to(tl.int64)[None, :]
        z = tl.load(z_rows[:, None] + offs * stride_n, mask=inside, other=0.0, eviction_policy="evict_first")
        v = contrast_values(z.to(tl.float32), factor, coefficients, LOSS, LOG)
        tl.store(out_rows[:, None] + offs, v, mask=inside)
