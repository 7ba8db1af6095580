"""Attacks are the published steps, stay in their ball, and run on networks of every form and mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_images import challenged, photos, small_net
from small_nets import Net
from torch import Tensor, nn

from fastgrad.challenges import CHALLENGES, PixelRange, fgsm, generate_challenges, pgd


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_ball_and_prediction(scale: float) -> None:
    # At scale 1000 the margins pass 17, where float32 cross-entropy has no gradient.
    net = small_net(scale=scale).eval()
    images = photos(batch=10)
    made = challenged(net, images, ["pgd"])
    with torch.no_grad():
        clean = net(images)
        top = clean.argmax(1, keepdim=True)

        def margin(logits: Tensor) -> Tensor:
            others = logits.scatter(1, top, -torch.inf).logsumexp(1)
            return logits.gather(1, top)[:, 0] - others

        margins = [margin(clean)] + [margin(net(made[f"pgd-{n}"])) for n in (1, 2, 3)]
    for n, epsilon in enumerate(CHALLENGES["pgd"].strengths, 1):
        # float32 rounding of values below one.
        assert float((made[f"pgd-{n}"] - images).abs().max()) <= epsilon + 2e-7
        assert bool((margins[n] < margins[0]).all())


def test_published_steps() -> None:
    net = small_net().double().eval()
    images = photos(batch=4).double()
    point = images.clone().requires_grad_()
    logits = net(point)
    loss = nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum")
    (slope,) = torch.autograd.grad(loss, point)
    expected = (images + 8 / 255 * slope.sign()).clamp(0, 1)
    pixels = PixelRange.of(images, clip=(0, 1))
    made = fgsm(net, images, 8 / 255, torch.Generator(), pixels=pixels)
    torch.testing.assert_close(made, expected, rtol=0, atol=4e-16)
    # Several steps lead away from the prediction of the image itself, whatever is predicted on the way.
    start = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).double()
    point = (images + 8 / 255 * (2 * start - 1)).clamp(0, 1)
    for _ in range(5):
        loss = nn.functional.cross_entropy(net(point.requires_grad_()), logits.argmax(1), reduction="sum")
        (slope,) = torch.autograd.grad(loss, point)
        point = (point.detach() + 4 / 255 * slope.sign()).clamp(images - 8 / 255, images + 8 / 255).clamp(0, 1)
    made = pgd(net, images, 8 / 255, torch.Generator().manual_seed(0), pixels=pixels, steps=5)
    torch.testing.assert_close(made, point, rtol=0, atol=1e-15)
    # The sign of one logit is the prediction, as of two logits that differ by it.
    middle = logits[:, :1].detach().mean()
    one = Net(lambda own, x: own.net(x)[:, :1] - middle, net=net)
    two = Net(lambda own, x: nn.functional.pad(own.one(x), (1, 0)), one=one)
    assert torch.equal(*(fgsm(model, images, 0.1, torch.Generator(), pixels=pixels) for model in (one, two)))


def attacked(attack: Any, **given: Any) -> Any:
    arguments = {"model": small_net(), "unit": photos(), "epsilon": 0.1, "generator": torch.Generator().manual_seed(0)}
    return attack(**{**arguments, "pixels": PixelRange.of(photos(), clip=(0, 1)), **given})


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_evaluation_mode_with_gradients(attack: Any) -> None:
    net = small_net()
    expected, before = attacked(attack, model=copy.deepcopy(net).eval()), copy.deepcopy(net.state_dict())
    with torch.inference_mode():
        assert torch.equal(attacked(attack, model=net), expected)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_frozen_script() -> None:
    net, pixels = small_net().eval(), PixelRange.of(photos(), clip=(0, 1))
    frozen: nn.Module = torch.jit.freeze(torch.jit.trace(net, photos()))
    expected, made = (pgd(one, photos(), 0.1, torch.Generator().manual_seed(0), pixels=pixels) for one in (net, frozen))
    assert ((made - expected).abs() > 0.01).float().mean() < 0.01
    assert list(generate_challenges(frozen, photos(), names=["fgsm"]))


@pytest.mark.parametrize("form", [lambda z, x: (z, x), lambda z, x: {"logits": z}], ids=["tuple", "dict"])
def test_forms_of_logits(form: Callable[[Tensor, Tensor], Any]) -> None:
    net = small_net()
    models = net, Net(lambda own, x: form(own.net(x), x), net=net)
    plain, wrapped = (challenged(model, photos(), ["pgd-2"], seed=1)["pgd-2"] for model in models)
    assert torch.equal(plain, wrapped)


def test_no_gradient_reaches_the_images() -> None:
    cut = Net(lambda net, x: net.small(x.detach()), small=small_net())
    for parameters in (True, False):
        cut.requires_grad_(parameters)
        with pytest.raises(ValueError, match="model must pass gradients of its logits to the images"):
            list(generate_challenges(cut, photos(), names=["fgsm"]))
    assert list(generate_challenges(cut, photos(), names=["noise"]))
