"""Compare the answers of a new file with those of the live module, before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastgrad.deploy.file.package import ModelPackage, PackageError

#: Units of rounding by which an input is moved, to represent the rounding of all layers.
_UNITS = 100
#: Relative rounding of a convolution's operands on a GPU under PyTorch's default settings.
_TF32 = 2.0**-11


@torch.no_grad()
def compare(
    path: Path, answers: Callable[[Tensor], tuple[Tensor, ...]], example_input: Tensor, tolerance: float, unit: float
) -> None:
    """Raise RuntimeError if the file's answers differ from those of the live module, which ``answers`` computes.

    The inputs are compared in one batch, and the first three and one alone. An input of NaN must not pass for reliable;
    it is skipped for a network that looks its input up in a table, such as a table of words.

    A difference above ``tolerance`` passes if rounding explains it: the live module's own answer moves as far if each
    number of its input moves by rounding, which the detector of an untrained network magnifies. ``unit`` is the
    relative rounding of the network's coarsest dtype.
    """
    try:
        package = ModelPackage(path)
    except PackageError as error:
        hint = "; export to .pt2" if path.suffix == ".onnx" else ""
        raise RuntimeError(f"the file cannot be run: {error.__cause__ or error}{hint}") from error
    example_input = example_input[: package.description.max_batch]
    three = example_input[torch.arange(3, device="cpu") % len(example_input)]
    unknown = torch.full_like(three[:1], torch.nan)
    for x in (example_input, three[:1], three[: package.description.max_batch], unknown):
        try:
            expected = answers(x)
        except (IndexError, ValueError) as error:
            # A detector that was fitted on integers names the floats first, and the table's error as the cause.
            if x is unknown and IndexError in (type(error), type(error.__cause__)):
                continue
            raise
        given = package._outputs(x).items()
        worst = {name: difference(ours, live) for (name, ours), live in zip(given, expected, strict=True)}
        if max(worst.values()) <= tolerance:
            continue
        moved = [answers(y) for y in _moved(x, unit)]
        for i, (name, gap) in enumerate(worst.items()):
            if gap <= max(tolerance, *(difference(other[i], expected[i]) for other in moved)):
                continue
            raise RuntimeError(
                f"the file's {name} differ from the live module's by {gap:.2g}, relative, in a batch of {len(x)} "
                f"like example_input, and more than rounding explains; at most {tolerance:g} is allowed (tolerance). "
                "Give real inputs as example_input, or allow more"
            )


def _moved(x: Tensor, unit: float) -> Iterator[Tensor]:
    """Yield two copies of the inputs in which each number is moved at random by at most `_UNITS` units of rounding."""
    step = _UNITS * max(unit, _TF32 if x.is_cuda else 0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        yield x + x.abs() * step * (2 * torch.rand(x.shape, generator=generator, device="cpu") - 1).to(x)


def difference(ours: Tensor, live: Tensor) -> float:
    """Return the largest difference, relative to the live value's size or 1; infinite if only one is finite."""
    ours, live = ours.double().cpu(), live.double().cpu()
    relative = (ours - live).abs() / live.abs().clamp(min=1)
    # Equal infinities and NaN in the same place are no difference.
    same = (ours == live) | (ours.isnan() & live.isnan())
    return float(torch.where(same, 0.0, relative.nan_to_num(nan=torch.inf)).max())
