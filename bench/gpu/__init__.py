"""The kernels on GPUs: what a device measures, what the compiler makes of them without one, and a static model."""
