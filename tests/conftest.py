"""What every test starts from: no settings of the person who runs it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_personal_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config or a terminal width from the outside changes no result."""
    for name in ("MPCSERVE_CONFIG", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
