"""Draw the pipeline as ``docs/images/pipeline.svg``: ``python docs/images/draw_pipeline.py``."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 600, 496
INK, PALE, ACCENT, OURS = "#1f2933", "#f4f6f8", "#9aa5b1", "#1f6feb"

#: Left, top, width, height, whether it is fastgrad's, heading, lines. Wide enough for a phone's 350 pixels.
BOXES = {
    "x": (36, 8, 150, 80, False, "input x", ["image, text, …"]),
    "network": (232, 8, 360, 80, False, "your network", ["one forward pass, unchanged"]),
    "contrasts": (
        36, 124, 280, 116, True, "all N contrasts",
        ["“why P, rather than Q?”", "last layer's backward pass", "and norms in one launch"],
    ),
    "blocks": (
        36, 252, 280, 116, True, "blocks",
        ["logits, activations, image;", "a second view", "within the cost limit"],
    ),
    "parameters": (
        36, 380, 280, 108, True, "all P parameters",
        ["squared norm per sample,", "one backward pass"],
    ),
    "introspection": (
        356, 124, 236, 116, True, "introspective classifier",
        ["predicts again,", "from contrasts or h"],
    ),
    "detector": (
        356, 252, 236, 116, True, "detector",
        ["how unusual: uncertainty", "probably wrong: risk", "one file, one server"],
    ),
    "training": (
        356, 380, 236, 108, True, "training",
        ["private training,", "gradient noise"],
    ),
}  # fmt: skip
#: From and to, side by side.
ARROWS = [
    ("x", "network"),
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
        f'<text x="{middle}" y="{top + 32}" class="heading">{escape(heading)}</text>',
    ]
    parts += [
        f'<text x="{middle}" y="{top + 58 + 23 * i}" class="line">{escape(line)}</text>' for i, line in enumerate(lines)
    ]
    return "\n".join(parts)


def arrow(start: str, end: str) -> str:
    """A line from the right edge of one box to the left edge of another."""
    left, top, width, height = BOXES[start][:4]
    x0, y0 = left + width, top + height / 2
    x1, y1 = BOXES[end][0] - 6, BOXES[end][1] + BOXES[end][3] / 2
    return f'<path d="M{x0} {y0} L{x1} {y1}" class="arrow" marker-end="url(#head)"/>'


def trunk() -> str:
    """Lines from the network down to the three boxes that read it."""
    left, top, _, height = BOXES["network"][:4]
    start, end = f"M{left + 40} {top + height} V{top + height + 18} H12", BOXES["blocks"][0] - 6
    rows = [BOXES[name][1] + BOXES[name][3] / 2 for name in ("contrasts", "blocks", "parameters")]
    ways = [f'<path d="{start} V{row} H{end}" class="arrow" marker-end="url(#head)"/>' for row in rows]
    return "\n".join(ways)


def draw() -> str:
    """The whole picture."""
    style = (
        f"text {{ font-family: Helvetica, Arial, sans-serif; fill: {INK}; text-anchor: middle; }} "
        ".heading { font-size: 20px; font-weight: bold; } .line { font-size: 18px; } "
        f".arrow {{ stroke: {INK}; stroke-width: 2; fill: none; }}"
    )
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker>'
    )
    body = [arrow(*one) for one in ARROWS] + [trunk()] + [box(*one) for one in BOXES.values()]
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
