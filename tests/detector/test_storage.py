import numpy as np
import torch

from fastgrad import UncertaintyDetector
from fastgrad.detector import storage


def detector():
    rng = np.random.default_rng(0)
    X = {"logits": rng.normal(size=(120, 4)), "features": rng.normal(size=(120, 3))}
    X["features"][80:] += 3
    return UncertaintyDetector(members=1, hidden=4).fit(X, np.arange(120) >= 80), X


def test_round_trip_is_bit_equal(tmp_path):
    fitted, X = detector()
    path = storage.save(tmp_path / "detector.safetensors", {"detector": fitted.to_module()}, {})
    module = storage.load(path)[0]["detector"]
    blocks = {name: torch.tensor(value) for name, value in X.items()}
    assert torch.equal(module(blocks), fitted.to_module()(blocks))
    assert torch.equal(module.calibration_scores, fitted.to_module().calibration_scores)
