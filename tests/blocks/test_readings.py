"""What modules see comes back as in the plain forward pass, and the user's model stays as it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from small_nets import Net
from torch import Tensor, nn

from fastgrad.blocks import Block
from fastgrad.blocks.extraction import Extraction
from fastgrad.blocks.forward import Pass, Reading
from fastgrad.blocks.subject import watch


def entering(inputs: tuple[Any, ...], _: Any) -> Tensor:
    return inputs[0]


def leaving(_: tuple[Any, ...], output: Any) -> Tensor:
    return output


class Seen(Block):
    """Keeps what it read."""

    name, shapes = "seen", "(B, N)"

    def __init__(self, *readings: Reading) -> None:
        self.wanted, self.found = readings, dict[Reading, Tensor]()

    def readings(self, subject: Any, mask: Any) -> tuple[Reading, ...]:
        return self.wanted

    def values(self, forward: Pass) -> Tensor:
        self.found = dict(zip(self.wanted, forward.readings(self.name), strict=True))
        return forward.logits


def read(model: nn.Module, x: Any, *readings: Reading) -> tuple[Tensor, dict[Reading, Tensor]]:
    """Logits and readings of one forward pass."""
    block = Seen(*readings)
    logits, _ = Extraction(model, [block])(x)
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in model.modules())
    return logits, block.found


def nested() -> Net:
    """Calls one module twice, and one by keyword; a later operation overwrites an output."""

    def function(net: Any, x: Tensor) -> Tensor:
        h = net.block(net.block(x) + net.table)
        h.mul_(2)
        return net.head(input=h)

    torch.manual_seed(3)
    block, table = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Parameter(torch.rand(1, 4))
    return Net(function, block=block, table=table, head=nn.Linear(4, 3), idle=nn.Linear(4, 4)).eval()


@pytest.mark.parametrize("training", [False, True])
def test_nested_and_repeated_calls(training: bool) -> None:
    model, x = nested().train(training), torch.randn(5, 4)
    readings = [
        Reading("block", entering), Reading("block", leaving), Reading("block.0", leaving), Reading("head", entering),
    ]  # fmt: skip
    logits, found = read(model, x, *readings)
    assert all(module.training == training for module in model.modules())
    assert set(found) == set(readings)
    with torch.no_grad():
        second = model.eval().block(x) + model.table
        between = model.block[0](second)
        after = model.block[1](between)
        assert torch.equal(logits, model(x))
    for reading, expected in zip(readings, (second, after, between, 2 * after), strict=True):
        assert torch.equal(found[reading], expected)
        assert not found[reading].requires_grad


def test_what_cannot_be_read() -> None:
    model, x = nested(), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="did not call 'idle'"):
        read(model, x, Reading("idle", leaving))
    with pytest.raises(AttributeError, match="tail"):
        read(model, x, Reading("tail", leaving))
    for function, was in ((lambda _, out: out.sum(), r"\(\)"), (lambda _, out: out[:2], r"\(2, 3\)")):
        with pytest.raises(ValueError, match=f"'head' must be .* each of 3 samples; it was {was}"):
            read(model, x, Reading("head", function))
    with pytest.raises(ValueError, match="it was NoneType"):
        read(model, x, Reading("head", lambda *_: None))  # type: ignore[arg-type,return-value]
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_of_the_user_come_after_the_reading() -> None:
    model, x = nested(), torch.randn(3, 4)
    handles = [
        model.block.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,)),
        model.block.register_forward_hook(lambda _m, _a, out: 2 * out),
    ]
    block = Seen(Reading("block.0", entering), Reading("block.1", leaving), Reading("block", leaving))
    Extraction(model, [block])(x)
    entered, normed, left = block.found.values()
    with torch.no_grad():
        assert torch.equal(entered, model.block(x) + model.table + 1)
    assert torch.equal(left, normed)
    assert [len(model.block._forward_pre_hooks), len(model.block._forward_hooks)] == [1, 1]
    for handle in handles:
        handle.remove()


def test_calls_in_other_threads_are_not_read() -> None:
    """Another thread calls the model in the middle of a pass."""
    torch.manual_seed(0)
    others: list[Tensor] = []
    x, other = torch.randn(4, 5), torch.randn(4, 5)

    def function(net: Any, x: Tensor) -> Tensor:
        h = net.inner(x)
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: others.append(net(other)))
            thread.start()
            thread.join()
        return net.head(h)

    model = Net(function, inner=nn.Linear(5, 6), head=nn.Linear(6, 3)).eval()
    readings = Reading("inner", leaving), Reading("head", entering)
    logits, found = read(model, x, *readings)
    with torch.no_grad():
        h = model.inner(x)
        assert all(torch.equal(value, h) for value in found.values())
        assert torch.equal(logits, model.head(h))
        assert all(torch.equal(own, model.head(model.inner(other))) for own in others)


class Counting(nn.Module):
    """Draws numbers and writes a buffer in training mode, and holds what has no copy of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout()
        with pytest.warns(FutureWarning):
            self.head = nn.utils.weight_norm(nn.Linear(4, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.modules_by_name = {"norm": self.norm}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.dropout(self.modules_by_name["norm"](x)))


def test_training_model_is_copied() -> None:
    torch.manual_seed(0)
    model, x = Counting(), torch.randn(6, 4)
    model(x)  # since then the weight of the head is part of a graph
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    logits, found = read(model, x, Reading("norm", leaving))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(logits, model.eval()(x))
    assert torch.equal(*(value.sum(1) for value in (found[Reading("norm", leaving)], model.norm(x))))


def test_uncopied_model_must_evaluate() -> None:
    model, x = nested(), torch.randn(3, 4)
    model.lock = threading.Lock()
    read(model, x)
    with pytest.raises(ValueError, match=r"model must be in evaluation mode .* Copying it raised TypeError: .*lock"):
        read(model.train(), x)
    assert all(module.training for module in model.modules())


def test_compiled_parts_are_read() -> None:
    torch.manual_seed(0)
    body, head, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3), torch.randn(5, 4)
    head.compile(backend="eager")
    model = nn.Sequential(torch.compile(body, backend="eager"), head).eval()
    assert watch(model, (x,), {}).head == "1"
    for _ in range(2):
        _, found = read(model, x, Reading("0.0", leaving), Reading("1", entering))
        first, last = found.values()
        torch.testing.assert_close(first, body[0](x).detach())
        torch.testing.assert_close(last, body(x).detach())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_parts_of_a_padded_encoder_are_called() -> None:
    """PyTorch's fused kernel would call none of them, and take its tokens as nested tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def function(net: Any, x: Tensor, mask: Tensor) -> Tensor:
        return net.head(net.encoder(x, src_key_padding_mask=mask)[:, 0])

    model = Net(function, encoder=nn.TransformerEncoder(layer, 2), head=nn.Linear(8, 3)).eval()
    x, mask = torch.randn(4, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [4], [2]])
    logits, found = read(model, {"x": x, "mask": mask}, Reading("encoder.layers.1.linear1", leaving))
    assert torch.backends.mha.get_fastpath_enabled()
    assert [tuple(value.shape) for value in found.values()] == [(4, 5, 16)]
    torch.testing.assert_close(logits, model(x, mask=mask).detach())
