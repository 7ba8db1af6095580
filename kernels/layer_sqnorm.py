"""Per-sample squared norms of weight gradients; only one number per tile leaves the chip.

    G[o, c, d] = sum_t g[o, t] a[c, stride * t + dilation * d - padding]        out = ||G||^2

- ``direct_kernel``: an implicit matrix product per (sample, kernel offset); a program owns a tile of (O, C), runs over
  the positions and sums the squares of its accumulator. A linear layer is a convolution with one kernel offset.
- ``gram_kernel``: the same number as ``sum_{t,t'} (a_t . a_t')(g_t . g_t')`` for a linear layer; a program owns a tile
  of position pairs, of which only those with t <= t' are formed.

Every program writes its own element of ``out``, so the result does not depend on timing. Positions are ``(d, h, w)``
triples, in which missing axes have size 1. Tiles run along channels, so that loads of channels-last operands are wide.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["before", "B"])
def direct_kernel(
    a_ptr, g_ptr, out_ptr, flag_ptr,
    before, B, groups, C, O,  # noqa: E741
    size_d, size_h, size_w, out_d, out_h, out_w, kernel_d, kernel_h, kernel_w,
    step_d, step_h, step_w, dil_d, dil_h, dil_w, pad_d, pad_h, pad_w,
    stride_ab, stride_ac, stride_ad, stride_ah, stride_aw,
    stride_gk, stride_gb, stride_go, stride_gd, stride_gh, stride_gw,
    FLAGGED: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid ``(K * B * groups * tiles_o * taps * tiles_c,)``, or a piece of it after ``before`` programs.

    With ``FLAGGED`` only samples whose ``flag`` (int32 ``(K, B)``) is set are computed; others get 0.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    taps = kernel_d * kernel_h * kernel_w
    tiles_o = tl.cdiv(O, BLOCK_O)
    pid = tl.program_id(0).to(tl.int64) + before
    rest = pid
    tile_c = (rest % tiles_c).to(tl.int32)
    rest = rest // tiles_c
    tap = (rest % taps).to(tl.int32)
    rest = rest // taps
    tile_o = (rest % tiles_o).to(tl.int32)
    rest = rest // tiles_o
    group = (rest % groups).to(tl.int32)
    rest = rest // groups
    sample = rest % B
    gradient = rest // B

    wanted = True
    if FLAGGED:
        wanted = tl.load(flag_ptr + rest) != 0
    square = 0.0
    if wanted:
        tap_w = tap % kernel_w
        tap_h = (tap // kernel_w) % kernel_h
        tap_d = tap // (kernel_w * kernel_h)
        cs = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
        os = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
        ts = tl.arange(0, BLOCK_T)
        c_in, o_in = (cs < C)[None, :], (os < O)[None, :]
        a_base = a_ptr + sample * stride_ab + group.to(tl.int64) * C * stride_ac + cs.to(tl.int64) * stride_ac
        g_base = g_ptr + gradient * stride_gk + sample * stride_gb + group.to(tl.int64) * O * stride_go
        g_base = g_base + os.to(tl.int64) * stride_go
        positions = out_d * out_h * out_w
        acc = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
        for start in range(0, positions, BLOCK_T):
            t = start + ts
            w = t % out_w
            h = (t // out_w) % out_h
            d = t // (out_w * out_h)
            inside = t < positions
            x_d = d * step_d + tap_d * dil_d - pad_d
            x_h = h * step_h + tap_h * dil_h - pad_h
            x_w = w * step_w + tap_w * dil_w - pad_w
            valid = inside & (x_d >= 0) & (x_d < size_d) & (x_h >= 0) & (x_h < size_h)
            valid = valid & (x_w >= 0) & (x_w < size_w)
            a_offs = x_d.to(tl.int64) * stride_ad + x_h.to(tl.int64) * stride_ah + x_w.to(tl.int64) * stride_aw
            g_offs = d.to(tl.int64) * stride_gd + h.to(tl.int64) * stride_gh + w.to(tl.int64) * stride_gw
            a = tl.load(a_base[None, :] + a_offs[:, None], mask=valid[:, None] & c_in, other=0.0)
            g = tl.load(g_base[None, :] + g_offs[:, None], mask=inside[:, None] & o_in, other=0.0)
            if UPCAST:
                # The interpreter multiplies bfloat16 wrongly.
                a = a.to(tl.float32)
                g = g.to(tl.float32)
            acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
        square = tl.sum(tl.sum(acc * acc, 1), 0)
    tl.store(out_ptr + pid, square)


@triton.jit
def gram_tile(
    x_ptr, rows, cols, T, K, stride_t, stride_k,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return products over K channels of positions ``rows`` and positions ``cols``, of the T of one sample."""
    row_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_t
    col_ptrs = x_ptr + cols.to(tl.int64)[:, None] * stride_t
    acc = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        offs = k.to(tl.int64)[None, :] * stride_k
        left = tl.load(row_ptrs + offs, mask=(rows < T)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(col_ptrs + offs, mask=(cols < T)[:, None] & (k < K)[None, :], other=0.0)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["B", "tiles", "pairs"])
def gram_kernel(
    a_ptr, g_ptr, out_ptr, diagonal_ptr,
    B, T, C, O,  # noqa: E741
    tiles, pairs, stride_ab, stride_at, stride_ac, stride_gk, stride_gb, stride_gt, stride_go,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid ``(K * B * pairs,)`` with ``pairs = tiles (tiles + 1) / 2`` pairs of position tiles, first <= second.

    A program writes its share of the norm, and its share of the terms with t = t', which shows how far others cancel.
    """
    pid = tl.program_id(0).to(tl.int64)
    pair = (pid % pairs).to(tl.int32)
    sample = (pid // pairs) % B
    gradient = pid // pairs // B
    first = tl.full([], 0, tl.int32)
    while pair >= tiles - first:
        pair -= tiles - first
        first += 1
    second = first + pair

    rows = first * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = second * BLOCK_T + tl.arange(0, BLOCK_T)
    a = a_ptr + sample * stride_ab
    g = g_ptr + gradient * stride_gk + sample * stride_gb
    inputs = gram_tile(a, rows, cols, T, C, stride_at, stride_ac, BLOCK_T, BLOCK_K, PRECISION, UPCAST)
    outputs = gram_tile(g, rows, cols, T, O, stride_gt, stride_go, BLOCK_T, BLOCK_K, PRECISION, UPCAST)
    product = inputs * outputs
    own = tl.where(rows[:, None] == cols[None, :], product, 0.0)
    weight = tl.where(first == second, 1.0, 2.0)
    tl.store(out_ptr + pid, tl.sum(tl.sum(product, 1), 0) * weight)
    tl.store(diagonal_ptr + pid, tl.sum(tl.sum(own, 1), 0))
