"""Operators: schemas beside their shape contracts, what runs where, eager forms, Triton launchers and their tuning.

An operator is a row of `schemas`, an eager form (``last_layer``, ``conv``, `channel_moments`) and, where it has a
kernel, a file in ``kernels/``, a launcher in ``triton/`` and a function in `tune`; `dispatch` chooses between the two.
A dtype that kernels serve is a row of `fastgrad.checks.KERNEL_DTYPES`, a GPU one of `tune.KNOWN_ARCHITECTURES`.
"""
