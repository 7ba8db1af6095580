"""Memory that a call frees is there for the next one, without a page from the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from torch import nn
from fastgrad.engine.network import Network

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        pass_ = [torch.ones(2 << 20, dtype=torch.float32) for _ in range(3)]
        del pass_
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    Network(nn.Linear(2, 2))
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
