from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgrad.blocks import Activations, Contrasts, Features, Gradients
from fastgrad.blocks.extraction import Extraction
from fastgrad.blocks.subject import watch
from fastgrad.layers import register_rule


class Misjudged(nn.Linear):
    """Its rule is wrong, so that the model as a whole is computed again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@register_rule(Misjudged)
def misjudged(_: nn.Module, a: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict.fromkeys(("weight", "bias"), 1 + g.square().sum(1))


class Unmappable(nn.Module):
    """``vmap`` refuses ``.item()``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Misjudged(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.inner(x))
        return self.head(h if h.sum().item() < torch.inf else x)


class Closure(nn.Module):
    """Uses a parameter that no attribute leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        weight = self.inner.weight
        self.function = lambda x: x @ weight.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.function(x))


def test_gradients_that_a_pass_cannot_see_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model must reach 'inner\.weight' through an attribute"):
        Extraction(Closure(), [Gradients()])(torch.randn(7, 6))


def test_h_where_the_network_runs_more_than_once() -> None:
    torch.manual_seed(0)
    net, x = Unmappable().double().eval(), torch.randn(7, 6, dtype=torch.float64)
    expected = Extraction(net, [Features()])(x)[1]["features"]
    _, blocks = Extraction(net, [Features(), Gradients()])(x)
    torch.testing.assert_close(blocks["features"], expected, rtol=1e-13, atol=1e-13)


def test_a_compiled_network_has_the_same_blocks() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).eval(), torch.randn(5, 6)
    for blocks in ([Gradients(), Features()], [Activations(), Contrasts()]):
        logits, values = Extraction(net, blocks)(x)
        found, same = Extraction(torch.compile(net, backend="eager"), blocks)(x)
        assert torch.equal(found, logits)
        for name, value in values.items():
            torch.testing.assert_close(same[name], value)


class Attention(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer
        if layer == "attention":
            self.mix = nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True)
        else:
            self.mix = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.5, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(x, x, x, need_weights=False)[0] if self.layer == "attention" else self.mix(x)
        return self.head(mixed.mean(1))


@pytest.mark.parametrize("layer", ["attention", "encoder layer"])
def test_attention_rounds_as_it_does_with_gradients(layer: str) -> None:
    torch.manual_seed(0)
    model = Attention(layer)
    for module in model.modules():
        module.training = False
    x = torch.randn(6, 50, 32)
    with torch.enable_grad():
        expected = model(x).detach()
    extraction = Extraction(model, [Contrasts()])
    logits, _ = extraction(x)
    assert torch.equal(logits, expected)
    assert not any(module.training for module in model.modules())
    if layer == "attention":
        assert model.mix.dropout == 0.5


@pytest.mark.filterwarnings("ignore")
def test_what_eight_bits_round_by_the_batch_is_no_mixing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    x = torch.randn(7, 6)
    x[2] *= 20
    assert not torch.allclose(quantized(x[:3])[:2], quantized(x[:2]), rtol=1e-3)
    assert watch(quantized, (x,), {}).classes == 3
