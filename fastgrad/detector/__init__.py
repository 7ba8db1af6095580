"""How unusual an input is: blocks, one score each, p-values, one weighted sum."""

from fastgrad.detector.estimator import UncertaintyDetector

__all__ = ["UncertaintyDetector"]
