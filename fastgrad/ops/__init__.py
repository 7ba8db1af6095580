"""Operators: what runs where, eager forms, Triton launchers and their tuning.

An operator has an eager form and a fake form, which computes only shapes (`last_layer`, ``conv``, `channel_moments`).
A kernel adds a file in ``kernels/``, a launcher in ``triton/`` and a function in `tune`; `dispatch` chooses between
kernel and eager form. `fastgrad.checks.KERNEL_DTYPES` lists the dtypes that kernels serve, and
`tune.KNOWN_ARCHITECTURES` the GPUs.
"""
