"""Adapters, experts and language models as libraries build them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms, relative_error
from small_nets import Net
from torch import Tensor, nn

import fastgrad

TOKENS = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))
# transformers computes norms and angles in float32, also in a float64 model.
DOUBLE, SINGLE = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss a sample, of all that the model puts out."""
    out: Any = model(x)
    return getattr(out, "logits", out).square().flatten(1).cos().sum(1)


def assert_exact(model: nn.Module, x: Tensor, eps: float = DOUBLE) -> Tensor:
    """Both ``record`` and ``clip_gradients`` give what the loop gives."""
    plain = copy.deepcopy(model)
    truth = loss_norms((losses_of(plain, row).sum() for row in x.split(1)), plain)
    wanted = [p for p in model.parameters() if p.requires_grad]
    with fastgrad.record(model):
        found = torch.stack(fastgrad.grad_sqnorm(losses_of(model, x).sum(), wanted), 1)
    assert relative_error(found, truth, eps).max() < 1e3 * eps
    with fastgrad.clip_gradients(model, 1.0) as clipped:
        norms = clipped.backward(losses_of(model, x))
    torch.testing.assert_close(norms, truth.sum(1).sqrt(), rtol=1e3 * eps, atol=0)
    return truth


def test_adapters_of_peft_merged_switched_and_disabled() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    config = peft.LoraConfig(r=2, target_modules=["1", "3"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).double().eval()
    assert_exact(model, TOKENS)
    model.add_adapter("other", config)
    model.double().eval().set_adapter("other")
    assert_exact(model, TOKENS)

    def of_all() -> dict[str, Tensor]:
        with fastgrad.record(model):
            found = fastgrad.grad_sqnorm(losses_of(model, TOKENS).sum(), list(model.parameters()))
        return dict(zip((n for n, _ in model.named_parameters()), found, strict=True))

    with model.disable_adapter():
        assert not of_all()["base_model.model.1.lora_A.other.weight"].any()
    assert_exact(model, TOKENS)
    model.merge_adapter()
    norms = of_all()
    assert not norms["base_model.model.1.lora_A.other.weight"].any()
    assert norms["base_model.model.1.base_layer.weight"].all()
    model.unmerge_adapter()
    assert_exact(model, TOKENS)


def llama(kind: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, tie_word_embeddings=True, **options,
    )  # fmt: skip
    return getattr(transformers, kind)(config).double().eval()


def test_a_language_model_with_tied_embeddings_rotary_positions_and_grouped_queries() -> None:
    model = llama("LlamaForCausalLM")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_exact(model, TOKENS, SINGLE)
    assert_exact(model, TOKENS[:3, :2], SINGLE)


def test_the_same_as_a_classifier() -> None:
    model = llama("LlamaForSequenceClassification", num_labels=3)
    _, features = fastgrad.GradientFeatures(model, loss="mse")(TOKENS)
    true = loss_norms(((model(row).logits - 1).square().sum() for row in TOKENS.split(1)), model)
    assert relative_error(features, true, SINGLE).max() < 1e3 * SINGLE


def chosen(net: Any, x: Tensor) -> Tensor:
    """Each layer adds to the tokens that chose it, in one tensor of all."""
    gates = net.route(x).softmax(-1)
    out, (_, best) = torch.zeros_like(x), gates.topk(2)
    for i, expert in enumerate(net.experts):
        here = (best == i).any(-1)
        out[here] = out[here] + expert(x[here]) * gates[here][:, i : i + 1]
    return out


def dispatched(net: Any, x: Tensor) -> Tensor:
    """Every expert gets the samples that chose it in the first places, by a product with zeros and ones."""
    best = nn.functional.one_hot(net.route(x).argmax(-1), 3)
    place = ((best.cumsum(0) - 1) * best).sum(-1)
    dispatch = (best.unsqueeze(2) * nn.functional.one_hot(place, len(x)).unsqueeze(1)).to(x)
    slots = torch.matmul(dispatch.movedim(0, -1), x)
    made = torch.stack([expert(each) for expert, each in zip(net.experts, slots, strict=True)])
    return torch.einsum("bec,ecd->bd", dispatch, made)


@pytest.mark.parametrize(("function", "shape"), [(chosen, (4, 5, 6)), (dispatched, (9, 6))])
def test_experts(function: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
    model = nn.Sequential(Net(function, route=nn.Linear(6, 3), experts=layers), nn.Linear(6, 3), nn.Flatten()).double()
    x = torch.randn(shape).double()
    assert_exact(model, x)
    assert_exact(model, x.flip(0)[:1])
