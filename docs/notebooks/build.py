"""Make the notebooks of two tutorials from their pages: ``python docs/notebooks/build.py`` runs them and writes them.

Text becomes text and code becomes code; what a page says that it prints is left out, because the notebook prints it.
"""

from __future__ import annotations

import argparse
import base64
import re
from pathlib import Path
from typing import Any

import nbformat

PAGES = Path(__file__).parents[1] / "tutorials"
FOLDER = Path(__file__).parent
NAMES = ("introspection", "purview")
#: Colab and a plain Jupyter have no fastgrad; a checkout has.
INSTALL = """import importlib.util

if importlib.util.find_spec("fastgrad") is None:
    %pip install --quiet fastgrad matplotlib"""
#: What each notebook draws after its last block, from the names that the page's code has made.
DRAWN = {
    "introspection": """import matplotlib.pyplot as plt

figure, axes = plt.subplots(2, 6, figsize=(11, 3.4), height_ratios=(1.4, 1), layout="constrained")
for i, place in enumerate(range(1700, 1706)):
    axes[0, i].imshow(images[place, 0], cmap="gray_r")
    axes[0, i].set_title(f"answer {int(z[place].argmax())}")
    axes[0, i].axis("off")
    axes[1, i].bar(range(10), norms[place].clamp(min=1e-6), log=True)
    axes[1, i].set_xticks(range(0, 10, 3))
axes[1, 0].set_ylabel("squared norm")
axes[1, 0].set_xlabel("class Q");""",
    "purview": """import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
shown = nn.functional.pad(torch.cat([images[test][:4, 0], unseen[:4, 0]]), (1, 1, 1, 1), value=0.5)
left.imshow(torch.cat([torch.cat(list(half), 1) for half in shown.split(4)]), cmap="gray_r")
left.set_title("above: digits, below: attacked digits")
left.axis("off")
right.barh(list(aurocs), list(aurocs.values()))
right.set_xlim(0.5, 1)
right.set_xlabel("AUROC");""",
}
PIECE = re.compile(r"^```(\w+)\n(.*?)^```\n?", re.DOTALL | re.MULTILINE)


def _text(text: str) -> Any:
    """Return a cell of text that holds its pictures, and names pages in code, since links between them lead nowhere."""
    cell = nbformat.v4.new_markdown_cell()
    for i, (words, file) in enumerate(re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text)):
        picture = base64.b64encode((PAGES / file).read_bytes()).decode()
        cell.setdefault("attachments", {})[f"{i}.png"] = {"image/png": picture}
        text = text.replace(f"![{words}]({file})", f"![{words}](attachment:{i}.png)")
    text = re.sub(r"\[([^\]]+)\]\((?!http|attachment)[^)]*\)", r"\1", text)
    # A line of a page ends where the page is full; a cell wraps by itself.
    cell.source = re.sub(r"(?<=\S)\n(?=[^\s|#-])", " ", text).strip()
    return cell


def notebook(name: str) -> Any:
    """Return the page's notebook, not yet run."""
    page, cells, end = (PAGES / f"{name}.md").read_text(encoding="utf-8"), [], 0
    for found in PIECE.finditer(page):
        cells.append(_text(page[end : found.start()]))
        end = found.end()
        if found[1] == "python":
            cells.append(nbformat.v4.new_code_cell(found[2].strip()))
        elif found[1] != "output":
            cells.append(nbformat.v4.new_markdown_cell(found[0].strip()))
    cells.append(_text(page[end:]))
    cells.insert(1, nbformat.v4.new_code_cell(INSTALL))
    last = max(i for i, cell in enumerate(cells) if cell.cell_type == "code")
    cells.insert(last + 1, nbformat.v4.new_code_cell(DRAWN[name]))
    cells = [cell for cell in cells if cell.source]
    for i, cell in enumerate(cells):
        cell.id = f"{name}-{i}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def executed(name: str) -> Any:
    """Return the notebook with its outputs; an error of a cell is raised."""
    from nbclient import NotebookClient

    return NotebookClient(notebook(name), timeout=300, record_timing=False).execute()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name in NAMES:
        made = executed(name)
        made.metadata.pop("language_info", None)
        nbformat.write(made, FOLDER / f"{name}.ipynb")
