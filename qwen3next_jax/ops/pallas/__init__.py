"""Kernels for devices, behind the operations that use them."""
