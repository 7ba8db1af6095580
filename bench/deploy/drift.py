"""Drift monitor: measured false-alarm rate and delay, beside a threshold on the moving mean.

Run ``python -m bench.deploy.drift`` (two minutes on one core; ``--quick`` for a look). The scores are standard
normal in distribution; the monitor sees ranks only, so its false alarms do not depend on that choice. The
thresholds on the mean know mean and spread of the calibration scores; "tuned" ones have moreover been set,
on the true distribution, to the monitor's own measured false-alarm rate, which nobody can do in production.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report import pages
from fastgrad.deploy.drift import DriftMonitor, ScoreReference

Scores = NDArray[np.float64]
CALIBRATION, WINDOW, ALPHA = 2000, 100, 0.01

SHIFTS: dict[str, Callable[[np.random.Generator, int], Scores]] = {
    "mean +0.25 sd": lambda r, n: r.normal(size=n) + 0.25,
    "mean +0.5 sd": lambda r, n: r.normal(size=n) + 0.5,
    "mean +1 sd": lambda r, n: r.normal(size=n) + 1,
    "mean +2 sd": lambda r, n: r.normal(size=n) + 2,
    "mean +4 sd": lambda r, n: r.normal(size=n) + 4,
    "1 image in 10 at +4 sd": lambda r, n: r.normal(size=n) + 4 * (r.random(n) < 0.1),
    "slow rise, +1 sd after 2,000": lambda r, n: r.normal(size=n) + np.arange(n) / 2000,
    "mean -1 sd (too certain)": lambda r, n: r.normal(size=n) - 1,
    "spread x 2, same mean": lambda r, n: 2 * r.normal(size=n),
    "frozen camera (one score)": lambda r, n: np.full(n, r.normal()),
}


def moving_mean(calibration: Scores, stream: Scores) -> Scores:
    """Standardised mean of the last WINDOW scores at every step (-inf before the window is full)."""
    sums = np.cumsum(np.concatenate([[0.0], stream]))
    means = (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW
    z = (means - calibration.mean()) / (calibration.std() / WINDOW**0.5)
    return np.concatenate([np.full(WINDOW - 1, -np.inf), z])


def first(hits: NDArray[np.bool_]) -> int | None:
    """Number (from 1) of the first hit."""
    return int(hits.argmax()) + 1 if hits.any() else None


def false_alarms(streams: int, length: int, seed: int) -> tuple[list[dict[str, Any]], float]:
    random = np.random.default_rng(seed)
    nominal = NormalDist().inv_cdf(1 - ALPHA)
    ever = average = 0
    peaks = []
    run_lengths = []
    for i in range(streams):
        calibration, stream = random.normal(size=CALIBRATION), random.normal(size=length)
        reference = ScoreReference.from_scores(calibration, seed=i)
        ever += DriftMonitor(reference, false_alarm_rate=ALPHA, seed=i).update(stream)
        monitor = DriftMonitor(reference, false_alarm_rate=0.001, form="average", seed=i)
        average += monitor.update(stream)
        run_lengths.append(monitor.alarm_at or length)
        peaks.append(moving_mean(calibration, stream).max())
    # The tuned threshold lets through as many in-distribution streams as the monitor did (at least one).
    tuned = float(np.sort(peaks)[-max(ever, 1)])
    plain = int((np.array(peaks) >= nominal).sum())
    bound = ALPHA * streams + 4 * (streams * ALPHA * (1 - ALPHA)) ** 0.5
    return [
        {"kind": "false alarms", "method": "fastgrad, ever", "streams": streams, "length": length,
         "stated": f"at most {ALPHA:.0%} ever", "alarms": ever, "rate": ever / streams, "within": ever <= bound},
        {"kind": "false alarms", "method": "fastgrad, average", "streams": streams, "length": length,
         "stated": "1 in 1,000 images or fewer", "alarms": average, "rate": average / streams,
         "within": float(np.mean(run_lengths)) >= 1000, "mean_run_length": float(np.mean(run_lengths))},
        {"kind": "false alarms", "method": f"mean of {WINDOW} at {ALPHA:.0%}", "streams": streams, "length": length,
         "stated": f"{ALPHA:.0%} a window", "alarms": plain, "rate": plain / streams, "within": plain <= bound},
    ], tuned  # fmt: skip


def delays(tuned: float, streams: int, longest: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    before = 1000
    for name, draw in SHIFTS.items():
        found: dict[str, list[int | None]] = {"fastgrad, ever": [], "fastgrad, average": [], "tuned mean": []}
        random = np.random.default_rng(seed)
        for i in range(streams):
            calibration, good, bad = (
                random.normal(size=CALIBRATION),
                random.normal(size=before),
                draw(random, longest),
            )
            reference = ScoreReference.from_scores(calibration, seed=i)
            ever = DriftMonitor(reference, false_alarm_rate=ALPHA, seed=i)
            average = DriftMonitor(reference, false_alarm_rate=0.001, form="average", seed=i)
            for method, monitor in (("fastgrad, ever", ever), ("fastgrad, average", average)):
                if monitor.update(good):
                    if method.endswith("ever"):
                        continue  # a false alarm has no delay
                    monitor.reset("the alarm was counted")
                delay = None
                for start in range(0, longest, 50):
                    if monitor.update(bad[start : start + 50]):
                        assert monitor.alarm_at is not None
                        delay = start + 1 + (monitor.alarm_at - (monitor.count - 50)) - 1
                        break
                found[method].append(delay)
            z = moving_mean(calibration, np.concatenate([good, bad]))
            if not (z[:before] >= tuned).any():
                found["tuned mean"].append(first(z[before:] >= tuned))
        for method, values in found.items():
            hit = sorted(value for value in values if value is not None)
            padded = hit + [None] * (len(values) - len(hit))
            rows.append({"kind": "delay", "shift": name, "method": method, "streams": len(values),
                         "median": padded[len(padded) // 2], "p90": padded[int(len(padded) * 0.9)],
                         "missed": len(values) - len(hit), "longest": longest})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    streams, length, shifted, longest = (60, 2000, 10, 2000) if args.quick else (500, 5000, 60, 4000)
    alarms, tuned = false_alarms(streams, length, seed=0)
    delay_rows = delays(tuned, shifted, longest, seed=1)
    pages.save("drift", alarms + delay_rows, packages=("numpy",), folder=args.out)


if __name__ == "__main__":
    main()
