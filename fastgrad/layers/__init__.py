"""One rule per layer family: from a layer's input and output gradient to one squared norm per parameter."""

from __future__ import annotations

from fastgrad.layers import (
    activation as activation,
)
from fastgrad.layers import conv as conv
from fastgrad.layers import embedding as embedding
from fastgrad.layers import linear as linear
from fastgrad.layers import norm as norm
from fastgrad.layers.registry import LayerRule as LayerRule
from fastgrad.layers.registry import find_rule as find_rule
from fastgrad.layers.registry import register_rule as register_rule

__all__ = ["LayerRule", "find_rule", "register_rule"]
