"""README and documentation get plainer: what makes prose hard to read may only become less."""

from __future__ import annotations

import json

import prose


def test_hard_sentences_become_fewer() -> None:
    found = prose.findings()
    ceilings = json.loads(prose.CEILINGS.read_text())
    counts = prose.counts(found)
    assert counts.keys() == ceilings.keys()
    for kind, count in counts.items():
        assert count <= ceilings[kind], f"{kind}: {count}, were {ceilings[kind]}; python tests/helpers/prose.py"


def test_what_counts_as_a_sentence() -> None:
    text = "# A 1 2 3\n\nOne `x = 1` of 2.\nTwo of ResNet-18, 3.\n\n```\n1 2 3 4\n```\n\n| a | b c |\n- item\n"
    assert [s for _, s, _ in prose.sentences(text)] == [
        "One `code` of 2.", "Two of ResNet-18, 3.", "a", "b c", "- item"
    ]  # fmt: skip


def test_what_counts_as_a_figure() -> None:
    assert len(prose._FIGURE.findall("Of 31 cases .93, not ResNet-18, float64, 64x64 or Lite0, in 1,024 s.")) == 3
