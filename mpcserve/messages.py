"""Messages: JSON objects of bounded depth, size and numbers, whoever sends them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

MAX_DEPTH = 16  # nesting of a JSON message
MAX_VALUES = 1 << 17  # values in a JSON message
MAX_DIGITS = 20  # of an integer in a message: 2^64 has 20


def json_of(message: Mapping[str, object]) -> bytes:
    """As it goes over the wire."""
    text = json.dumps(message, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode(errors="replace")  # a lone surrogate becomes "?": the peer would refuse it


def parse_message(payload: bytes) -> dict[str, object]:
    """A JSON object of bounded depth, size and numbers.

    Raises: ValueError (RecursionError for absurd nesting) on anything else.
    """
    message = json.loads(
        payload.decode("utf-8"),
        parse_int=_integer,
        parse_float=_finite,
        parse_constant=_finite,
    )
    if not isinstance(message, dict):
        raise ValueError(f"a JSON {type(message).__name__}")
    _check_values(message)
    return message


def _integer(digits: str) -> int:
    # int() of a megabyte of digits takes quadratic time.
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def _check_values(message: dict[str, object]) -> None:
    """Bound depth and count; refuse lone surrogates, which no log could print."""
    level: list[object] = [message]
    seen = 0
    for _ in range(MAX_DEPTH):
        deeper: list[object] = []
        for value in level:
            if isinstance(value, dict):
                deeper.extend(value.values())
                deeper.extend(value)
            elif isinstance(value, list):
                deeper.extend(value)
            elif isinstance(value, str):
                value.encode()  # UnicodeEncodeError is a ValueError
        seen += len(deeper)
        if seen > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        level = deeper
        if not level:
            return
    raise ValueError(f"nesting deeper than {MAX_DEPTH}")
