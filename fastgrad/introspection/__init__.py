"""Second answers: from the last layer's contrasts, and as a correction of the network's logits."""

from fastgrad.introspection.classifier import IntrospectiveClassifier

__all__ = ["IntrospectiveClassifier"]
