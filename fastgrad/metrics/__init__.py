"""Metrics on arrays or tensors; scikit-learn is imported where it is used.

Scores follow the estimators of this package: higher means less reliable. `detection`: does a score separate
challenging samples from clean ones? `calibration`: does a probability equal the share of right answers? `selective`:
what is gained by answering only where the uncertainty is low?
"""

from __future__ import annotations

from fastgrad.metrics.calibration import Reliability, brier, calibration_report, ece, mce, nll, reliability
from fastgrad.metrics.detection import aupr, auroc, detection_accuracy, detection_report, fpr_at_tpr
from fastgrad.metrics.selective import RiskCoverage, aurc, e_aurc, risk_coverage, threshold_for

__all__ = [
    "Reliability",
    "RiskCoverage",
    "aupr",
    "aurc",
    "auroc",
    "brier",
    "calibration_report",
    "detection_accuracy",
    "detection_report",
    "e_aurc",
    "ece",
    "fpr_at_tpr",
    "mce",
    "nll",
    "reliability",
    "risk_coverage",
    "threshold_for",
]
