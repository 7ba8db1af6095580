"""What a GPU could still surprise with, checked in Triton's interpreter: addresses, races, order, offsets.

- ``interpreter``: watches every load, store and atomic of a launch and decides in which order its programs run.
- ``watchers``: each address is an element of an operand, read after it was written, and written by one program, or by
  several that an atomic orders; on shapes that no memory holds, addresses and the arithmetic that leads to them.
- ``cases``, ``checks``: edge shapes of every kernel; equal bits in several or all orders of the programs.
"""
