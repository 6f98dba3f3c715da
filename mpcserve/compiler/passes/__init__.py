"""Compiler passes, one file each; their order is in `compiler.pipeline`."""
