"""CRC-32C (Castagnoli), the checksum of TFRecord files, with NumPy.

The remainder of the message, its bits in reflected order, by the polynomial 0x1EDC6F41 (0x82F63B78 reflected), begun
from and ended by an inversion of all bits: RFC 3720, B.4. A byte b takes a state s of 32 bits to

    s -> A(s ^ b),    A(s) = table[s mod 256] ^ (s >> 8)

A is linear over GF(2), so four bytes at once, a word w, are s -> A^4(s ^ w), the sum of what becomes of the halves of
s ^ w. And a message is cut into lanes, whose states go on side by side from 0, and then

    state(left + right) = A^n state(left) ^ state(right)          n: bytes of right

Zeros before a message do not change a state of 0; beginning from all ones is inverting the first four bytes.
"""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78
LANES = 4096
SHORT = 64
"""Bytes below which one after the other is as fast."""


def _table() -> np.ndarray:
    state = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        state = np.where(state & 1, (state >> 1) ^ np.uint32(POLYNOMIAL), state >> 1)
    return state


TABLE = _table()


def crc32c(data: bytes | memoryview) -> int:
    """Of any number of bytes."""
    content = np.frombuffer(data, np.uint8)
    if len(content) < SHORT:
        state = 0xFFFFFFFF
        for byte in content.tolist():
            state = int(TABLE[(state ^ byte) & 255]) ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    words = -(-len(content) // (4 * LANES))
    padded = np.zeros(4 * LANES * words, np.uint8)
    padded[-len(content) :] = content
    padded[len(padded) - len(content) :][:4] ^= 255
    low, high = _words()
    states = np.zeros(LANES, np.uint32)
    for column in np.ascontiguousarray(padded.view("<u4").reshape(LANES, words).T):
        states = states ^ column
        states = low.take(states & 0xFFFF) ^ high.take(states >> 16)
    operator = _power(4 * words)
    while len(states) > 1:
        states = _apply(operator, states[0::2]) ^ states[1::2]
        operator = _apply(operator, operator)
    return int(states[0]) ^ 0xFFFFFFFF


@functools.cache
def _words() -> tuple[np.ndarray, np.ndarray]:
    """A^4 of every lower and of every upper half of a state."""
    halves = np.arange(2**16, dtype=np.uint32)
    return _zeros(halves), _zeros(halves << 16)


def _zeros(states: np.ndarray, count: int = 4) -> np.ndarray:
    for _ in range(count):
        states = TABLE[states & 255] ^ (states >> 8)
    return states


def _apply(operator: np.ndarray, states: np.ndarray) -> np.ndarray:
    """operator: (32,) uint32, what becomes of each bit of a state."""
    made = np.zeros_like(states)
    for bit in range(32):
        made ^= np.where(states >> bit & 1, operator[bit], np.uint32(0))
    return made


def _power(exponent: int) -> np.ndarray:
    """A^exponent, as an operator."""
    made = np.uint32(1) << np.arange(32, dtype=np.uint32)
    square = _zeros(made, 1)
    while exponent:
        made = _apply(square, made) if exponent & 1 else made
        square, exponent = _apply(square, square), exponent >> 1
    return made
