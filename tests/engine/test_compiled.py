"""A compiled pass gives what the uncompiled one gives, follows the model, and keeps the norms' operators whole."""

from __future__ import annotations

import pytest
import torch
from small_nets import Net
from torch import Tensor, nn

import fastgrad
from fastgrad.engine import tracing as compiled
from fastgrad.engine.trial import Trial

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.GELU(),
        nn.Flatten(1, 1), nn.Flatten(2), nn.Linear(9, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(40, 4),
    ).eval()  # fmt: skip


def close(found: Tensor, expected: Tensor) -> None:
    """Both are sums of squares in float32; fused code rounds every product of a gradient otherwise."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


def test_a_compiled_pass_follows_the_model_and_leaves_it_as_it_was() -> None:
    model, x = network(), torch.randn(5, 3, 8, 8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    fast, plain = fastgrad.GradientFeatures(model, compile=True), fastgrad.GradientFeatures(model)
    logits, norms = fast(x)
    torch.testing.assert_close(logits, plain(x)[0])
    close(norms, plain(x)[1])
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    graphs = fast._compiled._graphs
    with torch.no_grad():  # as an optimizer does
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    close(fast(x)[1], plain(x)[1])
    assert len(graphs) == 1
    assert not torch.allclose(fast(x)[1], norms)

    model[0].weight.data = torch.randn_like(model[0].weight)  # another tensor in its place
    close(fast(x)[1], plain(x)[1])
    assert len(graphs) == 2


def test_a_module_in_another_s_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_compiler(monkeypatch)
    model, x = network(), torch.randn(5, 3, 8, 8)
    assert isinstance(model, nn.Sequential)
    fast, plain = fastgrad.GradientFeatures(model, compile=True), fastgrad.GradientFeatures(model)
    before = fast(x)[1]
    model[2] = nn.Tanh().eval()  # no tensor is another
    close(fast(x)[1], plain(x)[1])
    assert not torch.allclose(fast(x)[1], before)


def test_a_layer_that_began_with_zeros_is_tried_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_compiler(monkeypatch)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(5, 4)
    nn.init.zeros_(model[1].weight)
    fast, plain = fastgrad.GradientFeatures(model, compile=True), fastgrad.GradientFeatures(model)
    fast(x)
    nn.init.ones_(model[1].weight)
    close(fast(x)[1], plain(x)[1])
    assert [route.route for route in fast.report()] == ["linear"] * 4
    monkeypatch.setattr(Trial, "plan", None)
    close(fast(x)[1], plain(x)[1])


@pytest.mark.parametrize(
    "options", [{"target": "contrast"}, {"signals": [("bce", "ones"), ("mse", 1)]}, {"chunk_size": 2}]
)
def test_every_kind_of_pass_can_be_compiled(monkeypatch: pytest.MonkeyPatch, options: dict[str, object]) -> None:
    graphs = _without_compiler(monkeypatch)
    model, x = network().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    found = fastgrad.GradientFeatures(model, compile=True, **options)(x)
    expected = fastgrad.GradientFeatures(model, **options)(x)
    torch.testing.assert_close(found, expected)
    names = {str(node.target) for node in graphs[0].graph.nodes}
    assert "fastgrad.conv_sqnorm_whole.default" in names


def test_the_operators_still_see_where_a_gram_matrix_would_lose_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output gradients that cancel over positions: in float32 a Gram route would be off by a factor."""
    _without_compiler(monkeypatch)

    sign = torch.ones(16)
    sign[::2] = -1 + 1e-3
    model = Net(
        lambda net, x: net.head((net.conv(x) * net.sign).sum((2, 3))),
        conv=nn.Conv2d(64, 64, 1),
        head=nn.Linear(64, 3),
        sign=nn.Buffer(sign.view(4, 4)),
    ).eval()
    x = torch.randn(6, 64, 1, 1).expand(6, 64, 4, 4).contiguous()
    found = fastgrad.GradientFeatures(model, compile=True)(x)[1]
    truth = fastgrad.GradientFeatures(model.double())(x.double())[1]
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


def test_graphs_of_sizes_long_past_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_compiler(monkeypatch)
    monkeypatch.setattr(compiled, "GRAPHS", 2)
    features = fastgrad.GradientFeatures(nn.Linear(4, 3), compile=True)
    for samples in (1, 2, 3, 2):
        assert features(torch.randn(samples, 4))[1].shape == (samples, 2)
    assert len(features._compiled._graphs) == 2


def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs run as they are, and are collected."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, **options: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", keep)
    return graphs
