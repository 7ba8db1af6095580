"""rank_samples: its columns are those of a float64 loop over samples."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import Net
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import fastgrad

X = torch.randn(300, 2, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (300,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers)


def test_columns_are_their_definitions(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    # 300 samples in batches that a whole-network pass on a CPU would cut in pieces.
    table = fastgrad.rank_samples(model, DataLoader(TensorDataset(X, Y), batch_size=200), verbose=False)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(table) == 300
    assert np.array_equal(table.index, np.arange(300))
    assert np.array_equal(table.label, Y.numpy())
    double = copy.deepcopy(model).double().eval()
    for i in (0, 150, 299):
        z = double(X[i : i + 1].double())
        loss = F.cross_entropy(z, Y[i : i + 1])
        grads = torch.autograd.grad(loss, list(double.parameters()))
        p = z.detach().softmax(1)[0]
        expected = {
            "loss": float(loss.detach()),
            "confidence": float(p[Y[i]]),
            "el2n": float((p - F.one_hot(Y[i], 3)).norm()),
            "grand": float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()),
        }
        for name, value in expected.items():
            assert getattr(table, name)[i] == pytest.approx(value, rel=1e-4), name
        assert table.predicted[i] == int(p.argmax())


@pytest.mark.parametrize("margin", [20.0, 60.0, 200.0])
def test_the_confident_have_an_order_too(margin: float) -> None:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.zero_()
    x = torch.tensor([[margin, 0.0, 0.0], [margin + 1, 0.0, 0.0]])
    table = fastgrad.rank_samples(model, [(x, torch.zeros(2, dtype=torch.long))])
    rest = 2 * np.exp(-x[:, 0].double().numpy())  # 1 - p, up to its square
    assert table.loss == pytest.approx(rest, rel=1e-6, abs=0)
    assert table.el2n == pytest.approx(np.sqrt(1.5) * rest, rel=1e-6, abs=0)
    grand = np.sqrt(1.5) * rest * np.sqrt(x.double().square().sum(1).numpy() + 1)
    assert table.grand == pytest.approx(grand, rel=1e-4, abs=0)


def test_positions_have_64_bits(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy before 2 gives integers 32 on Windows."""
    plain = np.arange
    monkeypatch.setattr(np, "arange", lambda *numbers, dtype=np.int32: plain(*numbers, dtype=dtype))
    table = fastgrad.rank_samples(model, [(X[:9], Y[:9])], verbose=False)
    assert table.index.dtype == table.label.dtype == table.predicted.dtype == np.int64


def test_the_suspicious_come_first(model: nn.Module) -> None:
    table = fastgrad.rank_samples(model, [(X[:9], Y[:9])], verbose=False)
    for by in ("grand", "el2n", "loss"):
        assert np.all(np.diff(getattr(table.sort(by), by)) <= 0)
    by_confidence = table.sort("confidence", 4)
    assert len(by_confidence) == 4
    assert np.array_equal(by_confidence.confidence, np.sort(table.confidence)[:4])
    assert np.array_equal(by_confidence.label, Y.numpy()[by_confidence.index])


@pytest.mark.parametrize("by", ["grand", "el2n", "loss", "confidence"])
def test_samples_without_numbers_come_first(model: nn.Module, by: str) -> None:
    x = X[:9].clone()
    x[7] = torch.nan
    table = fastgrad.rank_samples(model, [(X[:4], Y[:4]), (x[4:], Y[4:9])], verbose=False)
    assert table.sort(by, 1).index == [7]
    getattr(table, by)[0] = -np.inf if by == "confidence" else np.inf
    assert table.sort(by, 2).index.tolist() == [7, 0]


def test_one_layer_and_mappings() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda net, values: {"logits": net.head(net.body(values).tanh())}, body=nn.Linear(5, 4), head=nn.Linear(4, 3)
    )
    x = torch.randn(6, 5)
    table = fastgrad.rank_samples(model, [{"values": x, "labels": Y[:6]}], layers="head", verbose=False)
    h = model.body(x).tanh()
    error = model.head(h).softmax(1) - F.one_hot(Y[:6], 3)
    expected = (error.square().sum(1) * (h.square().sum(1) + 1)).sqrt()
    np.testing.assert_allclose(table.grand, expected.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("loader", "kind", "message"),
    [
        (DataLoader(TensorDataset(X, Y), shuffle=True), ValueError, "loader must give samples in the order"),
        (
            DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(RandomSampler(X), 8, False)),
            ValueError,
            "loader must give samples in the order .* its sampler was a RandomSampler",
        ),
        (DataLoader(TensorDataset(X, Y), sampler=[1, 0]), ValueError, "loader must give .* its sampler was a list"),
        ([X], ValueError, "loader must give labels beside the inputs"),
        ([(X, Y.float())], ValueError, r"loader must give integer labels of shape \(300,\); they were torch.float32"),
        ([(X, Y * 1j)], ValueError, r"loader must give integer labels of shape \(300,\); they were torch.complex64"),
        ([(X, Y[:5])], ValueError, r"loader must give integer labels of shape \(300,\); .* \(5,\)"),
        ([(X, Y + 1)], ValueError, "loader must give labels that are classes of the model: .* from 0 to 2; it held 3"),
        ([], ValueError, "loader must hold at least one sample"),
        ([(X[:0], Y[:0])], ValueError, "loader must hold at least one sample"),
        (["x"], TypeError, "loader must give tensors"),
        (None, TypeError, "loader must be a loader of batches; it was NoneType"),
        ([(X[:2], ["cat", "dog"])], ValueError, r"loader must give integer labels of shape \(2,\): .*'str'"),
        ([(X[:2], [0, None])], ValueError, r"loader must give integer labels of shape \(2,\): .*NoneType"),
        ([(X.to("meta"), Y)], ValueError, "tensors of loader must be dense and hold values; .* meta device"),
    ],
)
def test_what_is_refused(model: nn.Module, loader: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fastgrad.rank_samples(model, loader, verbose=False)


def test_probabilities_in_place_of_logits_are_refused(model: nn.Module) -> None:
    logarithms, table = nn.Sequential(model, nn.LogSoftmax(1)), fastgrad.rank_samples(model, [(X, Y)])
    np.testing.assert_allclose(fastgrad.rank_samples(logarithms, [(X, Y)]).loss, table.loss, rtol=1e-4)
    with pytest.raises(ValueError, match="model must return logits; it returned probabilities, whose rows sum to 1"):
        fastgrad.rank_samples(nn.Sequential(model, nn.Softmax(1)), [(X, Y)])


def test_sorting_that_is_refused(model: nn.Module) -> None:
    table = fastgrad.rank_samples(model, [(X[:2], Y[:2])], verbose=False)
    with pytest.raises(ValueError, match="by must be one of 'grand', 'el2n', 'loss', 'confidence'; it was 'index'"):
        table.sort("index")
    with pytest.raises(ValueError, match="count must be an integer of at least 0; it was -1"):
        table.sort(count=-1)
