"""`IntrospectiveClassifier`: a second opinion on the class, from the gradients of every contrast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastgrad import checks
from fastgrad.batches import bar
from fastgrad.checks import Array, to_array
from fastgrad.introspection import network
from fastgrad.introspection.network import Inputs, IntrospectiveNetwork
from fastgrad.losses import LOSSES
from fastgrad.ops.dispatch import full_precision
from fastgrad.scores.rows import as_tensor
from fastgrad.scores.temperature import Temperature

Pairs = Mapping[str, ArrayLike]
# Above this many weights in the first layer, prediction stays in float32.
_DOUBLE_LIMIT = 10_000_000


class IntrospectiveClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The introspective network H as a scikit-learn classifier.

    Its input is row k of the last layer's gradient for contrast class k, for all k: ``delta^(k)_k h``, N*D numbers.
    The source is Prabhushankar and AlRegib, "Introspective Learning", 2022. Give these rows, or ``{"features": h,
    "logits": z}``, for which `fastgrad.contrast_rows_linear` computes the first layer without storing the rows.

    The defaults are the published shape: three linear layers with sigmoids, N*D-300-100-N, which for D = 64
    and N = 10 is 640-300-100-10.

    Args:
        hidden: Widths of the hidden layers.
        activation: ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        loss: The loss whose contrast rows are formed from features and logits.
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        batch_size: Samples per step.
        max_epochs: Largest number of passes over the data.
        patience: Epochs without improvement before training stops.
        validation_fraction: Share of samples held out to decide when to stop; 0 watches the training loss.
        device: Where to train, ``"cpu"`` or ``"cuda"``; the fitted network is on the CPU.
        verbose: Whether to show a progress bar.
        random_state: Seed of the initial weights, the split and the order of the samples.

    Attributes:
        classes_: The labels.
        network_: The fitted `IntrospectiveNetwork`, its logits divided by ``temperature_``.
        temperature_: The temperature that `calibrate` found; 1 before.
        history_: The watched loss of every epoch.
    """

    def __init__(
        self,
        *,
        hidden: tuple[int, ...] = (300, 100),
        activation: str = "sigmoid",
        loss: str = "mse",
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        batch_size: int = 128,
        max_epochs: int = 100,
        patience: int = 8,
        validation_fraction: float = 0.1,
        device: str = "cpu",
        verbose: bool = False,
        random_state: Any = 0,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.loss = loss
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.device = device
        self.verbose = verbose
        self.random_state = random_state

    @torch.inference_mode(False)
    def fit(self, R: ArrayLike | Pairs, y: ArrayLike, *, groups: ArrayLike | None = None) -> IntrospectiveClassifier:
        """Train the network on labelled samples; return the classifier itself.

        Args:
            R: Rows ``(B, N*D)`` or ``(B, N, D)``, or ``{"features": (B, D), "logits": (B, N)}``.
            y: Labels ``(B,)``.
            groups: ``(B,)``, the source of each sample as an integer; a clean image and its challenges share one.
                Samples of one source are all trained on or all held out. Negative or None: a source of its own.

        Raises:
            ValueError: A parameter is out of range, or shapes of R, y and groups do not fit.
        """
        self._check_parameters()
        inputs = self._inputs(R, reset=True)
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None: y holds a label per row of R")
        labels = self._labels(y, len(inputs[0]))
        self.classes_, codes = np.unique(labels, return_inverse=True)
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        targets = torch.from_numpy(codes.astype(np.int64))
        sources = np.unique(checks.groups_of(groups, len(codes)), return_inverse=True)[1]
        place = np.argsort(random.permutation(sources.max() + 1))[sources]
        order = torch.from_numpy(np.argsort(place, kind="stable"))
        # At least one source is trained on.
        held_out = int((place < min(round(self.validation_fraction * (sources.max() + 1)), sources.max())).sum())
        # A handful of held-out samples says nothing about when to stop.
        held_out = held_out if held_out >= 20 else 0
        with full_precision(torch.device(self.device)):
            parameters, self.history_ = self._train(inputs, targets, order[held_out:], order[:held_out], seed)
        self.n_iter_ = len(self.history_)
        tensors = {f"{'bias' if index % 2 else 'weight'}{index // 2}": value for index, value in enumerate(parameters)}
        self.network_ = IntrospectiveNetwork(
            **tensors, layers=len(parameters) // 2, activation=self.activation, loss=self.loss
        )
        self.temperature_ = 1.0
        return self

    def calibrate(self, R: ArrayLike | Pairs, y: ArrayLike) -> IntrospectiveClassifier:
        """Calibrate the probabilities by a temperature (`fastgrad.scores.temperature`); return the classifier itself.

        The network and the classifier are more certain of their training samples, so give samples that neither was
        trained on. The temperature becomes part of ``network_``; the predicted labels stay as they are.

        Args:
            R: As for `fit`.
            y: Labels ``(B,)``, all among those of `fit`.

        Raises:
            ValueError: A label is not one of `fit`, or shapes do not fit.
        """
        logits = torch.from_numpy(self._logits(R))
        labels = self._labels(y, len(logits))
        if not np.isin(labels, self.classes_).all():
            raise ValueError(f"y must hold labels of fit, {self.classes_.tolist()[:20]}; it held others")
        codes = torch.from_numpy(np.searchsorted(self.classes_, labels))
        temperature = float(Temperature.fit(logits * self.temperature_, codes).temperature)
        last = self.network_.options["layers"] - 1
        for name in ("weight", "bias"):
            self.network_.get_buffer(f"{name}{last}").div_(temperature / self.temperature_)
        self.temperature_ = temperature
        return self

    def decision_function(self, R: ArrayLike | Pairs) -> Array:
        """Return class logits ``(B, classes)``; for two classes ``(B,)``, the log odds of the second."""
        logits = self._logits(R)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, R: ArrayLike | Pairs) -> Array:
        """Return class probabilities ``(B, classes)``."""
        result: Array = torch.from_numpy(self._logits(R)).softmax(-1).numpy()
        return result

    def predict(self, R: ArrayLike | Pairs) -> NDArray[Any]:
        """Return labels ``(B,)``."""
        codes = self._logits(R).argmax(-1)
        labels: NDArray[Any] = self.classes_[codes]
        return labels

    def to_module(self) -> IntrospectiveNetwork:
        """Return the fitted network as a traceable module."""
        check_is_fitted(self, "network_")
        return self.network_

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _check_parameters(self) -> None:
        checks.one_of("activation", self.activation, network.ACTIVATIONS)
        checks.one_of("loss", self.loss, LOSSES)
        checks.at_least(1, batch_size=self.batch_size, max_epochs=self.max_epochs, patience=self.patience)
        if np.ndim(self.hidden) != 1 or any(not isinstance(n, (int, np.integer)) or n < 1 for n in self.hidden):
            raise ValueError(f"hidden must hold widths of at least 1; it was {self.hidden!r}")
        checks.lies_in("[0, inf)", learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        checks.lies_in("[0, 1)", validation_fraction=self.validation_fraction)
        try:
            torch.zeros(1, device=torch.device(self.device)).cpu()
        except (TypeError, RuntimeError, AssertionError) as error:
            raise ValueError(f"device must be one that PyTorch computes on; it was {self.device!r}: {error}") from error

    def _inputs(self, R: ArrayLike | Pairs, *, reset: bool) -> Inputs:
        """Return R as one tensor of rows or as features and logits, float64."""
        # One of SciPy's sparse formats is a dictionary, too.
        if isinstance(R, Mapping) and not issparse(R):
            if set(R) != {"features", "logits"}:
                raise ValueError(f"R must have the entries 'features' and 'logits'; it had {list(R)}")
            arrays = [to_array(f"R[{name!r}]", R[name]) for name in ("features", "logits")]
            if any(array.ndim != 2 or array.size == 0 for array in arrays) or len(arrays[0]) != len(arrays[1]):
                raise ValueError(
                    "R['features'] and R['logits'] must have shapes (B, D) and (B, N), not empty; they were "
                    f"{arrays[0].shape} and {arrays[1].shape}"
                )
        else:
            array = checks.validated(self, "R", R, reset=reset)
            arrays = [array.reshape(len(array), -1)]
        shapes = tuple(array.shape[1:] for array in arrays)
        width = math.prod(array.shape[1] for array in arrays)
        if reset:
            self.shapes_, self.n_features_in_ = shapes, width
        if width != self.n_features_in_ or (len(shapes) == len(self.shapes_) and shapes != self.shapes_):
            raise ValueError(f"R must have the shape of fit, {self.shapes_} per sample; it had {shapes}")
        return tuple(as_tensor(array) for array in arrays)

    def _labels(self, y: ArrayLike, count: int) -> NDArray[Any]:
        values: NDArray[Any] = column_or_1d(np.asarray(y.cpu() if isinstance(y, Tensor) else y), warn=True)
        if len(values) != count:
            raise ValueError(f"y must have one label per row of R, {count}; it had {len(values)}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError("y must be finite; it contains NaN or infinity")
        check_classification_targets(values)
        return values

    def _train(
        self, inputs: Inputs, targets: Tensor, chosen: Tensor, watched: Tensor, seed: int
    ) -> tuple[list[Tensor], list[float]]:
        """Train on the ``chosen`` samples; the ``watched`` ones decide when to stop.

        Return the best epoch's weights and biases in turn, with the rows' standardisation inside the first layer, and
        the watched loss of every epoch, which is the training loss if no samples are watched.
        """
        device, generator = torch.device(self.device), torch.Generator().manual_seed(seed)
        mean, scale = (value.float() for value in network.mean_and_scale(inputs, self.loss))
        there = mean.to(device), scale.to(device)
        sizes = [len(mean), *map(int, self.hidden), len(self.classes_)]
        parameters = [value.to(device).requires_grad_() for value in network.new_layers(sizes, self.activation, seed)]
        optimizer = torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)

        def batch_loss(samples: Tensor, reduction: str) -> Tensor:
            moved = tuple(value[samples].to(device, torch.float32) for value in inputs)
            logits = network.class_logits(_folded(parameters, *there), moved, self.activation, self.loss)
            return cross_entropy(logits, targets[samples].to(device), reduction=reduction)

        best_loss, waited, size = float("inf"), 0, int(self.batch_size)
        best, history = list[Tensor](), list[float]()
        for _ in bar(range(self.max_epochs), "introspective network", bool(self.verbose), unit="epoch"):
            total = 0.0
            order = torch.randperm(len(chosen), generator=generator, device="cpu")
            for samples in chosen[order].split(size):
                value = batch_loss(samples, "mean")
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += float(value.detach()) * len(samples)
            if len(watched):
                with torch.no_grad():
                    total = sum(float(batch_loss(samples, "sum")) for samples in watched.split(size))
            loss = total / len(watched if len(watched) else chosen)
            history.append(loss)
            if loss < best_loss * (1 - 1e-4):
                best, best_loss, waited = [value.detach().cpu().clone() for value in parameters], loss, 0
            else:
                waited += 1
                if waited >= self.patience:
                    break
        if best_loss == float("inf"):
            raise ValueError(f"R must hold numbers that float32 can train on; the loss was never finite: {history[:3]}")
        return _folded(best, mean, scale), history

    @torch.no_grad()
    def _logits(self, R: ArrayLike | Pairs) -> Array:
        """Return class logits ``(B, classes)``; a wide first layer runs in float32."""
        network_, inputs = self.to_module(), self._inputs(R, reset=False)
        wide = network_.get_buffer("weight0").numel() > _DOUBLE_LIMIT
        parts = zip(*(torch.split(value.float() if wide else value, network.CHUNK) for value in inputs), strict=True)
        result: Array = torch.cat([network_(*part).double() for part in parts]).numpy()
        return result


def _folded(parameters: list[Tensor], mean: Tensor, scale: Tensor) -> list[Tensor]:
    """Return the parameters with the standardisation inside the first layer."""
    weight = parameters[0] / scale
    return [weight, parameters[1] - weight @ mean, *parameters[2:]]
