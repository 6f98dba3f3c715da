"""Where every mask comes from: AES-128-CTR streams under keys that are used once.

Rules that must never break:
    1. A stream is named by (pair key, plan digest, bundle id or weight, what it is for); two
       different names give independent AES keys and start counters (HKDF-SHA256).
    2. A stream is read forwards only: a position is never read twice.
    3. A bundle id is used once (see `serving.ledger`), so a name is used once by each side.

Source: HKDF RFC 5869 (expand step only: pair keys are uniform 32-byte strings), CTR SP 800-38A,
GMAC SP 800-38D.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from math import prod

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from mpcserve.ring import HALF_BITS, WORD_BITS, Words, word_type

KEY_BYTES = 32
_BLOCK = 16
Buffer = bytes | bytearray | memoryview
_ZEROS = bytes(1 << 18)
_NONE = np.empty(0, np.uint8)
_AHEAD = 8 << 10
"""Bytes made at once: a call of AES costs as much as a few KiB of it."""


def derive(key: bytes, *context: str | bytes | int) -> bytes:
    """HKDF-Expand(key, context) → 32 bytes. Parts are length-prefixed: no two contexts collide."""
    assert len(key) == KEY_BYTES
    info = bytearray()
    for part in context:
        data = part if isinstance(part, bytes) else str(part).encode()
        info += len(data).to_bytes(4, "little") + data
    return hmac.digest(key, bytes(info) + b"\x01", "sha256")


def bundle_key(pair_key: bytes, digest: str, bundle_id: bytes) -> bytes:
    """The key from which all streams of one bundle are derived, for one pair of parties."""
    return derive(pair_key, "bundle", digest, bundle_id)


def weights_key(pair_key: bytes, digest: str) -> bytes:
    """The seed of the weights' masks of one deployment, for one pair of parties."""
    return derive(pair_key, "weights", digest)


class Mac:
    """GMAC under a key that is used for nothing else, and once.

    Who does not know the key can make two sequences of parts, of the same sizes, that have the same
    tag with a probability of 2^-128 per 16 bytes of them at most. Source: NIST SP 800-38D.
    """

    __slots__ = ("_encryptor",)

    def __init__(self, key: bytes) -> None:
        assert len(key) == KEY_BYTES
        cipher = Cipher(algorithms.AES(key[:_BLOCK]), modes.GCM(key[_BLOCK:]))
        self._encryptor = cipher.encryptor()

    def __repr__(self) -> str:
        return "Mac(<secret>)"

    def tag(self, parts: Iterable[Buffer]) -> bytes:
        """Of the parts, 16 bytes."""
        for part in parts:
            self._encryptor.authenticate_additional_data(part)
        self._encryptor.finalize()
        return self._encryptor.tag


class Stream:
    """An AES-128-CTR key stream, read forwards only; what is read begins at a whole word."""

    __slots__ = ("_ahead", "_at", "_encryptor")

    def __init__(self, seed: bytes) -> None:
        assert len(seed) == KEY_BYTES
        cipher = Cipher(algorithms.AES(seed[:_BLOCK]), modes.CTR(seed[_BLOCK:]))
        self._encryptor = cipher.encryptor()
        self._ahead = _NONE  # made at once for many small reads
        self._at = 0  # how much of that was read

    def __repr__(self) -> str:
        return "Stream(<secret>)"

    def begun(self) -> Stream:
        """Itself. Its first bytes are made now, as there is time, and not when they are read."""
        if not self._ahead.size:
            self._ahead = self._make(self._ahead, _AHEAD)
        return self

    def _read(self, size: int) -> NDArray[np.uint8]:
        """The next `size` bytes, in memory that nobody else is given."""
        start, whole = self._at, (size + 7) & ~7
        self._at = start + whole
        if self._at <= self._ahead.size:
            return self._ahead[start : start + size]
        left = self._ahead[start:]
        if whole - left.size < _AHEAD:
            # What is left stays in front: no position is lost.
            self._ahead = self._make(left, left.size + _AHEAD)
            self._at = whole
            return self._ahead[:size]
        self._ahead, self._at = _NONE, 0
        return self._make(left, whole)[:size]

    def _make(self, first: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
        """`first` and then fresh bytes, `size` in all."""
        out = np.empty(size + _BLOCK, np.uint8)
        out[: first.size] = first
        view, done = memoryview(out.data), first.size
        while done < size:
            step = min(size - done, len(_ZEROS))
            zeros = _ZEROS if step == len(_ZEROS) else _ZEROS[:step]
            done += self._encryptor.update_into(zeros, view[done : done + step + _BLOCK])
        return out[:size]

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` 64-bit words. Shapes: [count]."""
        return self._read(count * 8).view(np.uint64)

    def uniform(self, count: int, width: int) -> Words:
        """Words of which the low `width` bits are what `masks` draws. Shapes: [count]."""
        word = word_type(width)
        words: Words = self._read(count * (4 if word is np.uint32 else 8)).view(word)
        return words

    def masks(self, shape: tuple[int, ...], width: int) -> Words:
        """Uniform values mod 2^width, one word of stream each. Shapes: `shape`."""
        words = self.uniform(prod(shape), width)
        if width not in (HALF_BITS, WORD_BITS):
            words &= words.dtype.type((1 << width) - 1)
        return words.reshape(shape)

    def planes(self, count: int, size: int) -> Words:
        """Uniform bit planes. Shapes: [count, ceil(size / 64)]."""
        words = (size + WORD_BITS - 1) // WORD_BITS
        return self.words(count * words).reshape(count, words)
