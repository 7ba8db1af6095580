"""Rules of functions: how a function runs on the batch, and the formula of its parameters' gradients for each sample.

Every rule is ``rule(call, *args, **kwargs)`` with the function's own arguments, and returns what the function returns.
A rule that does not apply returns NotImplemented; the function then runs under ``vmap`` with a copy of its parameters
for each sample, which is as exact but slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrad.layers import linear, norm
from fastgrad.layers.conv import CONVOLUTIONS
from fastgrad.layers.recurrent import RECURRENT
from fastgrad.layers.registry import MODULES, ModuleRule, register_rule
from fastgrad.layers.whole import ENTERED, WHOLE

RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear.linear,
    torch.matmul: linear.matmul,
    Tensor.matmul: linear.matmul,
    Tensor.__matmul__: linear.matmul,
    torch.mm: linear.mm,
    torch.addmm: linear.addmm,
    F.embedding: linear.embedding,
    F.embedding_bag: linear.embedding_bag,
    F.batch_norm: norm.batch_norm,
    F.group_norm: norm.group_norm,
    F.instance_norm: norm.instance_norm,
    F.layer_norm: norm.layer_norm,
    F.rms_norm: norm.rms_norm,
    **CONVOLUTIONS,
    **RECURRENT,
    **WHOLE,
}

__all__ = ["ENTERED", "MODULES", "RULES", "ModuleRule", "register_rule"]
