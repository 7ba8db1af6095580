# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""Sum and sum of squares of every channel of every sample, from one read.

    sum[b, c] = sum_t x[b, c, t]        square[b, c] = sum_t x[b, c, t]^2

A program owns a tile of channels of one sample and walks over a share of the positions. Whatever is contiguous in
memory, positions or channels, runs along the tile's fast axis, so both layouts are read with the widest loads. The
partial sums of a share go to a place of their own, so that the result does not depend on timing.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B", "groups"])
def channel_moments_kernel(
    x_ptr, sum_ptr, square_ptr,
    B, C_units, T_units, stride_b, stride_c, stride_t, groups,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, UNROLL: tl.constexpr,
    ALIGN: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Grid ``(splits * B * tiles_c,)``; ``sum`` and ``square`` are float32 ``(splits, B, C)``.

    A program adds up ``groups`` times ``UNROLL`` tiles. Whatever vector loads need to know is a multiple of
    ``ALIGN`` is given in units of it: the stride of samples, the size of the fast axis, the stride of the slow one.
    """
    stride_b = stride_b.to(tl.int64) * ALIGN
    if CHANNELS_LAST:
        C = C_units * ALIGN
        T = T_units
        stride_t *= ALIGN
    else:
        C = C_units
        T = T_units * ALIGN
        stride_c *= ALIGN
    tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // tiles
    sample = row % B
    cs = (pid % tiles).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    ts = tl.arange(0, BLOCK_T)
    c_in = cs < C
    tile = x_ptr + sample * stride_b + cs.to(tl.int64)[:, None] * stride_c
    tile = tile + ts.to(tl.int64)[None, :] * stride_t
    start = row // B * groups * (UNROLL * BLOCK_T)

    total = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
    square = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
    for _ in range(groups):
        part = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
        part_square = tl.zeros([BLOCK_C, BLOCK_T], tl.float32)
        for i in tl.static_range(UNROLL):
            first = start + i * BLOCK_T
            inside = c_in[:, None] & (ts < tl.minimum(T - first, BLOCK_T).to(tl.int32))[None, :]
            x = tl.load(tile + first * stride_t, mask=inside, other=0.0).to(tl.float32)
            part += x
            part_square += x * x
        total += part
        square += part_square
        start += UNROLL * BLOCK_T
    out = row * C + cs
    tl.store(sum_ptr + out, tl.sum(total, 1), mask=c_in)
    tl.store(square_ptr + out, tl.sum(square, 1), mask=c_in)
