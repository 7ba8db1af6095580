"""Published detectors that read logits, h or maps of one forward pass; all are fitted on clean data alone.

Hyper-parameters are those of the papers or of pytorch-ood's defaults, fixed before any test image was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.detection.experiment import BATCH, Fit, NotRun, Seen
from bench.detection.registry import Score, method
from fastgrad.scores.mahalanobis import Mahalanobis


@method("energy", 2020, "Liu et al., NeurIPS")
def energy(fit: Fit) -> Score:
    return lambda seen: -seen.logits.logsumexp(1)


def margin(logits: Tensor) -> Tensor:
    two = logits.softmax(1).topk(2, 1).values
    return two[:, 1] - two[:, 0]


def gen(logits: Tensor) -> Tensor:
    from pytorch_ood.detector import GEN

    return GEN.score(logits, M=min(100, logits.shape[1]))


def p_norm(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(1, keepdim=True)
    return -(centred / centred.norm(p=5, dim=1, keepdim=True)).amax(1)


def grad_trust(logits: Tensor) -> Tensor:
    """Return the largest over the mean ``(z_k - 1/N)^4``: the variance of squared gradients reduces to it."""
    fourth = (logits.double() - 1 / logits.shape[1]) ** 4
    return fourth.amax(1) / fourth.mean(1)


# Scores of the logits alone need no fit.
for _name, _year, _paper, _read in (
    ("softmax", 2017, "Hendrycks and Gimpel, ICLR", lambda logits: 1 - logits.softmax(1).amax(1)),
    ("entropy", 2020, "Chan et al., ICCV 2021", lambda logits: torch.special.entr(logits.double().softmax(1)).sum(1)),
    ("margin", 2001, "Scheffer et al., IDA", margin),
    ("MaxLogit", 2022, "Hendrycks et al., ICML", lambda logits: -logits.amax(1)),
    ("GEN", 2023, "Liu et al., CVPR", gen),
    ("pNormSoftmax", 2024, "Cattelan and Silva, UAI; p = 5 of their grid, nothing is tuned", p_norm),
    ("GradTrust", 2024, "Prabhushankar and AlRegib, IEEE MIPR; in closed form", lambda logits: -grad_trust(logits)),
):
    method(_name, _year, _paper)(lambda fit, read=_read: lambda seen: read(seen.logits))


@method("GradNorm", 2021, "Huang et al., NeurIPS; in closed form")
def grad_norm(fit: Fit) -> Score:
    classes = fit.layer.out_features
    return lambda seen: -(seen.logits.softmax(1) - 1 / classes).abs().sum(1) * seen.h.abs().sum(1)


@method("Catalyst", 2026, "Hassan et al., CVPR Findings; deviations, capped at their clean 90th percentile")
def catalyst(fit: Fit) -> Score:
    # The authors tune the cap for each network; this is ReAct's rule.
    cap = float(fit.clean.spread.flatten()[::7].quantile(0.9))
    return lambda seen: -seen.logits.logsumexp(1) * seen.spread.clamp(0, cap).mean(1)


@method("RAS", 2026, "Guglielmo and Masana, arXiv:2604.08572")
def ras(fit: Fit) -> Score:
    profile = fit.clean.h.sort(1).values.mean(0)

    def score(seen: Seen) -> Tensor:
        shifted = torch.empty_like(seen.h).scatter_(1, seen.h.argsort(1), profile.expand_as(seen.h))
        return -fit.layer(shifted).logsumexp(1)

    return score


@method("WeiPer", 2024, "Granz et al., NeurIPS; softmax of 50 perturbed heads, distance 2.1")
def weiper(fit: Fit) -> Score:
    weight, bias = fit.layer.weight, fit.layer.bias
    made = torch.Generator().manual_seed(0)
    heads = []
    for _ in range(50):
        noise = F.normalize(torch.randn(weight.shape, generator=made), dim=1)
        heads.append(weight + 2.1 * noise * weight.norm(dim=1, keepdim=True))

    def score(seen: Seen) -> Tensor:
        largest = (F.linear(seen.h, head, bias).softmax(1).amax(1) for head in heads)
        return -sum(largest, torch.zeros(())) / len(heads)

    return score


def _gaussians(change: Callable[[Tensor], Tensor], fit: Fit) -> Score:
    h = change(fit.clean.h)
    try:
        labels = fit.labels
    except NotRun:
        one = Mahalanobis.fit(h, directions=h.shape[1])
        return lambda seen: one(change(seen.h).double())
    from pytorch_ood.detector import Mahalanobis as Gaussians

    several = Gaussians(None)
    several.fit_features(h, labels)
    return lambda seen: several.predict_features(change(seen.h))


for _name, _year, _paper, _change in (
    ("Mahalanobis", 2018, "Lee et al., NeurIPS; h alone; one Gaussian with shrinkage where classes have few images",
     lambda h: h),
    ("Mahalanobis++", 2025, "Mueller and Hein, ICML: h of unit length", partial(F.normalize, dim=1)),
):  # fmt: skip
    method(_name, _year, _paper)(partial(_gaussians, _change))


@method("KNN", 2022, "Sun et al., ICML: h of unit length")
def knn(fit: Fit) -> Score:
    bank, k = F.normalize(fit.clean.h, dim=1), 10 if fit.experiment.few else 50
    return lambda seen: torch.cdist(F.normalize(seen.h, dim=1), bank).kthvalue(k, 1).values


@method("CTM", 2024, "Ngoc-Hieu et al.: cosine of h to the nearest mean of a class")
def class_typical(fit: Fit) -> Score:
    h, labels = fit.clean.h, fit.labels
    means = torch.stack([h[labels == k].mean(0) for k in labels.unique()])
    return lambda seen: -(F.normalize(seen.h, dim=1) @ F.normalize(means, dim=1).T).amax(1)


@method("KPCA reconstruction", 2024, "Fang et al., NeurIPS: CoRP, random Fourier features of h of unit length")
def kernel_reconstruction(fit: Fit) -> Score:
    """Return the part of ``phi(h)`` outside its clean principal components, after the authors' code."""
    # The authors' settings for ImageNet and CIFAR-10: gamma of the Gaussian kernel, features, share of the variance.
    gamma, size, share = (3.0, 4096, 0.5) if fit.experiment.few else (2.0, 2048, 0.8)
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(fit.clean.h.shape[1], size, generator=made, dtype=torch.float64) * (2 * gamma) ** 0.5
    phase = 2 * torch.pi * torch.rand(size, generator=made, dtype=torch.float64)

    def phi(h: Tensor) -> Tensor:
        return (2 / size) ** 0.5 * (F.normalize(h.double(), dim=1) @ weight + phase).cos()

    known = phi(fit.clean.h)
    centre = known.mean(0)
    _, values, axes = torch.linalg.svd(known - centre, full_matrices=False)
    explained = values.square().cumsum(0) / values.square().sum()
    axes = axes[: int((explained < share).sum()) + 1]

    def score(seen: Seen) -> Tensor:
        rest = phi(seen.h) - centre
        return (rest - rest @ axes.T @ axes).norm(dim=1)

    return score


@method("SIRC", 2022, "Xia and Bouganis, ACCV: the softmax with the L1 norm of h")
def sirc(fit: Fit) -> Score:
    """Return ``(1 - S1) (1 + exp(-b (S2 - a)))`` with a and b of the clean norms: mean - 3 std and 1 / std."""
    norms = fit.clean.h.abs().sum(1).double()
    middle, slope = norms.mean() - 3 * norms.std(), 1 / norms.std()

    def score(seen: Seen) -> Tensor:
        # The logarithm keeps the order and neither overflows nor loses a softmax near one.
        logits = seen.logits.double()
        best = logits.argmax(1, keepdim=True)
        others = logits.scatter(1, best, -torch.inf).logsumexp(1) - logits.logsumexp(1)
        return others + F.softplus(-slope * (seen.h.abs().sum(1).double() - middle))

    return score


#: Input of a detector of pytorch-ood, by the suffix of its methods' names.
READS: Mapping[str, Callable[[Seen], Tensor]] = {
    "features": lambda seen: seen.h, "feature_maps": lambda seen: seen.h[:, :, None, None],
    "logits": lambda seen: seen.logits,
}  # fmt: skip


def _library(name: str, fit: Fit, *, classes: bool = False, reads: str = "features") -> Score:
    from pytorch_ood import detector as ood

    weight, bias, h = fit.layer.weight.detach(), fit.layer.bias.detach(), fit.clean.h

    def head(values: Tensor) -> Tensor:
        return values.flatten(1) @ weight.T + bias

    make: Mapping[str, Callable[[], Any]] = {
        "ViM": lambda: ood.ViM(None, min(h.shape[1] // 2, len(h) // 4), weight, bias),
        "DICE": lambda: ood.DICE(None, weight, bias, p=0.9),
        "NCI": lambda: ood.NCI(None, fit.layer, alpha=0.0001),
        "fDBD": lambda: ood.fDBD(None, fit.layer),
        **{kind: partial(getattr(ood, kind), nn.Identity(), head) for kind in ("ReAct", "ASH", "SCALE", "VRA")},
        **{kind: partial(getattr(ood, kind), None, head) for kind in ("NNGuide", "PNML", "SHE", "LTS")},
    }
    made = make[name]() if name in make else getattr(ood, name)(None)
    if name != "LTS":
        labels = fit.labels if classes else torch.zeros(len(h), dtype=torch.long)
        given = [] if name == "KLMatching" else [labels]
        with torch.enable_grad():
            getattr(made, f"fit_{reads}")(READS[reads](fit.clean), *given)
    return lambda seen: getattr(made, f"predict_{reads}")(READS[reads](seen)).detach()


for _name, _year, _paper, _how in (
    ("ViM", 2022, "Wang et al., CVPR", {}),
    ("DICE", 2022, "Sun and Li, ECCV", {}),
    ("NCI", 2025, "Liu and Qin, CVPR", {}),
    ("fDBD", 2024, "Liu and Qin, ICML", {}),
    ("NNGuide", 2023, "Park et al., ICCV", {}),
    ("PNML", 2021, "Bibas et al., NeurIPS", {}),
    ("LTS", 2024, "Djurisic et al., arXiv", {}),
    ("RMD", 2021, "Ren et al., ICML workshop", {"classes": True}),
    ("SHE", 2023, "Zhang et al., ICLR", {"classes": True}),
    ("GMM", 2018, "Lee et al., a mixture for every class", {"classes": True}),
    ("ReAct", 2021, "Sun et al., NeurIPS", {"reads": "feature_maps"}),
    ("ASH", 2023, "Djurisic et al., ICLR", {"reads": "feature_maps"}),
    ("SCALE", 2024, "Xu et al., ICLR", {"reads": "feature_maps"}),
    ("VRA", 2023, "Xu et al., NeurIPS", {"reads": "feature_maps"}),
    ("KLMatching", 2022, "Hendrycks et al., ICML", {"reads": "logits"}),
    ("TemperatureScaling", 2017, "Guo et al., ICML", {"reads": "logits", "classes": True}),
    ("OpenMax", 2016, "Bendale and Boult, CVPR", {"reads": "logits", "classes": True}),
):
    method(_name, _year, _paper)(partial(_library, _name, **_how))


@method("NAC", 2024, "Liu et al., ICLR: h")
def nac(fit: Fit) -> Score:
    from pytorch_ood.detector import NACUE

    if len(fit.clean.h) < 10_000:
        raise NotRun("its bins are set for tens of thousands of training images")
    neurons = nn.Identity()
    detector = NACUE(nn.Sequential(neurons, fit.layer), [neurons])
    detector.fit([h.requires_grad_() for h in fit.clean.h.split(BATCH)])
    return lambda seen: torch.cat([detector.predict(h.requires_grad_()) for h in seen.h.split(BATCH)])


@method("recovery testing", 2025, "Yun et al., arXiv:2505.12586; linear, without its logit test, five passes")
def recovery(fit: Fit) -> Score:
    """Predict every stage's means from the deepest; large errors in only a few stages are unusual."""
    *early, deepest = fit.clean.stages
    centre = deepest.mean(0)
    inputs = (deepest - centre).double()
    gram = inputs.T @ inputs
    ridge = gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    maps = [(torch.linalg.solve(ridge, inputs.T @ (x - x.mean(0)).double()), x.mean(0)) for x in early]

    def score(seen: Seen) -> Tensor:
        stages = seen.stages
        inputs = (stages[-1] - centre).double()
        errors = torch.stack(
            [(x - mean - inputs @ weight).square().sum(1) for x, (weight, mean) in zip(stages, maps, strict=False)], 1
        )
        share = errors.softmax(1)
        uneven = torch.tensor(float(errors.shape[1])).log() - torch.special.entr(share).sum(1)
        return uneven * (errors.mean(1) + 1e-8).log()

    return score
