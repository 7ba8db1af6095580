"""``fastgrad fit MODULE:FUNCTION FOLDER -o model.onnx``: from clean images to a file for ``fastgrad serve``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fastgrad
from fastgrad import checks
from fastgrad.deploy.file.export import check_target
from fastgrad.deploy.file.images import ImageError, decode_pixels

#: Mean and standard deviation of ImageNet's pixels, with which most published networks were trained.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("network", help="MODULE:FUNCTION, a function without arguments that returns the network")
    parser.add_argument("folder", type=Path, help="clean images that did not train it, a folder for each class")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write (.onnx or .pt2)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the network's input (224)")
    parser.add_argument("--mean", type=float, nargs="+", default=_MEAN, help="mean of each channel (ImageNet's)")
    parser.add_argument("--std", type=float, nargs="+", default=_STD, help="deviation of each channel (ImageNet's)")
    parser.add_argument("--max-samples", type=int, default=2000, help="most images to fit on (2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (0)")


def load_network(name: str) -> nn.Module:
    """Return the network of ``MODULE:FUNCTION``, in evaluation mode; modules of this folder come first."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"network must be MODULE:FUNCTION; it was {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        network = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"network must name a function that can be imported; {name!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    checks.is_a(nn.Module, network=network)
    return network.eval()  # type: ignore[no-any-return]


def read_folder(folder: Path, shape: tuple[int, int, int], most: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return pixels ``(n, C, H, W)`` in [0, 1] as the server reads them, classes ``(n,)`` and the classes' names.

    As with torchvision's ``ImageFolder``, classes are numbered by the sorted names of their folders.
    """
    labels = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = [
        (path, k) for k, name in enumerate(labels) for path in sorted((folder / name).rglob("*")) if path.is_file()
    ]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed), device="cpu")[:most]
    images, classes = [], []
    for path, k in (files[i] for i in order.tolist()):
        try:
            images.append(torch.from_numpy(decode_pixels(path.read_bytes(), shape)))
        except ImageError as error:
            print(f"fastgrad fit: {path} is left out: {error}", file=sys.stderr)
            continue
        classes.append(k)
    if not images:
        raise ValueError(f"folder must hold a folder of images for each class; {folder} has none")
    return torch.stack(images).float() / 255, torch.tensor(classes, device="cpu"), labels


def run(arguments: argparse.Namespace) -> int:
    """Fit, report and export; return the exit status."""
    checks.at_least(1, size=arguments.size, max_samples=arguments.max_samples)
    checks.is_seed(arguments.seed)
    target = check_target(arguments.out)
    network = load_network(arguments.network)
    shape = (len(arguments.mean), arguments.size, arguments.size)
    pixels, classes, labels = read_folder(arguments.folder, shape, arguments.max_samples, arguments.seed)
    mean, std = (torch.tensor(values, device="cpu").view(-1, 1, 1) for values in (arguments.mean, arguments.std))
    images = (pixels - mean) / std
    try:
        with torch.no_grad():
            outputs = network(images[:1]).shape[-1]
    except RuntimeError as error:
        raise ValueError(
            f"network must take images (1, {', '.join(map(str, shape))}), as --size and --mean give; it raised: {error}"
        ) from error
    if outputs != len(labels):
        raise ValueError(f"folder must hold one folder for each of the {outputs} classes; it holds {len(labels)}")
    two_stage = fastgrad.TwoStageModel(network, seed=arguments.seed)
    two_stage.fit(images, classes, mean=arguments.mean, std=arguments.std)
    print(two_stage.report())
    print(f"threshold {two_stage.threshold(0.05):.2f}: about 5 % of clean inputs are flagged")
    print(f"written; to serve it: fastgrad serve {fastgrad.export(two_stage, images[:8], target, labels=labels)}")
    return 0
