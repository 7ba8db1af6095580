"""Memory, orders and offsets of every kernel; and kernels with a fault each, which must not pass."""

from __future__ import annotations

import itertools
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

GROUPS = ("memory", "orders", "offsets")


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
def sums_kernel(x_ptr, part_ptr, sync_ptr, out_ptr, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    """Each program sums a block; the last to arrive adds the sums up in their order."""
    pid = tl.program_id(0)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    inside = (at < n) | (FAULT == "no mask")
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if FAULT == "writes an input":
        tl.store(x_ptr + at, x, mask=at < n)
    if FAULT == "one place":
        tl.store(part_ptr, tl.sum(x, 0))
    elif FAULT != "unwritten":
        tl.store(part_ptr + pid, tl.sum(x, 0))
    if FAULT == "relaxed":
        came = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    else:
        came = tl.atomic_add(sync_ptr, 1, sem="acq_rel", scope="gpu")
    last = tl.num_programs(0) - 1
    if FAULT == "too early":
        last = 0
    if came == last:
        total = 0.0
        for other in range(tl.num_programs(0)):
            total += tl.load(part_ptr + other)
        tl.store(out_ptr, total)


@triton.jit
def added_kernel(x_ptr, out_ptr):
    """Adds in the order in which programs arrive."""
    tl.atomic_add(out_ptr, tl.load(x_ptr + tl.program_id(0)))


def sums(fault: str) -> Case:
    x = torch.rand(21)

    def call() -> torch.Tensor:
        part, out = devices.empty((3,), x.dtype, x), devices.empty((1,), x.dtype, x)
        sync = torch.zeros(1, dtype=torch.int32)
        sums_kernel[(3,)](x, part, sync, out, 21, FAULT=fault, BLOCK=8)
        return out

    return Case(fault, (x,), call)


def test_a_sound_kernel_passes() -> None:
    assert checks.check_memory(sums("none"), checks.every_order(3)) == 6
    assert checks.check_memory(sums("none"), checks.shuffled(5)) == 5


@triton.jit
def arrivals_kernel(sync_ptr, out_ptr):
    """Each program notes how many came before it."""
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(sync_ptr, 1))


@pytest.mark.parametrize("programs", [2, 3, 4])
def test_every_order_of_arrivals_is_run(programs: int) -> None:
    found = []

    def call() -> torch.Tensor:
        out = torch.empty(programs, dtype=torch.int32)
        arrivals_kernel[(programs,)](torch.zeros(1, dtype=torch.int32), out)
        found.append(tuple(out.tolist()))
        return torch.zeros(1)

    checks.check_memory(Case("arrivals", (), call), checks.every_order(programs))
    assert sorted(found) == list(itertools.permutations(range(programs)))


@triton.jit
def twice_kernel(sync_ptr):
    """Each program arrives twice, so that orders of whole programs are not all orders."""
    tl.atomic_add(sync_ptr, 1)
    tl.atomic_add(sync_ptr, 1)


def test_a_program_that_arrives_twice_is_refused() -> None:
    call = lambda: twice_kernel[(2,)](torch.zeros(1, dtype=torch.int32))  # noqa: E731
    with pytest.raises(Exception, match="second atomic operation"):
        checks.check_memory(Case("twice", (), call))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no mask", "reads 4 bytes that no operand holds"),
        ("writes an input", "writes an input"),
        ("one place", "nothing orders them"),
        ("unwritten", "reads what nobody wrote"),
        ("relaxed", "reads what program 0 writes, and nothing orders them"),
        ("too early", "reads what nobody wrote|nothing orders them"),
    ],
)
def test_a_fault_is_found(fault: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        checks.check_memory(sums(fault))


def test_what_runs_between_two_programs_of_another_is_found() -> None:
    """The first to arrive reads what the others write later: no order of whole programs shows it but the race does."""
    x = torch.zeros(3)

    def call() -> torch.Tensor:
        part, out = torch.zeros(3), torch.zeros(1)
        sums_kernel[(3,)](x, part, torch.zeros(1, dtype=torch.int32), out, 3, FAULT="too early", BLOCK=1)
        return out

    with pytest.raises(Exception, match="writes what program 0 reads, and nothing orders them"):
        checks.check_memory(Case("too early", (x,), call))


def test_an_order_that_changes_the_result_is_found() -> None:
    x = torch.tensor([1.0, 1e8, -1e8])

    def call() -> torch.Tensor:
        out = torch.zeros(1)
        added_kernel[(3,)](x, out)
        return out

    with pytest.raises(SanitizerError, match="the order of programs changes the result"):
        checks.check_memory(Case("added", (x,), call))


@triton.jit
def rows_kernel(x_ptr, stride, WIDE: tl.constexpr):
    """Writes the first element of each row."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(x_ptr + row * stride, 0.0)


def test_an_offset_of_32_bits_is_found() -> None:
    x = torch.empty(3_000_000, 1000, device="meta")

    def call(wide: bool) -> Callable[[], object]:
        return lambda: rows_kernel[(len(x),)](x, 1000, WIDE=wide)

    assert checks.check_addresses(call(True), tune.INTERPRETER) == 3
    with pytest.raises(Exception, match=r"outside every operand|int32 overflow"):
        checks.check_addresses(call(False), tune.INTERPRETER)
