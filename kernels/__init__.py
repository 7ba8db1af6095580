"""Triton device code of fastgrad; imported only as ``fastgrad.kernels``.

Another project owns the top-level import name ``kernels``, and libraries import it. In a checkout they find this folder
first. Under the foreign name it is that project's package if it is installed; otherwise it is an empty package without
a file or a version, which such a library takes for "not installed", and using anything in it is refused.
"""

if __name__ != "fastgrad.kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    # Any checkout of this project is left out, or two of them on the path would look for each other forever.
    _others = [folder for folder in sys.path if not Path(folder, "kernels", "layer_sqnorm.py").exists()]
    _owner = PathFinder.find_spec(__name__, _others)
    if _owner is not None and _owner.origin is not None and _owner.loader is not None:
        sys.modules[__name__] = _module = module_from_spec(_owner)
        _owner.loader.exec_module(_module)
    else:
        __path__ = []
        del __file__

        def __getattr__(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            raise ImportError(
                f"the kernels of fastgrad are imported as 'fastgrad.kernels', not as {__name__!r}; "
                "install the package with 'pip install -e .'"
            )
