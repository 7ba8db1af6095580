"""Drift monitor: measured false-alarm rate and delay, compared with a threshold on the moving mean.

In-distribution scores are standard normal; the monitor sees only ranks, so its false alarms do not depend on that. The
thresholds on the mean use the calibration scores' mean and spread. The "tuned" one is moreover set to the monitor's
measured false-alarm rate on the true distribution, which nobody can do in production.
``python -m bench.deploy.drift`` takes two minutes on one core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import pages
from fastgrad.deploy.drift import DriftMonitor, ScoreReference

Scores = NDArray[np.float64]
#: Scores to calibrate on and before the change, the mean's window, the rate of false alarms.
CALIBRATION, BEFORE, WINDOW, ALPHA = 2000, 1000, 100, 0.01
#: Streams in distribution and their length; streams with a change and their length after it.
STREAMS, LENGTH, SHIFTED, LONGEST = 500, 5000, 60, 4000

SHIFTS: dict[str, Callable[[np.random.Generator, int], Scores]] = {
    **{f"mean +{rise} sd": lambda r, n, rise=rise: r.normal(size=n) + rise for rise in (0.25, 0.5, 1, 2, 4)},
    "1 image in 10 at +4 sd": lambda r, n: r.normal(size=n) + 4 * (r.random(n) < 0.1),
    "slow rise, +1 sd after 2,000": lambda r, n: r.normal(size=n) + np.arange(n) / 2000,
    "mean -1 sd (too certain)": lambda r, n: r.normal(size=n) - 1,
    "spread x 2, same mean": lambda r, n: 2 * r.normal(size=n),
    "frozen camera (one score)": lambda r, n: np.full(n, r.normal()),
}


def moving_mean(calibration: Scores, stream: Scores) -> Scores:
    """Return the standardised mean of the last WINDOW scores at every step (-inf before the window is full)."""
    means = np.lib.stride_tricks.sliding_window_view(stream, WINDOW).mean(1)
    z = (means - calibration.mean()) / (calibration.std() / WINDOW**0.5)
    return np.concatenate([np.full(WINDOW - 1, -np.inf), z])


def monitors(calibration: Scores, seed: int) -> dict[str, DriftMonitor]:
    reference = ScoreReference.from_scores(calibration, seed=seed)
    return {
        "fastgrad, ever": DriftMonitor(reference, false_alarm_rate=ALPHA, seed=seed),
        "fastgrad, average": DriftMonitor(reference, false_alarm_rate=0.001, form="average", seed=seed),
    }


def false_alarms() -> tuple[list[dict[str, Any]], float]:
    """Return rows, and the threshold on the mean that raises as many alarms as the monitor did."""
    random = np.random.default_rng(0)
    nominal = NormalDist().inv_cdf(1 - ALPHA)
    alarms: Counter[str] = Counter()
    peaks, run_lengths = [], []
    for i in range(STREAMS):
        calibration, stream = random.normal(size=CALIBRATION), random.normal(size=LENGTH)
        for method, monitor in monitors(calibration, i).items():
            alarms[method] += monitor.update(stream)
        run_lengths.append(monitor.alarm_at or LENGTH)
        peaks.append(moving_mean(calibration, stream).max())
    mean = f"mean of {WINDOW} at {ALPHA:.0%}"
    alarms[mean] = int((np.array(peaks) >= nominal).sum())
    bound = ALPHA * STREAMS + 4 * (STREAMS * ALPHA * (1 - ALPHA)) ** 0.5
    rows = [
        {"kind": "false alarms", "method": method, "streams": STREAMS, "length": LENGTH, "stated": stated,
         "alarms": alarms[method], "rate": alarms[method] / STREAMS,
         "within": bool(np.mean(run_lengths) >= 1000) if method == "fastgrad, average" else alarms[method] <= bound}
        for method, stated in (
            ("fastgrad, ever", f"at most {ALPHA:.0%} ever"), ("fastgrad, average", "1 in 1,000 images or fewer"),
            (mean, f"{ALPHA:.0%} a window"),
        )
    ]  # fmt: skip
    # If the monitor raised no alarm, the threshold is the highest peak, which one stream reaches.
    return rows, float(np.sort(peaks)[-max(alarms["fastgrad, ever"], 1)])


def delays(tuned: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each shift and method: images from the change to the alarm."""
    for name, draw in SHIFTS.items():
        found: dict[str, list[float]] = {"fastgrad, ever": [], "fastgrad, average": [], "tuned mean": []}
        random = np.random.default_rng(1)
        for i in range(SHIFTED):
            calibration, good = random.normal(size=CALIBRATION), random.normal(size=BEFORE)
            bad = draw(random, LONGEST)
            for method, monitor in monitors(calibration, i).items():
                if monitor.update(good):
                    if method == "fastgrad, ever":
                        continue  # a false alarm has no delay
                    monitor.reset()
                begin = monitor.count
                any(monitor.update(bad[start : start + 50]) for start in range(0, LONGEST, 50))
                found[method].append(np.inf if monitor.alarm_at is None else monitor.alarm_at - begin)
            late = moving_mean(calibration, np.concatenate([good, bad])) >= tuned
            if not late[:BEFORE].any():
                found["tuned mean"].append(late[BEFORE:].argmax() + 1 if late.any() else np.inf)
        for method, values in found.items():
            # None means longer than the stream.
            median, p90 = (
                None if np.isinf(value) else int(value)
                for value in (np.quantile(values, q, method="higher") for q in (0.5, 0.9))
            )
            yield {
                "kind": "delay", "shift": name, "method": method, "streams": len(values), "median": median, "p90": p90,
                "missed": int(np.isinf(values).sum()), "longest": LONGEST,
            }  # fmt: skip


def measure() -> Iterator[dict[str, Any]]:
    alarms, tuned = false_alarms()
    yield from alarms
    yield from delays(tuned)


if __name__ == "__main__":
    pages.command("drift", __doc__, measure, packages=("numpy",))
