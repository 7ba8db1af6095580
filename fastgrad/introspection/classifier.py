"""`IntrospectiveClassifier`: a second opinion on the class, from the gradients of every contrast."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor
from torch.nn.functional import linear

from fastgrad import checks
from fastgrad.gradients.contrasts import contrast_rows, contrast_rows_linear
from fastgrad.losses import LOSSES
from fastgrad.scores.fitted import Fitted, as_buffer
from fastgrad.scores.rows import as_tensor

Pairs = Mapping[str, ArrayLike]
#: Share of the sources that decides when to stop, fewest samples for that, and epochs without improvement before it.
_SHARE, _FEWEST, _PATIENCE = 0.1, 20, 10


class IntrospectiveNetwork(Fitted):
    """Class logits from contrast rows, given as such or as the features and logits that make them.

    Tensors ``weight0``, ``bias0``, ... are the layers, between which are sigmoids. Options: ``layers``, ``loss``.
    """

    def forward(self, rows: Tensor, logits: Tensor | None = None) -> Tensor:
        """Return class logits ``(B, classes)`` of rows ``(B, N*D)`` or ``(B, N, D)``, or of features and logits."""
        names = [f"{kind}{index}" for index in range(self.options["layers"]) for kind in ("weight", "bias")]
        weight, bias, *others = (self.get_buffer(name).to(rows.dtype) for name in names)
        if logits is None:
            hidden = linear(rows.flatten(1), weight, bias)
        else:
            hidden = contrast_rows_linear(rows, logits, weight, bias, loss=self.options["loss"])
        for weight, bias in zip(others[::2], others[1::2], strict=True):
            hidden = linear(torch.sigmoid(hidden), weight, bias)
        return hidden


class IntrospectiveClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The introspective network H as a scikit-learn classifier, trained by scikit-learn's ``MLPClassifier``.

    Its input is row k of the last layer's gradient for contrast class k, for all k: ``delta^(k)_k h``, N*D numbers, or
    ``{"features": h, "logits": z}``, from which these rows are made. By default it has the published shape: three
    linear layers with sigmoids, N*D-300-100-N, for D = 64 and N = 10 640-300-100-10. The source is Prabhushankar and
    AlRegib, "Introspective Learning", 2022.

    Args:
        hidden: Widths of the hidden layers.
        loss: The loss whose contrast rows are formed from features and logits.
        max_epochs: Largest number of passes over the data. Training stops earlier if the loss of a tenth of the
            sources, which is not trained on, has not fallen for ten epochs.
        random_state: Seed of the initial weights, of that tenth and of the order of the samples.

    Attributes:
        classes_: The labels.
        network_: The fitted `IntrospectiveNetwork`.
        n_iter_: The epochs that ran.
    """

    def __init__(
        self, *, hidden: tuple[int, ...] = (300, 100), loss: str = "mse", max_epochs: int = 100, random_state: Any = 0
    ) -> None:
        self.hidden = hidden
        self.loss = loss
        self.max_epochs = max_epochs
        self.random_state = random_state

    def fit(self, R: ArrayLike | Pairs, y: ArrayLike, *, sources: ArrayLike | None = None) -> IntrospectiveClassifier:
        """Train the network on labelled samples; return the classifier itself.

        Args:
            R: Rows ``(B, N*D)`` or ``(B, N, D)``, or ``{"features": (B, D), "logits": (B, N)}``.
            y: Labels ``(B,)``.
            sources: ``(B,)``, the source of each sample as an integer; a clean image and its challenges share one.
                Samples of one source are all trained on or all held out. Negative or None: a source of its own.

        Raises:
            ValueError: A parameter is out of range, or shapes of R, y and sources do not fit.
        """
        checks.one_of("loss", self.loss, LOSSES)
        checks.at_least(1, max_epochs=self.max_epochs)
        if np.ndim(self.hidden) != 1 or any(not isinstance(n, (int, np.integer)) or n < 1 for n in self.hidden):
            raise ValueError(f"hidden must hold widths of at least 1; it was {self.hidden!r}")
        inputs = self._inputs(R, reset=True)
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None: y holds a label per row of R")
        labels = column_or_1d(np.asarray(y.cpu() if isinstance(y, Tensor) else y), warn=True)
        checks.shape_is("y", labels, (len(inputs[0]),), "one label per row of R")
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        random = check_random_state(self.random_state)
        watched = watched_of(checks.sources_of(sources, len(codes)), random)
        rows = (inputs[0] if len(inputs) == 1 else contrast_rows(*inputs, loss=self.loss).flatten(1)).numpy()
        with np.errstate(over="ignore"):
            scaler = StandardScaler().fit(rows)
        if not np.isfinite(scaler.scale_).all():
            raise ValueError("R must hold numbers whose squares float64 can hold; they were larger")
        scaled = scaler.transform(rows).astype(np.float32)
        trained = MLPClassifier(
            tuple(map(int, self.hidden)), activation="logistic", batch_size=min(128, int((~watched).sum())),
            random_state=int(random.randint(2**31 - 1)),
        )  # fmt: skip
        every, best, lowest, waited, self.n_iter_ = np.arange(max(2, len(self.classes_))), trained, np.inf, 0, 0
        while self.n_iter_ < self.max_epochs and waited < _PATIENCE:
            trained.partial_fit(scaled[~watched], codes[~watched], classes=every)
            loss = float(trained.loss_)
            if watched.any():
                loss = log_loss(codes[watched], trained.predict_proba(scaled[watched]), labels=every)
            self.n_iter_, waited = self.n_iter_ + 1, waited + 1
            if loss < lowest * (1 - 1e-4):
                best, lowest, waited = copy.deepcopy(trained), loss, 0
        self.network_ = _network(best, scaler, self.loss)
        return self

    def decision_function(self, R: ArrayLike | Pairs) -> checks.Array:
        """Return class logits ``(B, classes)``; for two classes ``(B,)``, the log odds of the second."""
        logits = self._logits(R)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, R: ArrayLike | Pairs) -> checks.Array:
        """Return class probabilities ``(B, classes)``."""
        result: checks.Array = torch.from_numpy(self._logits(R)).softmax(-1).numpy()
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

    def _inputs(self, R: ArrayLike | Pairs, *, reset: bool) -> tuple[Tensor, ...]:
        """Return R as one tensor of rows or as features and logits, float64."""
        # One of SciPy's sparse formats is a dictionary, too.
        if isinstance(R, Mapping) and not issparse(R):
            if set(R) != {"features", "logits"}:
                raise ValueError(f"R must have the entries 'features' and 'logits'; it had {list(R)}")
            arrays = [checks.to_array(f"R[{name!r}]", R[name]) for name in ("features", "logits")]
            if any(array.ndim != 2 or array.size == 0 for array in arrays) or len(arrays[0]) != len(arrays[1]):
                shapes = f"{arrays[0].shape} and {arrays[1].shape}"
                raise ValueError(f"R must have features (B, D) and logits (B, N), not of shapes {shapes}")
        else:
            array = checks.validated(self, "R", R, reset=reset)
            arrays = [array.reshape(len(array), -1)]
        width = int(np.prod([array.shape[1] for array in arrays]))
        if reset:
            self.n_features_in_ = width
        if width != self.n_features_in_:
            raise ValueError(f"R must have the {self.n_features_in_} numbers a sample of fit; it had {width}")
        return tuple(as_tensor(array) for array in arrays)

    @torch.no_grad()
    def _logits(self, R: ArrayLike | Pairs) -> checks.Array:
        """Return class logits ``(B, classes)``."""
        network, inputs = self.to_module(), self._inputs(R, reset=False)
        parts = zip(*(value.split(4096) for value in inputs), strict=True)
        result: checks.Array = torch.cat([network(*part) for part in parts]).numpy()
        return result


def watched_of(sources: NDArray[np.intp], random: np.random.RandomState) -> NDArray[np.bool_]:
    """Return which samples decide when to stop: all of a tenth of the sources, or none if they are too few to say."""
    numbers = np.unique(sources, return_inverse=True)[1]
    watched: NDArray[np.bool_] = random.permutation(numbers.max() + 1)[numbers] < round(_SHARE * (numbers.max() + 1))
    return watched if watched.sum() >= _FEWEST else np.zeros_like(watched)


def _network(trained: MLPClassifier, scaler: StandardScaler, loss: str) -> IntrospectiveNetwork:
    """Return a trained network with the standardisation inside the first layer, and one logit for each class."""
    weights, biases = ([v.astype(np.float64) for v in values] for values in (trained.coefs_, trained.intercepts_))
    weights[0] = weights[0] / scaler.scale_[:, None]
    biases[0] = biases[0] - scaler.mean_ @ weights[0]
    if len(biases[-1]) == 1:  # of two classes, the log odds of the second
        weights[-1], biases[-1] = (np.concatenate([0 * v, v], -1) for v in (weights[-1], biases[-1]))
    tensors = {f"weight{i}": as_buffer(value.T) for i, value in enumerate(weights)}
    tensors |= {f"bias{i}": as_buffer(value) for i, value in enumerate(biases)}
    return IntrospectiveNetwork(**tensors, layers=len(weights), loss=loss)
