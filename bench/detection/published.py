"""Networks of CIFAR-10 with published weights: known by their digests, so that everyone has the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch

from bench.detection.architectures import Classifier, dense_network, residual_network
from bench.detection.registry import NotRun


class Published(NamedTuple):
    """Weights: where a file of them is, its SHA-256, the untrained network, its own names' beginnings by the file's."""

    url: str
    digest: str
    make: Callable[[], Classifier]
    places: Mapping[str, str]

    def load(self, path: Path) -> Classifier:
        """Return the network in evaluation mode, its weights kept in ``path``."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(self.url, str(path), progress=False)
            except OSError as why:
                raise NotRun(f"its weights are not in {path} and cannot be downloaded from {self.url} ({why})") from why
        if (found := sha256(path.read_bytes()).hexdigest()) != self.digest:
            raise ValueError(f"{path} must have the SHA-256 {self.digest}; it has {found}. Delete it")
        model = self.make()
        weights = model.state_dict()
        for name, value in torch.load(path, map_location="cpu", weights_only=True)["state_dict"].items():
            head, rest = next((head, name[len(head) :]) for head in self.places if name.startswith(head))
            weights[self.places[head] + rest] = value
        model.load_state_dict(weights)
        return model.eval()


_DICE = "https://github.com/deeplearning-wisc/dice/raw/8acfb8d52eee997a7bf6f9d17ff5363fd91ba47b/checkpoints/CIFAR-10"
_RESNETS = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/d5489e8995e81e91ce6b1d69dcc98ad579b0b153"
PUBLISHED: Mapping[str, Published] = {
    # "DICE" (Sun and Li, ECCV 2022).
    "densenet": Published(
        f"{_DICE}/densenet/checkpoint_100.pth.tar",
        "deaefd082911a1c6c92aacdcfecf03c71b932acc5c08b779c85c44eccdc0c817",
        dense_network,
        {"conv1.": "stem.", "block1.layer.": "stages.0.0.", "trans1.": "stages.0.1.", "block2.layer.": "stages.1.0.",
         "trans2.": "stages.1.1.", "block3.layer.": "stages.2.0.", "bn1.": "stages.2.1.", "fc.": "fc."},
    ),
    # Idelbayev, "Proper ResNet implementation for CIFAR10/CIFAR100 in PyTorch" (2018).
    "resnet56": Published(
        f"{_RESNETS}/pretrained_models/resnet56-4bfd9763.th",
        "4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
        partial(
            residual_network, width=16, blocks=9, stride=1, padded=True,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        ),
        {"module.conv1.": "stem.0.", "module.bn1.": "stem.1.", "module.layer1.": "stages.0.",
         "module.layer2.": "stages.1.", "module.layer3.": "stages.2.", "module.linear.": "fc."},
    ),
}  # fmt: skip
