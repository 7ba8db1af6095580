"""What a detector reads of an input, one file a block.

| block                 | reads                  | price (forward passes) | content                                |
|-----------------------|------------------------|------------------------|----------------------------------------|
| `logits`              | logits                 | 0                      | the network's answer                   |
| `features`            | h                      | 0                      | what enters the last linear layer      |
| `contrasts`           | h, logits              | 0                      | last-layer gradient norms, all classes |
| `activations`         | normalisation layers   | 0                      | mean squares of channels               |
| `image`               | input                  | 0                      | local statistics of the image          |
| `roughness`           | first maps             | 0                      | local contrast as the network sees it  |
| `bias_gradients`      | one backward pass      | up to 1.3              | signed gradients of biases             |
| `view`                | input                  | 1                      | change of the answer under a zoom      |
| `normalization_norms` | three backward passes  | about 5                | gradient norms of normalisation layers |
| `gradients`           | three backward passes  | about 8                | gradient norms of every parameter      |
| `ranked`              | ten backward passes    | about 25               | contrasts through the whole network    |

`activations`, `bias_gradients` and `normalization_norms` read layers; of networks that do little work for each number
that they write, as those for mobile devices, the last layers alone: reading stays cheap beside the forward pass.
"""

from __future__ import annotations

from fastgrad.blocks.activations import Activations
from fastgrad.blocks.bias_gradients import BiasGradients
from fastgrad.blocks.block import Block
from fastgrad.blocks.contrasts import Contrasts
from fastgrad.blocks.features import Features
from fastgrad.blocks.gradients import Gradients
from fastgrad.blocks.image import Image
from fastgrad.blocks.logits import Logits
from fastgrad.blocks.normalization_norms import NormalizationNorms
from fastgrad.blocks.ranked import Ranked
from fastgrad.blocks.roughness import Roughness
from fastgrad.blocks.view import View

#: Every block by name, in the order in which detectors take them up.
BLOCKS: dict[str, type[Block]] = {
    block.name: block
    for block in (
        Gradients,
        Contrasts,
        Ranked,
        Logits,
        Features,
        Image,
        Roughness,
        Activations,
        BiasGradients,
        NormalizationNorms,
        View,
    )
}

__all__ = [
    "BLOCKS",
    "Activations",
    "BiasGradients",
    "Block",
    "Contrasts",
    "Features",
    "Gradients",
    "Image",
    "Logits",
    "NormalizationNorms",
    "Ranked",
    "Roughness",
    "View",
]
