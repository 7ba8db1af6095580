"""Inner products of per-sample gradients: the matrix of a batch, and products with one vector.

Every implementation computes the ``(B, B)`` matrix of the same loss; the training step is the yardstick. The first and
the last row are compared with products of single samples' float64 gradients; errors are relative to the product of the
two norms. TorchJD's autogram refuses batch norm and recurrent layers unless it goes back once per sample.

The networks are those of TorchJD's own benchmark, from torchvision, at 32 or 64 pixels, and ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastgrad
from bench.micro import layer_peers
from bench.micro import network_peers as peers
from bench.micro.models import NETWORKS, Network, images, zoo
from bench.micro.tasks import LABELS, UNIT, Task, flat
from bench.registry import Implementation, case

#: Errors allowed, relative to the product of two norms: the forward pass alone rounds instance norms of four pixels
#: by 1e-4.
ALLOWED = 1e-3
#: Bytes of gradients that a peer may hold.
MEMORY = 3 << 30
OF_LAYERS = {"dattri-llm": layer_peers.dattri_gram, "bergson": layer_peers.bergson_gram}
one = partial(Implementation, graph=False)


class Encoder(nn.Module):
    """A transformer's encoder over vectors, ``(B, T, 64)`` to ``(B, 10)``."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


def _vectors(batch: int, made: torch.Generator) -> Tensor:
    return torch.randn(batch, 32, 64, generator=made)


MODELS: dict[str, Network] = {
    **NETWORKS,
    "ResNet-18 instance norm 64x64": (
        partial(zoo, "resnet18", norm_layer=partial(nn.InstanceNorm2d, affine=True)), images(64)),
    "MobileNetV3 group norm 64x64": (
        partial(zoo, "mobilenet_v3_small", norm_layer=partial(nn.GroupNorm, 1)), images(64)),
    "AlexNet 64x64": (partial(zoo, "alexnet"), images(64)),
    "SqueezeNet 64x64": (partial(zoo, "squeezenet1_1"), images(64)),
    "transformer T=32": (Encoder, _vectors),
}  # fmt: skip


class GramTask(Task):
    """The same network with a label for every sample."""

    def exact(self, names: Container[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return float64 products of each sample's gradient with the first's, the last's and the sum, and norms.

        ``(3, B)``, the norms of these three and the norms ``(B,)``, of the gradients of these parameters.
        """
        double = self.double()
        kept = [name in names for name, _ in double.model.named_parameters()]

        def dot(g: list[Tensor], h: list[Tensor]) -> Tensor:
            return torch.stack([(a * b).sum() for a, b, own in zip(g, h, kept, strict=True) if own]).sum()

        parameters = list(double.model.parameters())
        total = list(torch.autograd.grad(double.loss(double.model(double.x)), parameters, materialize_grads=True))
        sides = [double.gradient(0), double.gradient(len(self.x) - 1), total]
        found = []
        for i in range(len(self.x)):
            g = double.gradient(i)
            found.append(torch.stack([*(dot(side, g) for side in sides), dot(g, g)]))
        *products, squares = torch.stack(found, 1)
        return torch.stack(products), torch.stack([dot(side, side) for side in sides]).sqrt(), squares.sqrt()

    @cached_property
    def _whole(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.exact(dict(self.model.named_parameters()))

    @staticmethod
    def _far(found: Tensor, exact: tuple[Tensor, Tensor, Tensor], sides: slice) -> float:
        products, scale, norms = exact
        error = (found.double() - products[sides]).abs() / (scale[sides, None] * norms)
        return float(error.max()) if bool(torch.isfinite(error).all()) else float("inf")

    def gram_error(self, gram: Tensor) -> float:
        return self._far(gram[[0, -1]], self._whole, slice(0, 2))

    def vector_error(self, products: Tensor) -> float:
        return self._far(products[None], self._whole, slice(2, 3))

    def layers_error(self, found: layer_peers.OfLayers) -> float:
        return self._far(found.value[[0, -1]], self.exact(layer_peers.owned(self.model, found.layers)), slice(0, 2))


def ours(task: GramTask) -> Callable[[], Tensor]:
    parameters = list(task.model.parameters())

    def call() -> Tensor:
        with fastgrad.record(task.model):
            return fastgrad.grad_gram(task.loss(task.model(task.x)), parameters)

    return call


def squares(task: GramTask) -> Callable[[], Tensor]:
    parameters = list(task.model.parameters())

    def call() -> Tensor:
        with fastgrad.record(task.model):
            return fastgrad.grad_square_sum(task.loss(task.model(task.x)), parameters)[-1]

    return call


def autogram(task: GramTask) -> Callable[[], Tensor]:
    from torchjd.autogram import Engine

    model = copy.deepcopy(task.model)  # its hooks stay
    engine = Engine(model, batch_dim=0)
    return lambda: engine.compute_gramian(task.losses(model(task.x), task.y))


def vmapped(task: GramTask) -> Callable[[], Tensor]:
    """Compute all gradients by vmap(grad), and their products."""
    each = torch.func.vmap(peers.of_sample(task), randomness="different")
    return peers.batching(lambda: sum(g.flatten(1) @ g.flatten(1).mT for g in each(task.x, task.y)))


def loop(task: GramTask) -> Callable[[], Tensor]:
    parameters = list(task.model.parameters())

    def call() -> Tensor:
        losses = task.losses(task.model(task.x), task.y)
        backward = partial(torch.autograd.grad, inputs=parameters, retain_graph=True, materialize_grads=True)
        found = torch.stack([flat(backward(loss)) for loss in losses])
        return found @ found.mT

    return call


def tangent(task: GramTask) -> Callable[[], Tensor]:
    """Compute products with the summed gradient, which is known, by one forward pass with a tangent."""
    parameters, buffers = peers.state(task.model)

    def losses(values: dict[str, Tensor]) -> Tensor:
        return task.losses(functional_call(task.model, (values, buffers), (task.x,)), task.y)

    total = torch.func.grad(lambda values: losses(values).sum())(parameters)
    return peers.batching(lambda: torch.func.jvp(losses, (parameters,), (total,))[1])


@case(
    "gram", "{0} B={1}", against="training step",
    names=("fastgrad", "training step", "TorchJD autogram", "vmap(grad)", "per-sample loop",
           "products with one sum, jvp", "sums of squares, fastgrad", *OF_LAYERS),
    tiny=[("plain CNN 8x8", 3)],
    quick=[(name, 16) for name in MODELS if name.split()[0] in ("AlexNet", "MobileNetV3", "SqueezeNet", "transformer")
           or name in ("ResNet-18 32x32", "ResNet-18 instance norm 64x64", "GPT T=128")],
    full=[(name, batch) for batch in (16, 64) for name in (
        "ResNet-18 instance norm 64x64", "MobileNetV3 group norm 64x64", "AlexNet 64x64", "SqueezeNet 64x64",
        "transformer T=32", "ResNet-18 32x32", "GPT T=128")],
)  # fmt: skip
def gram(name: str, batch: int, device: str) -> Iterator[Implementation]:
    """The matrix of a batch; products with one summed gradient and sums of squares are for comparison."""
    task = GramTask(MODELS[name], batch, device, LABELS)
    yield one("fastgrad", partial(ours, task), task.gram_error, ALLOWED)
    yield one("training step", partial(peers.step, task), lambda found: 0.0, UNIT)
    yield one("TorchJD autogram", partial(autogram, task), task.gram_error, ALLOWED)
    if batch * sum(p.nbytes for p in task.model.parameters()) <= MEMORY:
        yield one("vmap(grad)", partial(vmapped, task), task.gram_error, ALLOWED)
        yield one("per-sample loop", partial(loop, task), task.gram_error, ALLOWED)
    yield one("products with one sum, jvp", partial(tangent, task), task.vector_error, ALLOWED)
    yield one("sums of squares, fastgrad", partial(squares, task), lambda found: 0.0, UNIT)
    for peer, prepare in OF_LAYERS.items():
        yield one(peer, partial(prepare, task), task.layers_error, ALLOWED, covered=partial(layer_peers.covered, task))


@case(
    "gram-growth", "{0} B={1}", against="training step", names=("fastgrad", "training step"),
    tiny=[("plain CNN 8x8", 3)],
    quick=[("plain CNN 32x32", batch) for batch in (16, 64, 256)] + [("transformer T=32", batch) for batch in (16, 64)],
    full=[(name, batch) for name in ("plain CNN 32x32", "transformer T=32") for batch in (16, 64, 128, 256, 512)],
)  # fmt: skip
def growth(name: str, batch: int, device: str) -> Iterator[Implementation]:
    """How the cost grows with the batch."""
    task = GramTask(MODELS[name], batch, device, LABELS)
    yield one("fastgrad", partial(ours, task), task.gram_error, ALLOWED)
    yield one("training step", partial(peers.step, task), lambda found: 0.0, UNIT)
