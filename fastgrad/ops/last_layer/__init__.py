"""Operators of the last layer, from features and logits or from features and weight."""
