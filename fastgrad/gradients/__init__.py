"""Squared gradient norms: all contrasts of the last layer in closed form, every parameter of a network per sample.

A network is planned first: which calls use which parameter, and which dimension is the batch. One forward pass with
probes and one backward pass then give the squared norm of every sample and parameter.
"""
