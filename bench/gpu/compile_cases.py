"""What is compiled: one call of a launcher for every shape that `tune` treats differently.

To add a kernel, append a ``Case`` to ``cases()`` and its most telling one to ``QUICK``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from fastgrad.ops.dispatch import KERNEL_DTYPES

DTYPES = KERNEL_DTYPES | {torch.int32: "i32", torch.int64: "i64"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        name: What the table says; starts with the operator's name.
        call: Runs the launcher on meta tensors.
        wide: Whether 16-byte loads and stores must appear; they need rows of a multiple of 16 bytes.
    """

    name: str
    call: Callable[[], object]
    wide: bool = True


# One case for each kernel: what every test run compiles.
QUICK = (
    "contrast_sqnorm B=4096 N=1000 D=512 bf16 cross_entropy",
    "contrast_sqnorm B=4096 N=262144 D=4096 bf16 cross_entropy",
    "contrast_sqnorm B=8 N=131072 D=4096 bf16 brier log",
    "linear_contrast_sqnorm B=1024 N=32000 D=4096 bf16 brier",
    "linear_contrast_stats B=1024 N=128256 D=4096 bf16 bce",
    "target_sqnorm B=4096 N=1000 D=512 bf16 soft brier",
    "conv_sqnorm B=64 64 to 64 32x32 kernel 3 stride 1 bf16",
    "linear_sqnorm B=64 T=196 C=768 O=3072 bf16",
)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> list[Case]:
    """The shapes that `tune` treats differently, for every kernel."""
    from fastgrad.ops.triton import contrast, layer_sqnorm, linear_contrast, target

    losses = ("cross_entropy", "bce", "mse", "brier")
    half, single = torch.bfloat16, torch.float32
    found: list[Case] = []

    def contrasts(B: int, N: int, D: int, dtype: torch.dtype, loss: str, log: bool, **kinds: bool) -> None:
        found.append(
            Case(
                f"contrast_sqnorm B={B} N={N} D={D} {DTYPES[dtype]} {loss}{' log' if log else ''}",
                lambda: contrast.contrast_sqnorm(
                    meta(B, D, dtype=dtype), meta(B, N, dtype=dtype), loss, True, log, False
                ),
                **kinds,
            )
        )

    for loss in losses:
        contrasts(4096, 1000, 512, half, loss, False)
        contrasts(4096, 1000, 512, half, loss, True)
        contrasts(4096, 8192 if loss == "brier" else 16384, 4096, single, loss, False)
        contrasts(4096, 262144, 4096, half, loss, False)
        contrasts(8, 131072, 4096, half, loss, True)
    for N, dtype in ((16, single), (128, half), (1000, single), (4096, half), (8192, single)):
        contrasts(4096, N, 512, dtype, "cross_entropy", False)
    contrasts(4096, 10, 512, single, "cross_entropy", False, wide=False)

    def linear(B: int, N: int, D: int, dtype: torch.dtype, loss: str, kind: str = "") -> None:
        x, w, b = meta(B, D, dtype=dtype), meta(N, D, dtype=dtype), meta(N, dtype=dtype)

        def call() -> object:
            if kind == "stats":
                return linear_contrast.linear_contrast_stats(x, w, b, loss, False)
            return linear_contrast.linear_contrast_sqnorm(x, w, b, loss, kind == "log", False)

        name = "linear_contrast_stats" if kind == "stats" else "linear_contrast_sqnorm"
        suffix = " log" if kind == "log" else ""
        found.append(Case(f"{name} B={B} N={N} D={D} {DTYPES[dtype]} {loss}{suffix}", call))

    for loss in losses:
        for B, N, D, dtype in (
            (1, 1000, 2048, half), (32, 1000, 2048, half), (64, 32000, 4096, half), (1024, 32000, 4096, half),
            (32, 1000, 2048, single), (1024, 1000, 2048, single),
        ):  # fmt: skip
            linear(B, N, D, dtype, loss)
        linear(32, 1000, 2048, half, loss, "log")
        for B, N, D, dtype in (
            (8, 128256, 4096, half),
            (1024, 128256, 4096, half),
            (256, 32000, 4096, single),
        ):
            linear(B, N, D, dtype, loss, "stats")

    def targets(B: int, N: int, D: int, kind: str, loss: str, log: bool) -> None:
        y = meta(B, dtype=torch.int64) if kind == "indices" else meta(B, N) if kind == "soft" else None
        found.append(
            Case(
                f"target_sqnorm B={B} N={N} D={D} bf16 {kind} {loss}{' log' if log else ''}",
                lambda: target.target_sqnorm(
                    meta(B, D, dtype=half), meta(B, N, dtype=half), y, kind, loss, True, log, False
                ),
            )
        )

    for loss in losses:
        for kind in ("ones", "predicted", "soft"):
            targets(4096, 1000, 512, kind, loss, False)
    targets(256, 128256, 4096, "indices", "brier", True)

    def conv(C: int, O: int, size: int, kernel: int, stride: int, dtype: torch.dtype) -> None:  # noqa: E741
        last = torch.channels_last
        a = meta(64, C, size, size, dtype=dtype).contiguous(memory_format=last)
        out = (size - 1) // stride + 1
        g = meta(64, O, out, out, dtype=dtype).contiguous(memory_format=last).unsqueeze(0)
        each = [(kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1)]
        found.append(
            Case(
                f"conv_sqnorm B=64 {C} to {O} {size}x{size} kernel {kernel} stride {stride} {DTYPES[dtype]}",
                lambda: layer_sqnorm.conv_sqnorm(a, g, *each, 1),  # type: ignore[call-arg]
                wide=C % 16 == 0,
            )
        )

    for dtype in (half, torch.float16, single):
        conv(64, 64, 32, 3, 1, dtype)
        conv(256, 512, 8, 3, 2, dtype)
        conv(3, 64, 32, 3, 1, dtype)
        for T, C, O in ((196, 768, 3072), (1024, 256, 256)):  # noqa: E741
            found.append(
                Case(
                    f"linear_sqnorm B=64 T={T} C={C} O={O} {DTYPES[dtype]}",
                    lambda T=T, C=C, O=O, dtype=dtype: layer_sqnorm.linear_sqnorm(  # type: ignore[misc] # noqa: E741
                        meta(64, T, C, dtype=dtype), meta(1, 64, T, O, dtype=dtype)
                    ),
                )
            )

    # Sizes of 1 are constants to the compiler, and take other branches of the language.
    one, ones, loss = meta(1, 1), meta(1), "mse"
    for name, call in (
        ("contrast_sqnorm", lambda: contrast.contrast_sqnorm(one, one, loss, True, True, True)),
        (
            "linear_contrast_sqnorm",
            lambda: linear_contrast.linear_contrast_sqnorm(one, one, ones, loss, True, True),
        ),
        ("linear_contrast_stats", lambda: linear_contrast.linear_contrast_stats(one, one, ones, loss, True)),
        ("target_sqnorm", lambda: target.target_sqnorm(one, one, one, "soft", loss, True, True, True)),
    ):
        found.append(Case(f"{name} B=1 N=1 D=1 fp32 {loss}", call, wide=False))
    return found
