"""What a GPU could still surprise with, checked in Triton's interpreter: addresses, races, order, schedules, offsets.

- ``interpreter``: watches every load, store and atomic of a launch and decides in which order its programs run.
- ``memory``: each address is an element of an operand, read after it was written, and written by one program, or by
  several that atomics order; operands lie between poisoned margins.
- ``schedule``: programs stop between any two of their memory operations; all orders that could differ, or random ones.
- ``offsets``: shapes that no memory holds, with addresses compared to those of 64-bit arithmetic.
- ``cases``: every kernel with edge shapes.

Run all of it with ``python -m bench.gpu.sanitize``.
"""
