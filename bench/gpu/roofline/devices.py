"""Data-sheet peaks and limits of the modelled devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        arch: Its name in the compile report.
        processors: Streaming multiprocessors or compute units.
        clock_hz: Boost clock.
        memory: Bytes per second of device memory.
        cache: Bytes of second-level cache (AMD's last-level cache included).
        cache_rate: Bytes per second from it.
        half: Dense float16/bfloat16 matrix operations per second.
        single: Matrix operations per second for float32 operands: three TF32 products, or AMD's own float32.
        shared: Bytes of shared memory of a processor.
        registers: 32-bit registers of a processor.
        threads: Resident threads of a processor, at most.
        lanes: float32 additions or multiplications a processor starts per cycle.
        special: Exponentials a processor starts per cycle.
        warp: Threads that run in step.
    """

    arch: str
    processors: int
    clock_hz: float
    memory: float
    cache: float
    cache_rate: float
    half: float
    single: float
    shared: int
    registers: int = 65536
    threads: int = 2048
    lanes: int = 128
    special: int = 16
    warp: int = 32


DEVICES = {
    "A100": Device("sm_80", 108, 1.41e9, 2.039e12, 40e6, 5.0e12, 312e12, 156e12 / 3, 164 << 10, lanes=64),
    "H100": Device("sm_90", 132, 1.755e9, 3.35e12, 50e6, 7.0e12, 989e12, 494e12 / 3, 228 << 10),
    "H200": Device("sm_90", 132, 1.755e9, 4.8e12, 50e6, 7.0e12, 989e12, 494e12 / 3, 228 << 10),
    "B200": Device("sm_100", 148, 1.85e9, 8.0e12, 126e6, 12e12, 2250e12, 1125e12 / 3, 228 << 10),
    "MI300X": Device(
        "gfx942", 304, 2.1e9, 5.3e12, 256e6, 11e12, 1307e12, 163e12, 64 << 10, registers=131072, warp=64
    ),
}
