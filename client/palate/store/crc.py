"""CRC-32 of files and of pieces put together: what tells that bytes arrived as they were sent. Knows no store.

CRC-32 is what S3 itself checks uploads with. It finds damage, not forgery: who needs that compares SHA-256 digests.
"""

from __future__ import annotations

import os
import zlib
from functools import lru_cache
from pathlib import Path

_POLYNOMIAL = 0xEDB88320  # of CRC-32 as zlib, gzip and S3 have it; bit 31 stands for x**0
_ONE = 1 << 31
_X_TO_8 = 1 << 23
_BLOCK = 1 << 20


def crc32_of(path: str | os.PathLike[str]) -> str:
    """Returns the CRC-32 of a file as eight hex digits.

    Raises:
        OSError: The file cannot be read.
    """
    crc = 0
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return spelled(crc)


def spelled(crc: int) -> str:
    """Returns a CRC-32 as eight hex digits."""
    return f"{crc:08x}"


def joined(first: int, second: int, second_bytes: int) -> int:
    """Returns the CRC-32 of two pieces in a row from the CRC-32 of each; `second_bytes` is the second one's length."""
    return _product(_x_to_bytes(second_bytes), first) ^ second


@lru_cache(maxsize=64)
def _x_to_bytes(count: int) -> int:
    """Returns x ** (8 * count) modulo the polynomial: what `count` zero bytes at the end multiply a CRC with."""
    result, power = _ONE, _X_TO_8
    while count:
        if count & 1:
            result = _product(result, power)
        power = _product(power, power)
        count >>= 1
    return result


def _product(a: int, b: int) -> int:
    """Multiplies two polynomials over GF(2) modulo CRC-32's."""
    result, bit = 0, _ONE
    while a:
        if a & bit:
            result ^= b
            a ^= bit
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
        bit >>= 1
    return result
