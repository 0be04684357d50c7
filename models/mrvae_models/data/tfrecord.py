"""TFRecord files, and the texts and bytes of the tf.train.Example messages in them, without TensorFlow.

A record is its length, 8 bytes, little-endian; a checksum of these; the bytes; a checksum of those. A checksum is
((c >> 15 | c << 17) + 0xA282EAD8) mod 2^32 of the CRC-32C c, 4 bytes, little-endian.

An Example is a protocol buffer: Example.features = 1, Features.feature = 1 (a map: key = 1, value = 2), and of a
Feature bytes_list = 1, whose value = 1. Fields of other numbers are floats and whole numbers, and are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .checks import DataError
from .crc32c import crc32c

SUFFIXES = (".tfrecord", ".tfrecords")
LENGTH, CHECKSUM = 8, 4


def masked(data: bytes | memoryview) -> int:
    """The checksum of a record's bytes."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def count(path: Path) -> int:
    """How many records a file has, by their lengths; DataError for one that ends within a record."""
    return sum(1 for _ in _records(path, read=False))


def records(path: Path) -> Iterator[bytes]:
    """The records of a file, in order; DataError where a checksum does not agree or the file ends within one."""
    return _records(path, read=True)


def _records(path: Path, read: bool) -> Iterator[bytes]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        number = start = 0
        while start < size:
            header = file.read(LENGTH + CHECKSUM)
            length = int.from_bytes(header[:LENGTH], "little")
            wrong = len(header) < LENGTH + CHECKSUM or masked(header[:LENGTH]) != _number(header[LENGTH:])
            end = start + LENGTH + length + 2 * CHECKSUM
            if wrong or end > size:
                what = "its length and the checksum of that do not agree" if wrong else f"it is {length} bytes long"
                raise DataError(
                    f"{path}: record {number}, at byte {start} of {size}: {what}; expected a TFRecord file, not "
                    "compressed: damaged or cut short; download it again"
                )
            content = b""
            if read:
                content = file.read(length)
                if masked(content) != _number(file.read(CHECKSUM)):
                    raise DataError(
                        f"{path}: record {number}, at byte {start}: its {length} bytes do not have the checksum that "
                        "is written behind them: damaged; download it again"
                    )
            yield content
            file.seek(end)
            number, start = number + 1, end


def _number(content: bytes) -> int:
    return int.from_bytes(content, "little")


def byte_features(example: bytes) -> dict[str, memoryview]:
    """The features of an Example that hold one text or string of bytes, by name. ValueError for no such message."""
    found: dict[str, memoryview] = {}
    for features in _messages(memoryview(example), 1):
        for entry in _messages(features, 1):
            key = b"".join(map(bytes, _messages(entry, 1))).decode("utf-8")
            values = [value for feature in _messages(entry, 2) for kind in _messages(feature, 1)
                      for value in _messages(kind, 1)]  # fmt: skip
            if len(values) == 1:
                found[key] = values[0]
    return found


def _messages(content: memoryview, wanted: int) -> Iterator[memoryview]:
    """The fields with this number that have a length."""
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, place = _varint(content, place)
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of wire type {kind} at byte {place}; expected 0, 1, 2 or 5")
        length, place = _varint(content, place) if kind == 2 else (8 if kind == 1 else 4, place)
        if place + length > len(content):
            raise ValueError(f"a field of {length} bytes at byte {place} of {len(content)}")
        if kind == 2 and number == wanted:
            yield content[place : place + length]
        place += length


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first, the eighth saying that more follow; and the place behind it."""
    value = shift = 0
    while place < len(content) and shift < 70:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
    raise ValueError(f"a number that does not end at byte {place}")
