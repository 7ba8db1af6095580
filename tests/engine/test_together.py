"""Small layers that are alike share one call, whichever of them a pass asks for, and what is not alike does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import true_norms
from torch import Tensor, nn

import fastgrad
from fastgrad.engine import together
from fastgrad.layers import conv


class Dense(nn.Module):
    """Convolutions of one shape beside others that differ in one setting, joined like those of a DenseNet."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.alike = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=bias) for _ in range(5))
        self.wider = nn.Conv2d(4, 4, 5, padding=2, bias=bias)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=bias)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=bias)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=bias)
        self.transposed = nn.ConvTranspose2d(4, 4, 3, padding=1, bias=bias)
        self.other = nn.Conv2d(4, 4, 3, padding=1, bias=not bias)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.alike:
            x = x + layer(F.silu(x))
        for layer in (self.wider, self.circular, self.dilated, self.grouped, self.transposed, self.other):
            x = x + layer(F.silu(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of every call of the operator."""
    found: list[int] = []
    operator = conv.conv_sqnorm

    def counted(a: Tensor, *rest: object, **options: object) -> Tensor:
        found.append(len(a))
        return operator(a, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(conv, "conv_sqnorm", counted)
    return found


def planned(model: nn.Module, x: Tensor, calls: list[int]) -> fastgrad.GradientFeatures:
    """An extractor after its first call, which tries every layer."""
    features = fastgrad.GradientFeatures(model)
    features(x)
    calls.clear()
    return features


def case(bias: bool) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = Dense(bias).double().eval(), torch.randn(3, 4, 6, 5, dtype=torch.float64)
    ones = lambda _, out: torch.sigmoid(out) - 1  # noqa: E731
    return model, x, true_norms(model, (x,), ones)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("held", "samples"), [(0, [3] * 11), (15_000, [3] * 6 + [6, 9]), (1 << 20, [3] * 6 + [15])]
)
def test_alike_layers_share_a_call(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, bias: bool, held: int, samples: list[int]
) -> None:
    monkeypatch.setattr(together, "HELD", held)
    model, x, expected = case(bias)
    features = planned(model, x, calls)
    torch.testing.assert_close(features(x)[1], expected, rtol=1e-10, atol=1e-18)
    # 5,760 bytes wait for each of the eleven layers, and the backward pass comes to the five that are alike last.
    assert sorted(calls) == samples


def test_a_rule_says_what_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrad.layers import RULES, register_rule

    class Gain(nn.Module):
        def __init__(self, power: int) -> None:
            super().__init__()
            self.power, self.gain = power, nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * x**self.power

    samples: list[int] = []
    monkeypatch.setitem(RULES, Gain, RULES[nn.Linear])

    @register_rule(Gain, alike=lambda module: module.power)
    def gain(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, Tensor]:
        samples.append(len(a))
        return {"gain": (g * a**module.power).sum((2, 3)).square().sum(1)}  # type: ignore[operator]

    powers = (1, 2, 1, 1, 2)
    model = nn.Sequential(*map(Gain, powers), nn.Flatten(), nn.Linear(120, 3)).double()
    x = torch.rand(3, 4, 6, 5, dtype=torch.float64)
    features = planned(model, x, samples)
    expected = true_norms(model, (x,), lambda _, out: torch.sigmoid(out) - 1)
    torch.testing.assert_close(features(x)[1], expected, rtol=1e-10, atol=1e-18)
    assert sorted(samples) == [6, 9]


def test_large_layers_do_not_wait(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgrad.engine.sites.SMALL", 1000)
    model, x, expected = case(True)
    features = planned(model, x, calls)
    torch.testing.assert_close(features(x)[1], expected, rtol=1e-10, atol=1e-18)
    assert calls == [3] * 11


def test_some_of_them_several_signals_and_training(calls: list[int]) -> None:
    model, x, expected = case(True)
    names = [name for name, _ in model.named_parameters()]
    some = fastgrad.GradientFeatures(model, layers=["alike.1", "alike.3"])
    places = [i for i, name in enumerate(names) if name.startswith(("alike.1", "alike.3"))]
    torch.testing.assert_close(some(x)[1], expected[:, places], rtol=1e-10, atol=1e-18)
    calls.clear()
    some(x)
    assert calls == [6]

    contrasts = fastgrad.GradientFeatures(model, loss="cross_entropy", target="contrast")(x)[1]
    assert contrasts.shape == (3, 3, len(names))
    for k in range(3):
        against = true_norms(
            model, (x,), lambda _, out, k=k: out.softmax(-1) - F.one_hot(torch.tensor([k]), 3)
        )
        torch.testing.assert_close(contrasts[:, k], against, rtol=1e-10, atol=1e-18)

    with fastgrad.record(model):
        loss = F.binary_cross_entropy_with_logits(model(x), torch.ones(3, 3).double(), reduction="sum")
        found = fastgrad.grad_sqnorm(loss, list(model.parameters()))
    torch.testing.assert_close(torch.stack(list(found), 1), expected, rtol=1e-10, atol=1e-18)


def test_a_failing_pass_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgrad.engine import tap

    model, x, _ = case(False)
    features = fastgrad.GradientFeatures(model)

    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("as if memory were short")

    with monkeypatch.context() as patch:
        patch.setattr(conv, "conv_sqnorm", fail)
        with pytest.raises(RuntimeError, match="memory were short"):
            features(x)
    assert not tap._asked
    assert features(x)[1].isfinite().all()
