"""Metrics that scikit-learn lacks, on arrays or tensors.

Scores follow the estimators of this package: higher means less reliable. scikit-learn's `roc_auc_score`,
`average_precision_score`, `log_loss` and `brier_score_loss` do the rest.
"""

from fastgrad.metrics.calibration import Reliability, ece, mce, reliability
from fastgrad.metrics.risk_coverage import RiskCoverage, augrc, aurc, e_aurc, risk_coverage
from fastgrad.metrics.thresholds import certified_threshold, false_alarm_threshold, fpr_at_tpr, threshold_for

__all__ = [
    "Reliability",
    "RiskCoverage",
    "augrc",
    "aurc",
    "certified_threshold",
    "e_aurc",
    "ece",
    "false_alarm_threshold",
    "fpr_at_tpr",
    "mce",
    "reliability",
    "risk_coverage",
    "threshold_for",
]
