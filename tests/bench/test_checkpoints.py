"""The bench of checkpoints compares calls that agree."""

from __future__ import annotations

import pytest
import torch

from bench import checkpoints


@pytest.mark.parametrize("blocks", checkpoints.BLOCKS)
def test_what_is_compared_agrees(blocks: str) -> None:
    made = checkpoints.calls(checkpoints.BLOCKS[blocks], 2, 4, 8, 2)
    plain = checkpoints.calls(None, 2, 4, 8, 2)
    torch.testing.assert_close(made["fastgrad"](), made["loop over samples"](), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(made["fastgrad"](), plain["loop over samples"](), rtol=1e-4, atol=1e-8)
