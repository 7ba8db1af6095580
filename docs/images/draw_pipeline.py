"""Draw the pipeline as ``docs/images/pipeline.svg``: ``python docs/images/draw_pipeline.py``."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 880, 420
INK, PALE, ACCENT, OURS = "#1f2933", "#f4f6f8", "#9aa5b1", "#1f6feb"

#: Left, top, width, height, whether it is fastgrad's, heading, lines.
BOXES = {
    "x": (16, 176, 104, 84, False, "input x", ["image, text", "or any batch"]),
    "network": (160, 176, 176, 84, False, "your network", ["one forward pass,", "unchanged"]),
    "contrasts": (
        392, 24, 236, 104, True, "all N contrasts",
        ["“why P, rather than Q?”", "backward pass of the last layer", "and squared norms, one launch"],
    ),
    "blocks": (
        392, 166, 236, 104, True, "blocks",
        ["logits, activations, image;", "a second view or gradients", "where the budget allows"],
    ),
    "parameters": (
        392, 308, 236, 84, True, "all P parameters",
        ["squared norm per sample,", "one backward pass"],
    ),
    "introspection": (
        672, 34, 196, 84, True, "introspective classifier",
        ["predicts again,", "from the contrasts"],
    ),
    "detector": (
        672, 166, 196, 104, True, "detector",
        ["uncertainty: how unusual", "risk: P(answer is wrong)", "one file, one server"],
    ),
    "training": (
        672, 298, 196, 104, True, "training",
        ["private training,", "ranking of samples,", "noise scale"],
    ),
}  # fmt: skip
#: From and to.
ARROWS = [
    ("x", "network"),
    ("network", "contrasts"),
    ("network", "blocks"),
    ("network", "parameters"),
    ("contrasts", "introspection"),
    ("blocks", "detector"),
    ("parameters", "training"),
]


def box(left: int, top: int, width: int, height: int, ours: bool, heading: str, lines: list[str]) -> str:
    """One rectangle with a bold heading and plain lines below."""
    border, fill = (OURS, "#eaf2ff") if ours else (ACCENT, PALE)
    middle = left + width / 2
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{border}" '
        'stroke-width="2"/>',
        f'<text x="{middle}" y="{top + 26}" class="heading">{escape(heading)}</text>',
    ]
    parts += [
        f'<text x="{middle}" y="{top + 50 + 20 * i}" class="line">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]
    return "\n".join(parts)


def arrow(start: str, end: str) -> str:
    """A line from the right edge of one box to the left edge of another."""
    left, top, width, height = BOXES[start][:4]
    x0, y0 = left + width, top + height / 2
    x1, y1 = BOXES[end][0] - 6, BOXES[end][1] + BOXES[end][3] / 2
    return f'<path d="M{x0} {y0} L{x1} {y1}" class="arrow" marker-end="url(#head)"/>'


def draw() -> str:
    """The whole picture."""
    style = (
        f"text {{ font-family: Helvetica, Arial, sans-serif; fill: {INK}; text-anchor: middle; }} "
        ".heading { font-size: 17px; font-weight: bold; } .line { font-size: 15px; } "
        f".arrow {{ stroke: {INK}; stroke-width: 2; fill: none; }}"
    )
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker>'
    )
    body = [arrow(*one) for one in ARROWS] + [box(*one) for one in BOXES.values()]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" role="img" aria-label="From an input to risk: network, contrasts, detector">',
            f"<style>{style}</style><defs>{head}</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            *body,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("pipeline.svg").write_text(draw(), encoding="utf-8")
