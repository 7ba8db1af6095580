"""The server's metrics for Prometheus, including drift."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fastgrad.checks import extra
from fastgrad.deploy.drift import DriftMonitor, ScoreReference
from fastgrad.deploy.file.description import Description

with extra("serve"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

RECENT = 1000
#: Bounds of histograms: seconds, and inputs.
_TIMES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts and distributions of one version of a file, in their own registry.

    The in-distribution scores of the description define the uncertainty's buckets and the drift monitor, which is None
    without them. ``false_alarm_rate`` belongs to the threshold in use; None without one.
    """

    def __init__(self, description: Description, false_alarm_rate: float | None, drift_false_alarm_rate: float) -> None:
        own: dict[str, Any] = {"namespace": "fastgrad", "registry": CollectorRegistry()}
        self._own = own
        self._recent = recent = deque[bool](maxlen=RECENT)
        text = "Answers of /predict and refused requests by HTTP status"
        self.requests = Counter("requests", text, ["status"], **own)
        # Without this, the counter is absent until the first answer, and has no rate.
        self.requests.labels("200")
        self.predictions = Counter("predictions", "Predictions by reliability", ["reliable"], **own)
        text = "Time from a request's headers to its answer"
        self.latency = Histogram("request_seconds", text, buckets=_TIMES, **own)
        self.batch_size = Histogram("batch_size", "Inputs in a batch", buckets=_SIZES, **own)
        reference, gauge = description.score_reference(), self.gauge
        text, scores = "Uncertainty of predictions", _buckets(reference)
        self.uncertainty = Histogram("uncertainty", text, buckets=scores, **own)
        text = f"Share called unreliable among the last {RECENT} predictions"
        gauge("share_flagged", text, lambda: sum(recent) / max(1, len(recent)))
        if false_alarm_rate is not None:
            gauge("expected_share_flagged", "That share on in-distribution inputs", lambda: false_alarm_rate)
        self.monitor: DriftMonitor | None = None
        if reference is not None:
            self.monitor = monitor = DriftMonitor(
                reference, false_alarm_rate=drift_false_alarm_rate, wrong_above=description.wrong_above
            )
            gauge("drift_evidence", "Capital of the bet that inputs have drifted", lambda: monitor.evidence)
            gauge("drift_scores", "Scores that the drift monitor has read", lambda: monitor.count)
            shown = f"1 once drift is shown; probability of ever being wrong <= {drift_false_alarm_rate:g}"
            gauge("drift_alarm", shown, lambda: monitor.alarm)
            if description.wrong_above is not None:
                text = f"Estimated share of wrong answers among the last {RECENT}, or a bound of its 95 % interval"
                for bound, suffix in (("rate", ""), ("low", "_low"), ("high", "_high")):
                    gauge("error_rate" + suffix, text, partial(_estimate, monitor, bound))

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is computed when Prometheus asks for it."""
        Gauge(name, text, **self._own).set_function(value)

    def observe(self, answer: dict[str, Any]) -> None:
        """Record one answer."""
        self.uncertainty.observe(answer["uncertainty"])
        reliable = answer["reliable"]
        self.predictions.labels({True: "yes", False: "no", None: "unknown"}[reliable]).inc()
        if reliable is not None:
            self._recent.append(not reliable)
        if self.monitor is not None:
            self.monitor.update(answer["uncertainty"], answer["risk"])

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return bytes(generate_latest(self._own["registry"]))


def _estimate(monitor: DriftMonitor, bound: str) -> float:
    """Return the estimated error rate or a bound of its interval; NaN if there is none."""
    return float(getattr(monitor.error_rate, bound, math.nan))


def _buckets(reference: ScoreReference | None) -> tuple[float, ...]:
    """Return quantiles of the in-distribution scores and two steps beyond the last; without scores, powers of ten."""
    if reference is None or len(reference.edges) < 2:
        return tuple(float(10.0**k) for k in range(-6, 7))
    levels = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
    edges = np.quantile(reference.edges, levels).tolist()
    spread = edges[-1] - edges[0]
    edges += [edges[-1] + spread, edges[-1] + 3 * spread]
    return tuple(dict.fromkeys(edges))
