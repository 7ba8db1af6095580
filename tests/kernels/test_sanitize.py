"""Memory, orders and offsets of every kernel; and kernels with a fault each, which must not pass."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("watches Triton's interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402

from bench.gpu.sanitize import checks  # noqa: E402
from bench.gpu.sanitize.cases import Case  # noqa: E402
from bench.gpu.sanitize.watchers import SanitizerError  # noqa: E402
from fastgrad.ops import tune  # noqa: E402
from fastgrad.ops.triton import devices  # noqa: E402

GROUPS = ("memory", "offsets")


@pytest.mark.parametrize("group", [pytest.param("memory", marks=pytest.mark.slow), *GROUPS[1:]])
def test_a_case_of_every_path(group: str) -> None:
    rows = checks.run(True, group)
    assert [row["fault"] for row in rows] == [None] * len(rows)
    assert len(rows) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_everything(group: str) -> None:
    rows = checks.run(False, group)
    assert [row["fault"] for row in rows] == [None] * len(rows)
    assert len(rows) >= 12


@triton.jit
def sums_kernel(x_ptr, out_ptr, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """Each program sums a block."""
    pid = tl.program_id(0)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    inside = (at < n) | (FAULT == "no mask")
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if FAULT == "writes an input":
        tl.store(x_ptr + at, x, mask=at < n)
    if FAULT == "one place":
        tl.store(out_ptr, tl.sum(x, 0))
    elif FAULT != "unwritten":
        tl.store(out_ptr + pid, tl.sum(x, 0))
    if FAULT == "reads what is unwritten":
        tl.store(out_ptr + pid, tl.load(out_ptr + pid + 3))
    if (FAULT == "reads another's") and (pid > 0):
        tl.store(out_ptr + pid, tl.load(out_ptr + pid - 1))
    if FAULT == "atomic":
        tl.atomic_add(out_ptr + pid, 1.0)


def sums(fault: str) -> Case:
    x = torch.rand(21)

    def call() -> torch.Tensor:
        out = devices.empty((6,), x.dtype, x)
        sums_kernel[(3,)](x, out, 21, FAULT=fault, BLOCK=8)
        return out[:3].clone()

    return Case(fault, (x,), call)


def test_a_sound_kernel_passes() -> None:
    assert checks.check_memory(sums("none"), checks.shuffled(5)) == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no mask", "reads 4 bytes that no operand holds"),
        ("writes an input", "writes an input"),
        ("one place", "writes what program 0 writes, and nothing orders them"),
        ("unwritten", "a result was not written"),
        ("reads what is unwritten", "reads what nobody wrote"),
        ("reads another's", "reads what program 0 writes, and nothing orders them"),
        ("atomic", "an atomic operation"),
    ],
)
def test_a_fault_is_found(fault: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        checks.check_memory(sums(fault))


def test_an_order_that_changes_the_result() -> None:
    """What a launcher leaves on the host may depend on the order even where no two programs share memory."""
    order: list[int] = []

    def call() -> torch.Tensor:
        out = devices.empty((6,), torch.float32, torch.zeros(1))
        sums_kernel[(3,)](torch.rand(21), out, 21, FAULT="none", BLOCK=8)
        order.append(0)
        return out[:3] + len(order)

    with pytest.raises(SanitizerError, match="the order of programs changes the result"):
        checks.check_memory(Case("order", (), call))


@triton.jit
def rows_kernel(x_ptr, stride, WIDE: tl.constexpr):
    """Writes the first element of each row."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(x_ptr + row * stride, 0.0)


def test_an_offset_of_32_bits() -> None:
    x = torch.empty(3_000_000, 1000, device="meta")

    def call(wide: bool) -> Callable[[], object]:
        return lambda: rows_kernel[(len(x),)](x, 1000, WIDE=wide)

    assert checks.check_addresses(call(True), tune.INTERPRETER) == 3
    with pytest.raises(Exception, match=r"outside every operand|int32 overflow"):
        checks.check_addresses(call(False), tune.INTERPRETER)
