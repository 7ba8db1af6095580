"""The table of what one grey level does: rows of both forms, and the default is the user's fit."""

from __future__ import annotations

import pytest
import torch
from small_images import CLASSES, images, small_network

pytest.importorskip("foolbox")

from bench.detection import grey_levels
from bench.report import pages
from fastgrad import TwoStageModel


def test_rows_and_page() -> None:
    model = small_network().eval().requires_grad_(False)
    with torch.no_grad():
        labelled = [(x, model(x).argmax(1)) for x in (images(60), images(40, 1))]
    case = grey_levels.Case(model, *labelled, attacked=40, seeds=1)
    found = list(grey_levels.rows("digits", case))
    assert [row["method"] for row in found] == list(grey_levels.FORMS)
    assert all(0 <= row[name] <= 1 for row in found for name in ("clean", "+1/255", "noise of 1/255", "FGSM 8/255"))
    text = pages.page("grey-levels", {"rows": found, "networks": {"digits": ["digits", True]}}, [])
    assert text is not None
    assert "| flagged, +1/255 |" in text
    direct = TwoStageModel(model).fit(*labelled[0], clip=(0, 1))
    x, _ = labelled[1]
    assert direct(x).logits.shape[1] == CLASSES
    assert torch.equal(grey_levels.fitted(case, 0, shifts=True)(x).uncertainty, direct(x).uncertainty)
    assert not torch.equal(grey_levels.fitted(case, 0, shifts=False)(x).uncertainty, direct(x).uncertainty)
