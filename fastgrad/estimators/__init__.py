"""Estimators on gradient features: `UncertaintyDetector` and `IntrospectiveClassifier`."""

from __future__ import annotations

from .detector import UncertaintyDetector

__all__ = ["UncertaintyDetector"]
