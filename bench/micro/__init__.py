"""Benchmarks by question: the last layer, the whole network, the rows of the introspective network, end to end.

Each module has ``cases(size, device, seed)``, which the command line (``fastgrad bench``) and the pytest-benchmark
files beside it share. ``size`` is ``"tiny"`` (to walk through the code), ``"quick"`` or ``"full"``.
"""
