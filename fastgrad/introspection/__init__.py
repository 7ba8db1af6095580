"""The introspective classifier: a second answer from the last layer's contrasts."""

from fastgrad.introspection.classifier import IntrospectiveClassifier

__all__ = ["IntrospectiveClassifier"]
