"""What makes prose hard to read: long sentences, many figures in one, words that only this project knows.

``python tests/helpers/prose.py`` prints each with its page and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LONGEST, FIGURES = 25, 2
ROOT_PAGES = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md", "bench/detection/README.md"
)  # fmt: skip
#: Words that a reader of the field does not know, and what to write.
PRIVATE = {
    r"had (a|no|its) say": "was (not) used for tuning",
    r"(that|which|who) had none": "not used for tuning",
    r"\bdraws?\b(?= (of|which|that|had))": "sample",
    r"\bits worth\b|\bworths?\b(?= of| and|,|\.)": "AUROC gain",
    r"\b(buys|bought)\b": "adds, at that cost",
    r"\brooms?\b": "package, module",
    r"\bstrangers?\b": "out-of-distribution set",
    r"\bby heart\b": "overfits",
    r"\b(told|tell|tells) apart\b": "distinguish",
    r"\bon offer\b": "among the candidates",
    r"\bknows? nothing\b": "is uninformative",
    r"\bdiffer in patience\b": "take longer",
    r"\bas one writes it down\b": "the textbook formula",
    r"\bwhat is read\b": "features used",
    r"\bwhat it is worth\b": "AUROC gain",
    r"\bmade of one's own\b": "custom",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bholes?\b": "vulnerability, gap",
    r"\bwhoever\b": "a user who",
    r"\bin vain\b": "wrongly",
    r"\bstays? in place\b": "name the allocator setting",
    r"\b(every|any|no)body\b": "name the actor",
    r"\bsecond look\b": "second forward pass",
    r"\bneeds a hand\b": "needs a wrapper",
    r"\bwithout more ado\b": "directly",
    r"\bof (mine|one's own)\b": "my own, your own",
    r"\bpulls? (at|any)\b": "large gradient",
    r"\btells? (\w+ ){1,4}from\b|\btold from\b": "distinguishes",
    r"\bhardly\b": "name the figure",
    r"\bat hand\b": "available",
}
_FIGURE = re.compile(r"(?<![\w.\-/])\.?\d[\d,]*(?:\.\d+)?(?![\w\-/])")
_WORD = re.compile(r"[\w'’./%+-]*\w[\w'’./%+-]*")


class Finding(NamedTuple):
    """One sentence, or word, that could be plainer."""

    kind: str
    page: str
    line: int
    text: str


def pages() -> list[Path]:
    """Return README, the pages of the documentation and the templates of the result pages."""
    docs = ROOT / "docs"
    # docs/measured holds copies of generated tables.
    own = sorted(p for p in docs.rglob("*.md") if p.parent != docs / "measured")
    return [ROOT / name for name in ROOT_PAGES] + own + sorted(ROOT.glob("bench/report/pages/*.j2"))


def sentences(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield line, text and whether it is a cell of a table, for every sentence outside code and generated tables."""
    blank = lambda found: "\n" * found[0].count("\n")  # noqa: E731 - lines keep their numbers
    text = re.sub(r"^(```|~~~|:::).*?^\1$", blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!-- table: .*?<!-- end -->", blank, text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL)
    text = re.sub(r"{%.*?%}", "", text)
    text = re.sub(r"{{.*?}}", "`code`", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`\n]+`", "`code`", text)
    paragraph: list[tuple[int, str]] = []

    def split() -> Iterator[tuple[int, str, bool]]:
        if paragraph:
            joined = " ".join(line for _, line in paragraph)
            for sentence in re.split(r"(?<=[.!?])[)*]*\s+(?=[\"(*A-Z`\d]|fastgrad)", joined):
                yield paragraph[0][0], sentence, False
        paragraph.clear()

    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("|"):
            yield from split()
            for cell in stripped.strip("|").split("|"):
                yield number, cell.strip(), True
        elif not stripped or stripped.startswith("#"):
            yield from split()
        else:
            if re.match(r"([-*+]|\d+\.) ", stripped):
                yield from split()
            paragraph.append((number, stripped))
    yield from split()


def findings() -> list[Finding]:
    """Return everything found on all pages."""
    found = []
    for page in pages():
        name = page.relative_to(ROOT).as_posix()
        for line, sentence, cell in sentences(page.read_text(encoding="utf-8")):
            if len(_WORD.findall(sentence)) > LONGEST:
                found.append(Finding("long sentences", name, line, sentence))
            if not cell and len(_FIGURE.findall(sentence)) > FIGURES:
                found.append(Finding("sentences of many figures", name, line, sentence))
            found += [
                Finding("private words", name, line, f"{match[0]!r}: {better}")
                for pattern, better in PRIVATE.items()
                for match in re.finditer(pattern, sentence, re.IGNORECASE)
            ]
    return found


if __name__ == "__main__":
    for finding in findings():
        print(f"{finding.page}:{finding.line}: {finding.kind}: {finding.text}")
