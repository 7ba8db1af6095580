"""Triton device code of fastgrad; imported as ``fastgrad.kernels`` and nothing else.

Another project owns the top-level import name ``kernels``, so importing this folder under that name is refused
instead of shadowing it.
"""

if __name__ != "fastgrad.kernels":
    raise ImportError(
        f"the kernels of fastgrad are imported as 'fastgrad.kernels', not as {__name__!r}; "
        "install the package with 'pip install -e .'"
    )
