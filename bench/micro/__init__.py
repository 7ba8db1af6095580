"""Benchmarks by question: the last layer, the whole network, the rows of the introspective network, end to end.

Each question has ``cases(size, device, seed)``, which ``fastgrad bench`` and ``test_micro.py`` share; ``size`` is
``"tiny"`` (to walk through the code), ``"quick"`` or ``"full"``. ``conv_routes`` and ``network.growth`` are commands of
their own.
"""
