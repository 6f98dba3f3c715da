"""Files that travel with the package: beside it in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path

from mpcserve.errors import ConfigError


def bundled(*parts: str) -> Path:
    """Path of a bundled file such as `bundled("models", "mnist_cnn.onnx")`. Raises: ConfigError."""
    package = Path(__file__).resolve().parent
    for root in (package, package.parent):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise ConfigError(
        f"{'/'.join(parts)}: not among the files of this installation",
        "install mpcserve again, or run it from a complete checkout",
    )
