"""Adapters, experts and language models as libraries build them, and all modules that PyTorch itself tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from gradient_oracle import loss_norms, relative_error
from small_nets import Net, check_losses, recorded
from torch import Tensor, nn
from torch.utils import _pytree as pytree

TOKENS = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(0))


def losses_of(model: nn.Module, x: Tensor) -> Tensor:
    """A loss a sample, of all that the model puts out."""
    out: Any = model(x)
    return getattr(out, "logits", out).square().flatten(1).cos().sum(1)


def check(model: nn.Module, x: Tensor, eps: float = torch.finfo(torch.float64).eps) -> None:
    check_losses(model, lambda x: losses_of(model, x), x, eps)


def test_adapters_of_peft_merged_switched_and_disabled() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    config = peft.LoraConfig(r=2, target_modules=["1", "3"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).double().eval()
    check(model, TOKENS)
    model.add_adapter("other", config)
    model.double().eval().set_adapter("other")
    check(model, TOKENS)

    def of_all() -> dict[str, Tensor]:
        found = recorded(model, lambda: losses_of(model, TOKENS).sum())
        return dict(zip((n for n, _ in model.named_parameters()), found.T, strict=True))

    with model.disable_adapter():
        assert not of_all()["base_model.model.1.lora_A.other.weight"].any()
    check(model, TOKENS)
    model.merge_adapter()
    norms = of_all()
    assert not norms["base_model.model.1.lora_A.other.weight"].any()
    assert norms["base_model.model.1.base_layer.weight"].all()
    model.unmerge_adapter()
    check(model, TOKENS)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("checkpoints", [False, True])
def test_language_model(checkpoints: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # transformers computes norms and angles in float32, also in a float64 model.
    if checkpoints:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for tokens in (TOKENS, TOKENS[:3, :2]):
        check(model, tokens, torch.finfo(torch.float32).eps)
    calls = [0]

    def counted(*_: Any) -> None:
        calls[0] += 1

    model.model.layers[0].mlp.register_forward_pre_hook(counted)
    recorded(model, lambda: losses_of(model, TOKENS).sum())
    calls[0] = 0
    recorded(model, lambda: losses_of(model, TOKENS).sum())
    alone = checkpoints and hasattr(torch.utils.checkpoint, "_NoopSaveInputs")  # with which vmap refuses checkpoints
    assert calls[0] > 2 if alone else calls[0] == 1 + checkpoints


def dispatched(net: Any, x: Tensor) -> Tensor:
    """Every expert gets the samples that chose it in the first places, by a product with zeros and ones."""
    best = nn.functional.one_hot(net.route(x).argmax(-1), 3)
    place = ((best.cumsum(0) - 1) * best).sum(-1)
    dispatch = (best.unsqueeze(2) * nn.functional.one_hot(place, len(x)).unsqueeze(1)).to(x)
    slots = torch.matmul(dispatch.movedim(0, -1), x)
    made = torch.stack([expert(each) for expert, each in zip(net.experts, slots, strict=True)])
    return torch.einsum("bec,ecd->bd", dispatch, made)


def test_experts() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
    model = nn.Sequential(Net(dispatched, route=nn.Linear(6, 3), experts=layers), nn.Linear(6, 3)).double()
    check(model, x := torch.randn(9, 6).double())
    check(model, x.flip(0)[:1])


def check_sample(info: Any, sample: Any) -> str:
    """Whether the norms are those of the loop, or the model is refused by name; "" without a certain batch."""
    given, forward = sample.constructor_input, sample.forward_input
    module = info.module_cls(*given.args, **given.kwargs).double().eval()
    tensors = [t for t in (*forward.args, *forward.kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    if not list(module.parameters()) or not tensors or len({len(t) for t in tensors}) > 1 or len(tensors[0]) < 2:
        return ""
    samples = len(tensors[0])
    if samples in (size for t in tensors for size in t.shape[1:]):
        return ""

    def losses(rows: slice) -> Tensor:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t[rows] if t.dim() else t, (forward.args, forward.kwargs))
        out = module(*args, **kwargs)
        floats = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        if any(t.dim() < 2 or (rows.start is None and samples not in t.shape) for t in floats):
            raise LookupError("an output of all samples")
        # Sums of squares of normalised values are constants.
        return sum((t.pow(3).sum() for t in floats), torch.zeros(()))

    try:
        losses(slice(None))
        truth = loss_norms((losses(slice(i, i + 1)) for i in range(samples)), module)
    except Exception:
        return "invalid"
    try:
        found = recorded(module, lambda: losses(slice(None)))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"refused: {error}" if " must " in str(error) else f"foreign {type(error).__name__}: {error}"
    wrong = found.shape != truth.shape or relative_error(found, truth, 2e-16).max() > 1e-8
    return "wrong" if wrong else "right"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_modules_of_pytorchs_own_tests() -> None:
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_db

    found, bad = Counter[str](), []
    for info in module_db:
        given = {"device": "cpu", "dtype": torch.float64, "requires_grad": False, "training": False}
        for sample in info.module_inputs_func(info, **given):
            torch.manual_seed(0)
            verdict = check_sample(info, sample)
            found[verdict.partition(":")[0]] += 1
            if verdict.partition(":")[0] not in ("", "invalid", "right", "refused"):
                bad.append((info.name, sample.constructor_input.args, sample.constructor_input.kwargs, verdict))
    assert not bad, bad
    assert found["right"] > 250, found
