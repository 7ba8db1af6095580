"""Draw the flow of a two-stage model as ``docs/images/pipeline.svg``: ``python docs/images/draw_pipeline.py``."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT = 600, 640
INK, PALE, GREY, OURS = "#1f2933", "#f4f6f8", "#9aa5b1", "#1f6feb"


class Box(NamedTuple):
    """A rectangle with a bold heading and plain lines; a dashed border marks what runs on request."""

    left: int
    top: int
    width: int
    height: int
    heading: str
    lines: tuple[str, ...]
    ours: bool = True
    on_request: bool = False


#: Wide enough for a phone's 350 pixels.
BOXES = (
    Box(24, 8, 150, 84, "input x", ("image, text, …",), ours=False),
    Box(236, 8, 340, 84, "your network", ("one forward pass, unchanged",), ours=False),
    Box(24, 136, 262, 108, "blocks", ("logits, activations,", "x itself; more on request")),
    Box(314, 136, 262, 108, "correction", ("of the logits, from h,", "the last layer's input"), on_request=True),
    Box(24, 276, 262, 108, "detector", ("p-values of the blocks,", "likeness to challenges")),
    Box(314, 276, 262, 108, "probabilities", ("the network's, mixed", "with the corrected ones")),
    Box(24, 416, 262, 76, "uncertainty", ("how unusual is x?",)),
    Box(314, 416, 262, 76, "risk", ("probability of an error",)),
    Box(24, 548, 262, 84, "all contrasts", ("last layer, one for each label",), on_request=True),
    Box(314, 548, 262, 84, "second answer", ("introspective, from contrasts",), on_request=True),
)
#: Middle, baseline and text of words beside the arrows.
NOTES = ((354, 404, "evidence"), (300, 528, "dashed: on request"))
#: Ways from box to box; the outer ones share their trunk below the network.
ARROWS = (
    "M174 50 H230",
    "M445 92 V114 H155 V130",
    "M445 92 V130",
    "M445 92 V114 H590 V330 H582",
    "M445 92 V114 H10 V590 H18",
    "M155 244 V270",
    "M445 244 V270",
    "M155 384 V410",
    "M445 384 V410",
    "M286 330 H308",
    "M286 354 H300 V454 H308",
    "M286 590 H308",
)


def box(one: Box) -> str:
    """Return the elements of a box."""
    border, fill = (OURS, "#eaf2ff") if one.ours else (GREY, PALE)
    dashes = ' stroke-dasharray="7 5"' if one.on_request else ""
    middle = one.left + one.width / 2
    parts = [
        f'<rect x="{one.left}" y="{one.top}" width="{one.width}" height="{one.height}" rx="8" fill="{fill}" '
        f'stroke="{border}" stroke-width="2"{dashes}/>',
        f'<text x="{middle}" y="{one.top + 33}" class="heading">{escape(one.heading)}</text>',
    ]
    parts += [
        f'<text x="{middle}" y="{one.top + 60 + 24 * i}" class="line">{escape(line)}</text>'
        for i, line in enumerate(one.lines)
    ]
    return "\n".join(parts)


def draw() -> str:
    """Return the whole picture."""
    style = (
        f"text {{ font-family: Helvetica, Arial, sans-serif; fill: {INK}; text-anchor: middle; }} "
        ".heading { font-size: 19px; font-weight: bold; } .line { font-size: 17px; } "
        f".arrow {{ stroke: {INK}; stroke-width: 2; fill: none; }}"
    )
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker>'
    )
    label = (
        "From an input through the network to uncertainty and risk. The detector reads blocks; its evidence sets the "
        "share of the corrected probabilities, and raises the risk. On request, the introspective classifier answers "
        "a second time, from the contrasts of all labels."
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" role="img" aria-label="{escape(label)}">',
            f"<style>{style}</style><defs>{head}</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            *(f'<path d="{way}" class="arrow" marker-end="url(#head)"/>' for way in ARROWS),
            *map(box, BOXES),
            *(f'<text x="{x}" y="{y}" class="line">{words}</text>' for x, y, words in NOTES),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("pipeline.svg").write_text(draw(), encoding="utf-8")
