"""Amounts as people read them. For reports: machines are given numbers."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """1234567 → "1.23 MB"; decimal units, as networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def counted(count: int, one: str) -> str:
    """3, "bit" → "3 bits"."""
    return f"{count} {one}" if count == 1 else f"{count} {one}s"


def human_seconds(seconds: float) -> str:
    """0.0123 → "12.3 ms"."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.1f} min"
