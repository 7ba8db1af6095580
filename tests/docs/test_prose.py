"""README and documentation hold nothing of what makes prose hard to read."""

from __future__ import annotations

import prose


def test_no_sentence_is_hard_to_read() -> None:
    assert prose.findings() == []


def test_what_counts_as_a_sentence() -> None:
    text = "# A 1 2 3\n\nOne `x = 1` of 2.\nTwo of ResNet-18, 3.\n\n```\n1 2 3 4\n```\n\n| a | b c |\n- item\n"
    assert [s for _, s, _ in prose.sentences(text)] == [
        "One `code` of 2.", "Two of ResNet-18, 3.", "a", "b c", "- item"
    ]  # fmt: skip


def test_what_counts_as_a_figure() -> None:
    assert len(prose._FIGURE.findall("Of 31 cases .93, not ResNet-18, float64, 64x64 or Lite0, in 1,024 s.")) == 3
