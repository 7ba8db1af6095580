"""A user's model is run in evaluation mode and left as it was: values, sizes, modes, hooks; threads take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small_images import photos, small_net
from small_nets import Net
from torch import Tensor, nn
from torch.ao import quantization

from fastgrad.challenges import PixelRange, fgsm, generate_challenges
from fastgrad.evaluation import evaluating


class Merging(nn.Linear):
    def train(self, mode: bool = True) -> Any:
        self.weight.data.add_(1 if mode else -1)
        return super().train(mode)


def observing(own: Any, x: Tensor) -> Tensor:
    """Keeps the range of what it sees, as a network to be quantized does; a first input makes room for it."""
    own.highest.resize_(3).copy_(x.detach().amax((0, 2, 3)))
    return own.net(x)


def counted(own: Any, x: Tensor) -> Tensor:
    own.calls = own.calls + 1
    return own.net(x)


def growing(own: Any, x: Tensor) -> Tensor:
    z = own.net(x)
    if own.length < z.shape[1]:
        own.length = z.shape[1]
        own.table = torch.arange(1.0, own.length + 1)
    return z * own.table[: z.shape[1]]


#: Networks that change themselves when they run, or when their modes change.
CHANGING: dict[str, Callable[[], nn.Module]] = {
    "nothing": small_net,
    "a buffer's values and size": lambda: Net(observing, net=small_net(), highest=nn.Buffer(torch.empty(0))),
    # Kernels of quantization write without a new version.
    "quantization": lambda: nn.Sequential(quantization.FusedMovingAvgObsFakeQuantize(), *small_net()),
    "a buffer": lambda: Net(counted, net=small_net(), calls=nn.Buffer(torch.zeros(()))),
    "weights with the mode": lambda: nn.Sequential(nn.Flatten(), Merging(768, 5)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("changes", CHANGING)
def test_model_is_left_as_it_was(changes: str, called: bool, training: bool) -> None:
    net = CHANGING[changes]().train(training)
    list(net.modules())[-1].eval()
    if called:
        net(photos()).sum().backward()
    modes, buffers = [m.training for m in net.modules()], dict(net.named_buffers())
    values, gradients = ([t.clone() for t in tensors] for tensors in (net.state_dict().values(), grads(net)))
    with torch.no_grad():
        list(generate_challenges(net, 0.5 + photos() / 2))
    assert [m.training for m in net.modules()] == modes
    assert all(found is buffers[name] for name, found in net.named_buffers())
    assert all(map(torch.equal, net.state_dict().values(), values))
    assert all(map(torch.equal, grads(net), gradients))
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def grads(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def test_table_that_grows() -> None:
    model = Net(growing, net=small_net(), length=0, table=nn.Buffer(torch.zeros(0), persistent=False))
    list(generate_challenges(model, photos(), names=["fgsm"]))
    assert len(model.table) == model.length > 0


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(1).expand(1 << 40),
        nn.UninitializedBuffer(),
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.zeros(2, dtype=torch.uint8).view(torch.bits8),
    ],
    ids=["expanded", "lazy", "meta", "sparse", "bits"],
)
def test_buffers_without_a_copy(buffer: Tensor) -> None:
    net = small_net()
    net.register_buffer("mask", buffer)
    fgsm(net, photos(), 0.1, torch.Generator(), pixels=PixelRange.of(photos()))
    assert net.mask is buffer


@pytest.mark.parametrize("wrapped", [False, True])
def test_two_threads(wrapped: bool) -> None:
    net, inside, ended = small_net().train(), [threading.Event(), threading.Event()], threading.Event()

    def first() -> None:
        with evaluating(net):
            inside[0].set()
            inside[1].wait(0.5)  # where the other does not wait
        ended.set()

    def second() -> None:
        inside[0].wait()
        with evaluating(nn.Sequential(net) if wrapped else net):
            inside[1].set()
            ended.wait()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result(timeout=60)
    assert all(module.training for module in net.modules())


def test_two_networks() -> None:
    both = threading.Barrier(2)

    def attack(net: nn.Module) -> None:
        with evaluating(net):
            both.wait(timeout=10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(attack, [small_net(), small_net()]))


def test_error() -> None:
    def broken(net: Any, x: Tensor) -> Tensor:
        raise RuntimeError("no")

    net = nn.Sequential(Net(broken)).train()
    with pytest.raises(RuntimeError, match="no"):
        list(generate_challenges(net, photos(), names=["pgd-1"]))
    assert net.training
    assert net[0].training
