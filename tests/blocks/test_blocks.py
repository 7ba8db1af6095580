"""Every block against its definition, by float64 autograd sample by sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import Net
from torch import Tensor, nn

from fastgrad._torch import flat_graph
from fastgrad.blocks import BLOCKS, Activations, Block, Contrasts, Gradients, View, channels, register_block
from fastgrad.blocks.extraction import Extraction, arguments
from fastgrad.blocks.forward import Pass
from fastgrad.blocks.subject import Subject, watch

EPS = torch.finfo(torch.float64).eps


def test_every_block_says_in_words_what_its_alarm_means() -> None:
    words = [block.alarm for block in BLOCKS.values()]
    assert len(set(words)) == len(words)
    for text in words:
        # Follows "Mostly because:", and others follow it.
        assert text
        assert text[0].islower()
        assert not set(text) & set(";.")


def summed(net: Any, x: Tensor) -> Tensor:
    """Two normalised convolutions with a sum around the second, activations in place."""
    x = net.relu(net.norm(net.stem(x)))
    return net.head(net.relu(net.second(net.conv(x)) + x).mean((2, 3)))


def masked(net: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Layer norms on tokens, an attention that a mask keeps from padding."""
    x = net.first(net.embed(input_ids))
    x = net.second(x + net.mix(x, x, x, key_padding_mask=attention_mask == 0, need_weights=False)[0])
    return net.head(x[:, 0])


def residual() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    convs = {"stem": nn.Conv2d(3, 4, 3, padding=1), "conv": nn.Conv2d(4, 4, 3, padding=1)}
    norms = {"norm": nn.BatchNorm2d(4), "second": nn.GroupNorm(2, 4)}
    net = Net(summed, **convs, **norms, relu=nn.ReLU(inplace=True), head=nn.Linear(4, 5)).double().eval()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-1, 1)
        net.norm.running_var.uniform_(0.5, 2)
        for p in (*net.norm.parameters(), *net.second.parameters()):
            p.uniform_(0.5, 1.5)
    return net, torch.randn(6, 3, 7, 5, dtype=torch.float64)


def outputs_of(net: nn.Module, x: Tensor, modules: list[nn.Module]) -> tuple[Tensor, list[Tensor]]:
    """Logits of one forward pass, and copies of what modules put out, before anything overwrites it."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handles = [module.register_forward_hook(keep) for module in modules]
    logits = net(x)
    for handle in handles:
        handle.remove()
    return logits, kept


def test_activations_are_logarithms_of_mean_squares() -> None:
    net, x = residual()
    _, values = Extraction(net, [Activations()])(x)
    _, outputs = outputs_of(net, x, [net.norm, net.second])
    expected = torch.cat([o.square().mean((2, 3)) for o in outputs], 1).log()
    # A mean of 35 squares, and a logarithm of numbers near one.
    torch.testing.assert_close(values["activations"], expected, rtol=0, atol=100 * EPS)


def test_an_output_without_positions_is_read_as_it_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.randn(7, 4)
    first = F.linear(x, net[0].weight, net[0].bias)
    expected = torch.cat([first, net[2](first.relu())], 1).detach()
    torch.testing.assert_close(Extraction(net, [Activations()])(x)[1]["activations"], expected)

    # Words, whose mean goes through a layer in place.
    layers = {"words": nn.Linear(4, 6), "pooler": nn.Linear(6, 5), "head": nn.Linear(5, 3)}
    pooled, x = Net(lambda net, x: net.head(net.pooler(net.words(x).mean(1)).tanh_()), **layers), torch.randn(7, 9, 4)
    pooled.eval()
    words = pooled.words(x)
    expected = torch.cat([words.square().mean(1).log(), pooled.pooler(words.mean(1))], 1).detach()
    torch.testing.assert_close(Extraction(pooled, [Activations()])(x)[1]["activations"], expected)


def test_the_logarithms_are_finite_where_norms_underflow() -> None:
    net, x = residual()
    net = net.float()
    with torch.no_grad():
        net.head.weight.mul_(400)
    _, values = Extraction(net, [Gradients(), Contrasts()])(x.float())
    assert all(torch.isfinite(value).all() for value in values.values())


@pytest.mark.parametrize("size", [3, 4, 32])
def test_a_view_of_small_images_is_another_image(size: int) -> None:
    images = torch.rand(2, 3, size, size + 1, generator=torch.Generator().manual_seed(0))
    view = View().of(images)
    assert view.shape == images.shape
    assert float((view - images).abs().amax((1, 2, 3)).min()) > 0.01


def test_view_is_a_divergence_under_the_same_network() -> None:
    net, _ = residual()
    x = torch.randn(4, 3, 20, 30, dtype=torch.float64)
    logits, values = Extraction(net, [View()])(x)
    cropped = F.interpolate(x[:, :, 1:19, 1:28], size=(20, 30), mode="bilinear", align_corners=False)
    first, second = logits.log_softmax(-1), net(cropped).detach().log_softmax(-1)
    expected = torch.log((first.exp() * (first - second)).sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(values["view"], expected, rtol=1e-8, atol=1e-8)


# Attention has no batching rule for its backward pass in PyTorch: slower, not wrong.
def test_padding_says_nothing() -> None:
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(11, 8), "mix": nn.MultiheadAttention(8, 2, batch_first=True)}
    net = Net(masked, **layers, first=nn.LayerNorm(8), second=nn.LayerNorm(8), head=nn.Linear(8, 3)).double().eval()
    ids, mask = torch.randint(1, 11, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    short = {"input_ids": ids[:, :4], "attention_mask": mask[:, :4]}
    mask[:, 4:] = 0
    long = {"input_ids": ids, "attention_mask": mask}
    blocks = [Activations(), Gradients()]
    (_, padded), (_, plain) = Extraction(net, blocks)(long), Extraction(net, blocks)(short)
    for name, value in plain.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-8, atol=1e-8)
    extraction = Extraction(net, [Activations()])
    extraction(long)
    with pytest.raises(ValueError, match="inputs must have 'attention_mask', as those of fit had"):
        extraction({"input_ids": ids})


def test_a_network_without_normalisation_is_read_at_its_layers() -> None:
    torch.manual_seed(0)
    layers = {"lstm": nn.LSTM(4, 6, batch_first=True), "head": nn.Linear(6, 3)}
    net = Net(lambda net, x: net.head(net.lstm(x)[0][:, -1]), **layers).double().eval()
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    subject = watch(net, *arguments(x))
    assert [place.path for place in subject.channels] == ["lstm"]
    _, values = Extraction(net, [Activations()])(x)
    states = net.lstm(x)[0]
    torch.testing.assert_close(values["activations"], states.square().mean(1).log().detach(), rtol=0, atol=1e-12)


def test_one_forward_pass_serves_every_block() -> None:
    net, x = residual()
    calls = []
    Extraction(net, [block() for block in BLOCKS.values()])(x)  # watched and planned
    net.stem.register_forward_hook(lambda *_: calls.append(1))
    extraction = Extraction(net, [Activations(), BLOCKS["image"](), Contrasts()])
    extraction(x)
    calls.clear()
    extraction(x)
    assert len(calls) == 1


def test_block_of_the_users_has_its_name() -> None:
    class Brightness(Block):
        name, shapes = "brightness", "(B, 1)"

        def values(self, forward: Pass) -> Tensor:
            return forward.image().mean((1, 2, 3), keepdim=True)[:, :, 0, 0]

    assert register_block(Brightness) is Brightness
    try:
        assert register_block(Brightness) is BLOCKS["brightness"]
        net, x = residual()
        _, values = Extraction(net, [Brightness()])(x)
        torch.testing.assert_close(values["brightness"], x.mean((1, 2, 3))[:, None])
    finally:
        del BLOCKS["brightness"]


def own(**members: Any) -> type[Block]:
    return type("Own", (Block,), members)


def needing(self: Any, level: Any) -> None: ...


def forgetting(self: Any, level: int = 1, size: int = 2) -> None: ...


#: What cannot be a block, or cannot be registered.
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: register_block(own(name="logits")), ValueError, "block must have a name of its own; Own's was 'logits'"),
    (lambda: register_block(own()), ValueError, "Own's was ''"),
    (lambda: register_block(5), TypeError, "subclass of Block; it was 5"),
    (
        lambda: register_block(own(name="needing", __init__=needing)),
        TypeError, r"made without arguments; Own needs \['level'\]",
    ),
    (  # a file would forget the level
        lambda: register_block(own(name="forgetting", __init__=forgetting, options=lambda self: {"size": 2})),
        TypeError, r"its arguments from options\(\); Own has none for \['level'\]",
    ),
    *((partial(own, name=name), ValueError, f"name of a block must .*; it was '{name}'")
      for name in ("my.block", "training", "forward", "challenges")),
    (lambda: extracted(own(name="without")()), NotImplementedError, "the block 'without' must define values"),
    (
        lambda: extracted(own(name="array", values=lambda self, found: found.image().numpy())()),
        TypeError, r"values of the block 'array' must be a torch\.Tensor; it was ndarray",
    ),
]  # fmt: skip


def extracted(block: Block) -> Any:
    net, x = residual()
    return Extraction(net, [block])(x)


@pytest.mark.parametrize(("call", "error", "words"), REFUSED)
def test_no_block(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    known = set(BLOCKS)
    with pytest.raises(error, match=words):
        call()
    assert set(BLOCKS) == known


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_model_is_unchanged_after_an_error(name: str) -> None:
    net, x = residual()
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    extraction = Extraction(net, [BLOCKS[name]()])
    extraction(x)
    with pytest.raises((RuntimeError, ValueError)):
        extraction(x[:, :2])
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def positions() -> nn.Module:
    """Layer norms and linear layers, as a transformer has them."""
    norms = {"first": nn.LayerNorm(6), "second": nn.LayerNorm(8)}
    layers = {"hidden": nn.Linear(6, 8), "back": nn.Linear(8, 6), "head": nn.Linear(6, 3)}
    return Net(lambda net, x: net.head((x + net.back(net.second(net.hidden(net.first(x))))).mean(1)), **norms, **layers)


def test_network_with_layer_norms() -> None:
    """Every position has one scale behind a layer norm, however unusual it is."""
    subject = watch(positions().eval(), *arguments(torch.randn(4, 5, 6)))
    assert [place.path for place in subject.channels] == ["hidden", "back"]
    # A layer that is called twice has no one output.
    twice, square = positions().eval(), nn.Linear(6, 6)
    twice.back = nn.Sequential(twice.back, square, square)
    subject = watch(twice, *arguments(torch.randn(4, 5, 6)))
    assert [place.path for place in subject.channels] == ["hidden", "back.0"]


def test_layers_called_twice_are_refused() -> None:
    layers = {"layer": nn.Linear(3, 4), "head": nn.Linear(4, 3)}
    siamese = Net(lambda net, x: net.head(net.layer(x[:, :3]) * net.layer(x[:, 3:])), **layers)
    with pytest.raises(ValueError, match=r"'activations': the network calls no .* layer but the last exactly once"):
        Extraction(siamese.eval(), [Activations()])(torch.randn(4, 6))


def test_layer_norms_are_read_where_there_is_nothing_else() -> None:
    net = positions().eval()
    net.hidden = nn.Sequential(nn.Identity())
    net.second, net.back = nn.LayerNorm(6), nn.Identity()
    subject = watch(net, *arguments(torch.randn(4, 5, 6)))
    assert [place.path for place in subject.channels] == ["first", "second"]


class Normalize(nn.Module):
    """What brings pixels to the network's scale, as transforms do that are part of a network."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25


def test_containers_and_scaled_pixels_are_no_normalisation_layers() -> None:
    # A container named as torchvision names its own.
    named = type("Conv2dNormActivation", (nn.Sequential,), {})

    def unit(inputs: int, outputs: int) -> nn.Module:
        return named(nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU())

    net = nn.Sequential(Normalize(), unit(3, 8), unit(8, 8), nn.Flatten(), nn.Linear(8 * 16, 3)).eval()
    places = watch(net, *arguments(torch.randn(3, 3, 8, 8))).channels
    assert [(place.path, place.dim, place.count) for place in places] == [("1.1", 1, 8), ("2.1", 1, 8)]


def test_normalisation_layers() -> None:
    assert channels.is_normalization(type("Own", (nn.BatchNorm2d,), {})(3))
    for module in (nn.RMSNorm(3), type("LayerNorm2d", (nn.Module,), {})(), type("Own", (nn.LayerNorm,), {})(3)):
        assert channels.is_normalization(module)
        assert channels.is_layer_norm(module)


def test_costly_tokens_are_read_at_last_layers() -> None:
    """A layer of 512 inputs computes 1,024 operations for a number that it writes, one of 32 inputs 64."""

    def read(width: int) -> list[str]:
        layers = [m for _ in range(4) for m in (nn.Linear(width, width), nn.Tanh())]
        mean = [nn.Unflatten(1, (6, 1)), nn.AvgPool3d((6, 1, 1)), nn.Flatten()]
        net = nn.Sequential(*layers, *mean, nn.Linear(width, 5)).eval()
        return [place.path for place in watch(net, *arguments(torch.randn(3, 6, width))).channels]

    assert read(32) == ["4", "6"]
    assert read(512) == ["0", "2", "4", "6"]


def test_maps_are_read_on_a_grid() -> None:
    layers = [m for _ in range(25) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    images = torch.randn(5, 4, 20, 9)
    subject = watch(net, *arguments(images))
    places = subject.channels
    assert [place.path for place in places] == ["1", "7", "13", "19", "25", "31", "37", "43", "49"]
    found = Extraction(net, [Activations()])(images)[1]["activations"].view(5, 9, 4)
    for place, own in zip(places, found.unbind(1), strict=True):
        output = net[: int(place.path) + 1](images)[:, :, 3::3, 2::2]
        torch.testing.assert_close(own, output.square().mean((2, 3)).log())
    assert Subject.from_json(json.loads(json.dumps(asdict(subject)))) == subject


def test_tokens_are_read_at_every_position() -> None:
    layers = [m for _ in range(20) for m in (nn.Linear(6, 6), nn.Tanh())]
    # One row a sentence: the mean of its words.
    mean = [nn.Unflatten(1, (30, 1)), nn.AvgPool3d((30, 1, 1)), nn.Flatten()]
    net = nn.Sequential(*layers, *mean, nn.Linear(6, 3)).eval()
    words = torch.randn(4, 30, 6)
    subject = watch(net, *arguments(words))
    assert all(place.grid == 0 for place in subject.channels)
    found = Extraction(net, [Activations()])(words)[1]["activations"]
    torch.testing.assert_close(found[:, -6:], net[:39](words).square().mean(1).log())


@pytest.mark.parametrize(
    ("shape", "inside"),
    [
        ((2, 3, 50), np.s_[..., 7::7]),
        ((2, 3, 8, 16), np.s_[..., 2::2]),
        ((2, 3, 5, 6, 9), np.s_[..., 2::2]),
        ((2, 3, 17, 9, 4), np.s_[:, :, 3::3, 2::2]),
        ((2, 3), np.s_[:]),
    ],
)
def test_a_grid_takes_evenly_spaced_positions_inside_any_map(shape: tuple[int, ...], inside: tuple[Any, ...]) -> None:
    value = torch.randn(shape)
    assert torch.equal(channels.sampled(value, 8), value[inside])
    assert channels.channel_dim(nn.Linear(3, 4), tuple(value.shape[1:2])) is None


@pytest.mark.parametrize("size", [4, 5])
def test_maps_as_wide_as_deep(size: int) -> None:
    # As detectors have it: no class of PyTorch's own.
    frozen = type("FrozenBatchNorm2d", (nn.Module,), {"weight": torch.ones(4)})()
    assert channels.channel_dim(frozen, (3, 4, size, size)) == 1
    assert channels.channel_dim(nn.LayerNorm(size), (3, 4, size, size)) == -1


@pytest.mark.parametrize("size", [6, 20])
def test_traced_map_is_read_before_it_changes(size: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential()
    for width in (2, 4):
        net.extend([nn.Conv2d(width, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)])
    net.extend([nn.Flatten(), nn.Linear(4 * size * size, 3)]).eval()
    x, extraction = torch.randn(5, 2, size, size), Extraction(net, [Activations()])

    def read(x: torch.Tensor) -> torch.Tensor:
        return extraction(x)[1]["activations"]

    expected = read(x)
    torch.testing.assert_close(flat_graph(read, x[:2])(x), expected)
