"""Numba kernels: arrays in, arrays out. Each has an oracle on Python integers in the tests."""
