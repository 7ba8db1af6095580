"""Operators: schema and shape contract, eager implementation for any device, Triton launchers, launch heuristics."""
