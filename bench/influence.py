"""Rows of grad_project beside exact inner products: error, bias, time, a store of many rows, and leaving samples out.

    python -m bench.influence

The leave-some-out check is the linear datamodeling score (Park et al., 2023): networks are trained on random halves of
the training samples, and a method's sums of scores over each half are rank-correlated with the losses of the test
samples.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastgrad
from bench.report import pages

SIZES = (1000, 4096, 16384, 50000)
SEEDS, SUBSETS, REPEATS = 50, 24, 9
STORED, QUERIES, WIDTH = 100_000, 100, 1024
TRAIN, TEST = 400, 60


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Embedding(256, 128), nn.TransformerEncoder(layer, 5, enable_nested_tensor=False), nn.Linear(128, 256)
    )


def projections() -> Iterator[dict[str, Any]]:
    """Compare estimates with exact products on an encoder of a million parameters."""
    torch.manual_seed(0)
    model = encoder().eval()
    x, y = torch.randint(256, (2, 16, 32)).unbind()
    parameters = list(model.parameters())

    def losses() -> Tensor:
        return cross_entropy(model(x).mT, y, reduction="none").sum(1)

    def rows(size: int, seed: int = 0) -> Tensor:
        with fastgrad.record(model):
            return fastgrad.grad_project(losses(), parameters, size, seed=seed)

    with fastgrad.record(model):
        exact = fastgrad.grad_gram(losses(), parameters).double()
    scale = (exact.diagonal()[:, None] * exact.diagonal()).sqrt()
    pairs = torch.ones_like(exact).triu(1).bool()
    for size in SIZES:
        step, own = [], []
        for _ in range(REPEATS):  # one after the other, so that load meets both
            for times, call in (
                (step, lambda: torch.autograd.grad(losses().sum(), parameters)), (own, partial(rows, size)),
            ):  # fmt: skip
                begin = time.process_time()
                call()
                times.append(time.process_time() - begin)
        found = torch.stack([(made := rows(size, seed).double()) @ made.mT for seed in range(SEEDS)])
        errors = ((found - exact) / scale)[:, pairs]
        correlations = [float(torch.corrcoef(torch.stack([f[pairs], exact[pairs]]))[0, 1]) for f in found]
        yield {
            "kind": "projection", "K": size, "correlation": sum(correlations) / SEEDS, "least": min(correlations),
            "error": float(errors.square().mean().sqrt()), "predicted": (2 / size) ** 0.5,
            # The mean over seeds in standard errors, of the mean over all pairs.
            "bias": float(errors.mean()), "bias_error": float(errors.mean(1).std() / SEEDS**0.5),
            "steps": min(own) / min(step),
        }  # fmt: skip


def stored() -> Iterator[dict[str, Any]]:
    """Write and read a store of random rows."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        store = fastgrad.GradientStore(folder, nn.Linear(2, 2), size=WIDTH)
        begin = time.perf_counter()
        for _ in range(STORED // 1000):
            store.append(torch.randn(1000, WIDTH))
        written, queries = time.perf_counter(), torch.randn(QUERIES, WIDTH)
        values, indices = store.topk(queries, 10)
        read = time.perf_counter()
        whole = store @ queries.mT
        yield {
            "kind": "store", "rows": STORED, "queries": QUERIES, "K": WIDTH, "write": written - begin,
            "topk": read - written, "scores": time.perf_counter() - read,
            "same": bool(torch.equal(whole.mT.topk(10).indices, indices)) and bool(values.isfinite().all()),
        }  # fmt: skip


def network(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    """Train on these samples."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(12):
        for rows in torch.randperm(len(x)).split(40):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


def left_out() -> Iterator[dict[str, Any]]:
    """Score methods by networks that are trained on halves of the samples, with three seeds each."""
    images, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = images[order].float() / 16, labels[order]
    (x, u), (y, v) = (each[: TRAIN + TEST].split([TRAIN, TEST]) for each in (x, y))
    model = network(x, y, 0)
    with fastgrad.record(model):
        losses = cross_entropy(model(x), y, reduction="none")
        asked = cross_entropy(model(u), v, reduction="none")
        scores = {"exact": fastgrad.grad_gram(losses, model, other=asked, retain_graph=True)}
        for normalize in (False, True):
            for size in (1024, 4096):
                ours = fastgrad.grad_project(losses, model, size, normalize=normalize, retain_graph=True)
                theirs = fastgrad.grad_project(asked, model, size, retain_graph=True)
                scores[f"grad_project K={size}{', cosine' * normalize}"] = ours @ theirs.mT
        norms = torch.stack(fastgrad.grad_sqnorm(losses, list(model.parameters()))).sum(0).sqrt()
        scores["exact, cosine"] = scores["exact"] / norms[:, None].clamp(min=1e-12)
    with torch.no_grad():
        h, g = model[:-1](x), model[:-1](u)
        same = (y[:, None] == v).float()
        scores["nearest h"] = -torch.cdist(h, g)
        scores["nearest h, same label"] = same * torch.exp(-torch.cdist(h, g) / torch.cdist(h, g).median())
        scores["random"] = torch.randn(TRAIN, TEST, generator=torch.Generator().manual_seed(1))
    halves = [torch.randperm(TRAIN, generator=torch.Generator().manual_seed(s))[: TRAIN // 2] for s in range(SUBSETS)]
    with torch.no_grad():
        seen = []
        for kept in halves:
            with torch.enable_grad():
                models = [network(x[kept], y[kept], seed) for seed in range(3)]
            seen.append(-torch.stack([cross_entropy(m(u), v, reduction="none") for m in models]).mean(0))
    truth = torch.stack(seen)
    for method, values in scores.items():
        sums = torch.stack([values[kept].sum(0) for kept in halves]).detach()
        each = torch.tensor([spearmanr(sums[:, j], truth[:, j]).statistic for j in range(TEST)])
        yield {
            "kind": "left out", "method": method, "score": float(each.mean()),
            "error": float(each.std() / TEST**0.5),
        }  # fmt: skip


def measure() -> Iterator[dict[str, Any]]:
    torch.set_num_threads(1)
    yield from left_out()
    yield from stored()
    yield from projections()


if __name__ == "__main__":
    pages.command(
        "influence", __doc__, measure, packages=("torch", "numpy", "scipy", "scikit-learn"),
        facts={"seeds": SEEDS, "subsets": SUBSETS, "train": TRAIN, "test": TEST},
    )  # fmt: skip
