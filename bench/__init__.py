"""Measurements: speed against other libraries, and the evaluation tables."""
