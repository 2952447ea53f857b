"""Whose turn a request is, read from the first bytes of a body that is not read whole."""

from __future__ import annotations

import re
from typing import TypeAlias

import zstandard

Turn: TypeAlias = tuple[str, int]
"""(model_id, seq_id)"""

_PLAIN_BYTES = 4096
_LENGTH_DELIMITED, _VARINT = 2, 0
_MODEL_ID_FIELD, _SEQ_ID_FIELD = 1, 2


def turn_in_json(head: bytes) -> Turn | None:
    """The turn in the beginning of a JSON object; None where it is not, or not that early."""
    model_id = re.search(rb'"model_id"\s*:\s*"([^"\\]+)"', head)
    seq_id = re.search(rb'"seq_id"\s*:\s*(\d+)', head)
    if model_id is None or seq_id is None:
        return None
    return model_id[1].decode(errors="replace"), int(seq_id[1])


def turn_in_protobuf(head: bytes, *, is_compressed: bool) -> Turn | None:
    """The turn in the beginning of a ForwardBackwardRequest, whose first two fields it is."""
    try:
        plain = _decompressed(head) if is_compressed else head
        tag, rest = _varint(plain)
        if tag != _MODEL_ID_FIELD << 3 | _LENGTH_DELIMITED:
            return None
        length, rest = _varint(rest)
        model_id, rest = rest[:length].decode(), rest[length:]
        tag, rest = _varint(rest)
        if tag != _SEQ_ID_FIELD << 3 | _VARINT:
            return None
        return model_id, _varint(rest)[0]
    except (IndexError, UnicodeDecodeError, zstandard.ZstdError):
        return None


def _decompressed(head: bytes) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(head) as reader:
        return reader.read(_PLAIN_BYTES)


def _varint(data: bytes) -> tuple[int, bytes]:
    """The number at the beginning (seven bits a byte, the lowest first), and what follows it."""
    value = 0
    for position in range(10):
        byte = data[position]
        value |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return value, data[position + 1 :]
    raise IndexError("no varint")
