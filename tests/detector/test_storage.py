import numpy as np
import torch

from fastgrad import UncertaintyDetector
from fastgrad.detector import storage


def test_round_trip_is_bit_equal(tmp_path):
    rng = np.random.default_rng(0)
    X = {"logits": rng.normal(size=(120, 4)), "features": rng.normal(size=(120, 3))}
    X["features"][80:] += 3
    fitted = UncertaintyDetector(folds=2).fit(X, np.arange(120) >= 80).to_module()
    path = storage.save(tmp_path / "detector.safetensors", {"detector": fitted}, {})
    module = storage.load(path)[0]["detector"]
    blocks = {name: torch.tensor(value) for name, value in X.items()}
    assert torch.equal(module(blocks), fitted(blocks))
    assert torch.equal(module.calibration_scores, fitted.calibration_scores)
