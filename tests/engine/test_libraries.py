"""Adapters, experts and language models as libraries build them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms, relative_error
from small_nets import Net, recorded
from torch import Tensor, nn

import fastgrad

TOKENS = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))
HIDDEN = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1)).double()


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss a sample, of all that the model puts out."""
    out: Any = model(x)
    return getattr(out, "logits", out).square().flatten(1).cos().sum(1)


def loop(model: nn.Module, x: Tensor) -> Tensor:
    """Squared norms ``(B, P)`` of the trainable parameters, sample by sample."""
    model = copy.deepcopy(model)
    return loss_norms((losses_of(model, row).sum() for row in x.split(1)), model)


# transformers computes norms and angles in float32, also in a float64 model.
SINGLE = torch.finfo(torch.float32).eps


def assert_exact(model: nn.Module, x: Tensor, eps: float = torch.finfo(torch.float64).eps) -> None:
    """Both ``record`` and ``clip_gradients`` give what the loop gives."""
    truth = loop(model, x)
    wanted = [p for p in model.parameters() if p.requires_grad]
    with fastgrad.record(model):
        found = torch.stack(fastgrad.grad_sqnorm(losses_of(model, x).sum(), wanted), 1)
    assert relative_error(found, truth, eps).max() < 1e3 * eps
    with fastgrad.clip_gradients(model, 1.0) as clipped:
        norms = clipped.backward(losses_of(model, x))
    torch.testing.assert_close(norms, truth.sum(1).sqrt(), rtol=1e3 * eps, atol=0)


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
    with model.disable_adapter():
        assert not loop_of_all(model, TOKENS)["base_model.model.1.lora_A.other.weight"].any()
    assert_exact(model, TOKENS)
    model.merge_adapter()
    norms = loop_of_all(model, TOKENS)
    assert not norms["base_model.model.1.lora_A.other.weight"].any()
    assert norms["base_model.model.1.base_layer.weight"].all()
    model.unmerge_adapter()
    assert_exact(model, TOKENS)


def loop_of_all(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What ``record`` gives for every parameter, all of them trainable, held against the loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(True)
    try:
        found = recorded(model, lambda: losses_of(model, x).sum())
        assert relative_error(found, loop(model, x), 2e-16).max() < 1e-12
    finally:
        model.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
    return dict(zip((n for n, _ in model.named_parameters()), found.unbind(1), strict=True))


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, tie_word_embeddings=True, **options,
    )  # fmt: skip
    return config, transformers


def test_a_language_model_with_tied_embeddings_rotary_positions_and_grouped_queries() -> None:
    config, transformers = llama()
    model = transformers.LlamaForCausalLM(config).double().eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_exact(model, TOKENS, SINGLE)
    assert_exact(model, TOKENS[:3, :2], SINGLE)


def test_the_same_as_a_classifier() -> None:
    config, transformers = llama(num_labels=3)
    model = transformers.LlamaForSequenceClassification(config).double().eval()
    _, features = fastgrad.GradientFeatures(model, loss="mse")(TOKENS)
    true = loss_norms(((model(row).logits - 1).square().sum() for row in TOKENS.split(1)), model)
    assert relative_error(features, true, SINGLE).max() < 1e3 * SINGLE


def all_experts(net: Any, x: Tensor) -> Tensor:
    """Every expert, a slice of one parameter, sees every token."""
    gates = net.route(x).softmax(-1)
    if net.way == "einsum":
        return torch.einsum("btd,edo,bte->bto", x, net.weight, gates)
    tokens = x.reshape(1, -1, 6).expand(3, -1, -1)
    each = torch.bmm(tokens, net.weight).unflatten(1, x.shape[:2])
    return (gates.movedim(-1, 0).unsqueeze(-1) * each).sum(0)


def chosen_experts(net: Any, x: Tensor) -> Tensor:
    """Tokens go to one of three layers each."""
    gates = net.route(x).softmax(-1)
    out, chosen = torch.zeros_like(x), gates.argmax(-1)
    for i, expert in enumerate(net.experts):
        out[chosen == i] = expert(x[chosen == i]) * gates[chosen == i][:, i : i + 1]
    return out


@pytest.mark.parametrize("way", ["bmm", "einsum"])
def test_experts_in_one_parameter(way: str) -> None:
    torch.manual_seed(0)
    experts = Net(all_experts, way=way, route=nn.Linear(6, 3), weight=nn.Parameter(torch.randn(3, 6, 6)))
    model = nn.Sequential(nn.Linear(6, 6), experts).double()
    assert_exact(model, HIDDEN)
    assert_exact(model, HIDDEN[:1])


def test_experts_of_gathered_tokens() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
    model = nn.Sequential(nn.Linear(6, 6), Net(chosen_experts, route=nn.Linear(6, 3), experts=layers)).double()
    assert_exact(model, HIDDEN)


def summed_experts(net: Any, x: Tensor) -> Tensor:
    """Each layer adds to the tokens that chose it, in one tensor of all."""
    gates = net.route(x).softmax(-1)
    out, (_, chosen) = torch.zeros_like(x), gates.topk(2)
    for i, expert in enumerate(net.experts):
        here = (chosen == i).any(-1)
        out[here] = out[here] + expert(x[here]) * gates[here][:, i : i + 1]
    return out


def test_experts_that_add_to_the_tokens_that_chose_them() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
    experts = Net(summed_experts, route=nn.Linear(6, 3), experts=layers)
    model = nn.Sequential(experts, nn.Linear(6, 3), nn.Flatten()).double()
    assert_exact(model, HIDDEN)


def dispatched(net: Any, x: Tensor) -> Tensor:
    """Every expert gets the samples that chose it in the first places, by a product with zeros and ones."""
    chosen = nn.functional.one_hot(net.route(x).argmax(-1), 2)
    place = ((chosen.cumsum(0) - 1) * chosen).sum(-1)
    dispatch = (chosen.unsqueeze(2) * nn.functional.one_hot(place, len(x)).unsqueeze(1)).to(x)
    if net.way == "einsum":
        slots = torch.einsum("bec, bd -> ecd", dispatch, x)
    else:
        slots = torch.matmul(dispatch.movedim(0, -1), x)
    made = torch.stack([expert(each) for expert, each in zip(net.experts, slots, strict=True)])
    return torch.einsum("bec,ecd->bd", dispatch, made)


@pytest.mark.parametrize("way", ["einsum", "matmul"])
def test_experts_of_dispatched_samples(way: str) -> None:
    torch.manual_seed(0)
    route, experts = nn.Linear(6, 2), nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
    model = nn.Sequential(Net(dispatched, way=way, route=route, experts=experts), nn.Linear(6, 3)).double()
    x = torch.randn(9, 6).double()
    with torch.no_grad():
        expert = model[0].route(x).argmax(-1)
    x = x[expert.argsort(descending=bool(expert.sum() > 4))]
    assert_exact(model, x)
    assert_exact(model, x.flip(0))
