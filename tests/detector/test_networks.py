"""Networks of other kinds: in their libraries' forms, compiled, under autocast, and with habits of their own."""

import warnings
from typing import Any

import pytest
import torch
from small_images import CLASSES, images, loader, small_network
from small_nets import Net
from torch import nn

from fastgrad import TwoStageModel
from fastgrad.blocks import Block
from fastgrad.challenges import CHALLENGES
from fastgrad.checks import without_warnings


def test_hugging_face_and_timm():
    transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
        patch_size=4, num_labels=CLASSES,
    )  # fmt: skip
    vit = transformers.ViTForImageClassification(config)
    mixer = timm.create_model("resnet10t", num_classes=CLASSES)
    blocks = ["logits", "features", "activations", "gradients", "view", "image"]
    for network, head, size in ((vit, "classifier", 8), (mixer, "fc", 32)):
        data = [nn.functional.interpolate(x, size=(size, size)) for x in loader(24, labels=False)]
        two_stage = TwoStageModel(network, blocks=blocks).fit(data, challenges=None)
        assert two_stage.extraction_.subject.head == head
        assert torch.isfinite(two_stage(data[0]).uncertainty).all()


def test_text_classifier():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    network = transformers.BertForSequenceClassification(config)
    tokens = torch.randint(0, 20, (60, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(20)]
    two_stage = TwoStageModel(network).fit(data, challenges=None)
    assert two_stage.report().kept == ["logits", "activations"]
    assert two_stage(data[0]).uncertainty.shape == (20,)
    assert two_stage(data[0]).risk is None
    two_stage.fit([batch | {"labels": torch.arange(20) % 3} for batch in data])
    assert two_stage(data[0]).risk is not None
    assert set(two_stage.report().challenges) == {"transposition", "substitution"}  # of inputs without padding


def test_compiled(tmp_path):
    plain, options = small_network(), {"blocks": ["logits", "activations", "features"]}
    one = TwoStageModel(plain, **options).fit(loader(60), challenges=None)
    other = TwoStageModel(torch.compile(plain, backend="eager"), **options).fit(loader(60), challenges=None)
    assert other.extraction_.subject == one.extraction_.subject
    torch.testing.assert_close(other(images(5)), one(images(5)), rtol=0, atol=0)
    other.save(tmp_path / "compiled")
    torch.testing.assert_close(TwoStageModel.load(tmp_path / "compiled", plain)(images(5)), one(images(5)))


def exact(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Autocast leaves this network as it is."""
    with torch.autocast("cpu", enabled=False):
        return net.network(x)


def test_autocast():
    x, blocks, network = images(9, 5), ["logits", "activations", "image"], small_network()
    # Of so many channels that their projection is held in float32.
    network[0], network[1], network[6] = (
        nn.Conv2d(3, 1100, 3, padding=1), nn.BatchNorm2d(1100), nn.Linear(4400, CLASSES),
    )  # fmt: skip

    def fit():
        with without_warnings():
            two_stage = TwoStageModel(Net(exact, network=network), blocks=blocks)
            return two_stage.fit(loader(40), correct=True, challenges_per_input=1, verbose=False)

    plain = fit()
    with torch.autocast("cpu", torch.bfloat16):
        cast, answer = fit(), plain(x)
    for other in (answer, cast(x)):
        assert all(torch.equal(a, b) for a, b in zip(plain(x)[:3], other[:3], strict=True))


def behind(change):
    """A network whose inputs are changed first."""
    return Net(lambda net, x: net.network(change(x)), network=small_network())


def test_random_numbers():
    noisy = Net(lambda net, x: net.network(x) + 100 * torch.rand(len(x), CLASSES), network=small_network())
    with pytest.warns(UserWarning, match="draws random numbers"):
        TwoStageModel(noisy, blocks=["logits"]).fit(loader(60, labels=False), challenges=None)


@pytest.mark.parametrize("write", [lambda x: x.mul_(0.7).sub_(0.1), lambda x: x.clamp_(0, 1)])
def test_writes_to_its_inputs(write):
    fits = []
    for change in (write, lambda x: write(x.clone())):
        with torch.no_grad():
            model = TwoStageModel(behind(change), blocks=["logits", "image", "view"])
            fits.append(model.fit(loader(60), challenges_per_input=1))
    # Attacks are among them.
    assert fits[0].report().challenges == fits[1].report().challenges
    assert torch.equal(*(fit.calibration_scores for fit in fits))
    x = images(5)
    assert torch.equal(*(fit(x).uncertainty for fit in fits))
    assert torch.equal(x, images(5))


def test_no_single_sample():
    def several(x):
        if len(x) == 1:
            raise RuntimeError("one alone")
        return x

    with pytest.raises(RuntimeError, match="one alone"):
        TwoStageModel(behind(several), blocks=["logits"]).fit(loader(60))


class Rounding(Block):
    """Two squared norms, of which one is 0 but for rounding, as those of a key's bias in attention are."""

    name = "rounding"
    squared_norms = True

    def values(self, forward):
        return torch.tensor([0.0, -40.0 - forward.samples]).expand(forward.samples, 2)


def test_norms_that_are_rounding():
    two_stage = TwoStageModel(small_network(), blocks=["logits", Rounding()]).fit(loader(60), challenges=None)
    assert two_stage.report().kept == ["logits", "rounding"]


def frozen(net: Any, x: torch.Tensor) -> torch.Tensor:
    if x.requires_grad:
        warnings.warn("no autograd kernel was registered", stacklevel=1)  # as operations on integers do
    with net.mode():
        h = net.network[:-1](x)
    return net.network[-1](h)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradients_no_attacks(mode):
    model = Net(frozen, network=small_network(), mode=mode)
    report = TwoStageModel(model, blocks=["logits"]).fit(loader(80)).report()
    assert set(report.challenges) == {name for name, kind in CHALLENGES.items() if not kind.passes}
    assert report.passes == pytest.approx(4)
