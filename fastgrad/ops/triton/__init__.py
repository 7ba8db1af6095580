"""Launchers of the Triton kernels: plain functions of what the schemas say, tensors of any strides.

Importing a module of this package imports Triton; the operators do so when a Triton implementation is first used. A
launcher never synchronises with the device and allocates by shape alone, so that it can be captured in a CUDA graph.
"""
