"""The models: those of timm, torchvision and transformers, with random weights, and a few of PyTorch's parts.

A model is built by a name of its package or by a configuration that makes it small. Dropout is off by configuration,
so that tools that need training mode compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int], Any]
Model = tuple[Callable[[], nn.Module], Inputs]
VOCABULARY, LENGTH = 64, 12


def images(size: int) -> Inputs:
    return lambda batch: torch.randn(batch, 3, size, size)


def tokens(batch: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, LENGTH))


def named(batch: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(batch), "attention_mask": torch.ones(batch, LENGTH, dtype=torch.long)}


def both(batch: int) -> dict[str, Tensor]:
    """Inputs of an encoder and of a decoder."""
    return {"input_ids": tokens(batch), "decoder_input_ids": tokens(batch)}


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    if name[0].isupper():  # a class
        made: nn.Module = getattr(models, name)(num_classes=10, **options)
    else:
        made = models.get_model(name, num_classes=10, **options)
    return made


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(name, num_classes=10, **options)
    return made


#: By what names configurations call width, depth, heads and dropout.
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "n_embd": 32, "dim": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "intermediate_size": 64, "hidden_dim": 64, "d_ff": 64,
    "d_kv": 8, "ffn_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_position_embeddings": 40, "n_positions": 40,
    "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "dropout_rate", "hidden_dropout", "activation_dropout", "feat_proj_dropout", "classifier_dropout",
    "layerdrop", "embedding_dropout", "mlp_dropout", "final_dropout", "seq_classif_dropout",
)  # fmt: skip


def _transformers(kind: str, head: str, **options: Any) -> nn.Module:
    """Build a model of a kind, with a head, and with this package's own configuration made small."""
    import transformers

    config = transformers.AutoConfig.for_model(kind)
    for name, value in ({**SMALL, **dict.fromkeys(DROPOUTS, 0.0)}).items():
        if name in options or (hasattr(config, name) and not isinstance(getattr(config, name), (list, dict))):
            setattr(config, name, options.get(name, value))
    for name, value in options.items():
        setattr(config, name, value)
    config.use_cache = False
    made: nn.Module = getattr(transformers, f"AutoModel{head}").from_config(config)
    return made


class Tagger(nn.Module):
    """Embedding, recurrent layer, and a linear layer at each position."""

    def __init__(self, kind: Callable[..., nn.Module], width: int = 32) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(2 * width, 10)
        self.body = kind(width, width, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.table(x))[0])


class Reused(nn.Module):
    """One layer, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(3):
            h = self.layer(h.tanh())
        return self.last(h)


class Translator(nn.Module):
    """PyTorch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.body = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.table(x), self.table(x.flip(1))))


def _torchvisions() -> dict[str, Model]:
    found: dict[str, Model] = {
        name: (partial(_torchvision, name), images(64))
        for name in ("resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5",
                     "efficientnet_b0", "regnet_y_400mf")
    }  # fmt: skip
    found["mobilenet_v3_small"] = (partial(_torchvision, "mobilenet_v3_small", dropout=0.0), images(64))
    for name, layer in (("group", partial(nn.GroupNorm, 8)), ("instance", partial(nn.InstanceNorm2d, affine=True))):
        found[f"resnet18, {name} norm"] = (partial(_torchvision, "resnet18", norm_layer=layer), images(64))
    small = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    found["VisionTransformer"] = (partial(_torchvision, "VisionTransformer", **small), images(32))
    window: dict[str, Any] = {
        "patch_size": [4, 4],
        "embed_dim": 32,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": [4, 4],
    }
    found["SwinTransformer"] = (
        partial(_torchvision, "SwinTransformer", stochastic_depth_prob=0.0, **window), images(32))  # fmt: skip
    return found


#: Names of timm, with the size of their images. LeViT is none: in evaluation mode it keeps a graph between its calls.
TIMM = {
    "vit_tiny_patch16_224": 64, "deit_tiny_distilled_patch16_224": 64, "mixer_s32_224": 64, "resmlp_12_224": 64,
    "xcit_nano_12_p16_224": 64, "poolformer_s12": 64, "convnextv2_atto": 64, "mobilevit_xxs": 64,
    "ghostnet_100": 64, "repvgg_a0": 64, "eca_nfnet_l0": 64, "skresnet18": 64, "botnet26t_256": 128,
    "hrnet_w18_small": 64,
    "pvt_v2_b0": 64, "mambaout_femto": 64, "eva02_tiny_patch14_224": 56,
}  # fmt: skip
#: These take the size when they are built.
SIZED = {
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "mixer_s32_224", "resmlp_12_224", "xcit_nano_12_p16_224",
    "eva02_tiny_patch14_224", "botnet26t_256",
}  # fmt: skip
#: Kinds of transformers with a head of its automatic classes, and what differs from `SMALL`.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "gpt2": ("ForCausalLM", {}, named),
    "llama": ("ForCausalLM", {}, named),
    "gemma2": ("ForCausalLM", {}, named),
    "gpt_neox": ("ForCausalLM", {}, named),
    "opt": ("ForCausalLM", {}, named),
    "bloom": ("ForCausalLM", {}, named),
    "mamba": ("ForCausalLM", {"state_size": 4, "time_step_rank": 4, "intermediate_size": 64}, tokens),
    "bert": ("ForMaskedLM", {}, named),
    "albert": ("ForMaskedLM", {}, named),
    "distilbert": ("ForSequenceClassification", {}, named),
    "electra": ("ForSequenceClassification", {}, named),
    "deberta-v2": ("ForSequenceClassification", {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 32}, named),
    "modernbert": ("ForSequenceClassification", {}, named),
    "mpnet": ("", {}, named),
    "fnet": ("", {}, tokens),
    "t5": ("ForSeq2SeqLM", {}, both),
    "bart": ("ForSeq2SeqLM", {}, both),
    "segformer": ("ForImageClassification", {
        "hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
        "sr_ratios": [2, 1], "mlp_ratios": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2],
        "decoder_hidden_size": 32, "drop_path_rate": 0.0}, images(32)),
    "wav2vec2": ("ForAudioClassification", {
        "conv_dim": [16, 16], "conv_kernel": [8, 4], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
        "apply_spec_augment": False}, lambda batch: torch.randn(batch, 400)),
}  # fmt: skip

MODELS: dict[str, Model] = {
    "torch LSTM": (partial(Tagger, nn.LSTM), tokens),
    "torch GRU": (partial(Tagger, nn.GRU), tokens),
    "torch Transformer": (Translator, tokens),
    "torch linear layer used three times": (Reused, lambda batch: torch.randn(batch, 16)),
    **{
        f"transformers {kind}": (partial(_transformers, kind, head, **options), inputs)
        for kind, (head, options, inputs) in TRANSFORMERS.items()
    },
    **{f"torchvision {name}": model for name, model in _torchvisions().items()},
    **{
        f"timm {name}": (partial(_timm, name, **({"img_size": size} if name in SIZED else {})), images(size))
        for name, size in TIMM.items()
    },
}
