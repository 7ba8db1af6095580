# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"
"""The first linear layer over the contrast rows ``vec(d h^T)``, which are never formed.

    y[b, u] = sum_k d[b, k] sum_j V[u, k D + j] h[b, j] + c[u]

One matrix product over the ``N D`` pairs (k, j): its left operand ``d[b, k] h[b, j]`` is made tile by tile from a tile
of ``h``, which stays on chip, and a column of ``d``; only V streams through. The pairs are shared out over programs;
the last one of an output tile to arrive adds the partial sums up in the order of the parts, so the result does not
depend on timing.
"""

import triton
import triton.language as tl

from .linear_contrast import arrive


@triton.jit(do_not_specialize=["B", "U", "parts"])
def rows_linear_kernel(
    h_ptr, d_ptr, v_ptr, c_ptr, y_ptr, work_ptr, sync_ptr,
    B, U, N, D_units, stride_hb, stride_hd, stride_db, stride_dn, stride_vu, stride_vr, parts, steps_per_part,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    ALIGN_H: tl.constexpr, ALIGN_V: tl.constexpr, ALIGN_D: tl.constexpr,
):  # fmt: skip
    """Grid ``(tiles_m * tiles_u * parts,)``.

    A step is one pair of (block of ``BLOCK_K`` features, contrast), the contrasts running fastest. ``work`` is
    float32 ``(parts, B, U)`` and ``sync`` int32 ``(tiles_m * tiles_u,)``, zero; neither is used without ``SPLIT``.
    """
    D = D_units * ALIGN_D
    tiles_u = tl.cdiv(U, BLOCK_U)
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts
    rows = (tile // tiles_u).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = (tile % tiles_u) * BLOCK_U + tl.arange(0, BLOCK_U)
    first = part.to(tl.int64) * steps_per_part
    last = tl.minimum(first + steps_per_part, tl.cdiv(D, BLOCK_K).to(tl.int64) * N)

    # Rows past the end repeat the last one: no masks in the product, and nothing of them is stored.
    safe_rows = tl.minimum(rows, B - 1)
    h_rows = h_ptr + safe_rows * stride_hb * ALIGN_H
    d_rows = d_ptr + safe_rows * stride_db
    v_rows = v_ptr + tl.minimum(units, U - 1).to(tl.int64) * stride_vu * ALIGN_V
    acc = tl.zeros([BLOCK_M, BLOCK_U], tl.float32)
    for block in range((first // N).to(tl.int32), tl.cdiv(last, N).to(tl.int32)):
        js = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (js < D)[None, :]
        h = tl.load(h_rows[:, None] + js.to(tl.int64)[None, :] * stride_hd, mask=inside, other=0.0)
        before = tl.full([], block, tl.int64) * N
        start = tl.maximum(first - before, 0).to(tl.int32)
        stop = tl.minimum(last - before, N).to(tl.int32)
        for k in range(start, stop):
            k64 = tl.full([], k, tl.int64)
            v_ptrs = v_rows[:, None] + (k64 * D_units * ALIGN_D + js)[None, :] * stride_vr
            v = tl.load(v_ptrs) if EVEN_K else tl.load(v_ptrs, mask=inside, other=0.0)
            d = tl.load(d_rows + k64 * stride_dn)
            left = (h.to(tl.float32) * d[:, None]).to(h.dtype)
            if UPCAST:
                # The interpreter multiplies bfloat16 wrongly.
                left = left.to(tl.float32)
                v = v.to(tl.float32)
            acc = tl.dot(left, tl.trans(v), acc, input_precision=PRECISION)

    inside = (rows < B)[:, None] & (units < U)[None, :]
    offs = rows[:, None] * U + units[None, :]
    if SPLIT:
        plane = tl.full([], B, tl.int64) * U
        tl.store(work_ptr + part.to(tl.int64) * plane + offs, acc, mask=inside)
        if arrive(sync_ptr + tile) == parts - 1:
            total = tl.zeros([BLOCK_M, BLOCK_U], tl.float32)
            for other in range(parts):
                at = work_ptr + tl.full([], other, tl.int64) * plane + offs
                total += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
            if HAS_BIAS:
                total += tl.load(c_ptr + units, mask=units < U, other=0.0).to(tl.float32)[None, :]
            tl.store(y_ptr + offs, total, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(c_ptr + units, mask=units < U, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + offs, acc, mask=inside)
