"""Messages over a pipe: four bytes of length, then JSON. Never pickle: reading it runs code."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

HEADER = struct.Struct(">I")


def packed(message: Any) -> bytes:
    """A message as it goes over the pipe; what JSON does not know goes as text."""
    body = json.dumps(message, default=str, separators=(",", ":")).encode()
    return HEADER.pack(len(body)) + body


def send(descriptor: int, message: Any) -> None:
    """Write a message, however often that takes."""
    rest = memoryview(packed(message))
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def receive(descriptor: int) -> Any:
    """The next message.

    Raises:
        EOFError: The other side has closed the pipe.
    """
    (length,) = HEADER.unpack(_exactly(descriptor, HEADER.size))
    return json.loads(_exactly(descriptor, length))


def _exactly(descriptor: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(descriptor, min(count, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
