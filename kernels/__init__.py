"""Triton device code of fastgrad; imported only as ``fastgrad.kernels``.

Another project owns the top-level import name ``kernels``, and libraries look for that project by importing the
name. In a checkout they find this folder, so under a foreign name it is an empty package without a file or a version,
which such a library takes for "not installed"; using anything in it is refused.
"""

if __name__ != "fastgrad.kernels":
    __path__ = []
    del __file__

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"the kernels of fastgrad are imported as 'fastgrad.kernels', not as {__name__!r}; "
            "install the package with 'pip install -e .'"
        )
