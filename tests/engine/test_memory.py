"""What a call frees is there for the next one, without a page from the system; graphs go with their outputs."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from small_nets import Net
from torch import nn

import fastgrad

COUNT = """
import resource, sys
import torch
from fastgrad.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        pass_ = [torch.ones(2 << 20, dtype=torch.float32) for _ in range(3)]
        del pass_
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_freed_memory_is_kept() -> None:
    def run(which: str) -> int:
        found = subprocess.run([sys.executable, "-c", COUNT, which], capture_output=True, text=True, check=True)
        return int(found.stdout)

    # Ten rounds of 24 MiB: all of their pages come anew, or hardly any.
    pages = 10 * (24 << 20) // 4096
    if run("plain") < pages / 2:
        pytest.skip("this system's pages are larger, or its C library keeps memory by itself")
    assert run("kept") < pages / 20


def graphs() -> list[torch.Tensor]:
    """Tensors whose graph is alive."""
    return [o for o in gc.get_objects() if type(o) is torch.Tensor and o.grad_fn is not None]


@pytest.mark.parametrize("train", [False, True])
def test_a_first_call_leaves_no_graph_alive(train: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).train(train)
    gc.collect()
    before = len(graphs())
    gc.disable()
    try:
        for size in (5, 6, 7):
            fastgrad.GradientFeatures(model)(torch.randn(size, 3, 8, 8))
        # Neither cycles nor hooks of the graph hold on to activations: nobody waits for a collector.
        assert len(graphs()) == before
    finally:
        gc.enable()


OUT_OF_MEMORY = [
    MemoryError("none"), torch.OutOfMemoryError("none"), RuntimeError("CUDA error: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
]  # fmt: skip


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_ran_out(error: Exception) -> None:
    """Wherever it ran out, the error comes out as it is, and the next call is like a first one."""

    def function(net: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise error
        return net.twice(net.twice(x + net.shift) * mask).tanh()

    def made() -> fastgrad.GradientFeatures:
        torch.manual_seed(0)
        return fastgrad.GradientFeatures(Net(function, shift=nn.Parameter(torch.randn(4)), twice=nn.Linear(4, 4)))

    x, mask, left = torch.ones(5, 4), torch.randn(1, 4, generator=torch.Generator().manual_seed(0)), -1
    truth, routes = (extractor := made())(x, mask)[1], extractor.report()
    assert {route.route for route in routes} == {"copies", "sum"}
    for calls in range(1, -left):
        extractor, left = made(), calls
        with pytest.raises(type(error)) as raised:
            extractor(x, mask)
        assert raised.value is error
        assert torch.equal(extractor(x, mask)[1], truth)
        assert extractor.report() == routes


def test_memory_of_a_long_recording_is_flat() -> None:
    model, x, counts = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3), []
    gc.freeze()  # what other tests have made is neither searched nor counted
    try:
        with fastgrad.record(model):
            for _ in range(12):
                fastgrad.grad_sqnorm(model(x).sum(), list(model.parameters()))
                gc.collect()
                counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    finally:
        gc.unfreeze()
    assert counts[-1] <= counts[5] + 2
