"""The simple gradient noise scale, from per-sample norms (McCandlish et al., 2018, arXiv:1812.06162)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgrad import checks


class NoiseScale:
    """The batch size beyond which a larger batch gains little: ``tr(Sigma) / |G|^2``.

    ``G`` is the true gradient of the mean loss and ``Sigma`` the covariance of single samples' gradients. A step on a
    batch of that many samples makes half the progress of a step along ``G``. Unbiased estimates of the two terms are
    averaged over batches before they are divided. ``s`` is the mean of the B squared norms of the samples' gradients.
    ``b`` is the squared norm of their mean (McCandlish et al., 2018, appendix A.1, batches of sizes 1 and B)::

        |G|^2 = (B b - s) / (B - 1)        tr(Sigma) = B (s - b) / (B - 1)

    Args:
        decay: Factor per batch of the exponential moving averages, in [0, 1); None weights all batches equally.

    Raises:
        TypeError, ValueError: For any other ``decay``.

    Example::

        noise = fastgrad.NoiseScale(decay=0.99)
        with fastgrad.record(model):
            losses = F.cross_entropy(model(x), y, reduction="none")
            sqnorms = fastgrad.grad_sqnorm(losses, parameters, retain_graph=True)
            gradients = torch.autograd.grad(losses.sum(), parameters)
        noise.update(torch.stack(sqnorms).sum(0), sum(g.square().sum() for g in gradients))
        noise.scale
    """

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None:
            checks.lies_in("[0, 1)", decay=decay)
        self._decay = decay
        # Weighted sums over batches of the estimates and of the weights; all three decay alike.
        self._gradient = self._trace = self._weight = 0.0

    def update(self, sqnorms: Tensor, batch_sqnorm: Tensor | float) -> None:
        """Add a batch to the averages; this waits for the device.

        Args:
            sqnorms: ``(B,)``, B at least 2: each sample's squared gradient norm, over all parameters together.
            batch_sqnorm: Squared norm of the gradient of the loss **summed** over the same samples
                (``reduction="sum"``). Multiply that of a mean by B squared.

        Raises:
            TypeError, ValueError: For anything else, or if ``batch_sqnorm`` is too large for a sum of gradients of
                these norms, which another loss or other parameters would explain.
        """
        checks.is_float("sqnorms", sqnorms)
        if sqnorms.dim() != 1 or len(sqnorms) < 2:
            raise ValueError(f"sqnorms must have shape (B,) with B at least 2; it was {tuple(sqnorms.shape)}")
        given = checks.to_array("batch_sqnorm", batch_sqnorm, finite=False)
        if given.size != 1:
            raise ValueError(f"batch_sqnorm must be one number; it had shape {given.shape}")
        norms, total, count = sqnorms.detach().double(), given.item(), len(sqnorms)
        low, high = (float(edge) for edge in norms.aminmax())
        for name, value in (("sqnorms", low), ("sqnorms", high), ("batch_sqnorm", total)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative; it held {value}")
        largest = float(norms.sqrt().sum()) ** 2
        if total > largest * (1 + 1e3 * torch.finfo(sqnorms.dtype).eps):
            raise ValueError(
                f"batch_sqnorm must be that of the sum of gradients, at most {largest:.6g} here; it was {total:.6g}"
            )
        single, batch = float(norms.mean()), total / count**2
        # The mean of squares is at least the square of the mean, but rounding may break this if samples are alike.
        single = max(single, batch)
        keep, add = (1.0, 1.0) if self._decay is None else (self._decay, 1 - self._decay)
        self._gradient = keep * self._gradient + add * (count * batch - single) / (count - 1)
        self._trace = keep * self._trace + add * count * (single - batch) / (count - 1)
        self._weight = keep * self._weight + add

    @property
    def gradient_sqnorm(self) -> float:
        """The average estimate of ``|G|^2``; may be negative after few batches. NaN before the first."""
        return self._gradient / self._weight if self._weight else math.nan

    @property
    def trace(self) -> float:
        """The average estimate of ``tr(Sigma)``. NaN before the first batch."""
        return self._trace / self._weight if self._weight else math.nan

    @property
    def scale(self) -> float:
        """The noise scale, in samples; infinite while ``gradient_sqnorm`` is not positive, NaN before any batch."""
        if self.gradient_sqnorm <= 0:
            return math.inf
        return self.trace / self.gradient_sqnorm
