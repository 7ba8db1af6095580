"""A function that Python does not see."""

from __future__ import annotations

import warnings

import torch


def _scaled(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w.exp()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scripts are deprecated, and in use
    scripted = torch.jit.script(_scaled)
