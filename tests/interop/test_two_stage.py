import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastgrad import TwoStageModel
from fastgrad.interop import as_pytorch_ood


def test_works_as_a_pytorch_ood_detector():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("pytorch_ood")
        from pytorch_ood.api import Detector
        from pytorch_ood.metrics import OODMetrics

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))
    clean, odd = torch.rand(240, 3, 4, 4) * 0.2 + 0.4, torch.rand(40, 3, 4, 4)
    known = TensorDataset(torch.cat([clean[:200], odd]), torch.cat([torch.arange(200) % 3, torch.full((40,), -1)]))
    detector = as_pytorch_ood(TwoStageModel(network, blocks=["logits", "image"]), challenges=None)
    assert isinstance(detector, Detector)
    assert detector.fit(DataLoader(known, batch_size=40)) is detector
    assert detector.two_stage.report().drawn == 200
    detector.fit([(clean, [0, 1, -1] * 80)])
    assert detector.two_stage.report().drawn == 160
    with pytest.raises(ValueError, match=r"labels must have shape \(240,\) \(one a sample\); it was \(240, 3\)"):
        detector.fit([(clean, torch.rand(240, 3))])
    for bad, message in (
        (None, "data_loader must be a loader"),
        ([3], "data_loader must give tensors"),
        ([clean], r"data_loader must give \(x, labels\); it gave inputs alone"),
        ([(clean, ["cat"] * 240)], "labels must be numeric"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            detector.fit(bad)
    with pytest.raises(TypeError, match="two_stage must be a TwoStageModel; it was Flatten"):
        as_pytorch_ood(network[0])
    detector.fit(DataLoader(known, batch_size=40))

    metrics = OODMetrics()
    for x, label in ((clean[200:], 0), (odd, -1)):
        metrics.update(detector.predict(x), torch.full((len(x),), label))
    assert metrics.compute()["AUROC"] > 0.8
    assert torch.equal(detector(odd), detector.predict(odd))
