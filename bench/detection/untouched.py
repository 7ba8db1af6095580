"""One test on a network and data that no choice was made on, by a protocol that was committed before it was run.

    python -m bench.detection.untouched --data DIR --cache CACHE

``PROTOCOL`` says all that is chosen; the page gives its digest. The detector, the risk and the error rate are the
package's defaults, as they are at the commit that holds the protocol. It is run once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.detection import cases, error_rate, methods_images, methods_outputs, resampled, runner  # noqa: F401
from bench.detection.architectures import residual_network
from bench.detection.cache import digest
from bench.detection.data import sets
from bench.detection.experiment import CASES, SMALL, Experiment, Fit, Options
from bench.detection.failure import judged
from bench.detection.methods_ours import fitted
from bench.detection.networks import _RESNETS, Published
from bench.detection.registry import METHODS, case
from bench.report import pages
from fastgrad.blocks import DEFAULT_BLOCKS

PROTOCOL: dict[str, Any] = {
    "network": "ResNet-32 on CIFAR-10, published weights of Idelbayev (2018)",
    "weights": "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
    "data": "test images of CIFAR-10; Omniglot and Fashion-MNIST, grey, enlarged to 32 pixels and compressed once",
    "fit": [2000, 2800], "test": [3000, 3400], "images of a case": 60, "first image of other sets": 300,
    "seed": 5,
    "cases": ["corruptions like generated ones", "corruptions unlike generated ones", "attacks", "attacks after JPEG",
              "near sets", "far sets"],
    "left out": ["C&W", "DeepFool"],
    "detection": "AUROC of clean test inputs against each case, mean of each group; attacks that changed the answer",
    "methods": ["softmax", "entropy", "energy", "GEN", "KNN", "ViM", "Mahalanobis", "fastgrad, default"],
    "failure": "AUROC of wrong against right answers among clean inputs and all cases: risk, softmax, entropy",
    "error rate": "streams as in error-rate: share in the interval and its width by group; mean absolute errors",
    "runs": 1,
}  # fmt: skip
DIGEST = digest(PROTOCOL)
#: Sets that no table has as a case.
NEW = {"characters": "omniglot-28", "clothes": "fashion-mnist"}
WEIGHTS = Published(
    f"{_RESNETS}/pretrained_models/resnet32-d509ac18.th", PROTOCOL["weights"],
    partial(residual_network, width=16, blocks=5, stride=1, padded=True,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    {"module.conv1.": "stem.0.", "module.bn1.": "stem.1.", "module.layer1.": "stages.0.",
     "module.layer2.": "stages.1.", "module.layer3.": "stages.2.", "module.linear.": "fc."},
)  # fmt: skip


def experiment(options: Options) -> Experiment:
    """Return the network with its images; the two new sets become cases of this process."""
    for name, file in NEW.items():
        sets.SETS = {**sets.SETS, name: (file,)}
        case(name, "far sets", (SMALL,))(partial(cases.other, name))
    model = WEIGHTS.load(options.cache / "resnet32-cifar10.pth.tar")
    model = model.requires_grad_(False).to(memory_format=torch.channels_last)
    parts = {
        part: sets.load(options.data, "cifar10", "test", last - first, first).labelled()
        for part, (first, last) in ((part, PROTOCOL[part]) for part in ("fit", "test"))
    }
    count = PROTOCOL["images of a case"]
    draw = PROTOCOL["first image of other sets"] // count
    return Experiment("untouched", draw, model, parts, options, SMALL, count, [model.stem, *model.stages])


def measure(*, data: Path, cache: Path) -> Iterator[dict[str, Any]]:
    own = experiment(Options(data, cache))
    names = [
        name for name, one in CASES.items()
        if SMALL in one.kinds and one.group in PROTOCOL["cases"] and not name.startswith(tuple(PROTOCOL["left out"]))
    ]  # fmt: skip
    for method in PROTOCOL["methods"]:
        scores, absent = runner.measure(own, METHODS[method], names)
        for name in names:
            head = {"kind": "detection", "method": method, "group": CASES[name].group, "case": name}
            if why := absent.get(name) or absent.get("clean"):
                yield head | {"not run": why}
            else:
                auroc = resampled.auroc(scores["clean"], scores[name])[0]
                yield head | {"auroc": round(float(auroc), 4), "inputs": len(scores[name])}
    two_stage = fitted(Fit(own), DEFAULT_BLOCKS)
    present = ["clean"]
    for name in names:
        try:
            present.append(name) if len(own.seen(name).images) else None
        except runner.ABSENT:
            continue
    every = error_rate.joined([error_rate.answers(own, name, two_stage) for name in present])
    confidence = error_rate.softmax(every.logits)
    entropy = -(confidence * np.log(np.maximum(confidence, 1e-30))).sum(1)
    for what, values in (("risk", every.risk), ("softmax", 1 - confidence.max(1)), ("entropy", entropy)):
        sources = np.concatenate([judged(own, name).source for name in present])
        auroc = resampled.grouped_auroc(values, every.wrong, sources)[0]
        yield {"kind": "failure", "method": what, "auroc": round(float(auroc), 4), "inputs": len(values)}
    for row in error_rate.measure(own):
        yield {"kind": "error rate", **row}
    right = len(own.right["test"]) / len(own.parts["test"][1])
    yield {"kind": "about", "accuracy": round(right, 4)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    pages.command(
        "untouched", __doc__, measure, packages=("torch", "numpy", "scikit-learn", "foolbox", "pytorch-ood"),
        facts={"protocol": PROTOCOL, "digest": DIGEST},
        data={"type": Path, "required": True, "help": "folder with the .npz files"},
        cache={"type": Path, "default": Path("detection-cache"), "help": "weights, images, scores"},
    )  # fmt: skip
