"""Launchers of the Triton kernels: they take the operators' arguments, tensors of any strides.

Importing a module of this package imports Triton. A launcher never synchronises with the device, and what it allocates
depends only on shapes, so it can be captured in a CUDA graph.
"""
