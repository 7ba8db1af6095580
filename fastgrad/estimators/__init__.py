"""Estimators on gradient features: `UncertaintyDetector` and `IntrospectiveClassifier`."""

from __future__ import annotations

from .classifier import IntrospectiveClassifier
from .detector import UncertaintyDetector

__all__ = ["IntrospectiveClassifier", "UncertaintyDetector"]
