"""Launchers of the last layer's kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

from fastgrad.kernels import contrast, general
from fastgrad.ops import tune
from fastgrad.ops.triton import devices
from fastgrad.ops.tune import cdiv, chunk

#: Losses of the kernel that is the formula itself; `general` serves all.
PLAIN = ("cross_entropy", "bce", "mse")


@lru_cache(1024)
def _plan(
    choose: Callable[..., tuple[tune.Options, int]], sizes: tuple[int, int, int], strides: tuple[int, int, int, int],
    loss: str, arch: tune.Architecture,
) -> tuple[int, int, tune.Options, tune.Options]:  # fmt: skip
    """Return programs, how many share a row, and the constants of the first or only kernel and of the second.

    ``choose`` is `tune.last_layer`, ``sizes`` are B, N and D, ``strides`` of rows and columns of features, then logits.
    """
    B, N, D = sizes
    config, tiles = choose(B, N, D, loss, arch)
    logits: tune.Options = {"LOSS": loss, "ALIGN_Z": devices.alignment(gcd(strides[2], N)), **devices.OPTIONS}
    options = {**logits, "ALIGN_H": devices.alignment(strides[0]), **config}
    if not tiles:
        return cdiv(B, config["ROWS"]), 0, options, {}
    # The last tile of every row has logits, wherever the row begins.
    whole = strides[2:] == (N, 1) and cdiv(N + 15, config["BLOCK_N"]) == tiles
    options["PEEL"] = logits["PEEL"] = whole and logits["ALIGN_Z"] < 8
    options["COUNT"] = 9 if loss == "brier" else 4  # fields of the moments that leave the chip
    ends = {**logits, "BLOCK_N": config["BLOCK_N"], "num_warps": config["num_warps"], "PARTS": tune.power_of_two(tiles)}
    return B * tiles, tiles, options, ends


def contrast_sqnorm(features: Tensor, logits: Tensor, loss: str, bias: bool, log: bool, mean: bool) -> Tensor:
    """Return squared norms of all one-hot contrasts, ``(B, N)`` float32, for features ``(B, D)``, logits ``(B, N)``."""
    B, N = logits.shape
    out = devices.empty((B, N), torch.float32, logits)
    if B == 0 or N == 0:
        return out
    D, strides = features.shape[1], (*features.stride(), *logits.stride())
    programs, tiles, options, _ = _plan(tune.last_layer, (B, N, D), strides, loss, devices.architecture(logits))
    if tiles or log or loss not in PLAIN:
        return _general(features, logits, None, out, "contrasts", loss, bias, log, mean)
    contrast.contrast_rows_kernel[(programs,)](
        features, logits, out, B, N, D, *strides, BIAS=bias, MEAN=mean, **options
    )
    return out


def _general(
    features: Tensor, logits: Tensor, labels: Tensor | None, out: Tensor, kind: str, loss: str, bias: bool, log: bool,
    mean: bool,
) -> Tensor:  # fmt: skip
    """Fill ``out`` with what ``kind`` names: see `fastgrad.kernels.general`. Return it."""
    (B, D), N = features.shape, logits.shape[1]
    K = out.shape[1] if kind == "indices" else 1
    strides = (*features.stride(), *logits.stride())
    programs, tiles, options, ends = _plan(tune.last_layer, (B, N, D), strides, loss, devices.architecture(logits))
    labelled = logits if labels is None else labels
    integers = (*strides[2:], *((0, 0) if labels is None else labels.stride()))
    kept: tune.Options = {"KIND": kind, "LOG": log, "BIAS": bias, "MEAN": mean, "BLOCK_K": tune.power_of_two(K)}
    if not tiles:
        general.rows_kernel[(programs,)](
            features, logits, labelled, out, B, N, D, K, *strides[:2], *integers, **options, **kept
        )
        return out
    work = devices.empty((1 + options["COUNT"], B, tiles), torch.float32, logits)
    general.moments_kernel[(programs,)](
        features, logits, work, N, D, *strides, tiles, chunk(D, tiles, 16), LOG=log, **options
    )
    constant = kind in ("ones", "uniform") and loss != "brier"
    parts = devices.empty((6, B, tiles), torch.float32, logits) if constant or kind == "statistics" else out
    tiled = kind == "contrasts" or parts is not out
    general.finish_kernel[(programs if tiled else B,)](
        logits, labelled, work, parts, B, N, K, *integers, tiles, TILED=tiled, **ends, **kept
    )
    if kind == "statistics":
        low, high, total, weighted, weight, predicted = parts
        found = (low.amin(1), high.amax(1), total.sum(1) / N, weighted.sum(1) / weight.sum(1), predicted[:, 0])
        torch.stack(found, 1, out=out)
    elif constant:
        first, second, factor = parts[0], parts[1], parts[5, :, 0]
        if log and kind == "ones" and loss == "bce":
            torch.add(second.logsumexp(1), factor.log(), out=out)
        else:
            value = second.sum(1) - first.sum(1).square() / N
            torch.add(value.log(), factor.log(), out=out) if log else torch.mul(value, factor, out=out)
    return out


def target_sqnorm(
    features: Tensor, logits: Tensor, target: Tensor | None, kind: str, loss: str, bias: bool, log: bool, mean: bool
) -> Tensor:
    """Return squared norms of one target per sample, ``(B,)`` float32, for features ``(B, D)`` and logits ``(B, N)``.

    ``target`` is ``(B,)`` or ``(B, K)`` int64 for ``indices``, whose result has its shape, else None. An index outside
    ``[0, N)`` gives NaN: reading it back to raise would wait for the device.
    """
    B, N = logits.shape
    labels = target if target is None or target.dim() == 2 else target.unsqueeze(1)
    out = devices.empty((B,) if labels is None else labels.shape, torch.float32, logits)
    if out.numel():
        if kind == "uniform" and N == 1:
            kind = "ones"  # the same label, whose logarithm does not underflow
        _general(features, logits, labels, out, kind, loss, bias, log, mean)
    return out if target is None else out.reshape(target.shape)


def contrast_stats(features: Tensor, logits: Tensor, loss: str, bias: bool, mean: bool) -> Tensor:
    """Return minimum, maximum, mean, softmax expectation and predicted class of all contrasts, ``(B, 5)`` float32."""
    out = devices.empty((logits.shape[0], 5), torch.float32, logits)
    return _general(features, logits, None, out, "statistics", loss, bias, False, mean) if len(out) else out
