"""Gradient-based uncertainty at the speed of inference."""

__version__ = "0.1.0"
