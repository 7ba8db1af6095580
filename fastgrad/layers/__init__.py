"""Layer rules: they compute per-sample squared norms of parameters from a layer's input and output gradient.

Classes of other libraries are given by name, so that these need not be installed. A subclass takes the rule of its
nearest base class here unless it overrides ``forward``. Layers without a rule take the fallback, as exact but slower.
"""

from __future__ import annotations

from torch import nn

from fastgrad._torch import BatchNorm, InstanceNorm
from fastgrad.layers import norm
from fastgrad.layers.attention import ATTENTION
from fastgrad.layers.conv import CONVOLUTION, SAME_CONVOLUTION, STORED_CONVOLUTION
from fastgrad.layers.linear import EMBEDDING, LINEAR
from fastgrad.layers.recurrent import RECURRENT
from fastgrad.layers.registry import RULES, LayerRule, ReplayRule, find_rule, register_rule

RULES.update(
    {
        nn.Linear: LINEAR,
        "transformers.pytorch_utils.Conv1D": LINEAR,
        "timm.layers.conv2d_same.Conv2dSame": SAME_CONVOLUTION,
        "efficientnet_pytorch.utils.Conv2dDynamicSamePadding": SAME_CONVOLUTION,
        "efficientnet_pytorch.utils.Conv2dStaticSamePadding": STORED_CONVOLUTION,
        "efficientnet_lite_pytorch.utils.Conv2dDynamicSamePadding": SAME_CONVOLUTION,
        "efficientnet_lite_pytorch.utils.Conv2dStaticSamePadding": STORED_CONVOLUTION,
        nn.Embedding: EMBEDDING,
        nn.PReLU: norm.PRELU,
        # The base class of BatchNorm1d to 3d; synchronised batch norm has a forward of its own.
        BatchNorm: norm.BATCH_NORM,
        nn.SyncBatchNorm: norm.BATCH_NORM,
        InstanceNorm: norm.INSTANCE_NORM,
        nn.GroupNorm: norm.GROUP_NORM,
        nn.LayerNorm: norm.LAYER_NORM,
        "timm.layers.norm.LayerNorm": norm.LAYER_NORM,
        "timm.layers.norm.LayerNorm2d": norm.LAYER_NORM_2D,
        "torchvision.models.convnext.LayerNorm2d": norm.LAYER_NORM_2D,
        nn.RMSNorm: norm.RMS_NORM,
        "transformers.models.llama.modeling_llama.LlamaRMSNorm": norm.RMS_NORM_OF_TRANSFORMERS,
        "transformers.models.mistral.modeling_mistral.MistralRMSNorm": norm.RMS_NORM_OF_TRANSFORMERS,
        "transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm": norm.RMS_NORM_OF_TRANSFORMERS,
        "transformers.models.t5.modeling_t5.T5LayerNorm": norm.RMS_NORM_OF_TRANSFORMERS,
        nn.MultiheadAttention: ATTENTION,
    }
)
RULES.update(dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), CONVOLUTION))
RULES.update(dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), CONVOLUTION))
RULES.update(dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), RECURRENT))

__all__ = ["RULES", "LayerRule", "ReplayRule", "find_rule", "register_rule"]
