# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""From logits to moments, tile by tile and part by part, and from moments to the squared norms of all contrasts.

``losses`` says what the moments are.
"""

import triton
import triton.language as tl

from .losses import contrast_coefficients, empty_moments, load_moments, reduce_moments, rest_value
from .sweeps import load_block


@triton.jit
def tile_moments(z, valid, LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr):
    """Moments of each row of a tile of logits ``[R, C]``; entries outside ``valid`` do not exist."""
    return reduce_moments(z, z, z, z, z, z, z, z, z, valid, LOSS, LOG, STATS, False)


@triton.jit
def merge_moments(
    top, second, square, mass, x1, x2, x3, x4, x5, top_b, second_b, square_b, mass_b, y1, y2, y3, y4, y5,
    LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Moments ``[R]`` of rows of two parts."""
    pair = tl.join(top, top_b)
    return reduce_moments(
        pair, tl.join(second, second_b), tl.join(square, square_b), tl.join(mass, mass_b), tl.join(x1, y1),
        tl.join(x2, y2), tl.join(x3, y3), tl.join(x4, y4), tl.join(x5, y5), pair == pair, LOSS, LOG, STATS, True,
    )  # fmt: skip


@triton.jit
def add_tile(
    top, second, square, mass, x1, x2, x3, x4, x5, z, valid,
    LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Moments ``[R]`` of rows that a tile of logits ``[R, C]`` continues."""
    top_b, second_b, square_b, mass_b, y1, y2, y3, y4, y5 = tile_moments(z, valid, LOSS, LOG, STATS)
    return merge_moments(
        top, second, square, mass, x1, x2, x3, x4, x5, top_b, second_b, square_b, mass_b, y1, y2, y3, y4, y5,
        LOSS, LOG, STATS,
    )  # fmt: skip


@triton.jit
def sweep_moments(
    z_rows, stride_n, start, stop, valid,
    LOSS: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Moments ``[ROWS]`` of the columns ``[start, stop)`` of rows, which stay in the cache for a second sweep."""
    top, second, square, mass, x1, x2, x3, x4, x5 = empty_moments(ROWS, LOSS, False)
    for n in range(start, stop, BLOCK_N):
        z, inside = load_block(z_rows, stride_n, n, stop, valid, BLOCK_N, float("-inf"), "evict_last")
        top, second, square, mass, x1, x2, x3, x4, x5 = add_tile(
            top, second, square, mass, x1, x2, x3, x4, x5, z, inside, LOSS, LOG, False
        )
    return top, second, square, mass, x1, x2, x3, x4, x5


@triton.jit
def merge_parts(
    at, parts, stride_part, plane, valid,
    LOSS: tl.constexpr, LOG: tl.constexpr, STATS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the partial moments of rows, ``PARTS`` at a time in their order, and add up their partial squares.

    ``at`` ``(ROWS,)`` points to each row's first part.
    """
    top, second, square, mass, x1, x2, x3, x4, x5 = empty_moments(ROWS, LOSS, STATS)
    features = tl.zeros([ROWS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        exists = valid[:, None] & (part < parts)[None, :]
        top_b, second_b, square_b, mass_b, y1, y2, y3, y4, y5, more = load_moments(
            at[:, None] + part.to(tl.int64)[None, :] * stride_part, plane, exists, LOSS, STATS
        )
        features += tl.sum(more, 1)
        top_b, second_b, square_b, mass_b, y1, y2, y3, y4, y5 = reduce_moments(
            top_b, second_b, square_b, mass_b, y1, y2, y3, y4, y5, exists, LOSS, LOG, STATS, True
        )
        top, second, square, mass, x1, x2, x3, x4, x5 = merge_moments(
            top, second, square, mass, x1, x2, x3, x4, x5, top_b, second_b, square_b, mass_b, y1, y2, y3, y4, y5,
            LOSS, LOG, STATS,
        )  # fmt: skip
    return top, second, square, mass, x1, x2, x3, x4, x5, features


@triton.jit
def contrast_values(
    z, factor, top, base, peak, c0, c1, c2, c3, c4, c5, LOSS: tl.constexpr, LOG: tl.constexpr
):  # fmt: skip
    """Squared norms (or logarithms) for logits ``z`` ``[R, C]`` of any contrasts. A tie is the maximum's equal."""
    v = rest_value(
        z, base[:, None], c0[:, None], c1[:, None], c2[:, None], c3[:, None], c4[:, None], c5[:, None], LOSS, LOG
    )  # fmt: skip
    v = tl.where(z == top[:, None], peak[:, None], v)
    return v + factor[:, None] if LOG else v * factor[:, None]


@triton.jit
def write_values(
    z_rows, stride_n, out_rows, start, stop, valid, factor, top, second, square, mass, x1, x2, x3, x4, x5,
    LOSS: tl.constexpr, LOG: tl.constexpr, BLOCK_N: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Turn the columns ``[start, stop)`` of rows of logits into squared norms.

    With ``SHARED`` the logits come from other programs of the same launch, and are read past the first-level cache.
    """
    base, peak, c0, c1, c2, c3, c4, c5 = contrast_coefficients(
        top, second, square, mass, x1, x2, x3, x4, x5, LOSS, LOG
    )
    for n in range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        inside = valid[:, None] & (cols < stop)[None, :]
        offs = cols.to(tl.int64)[None, :]
        if SHARED:
            z = tl.load(z_rows[:, None] + offs * stride_n, mask=inside, other=0.0, cache_modifier=".cg")
        else:
            z = tl.load(
                z_rows[:, None] + offs * stride_n, mask=inside, other=0.0, eviction_policy="evict_first"
            )
        v = contrast_values(
            z.to(tl.float32), factor, top, base, peak, c0, c1, c2, c3, c4, c5, LOSS, LOG
        )  # fmt: skip
        tl.store(out_rows[:, None] + offs, v, mask=inside)
