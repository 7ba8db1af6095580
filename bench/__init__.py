"""Measurements, in rooms that know only those named before them.

- ``harness``: one case measured, checked before it is timed; results files.
- ``micro``: what is measured: operators and networks against the alternatives.
- ``report``: pages, figures and the README's blocks from results files.
- ``gpu``: the kernels on a device, as compiled without one, and as a static model expects.
- ``paper``: the evaluation tables, see its README.md.
- ``deploy``: exported files, the server under load, the drift monitor.

``run`` is ``fastgrad bench``; ``selections`` names what it measures; ``results`` is what was measured.
"""
