"""Measure implementations of one task side by side: first whether they are right, then how long they take.

Rules, the same for every case:

- An implementation is checked against float64 on the inputs it is timed on. One that fails, or that does not accept
  the task, is reported with ``correct: false`` and never timed.
- The implementations of a case take turns, sample by sample, so that a machine that slows down slows all of them.
  Those of whole-network cases do so in processes of their own on a CPU (see `bench.harness.isolated`).
- On a CPU a sample is wall time (``time.perf_counter``) over as many calls as fill a millisecond, with two threads
  unless asked otherwise. On a GPU it is the time between two CUDA events around one replay of a CUDA graph (one call
  where the task cannot be captured), with the second-level cache overwritten before it.
- Peak memory is what the framework's allocator held at most during one call, beyond what it held before: CUDA's
  statistics on a GPU, the profiler's record of every allocation on a CPU. Scratch that a C library allocates by
  itself is in neither.
- Copy bandwidth and matrix rate, the floors of the figures, are measured in the same run.
"""
