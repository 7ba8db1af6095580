"""Stateless functions on the last layer ``z = W h + b``: squared gradient norms of all contrasts, introspective rows.

One sample's gradient of that layer is rank one, ``delta h^T`` with ``delta = dL/dz``. So all of this follows from the
``D`` features and ``N`` logits, without a backward pass. The losses are in :mod:`fastgrad.losses`.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrad import checks, losses
from fastgrad._torch import check_later, is_traced, unwrapped
from fastgrad.ops import last_layer
from fastgrad.ops.dispatch import full_precision


class ContrastStats(NamedTuple):
    """Statistics of each sample's squared norms over its N contrasts; each field has the leading shape.

    ``expected`` weighs contrast k by its softmax probability; ``predicted`` is the contrast of the predicted class.
    """

    min: Tensor
    max: Tensor
    mean: Tensor
    expected: Tensor
    predicted: Tensor


def contrast_sqnorm(
    features: Tensor,
    logits: Tensor,
    *,
    loss: str = "cross_entropy",
    bias: bool = True,
    reduction: str = "sum",
    log: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Return the squared L2 norm of the last layer's gradient for every one-hot contrast: "why P, rather than k?".

    The relative error is a few units in the last place of float32, even where a confident network leaves autograd no
    correct digit. Differentiable with respect to both tensors. For cross-entropy, with the two largest logits
    ``m >= r``, ``f = exp(z - r)``, the sums ``s1`` of f and ``s2`` of f^2 without one largest logit,
    ``rho = exp(r - m)`` and ``a = 1 + rho s1``, it is ``||h||^2 + 1`` times::

        rho^2 (s1^2 + s2) / a^2 + 2 (1 - exp(z_k - m)) / a

    Args:
        features: ``(..., D)``, the input ``h`` of the last layer; float16, bfloat16, float32 or float64; any strides.
        logits: ``(..., N)``, its output; same leading shape and device.
        loss: ``"cross_entropy"``, ``"bce"`` (with logits), ``"mse"`` (on logits) or ``"brier"`` (mse on softmax).
        bias: Whether the layer's bias gradient belongs to the norm: ``||delta||^2 (||h||^2 + 1)`` or without the 1.
        reduction: How the loss is reduced over classes, ``"sum"`` or ``"mean"``.
        log: Return the natural logarithm. ``||delta||^2`` is computed in log space, so that it does not underflow;
            ``||h||^2`` is not. ``"brier"`` may underflow where logits tie for the highest and all others are 40 below.
        impl: ``"auto"``, ``"triton"`` or ``"eager"``; an explicit choice never falls back.

    Returns:
        ``(..., N)``, float32 (float64 for float64 logits). NaN or infinity in one row reaches that row only. A row with
        an infinite largest logit is NaN for ``"cross_entropy"`` and ``"brier"``, whose softmax is undefined; any
        infinite logit makes it infinite for ``"mse"``. Where ``||h||^2`` is beyond the dtype's range (a feature of
        1.8e19 in float32), the whole row is infinite or NaN.

    Raises:
        TypeError: A tensor is missing or not floating, or only one of them is float64.
        ValueError: Shapes or devices do not fit, an option is unknown, or ``impl="triton"`` cannot serve the tensors.
    """
    leading = _head_pair(features, logits, loss, reduction, bias=bias, log=log)
    norms = last_layer.contrast_sqnorm(_matrix(features), _matrix(logits), loss, bias, log, reduction == "mean", impl)
    return norms if logits.dim() == 2 else norms.reshape(*leading, logits.shape[-1])


def contrast_topk(
    features: Tensor,
    logits: Tensor,
    k: int,
    *,
    loss: str = "cross_entropy",
    bias: bool = True,
    reduction: str = "sum",
    log: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the contrasts of the k classes with the largest logits, without the matrix ``(..., N)`` of all.

    The first is the predicted class, the others are its nearest rivals: except for ``"brier"``, a larger logit has the
    smaller norm. The other arguments and errors are those of :func:`contrast_sqnorm`.

    Returns:
        Squared norms ``(..., k)``, float32 (float64 for float64 logits), and the classes ``(..., k)``, int64.
    """
    leading = _head_pair(features, logits, loss, reduction, bias=bias, log=log)
    checks.at_least(1, k=k)
    if k > logits.shape[-1]:
        raise ValueError(f"k must be at most the number of classes, {logits.shape[-1]}; it was {k}")
    classes = _matrix(logits).topk(k).indices
    norms = last_layer.target_sqnorm(
        _matrix(features), _matrix(logits), classes, "indices", loss, bias, log, reduction == "mean", impl
    )
    return norms.reshape(*leading, k), classes.reshape(*leading, k)


def contrast_stats(
    features: Tensor,
    logits: Tensor,
    *,
    loss: str = "cross_entropy",
    bias: bool = True,
    reduction: str = "sum",
    impl: str = "auto",
) -> ContrastStats:
    """Compute statistics over all contrasts from logits that exist, without the matrix ``(..., N)`` of norms.

    Arguments and errors are those of :func:`contrast_sqnorm`.

    Returns:
        :class:`ContrastStats` of tensors ``(...)``, float32 (float64 for float64 logits).
    """
    leading = _head_pair(features, logits, loss, reduction, bias=bias)
    stats = last_layer.contrast_stats(_matrix(features), _matrix(logits), loss, bias, reduction == "mean", impl)
    return ContrastStats(*stats.reshape(*leading, 5).unbind(-1))


def target_sqnorm(
    features: Tensor,
    logits: Tensor,
    target: str | Tensor,
    *,
    loss: str = "cross_entropy",
    bias: bool = True,
    reduction: str = "sum",
    log: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Return the squared L2 norm of the last layer's gradient for one label per sample.

    ``target`` is ``"ones"``, ``"uniform"`` (1/N), ``"predicted"``, class indices ``(...)`` or soft targets
    ``(..., N)``, which have the eager form alone. ``"ones"`` is the confounding label, 1 for every class. The other
    arguments are those of :func:`contrast_sqnorm`. The norm of a soft target may underflow before ``log`` takes its
    logarithm. Where the probabilities are close to a soft target with unequal entries, digits are lost in proportion to
    their difference.

    Returns:
        ``(...)``, float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: As in :func:`contrast_sqnorm`, or a label is out of range.
    """
    leading = _head_pair(features, logits, loss, reduction, bias=bias, log=log)
    check_target(target, logits)
    if isinstance(target, str):
        kind, label = target, None
    elif target.is_floating_point():
        kind, label = "soft", _matrix(target)
    else:
        kind, label = "indices", target.reshape(-1)
    norms = last_layer.target_sqnorm(
        _matrix(features), _matrix(logits), label, kind, loss, bias, log, reduction == "mean", impl
    )
    return norms.reshape(leading)


def linear_contrast_sqnorm(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    loss: str = "cross_entropy",
    reduction: str = "sum",
    log: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the last layer and all its contrasts: ``(logits, contrast_sqnorm(features, logits))``.

    Features are ``(..., D)``, the weight ``(N, D)`` and the bias ``(N,)`` or None, all of one device and dtype. Under
    autocast they may be of several dtypes and are then cast to autocast's, as by ``torch.nn.functional.linear``. With a
    bias, its gradient belongs to the norm. The other arguments are those of :func:`contrast_sqnorm`.

    Returns:
        Logits ``(..., N)`` in the dtype of the features, and the squared norms ``(..., N)`` of exactly these logits,
        float32 (float64 for float64).

    Raises:
        TypeError, ValueError: As in :func:`contrast_sqnorm`, or a tensor has another dtype than the features.
    """
    features, weight, bias = _linear(features, weight, bias, loss, reduction, log=log)
    logits, norms = last_layer.linear_contrast_sqnorm(
        _matrix(features), weight, bias, loss, log, reduction == "mean", impl
    )
    shape = (*features.shape[:-1], weight.shape[0])
    return logits.reshape(shape), norms.reshape(shape)


def linear_contrast_stats(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    loss: str = "cross_entropy",
    reduction: str = "sum",
    impl: str = "auto",
) -> ContrastStats:
    """Compute statistics over all contrasts without storing ``(..., N)``: for vocabularies of 128k and more.

    At most 4 million logits are held at a time, 64 million on a GPU, or one row; compiled, all of them. Arguments and
    errors are those of :func:`linear_contrast_sqnorm`.

    Returns:
        :class:`ContrastStats` of tensors ``(...)``, float32 (float64 for float64).
    """
    features, weight, bias = _linear(features, weight, bias, loss, reduction)
    stats = last_layer.linear_contrast_stats(_matrix(features), weight, bias, loss, reduction == "mean", impl)
    return ContrastStats(*stats.reshape(*features.shape[:-1], 5).unbind(-1))


def contrast_rows(features: Tensor, logits: Tensor, *, loss: str = "mse", rows: str = "diagonal") -> Tensor:
    """Return introspective features: for every contrast k, row k of its weight gradient, ``delta^(k)_k h``.

    For ``bce`` and ``mse`` these rows are exactly the rows of the one gradient under the all-ones label; for
    ``cross_entropy`` and ``brier`` they are not. The rows left out are not small in general: ``rows="full"``, not
    ``"diagonal"``, gives the whole gradient of every contrast. The other arguments and the errors are those of
    :func:`contrast_sqnorm`. The source is Prabhushankar and AlRegib, "Introspective Learning", 2022.

    Returns:
        ``(..., N, D)``, or ``(..., N, N, D)`` for ``"full"`` with ``[..., k, j, :]`` the row j of contrast k; float32
        (float64 for float64 logits).
    """
    checks.one_of("rows", rows, ("diagonal", "full"))
    _head_pair(features, logits, loss)
    h = features.to(losses.compute_dtype(logits.dtype))
    if rows == "diagonal":
        return losses.contrast_diagonal(logits, loss=loss).unsqueeze(-1) * h.unsqueeze(-2)
    return losses.contrast_delta(logits, loss=loss).unsqueeze(-1) * h.unsqueeze(-2).unsqueeze(-2)


def contrast_rows_linear(
    features: Tensor, logits: Tensor, weight: Tensor, bias: Tensor | None = None, *, loss: str = "mse"
) -> Tensor:
    """Apply a linear layer to the flattened :func:`contrast_rows`, which are stored only if they are small.

    Equal to ``linear(contrast_rows(features, logits).flatten(-2), weight, bias)``. If there are many rows, the
    features are multiplied with the weight instead, some units at a time, also in the backward pass. The weight is
    ``(U, N * D)`` and the bias ``(U,)`` or None, on the device of the features. Other arguments are those of
    :func:`contrast_sqnorm`.

    Returns:
        ``(..., U)``, float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: As in :func:`contrast_sqnorm`, or ``weight`` or ``bias`` has another shape or device.
    """
    leading = _head_pair(features, logits, loss)
    checks.is_float("weight", weight)
    checks.same_device("weight", weight, "features", features)
    checks.shape_is("weight", weight, (*weight.shape[:1], features.shape[-1] * logits.shape[-1]), "U rows of N * D")
    _bias(bias, weight)
    diagonal = losses.contrast_diagonal(_matrix(logits), loss=loss)
    with full_precision(features.device):
        out = last_layer.rows_linear(_matrix(features), diagonal, weight, bias)
    return out.reshape(*leading, weight.shape[0])


class NoClassError(ValueError):
    """A target names a class that the model does not have."""


def check_target(target: str | Tensor, logits: Tensor, *, wait: bool = False) -> None:
    """Raise unless ``target`` is a known label name, class indices ``(...)`` or soft targets ``(..., N)``.

    An index without a class raises NoClassError. On a GPU this needs ``wait``, else the device raises an error.
    """
    if isinstance(target, str):
        checks.one_of("target", target, losses.TARGETS)
        return
    checks.is_tensor("target", target)
    checks.same_device("target", target, "logits", logits)
    if target.is_floating_point():
        checks.is_float("target", target)
        checks.shape_is("target", target, tuple(logits.shape), "soft targets, the shape of logits")
        return
    if target.dtype == torch.bool or target.dtype.is_complex:
        raise TypeError(f"target must hold class indices (integers) or soft targets (floats); it was {target.dtype}")
    checks.shape_is("target", target, tuple(logits.shape[:-1]), "class indices, the leading shape of logits")
    classes, target = logits.shape[-1], unwrapped(target)
    wanted = f"target must hold class indices from 0 to {classes - 1}"
    if is_traced() or type(target) is not torch.Tensor or not (wait or target.device.type == "cpu"):
        # Reading the labels here would synchronise with the device or break the graph; this check runs there.
        check_later(((target >= 0) & (target < classes)).all(), wanted)
    elif target.numel():
        # PyTorch has no aminmax of wider unsigned integers.
        low, high = map(int, target.long().aminmax())
        if low < 0 or high >= classes:
            raise NoClassError(f"{wanted}; it held {low if low < 0 else high}")


def _check_features(features: Tensor, loss: str, reduction: str, flags: dict[str, object]) -> None:
    checks.one_of("loss", loss, losses.LOSSES)
    checks.one_of("reduction", reduction, losses.REDUCTIONS)
    checks.is_bool(**flags)
    checks.is_float("features", features)
    checks.holds_values("features", features)


def _has_features(features: Tensor) -> None:
    if features.dim() < 1:
        raise ValueError("features must have shape (..., D); it was a scalar")


def _matrix(tensor: Tensor) -> Tensor:
    """Reshape ``(..., M)`` to ``(B, M)``; a view wherever the strides allow one."""
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


#: Options and kinds of tensors that passed the checks. Checking a call like an earlier one takes as long as a softmax.
_passed: set[tuple[object, ...]] = set()


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.device, tensor.layout, tensor.is_nested


def _head_pair(
    features: Tensor, logits: Tensor, loss: str, reduction: str = "sum", *, bias: bool = True, log: bool = False
) -> tuple[int, ...]:
    """Check options, and features against logits; return their leading shape."""
    call = None
    if not torch.compiler.is_compiling():
        with contextlib.suppress(AttributeError, TypeError):
            call = (loss, reduction, type(bias), type(log), *_kind(features), *_kind(logits))
    if call is None or call not in _passed:
        _check_features(features, loss, reduction, {"bias": bias, "log": log})
        checks.is_float("logits", logits)
        checks.same_device("features", features, "logits", logits)
        checks.holds_values("logits", logits)
        if (features.dtype == torch.float64) != (logits.dtype == torch.float64):
            raise TypeError(
                f"features and logits must both be float64 or neither; they were {features.dtype} and {logits.dtype}"
            )
        if call is not None:
            _passed.add(call)
    _has_features(features)
    shape = logits.shape
    if not shape or shape[-1] < 1:
        raise ValueError(f"logits must have shape (..., N) with N >= 1; it was {tuple(shape)}")
    leading = shape[:-1]
    if features.shape[:-1] != leading:
        raise ValueError(
            f"features must have the leading shape of logits, {tuple(leading)}; it was {tuple(features.shape[:-1])}"
        )
    return leading


def _linear(
    features: Tensor, weight: Tensor, bias: Tensor | None, loss: str, reduction: str, **flags: object
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check a linear layer and return it, cast to autocast's dtype if autocast is on and the dtypes differ."""
    _check_features(features, loss, reduction, flags)
    _has_features(features)
    checks.is_float("weight", weight)
    size = features.shape[-1]
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != size:
        raise ValueError(f"weight must have shape (N, D) with N >= 1 and D = {size}; it was {tuple(weight.shape)}")
    checks.same_device("weight", weight, "features", features)
    _bias(bias, weight)
    dtypes = {t.dtype for t in (features, weight, bias) if t is not None}
    if len(dtypes) > 1 and torch.float64 not in dtypes and torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
        return features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != features.dtype:
            raise TypeError(f"{name} must have the dtype of features, {features.dtype}; it was {tensor.dtype}")
    return features, weight, bias


def _bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None:
        checks.is_float("bias", bias)
        checks.shape_is("bias", bias, (weight.shape[0],), "one entry for each row of weight")
        checks.same_device("bias", bias, "weight", weight)
