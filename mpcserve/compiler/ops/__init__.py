"""Lowering functions by family; every module here is searched by `compiler.registry`."""
