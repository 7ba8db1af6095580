"""A static performance model of the kernels: what they should take on GPUs that nobody has timed them on.

Predictions, not measurements. They exist so that the first run on a device tests a claim.

- ``work``: bytes and operations of each launch, as formulas of its shape and configuration.
- ``counter``: counts the same in Triton's interpreter; the tests compare the two.
- ``devices``: peaks and limits from data sheets.
- ``predict``: occupancy from the compile report, and the time that follows.
"""
