"""One rule per layer family: from a layer's input and output gradient to one squared norm per parameter."""

from __future__ import annotations

from fastgrad.layers import activation, attention, conv, embedding, linear, norm, recurrent
from fastgrad.layers.registry import LayerRule, ReplayRule, find_rule, register_replay, register_rule

# Imported for the rules they register.
_FAMILIES = (activation, attention, conv, embedding, linear, norm, recurrent)

__all__ = ["LayerRule", "ReplayRule", "find_rule", "register_replay", "register_rule"]
