"""The kernels on GPUs: times on a device, and compiled and interpreted code without one."""
