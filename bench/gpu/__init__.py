"""The kernels on GPUs: what a device measures, what the compiler makes of them without one, and what they must move."""
