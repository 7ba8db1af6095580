"""Launchers of the Triton kernels: functions of what the operators take, tensors of any strides.

Importing a module of this package imports Triton. A launcher never synchronises with the device and allocates by shape
alone, so that it can be captured in a CUDA graph.
"""
