"""Operators: what runs where, eager forms, Triton launchers and their tuning.

An operator is an eager form beside its fake form, which gives shapes alone (`last_layer`, ``conv``,
`channel_moments`). Where it has a kernel, that is a file in ``kernels/``, a launcher in ``triton/`` and a function in
`tune`; `dispatch` chooses. A dtype that kernels serve is a row of `fastgrad.checks.KERNEL_DTYPES`, a GPU one of
`tune.KNOWN_ARCHITECTURES`.
"""
