"""Measurements. Modules import only those named before them.

- ``registry``, ``clock``: cases of speed, and what pytest-benchmark cannot do.
- ``report``: files of results, pages, figures and the blocks of README and documentation from ``results``.
- ``micro``: operators and networks against the alternatives, and, by ``paired``, against another revision.
- ``gpu``: the kernels on a device, and as compiled and interpreted without one.
- ``detection``: what detectors find, see detection/README.md.
- ``deploy``: exported files, the server under load, scoring, the drift monitor.
"""
