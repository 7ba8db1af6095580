"""What blocks need to know about a network and its inputs, learned by watching it run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from fastgrad._torch import DispatchMode, original, pytree
from fastgrad.batches import batch_size, class_logits, refuse_probabilities, take
from fastgrad.blocks import channels
from fastgrad.blocks.channels import Channels
from fastgrad.evaluation import Evaluated, Hook, RandomState, agree, buffers_kept

#: Why blocks of the input image cannot be served.
NO_IMAGE = "the input is not one image (B, C, H, W), at least 3 x 3"
#: Writing one value costs about as much as this many operations of a matrix product.
_WRITE = 16


@dataclass(frozen=True)
class Subject:
    """A network and the kind of input it gets."""

    classes: int  # N
    head: str | None  # the linear layer that returned the logits, from an input with one row (B, D) per sample
    bias: bool  # whether that layer has a bias
    channels: tuple[Channels, ...]  # where channels are read, in the order of the forward pass
    image: int | str | None  # index or keyword of the one image tensor (B, C, H, W); None for none or several
    mask: str | None  # keyword of the input that marks the positions of a text (B, T)
    first: str | None = None  # the module that returns the first normalised, or else convolved, maps (B, C, H, W)
    dims: int | None = None  # dimensions of the inputs, if they are one tensor
    dtype: str | None = None  # and its dtype

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Subject:
        """Return the subject that `dataclasses.asdict` stored."""
        return cls(**{**stored, "channels": tuple(Channels(**place) for place in stored["channels"])})

    def mismatch(self, x: object) -> str | None:
        """Return words about one tensor of inputs that is not of the kind that was watched, or None."""
        if self.dims is None or not isinstance(x, Tensor) or (x.dim(), str(x.dtype)) == (self.dims, self.dtype):
            return None
        hint = ": a single input is x[None]" if x.dim() == self.dims - 1 else ""
        return (
            f"x must be a batch like those of fit, with {self.dims} dimensions and {self.dtype}; it was of shape "
            f"{tuple(x.shape)} and {x.dtype}{hint}"
        )


class _Watch(DispatchMode):
    """One forward pass: outputs of modules, operations of products and of writing, and the coarsest precision."""

    def __init__(self, network: Evaluated, args: Any, kwargs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, nn.Module, Any, Tensor]] = []
        self.operations = self.precision = 0.0
        hooks = [
            (module, self._hook(path, module))
            for path, module in network.model.named_modules()
            if path and (channels.is_normalization(module) or isinstance(module, channels.LAYERS))
        ]
        with self:
            self.logits = class_logits(network.run(args, kwargs, hooks))

    def _hook(self, path: str, module: nn.Module) -> Hook:
        def leave(inputs: tuple[Any, ...], output: Any) -> None:
            value = channels.output_of(output)
            if value is not None and value.is_floating_point():
                self.seen.append((path, module, inputs, value))

        return leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.operations += _WRITE * tensor.numel()
                if tensor.is_floating_point():
                    # Dynamic quantization to eight bits returns the dtype of its input, which hides its precision.
                    quantized = 2**-8 if func.namespace == "quantized" else 0.0
                    self.precision = max(self.precision, quantized, torch.finfo(tensor.dtype).eps)
        return out


def unlike_inputs(x: object) -> str | None:
    """Return what may be wrong with a batch on which a network fails, in words, or None."""
    if not isinstance(x, Tensor):
        return None
    if not x.is_floating_point() and x.dim() >= 3:
        return f"images of a floating dtype, as the network was trained on, such as x.float() / 255; it gave {x.dtype}"
    if x.dim() == 3:
        own = tuple(x.shape[1:])
        return (
            f"batches (B, ...) of inputs; dimension 0 left inputs of shape {own}: a batch of one input is x[None], "
            "grey images (B, H, W) become (B, 1, H, W) by x[:, None]"
        )
    return None


def is_image(value: object) -> bool:
    """Whether ``value`` is a batch of images ``(B, C, H, W)`` whose pixels have neighbours."""
    if not (isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()):
        return False
    return min(value.shape[2:]) >= 3 and value.shape[1] > 0


def watch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Subject:
    """Run ``model`` on three samples and on two, and return what blocks can read of it; it is left as it was.

    ``args`` and ``kwargs`` hold at least one sample. ValueError if the model does not return logits ``(B, N)``, returns
    probabilities instead, or mixes samples.
    """
    network, samples = Evaluated(original(model)), batch_size(args, kwargs)
    places, before = torch.arange(3, device="cpu") % samples, RandomState(network.model.modules())
    try:
        with buffers_kept(network.model):
            three, two = (_Watch(network, *take((args, kwargs), places[:count], samples)) for count in (3, 2))
        drew = not before.same()
    finally:
        before.restore()
    logits = three.logits
    refuse_probabilities(logits)
    # A model that draws random numbers cannot be compared: two samples get other numbers than three.
    if not drew and not agree(two.logits, logits[:2], three.precision):
        raise ValueError(
            "model must treat the samples of a batch independently; its logits of a sample change with other samples"
        )
    path, head = next(
        (
            (path, module)
            for path, module, inputs, value in reversed(three.seen)
            if isinstance(module, nn.Linear)
            and inputs
            and inputs[0].dim() == 2
            and value.shape == logits.shape
            and torch.equal(value.to(logits.dtype), logits)
        ),
        (None, None),
    )
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    images = [place for place, value in given if is_image(value)]
    alone = len(given) == 1 and isinstance(given[0][1], Tensor)
    found = _places(three, two, path)
    # The first maps of at least 3 x 3; normalised ones, which have one scale, come before others.
    maps = [
        (not channels.is_normalization(module), place.path)
        for module, place, value in found
        if place.dim == 1 and value.dim() == 3 and min(value.shape[1:]) >= 3
    ]
    mask = kwargs.get("attention_mask")
    return Subject(
        classes=logits.shape[1],
        head=path,
        bias=getattr(head, "bias", None) is not None,
        channels=channels.choose(found, three.operations / 3),
        image=images[0] if len(images) == 1 else None,
        mask="attention_mask" if isinstance(mask, Tensor) and mask.dim() == 2 else None,
        first=min(maps, key=lambda seen: seen[0], default=(True, None))[1],
        dims=given[0][1].dim() if alone else None,
        dtype=str(given[0][1].dtype) if alone else None,
    )


def _places(three: _Watch, two: _Watch, head: str | None) -> list[tuple[nn.Module, Channels, Tensor]]:
    """Return the places called once with a row per sample, with one sample's output, except the layer of the logits."""
    calls = [path for path, *_ in three.seen]
    fewer = {path: value for path, _, _, value in two.seen}
    found = []
    for path, module, _, value in three.seen:
        dim = channels.channel_dim(module, tuple(value.shape))
        alone = calls.count(path) == 1 and path != head and path in fewer
        if dim is None or not alone or value.shape[0] != 3 or fewer[path].shape[0] != 2:
            continue
        found.append((module, Channels(path, dim, value.shape[dim]), value[0]))
    return found
