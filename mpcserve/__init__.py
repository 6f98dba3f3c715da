"""Encrypted inference: ONNX models served by three parties, none of which sees input or weights."""

from mpcserve.version import __version__

__all__ = ["__version__"]
