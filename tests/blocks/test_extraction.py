from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_images import images, small_network
from small_nets import Net
from torch import nn

import fastgrad
from fastgrad.blocks import Activations, Contrasts, Gradients, Penultimate
from fastgrad.blocks.extraction import Extraction
from fastgrad.blocks.subject import watch


def unmappable(net: Any, x: torch.Tensor) -> torch.Tensor:
    """``vmap`` refuses ``.item()``."""
    h = torch.tanh(net.inner(x))
    return net.head(h if h.sum().item() < torch.inf else x)


def decoyed(net: Any, x: torch.Tensor) -> Any:
    logits = net.head(net.body(x))
    net.decoy(logits)
    return {"logits": logits}


HEADS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "last": (small_network, "6"),
    "before another": (
        lambda: Net(decoyed, body=nn.Flatten(), head=nn.Linear(192, 3), decoy=nn.Linear(3, 3)), "head",
    ),
    "none": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Sigmoid()), None),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_the_layer_that_returned_the_logits(case: str) -> None:
    make, head = HEADS[case]
    assert watch(make(), (images(2),), {}).head == head


def test_blocks_hold_what_they_say() -> None:
    network, x = small_network().eval(), images(4)
    logits, blocks = Extraction(network, [Gradients(), Penultimate()], log=False)(x)
    torch.testing.assert_close(blocks["features"], network[:-1](x).detach())
    torch.testing.assert_close(logits, network(x).detach())
    ones = fastgrad.target_sqnorm(blocks["features"], logits, "ones", loss="bce", bias=False)
    place = [name for name, _ in network.named_parameters()].index("6.weight")
    torch.testing.assert_close(blocks["gradients"][:, 0, place], ones, rtol=1e-4, atol=0)


def test_h_where_the_network_runs_more_than_once() -> None:
    torch.manual_seed(0)
    net = Net(unmappable, inner=nn.Linear(6, 6), head=nn.Linear(6, 3)).double().eval()
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = Extraction(net, [Penultimate()])(x)[1]["features"]
    _, blocks = Extraction(net, [Penultimate(), Gradients()])(x)
    torch.testing.assert_close(blocks["features"], expected, rtol=1e-13, atol=1e-13)


def test_a_compiled_network_has_the_same_blocks() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).eval(), torch.randn(5, 6)
    for blocks in ([Gradients(), Penultimate()], [Activations(), Contrasts()]):
        logits, values = Extraction(net, blocks)(x)
        found, same = Extraction(torch.compile(net, backend="eager"), blocks)(x)
        assert torch.equal(found, logits)
        for name, value in values.items():
            torch.testing.assert_close(same[name], value)


@pytest.mark.parametrize("wrap", [lambda z: SimpleNamespace(logits=z), lambda z: (z, z - z.mean(0))])
def test_of_what_a_network_returns_the_logits_alone_count(wrap: Callable[[torch.Tensor], Any]) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).eval(), torch.randn(5, 6)
    logits, values = Extraction(net, [Gradients()])(x)
    same, found = Extraction(Net(lambda own, x: wrap(own.net(x)), net=net), [Gradients()])(x)
    assert torch.equal(same, logits)
    assert torch.equal(found["gradients"], values["gradients"])


def attended(net: Any, x: torch.Tensor) -> torch.Tensor:
    mixed = net.mix(x, x, x, need_weights=False)[0] if isinstance(net.mix, nn.MultiheadAttention) else net.mix(x)
    return net.head(mixed.mean(1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True),
        lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.5, batch_first=True),
    ],
    ids=["attention", "encoder layer"],
)
def test_attention_answers_as_in_an_ordinary_call(make: Callable[[], nn.Module], frozen: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(attended, mix=make(), head=nn.Linear(32, 5)).requires_grad_(not frozen), torch.randn(6, 50, 32)
    for training in (True, False):
        logits, _ = Extraction(model.train(training), [Activations()])(x)
        with torch.no_grad():
            torch.testing.assert_close(logits, model.eval()(x))


@pytest.mark.filterwarnings("ignore")
def test_rounding_to_eight_bits_is_no_mixing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    x = torch.randn(7, 6)
    x[2] *= 20
    assert not torch.allclose(quantized(x[:3])[:2], quantized(x[:2]), rtol=1e-3)
    assert watch(quantized, (x,), {}).classes == 3
