"""Measurements, in rooms that know only those named before them.

- ``registry``, ``clock``, ``memory``, ``results_file``: cases, and what pytest-benchmark cannot do.
- ``report``: pages, figures and the blocks of README and documentation from ``results``.
- ``micro``: operators and networks against the alternatives; ``conftest`` has the fixtures, ``paired`` the comparison
  with another revision.
- ``gpu``: the kernels on a device, and as compiled without one.
- ``paper``: the evaluation tables, see its README.md.
- ``deploy``: exported files, the server under load, the drift monitor.
"""
