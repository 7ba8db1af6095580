"""Squared gradient norms: all contrasts of the last layer in closed form, every parameter of a network per sample.

The model runs on each sample of a batch (`fastgrad.engine`), and one backward pass gives every parameter's norms.
"""
