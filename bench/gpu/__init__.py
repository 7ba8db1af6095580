"""Checks of the kernels: times on a GPU; compiled and interpreted code without one."""
