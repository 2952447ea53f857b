"""Replies that fit into an agent's context; what was cut lies in a file of its own."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from mcp_types import CallToolResult, ResourceLink, TextContent

MAX_REPLY_BYTES = 4 * 4_000  # 4k tokens at four bytes a token
KEPT_FILES = 50
URI = "tinker-mcp://replies/"

_NOTE_BYTES = 600  # for the words that say where the rest is
_TEXT_LIMITS = (2_000, 1_000, 500, 250, 120)  # characters; scalars of a list: a tenth
_ROW_LIMITS = (50, 20, 10, 5, 2)


def fitted(result: CallToolResult, tool: str, folder: Path) -> CallToolResult:
    """The result itself if it is short, else its beginning with a link to the whole in `folder`."""
    whole = result.structured_content
    if whole is None or _size(whole) <= MAX_REPLY_BYTES:
        return result
    short = _shortened(whole, MAX_REPLY_BYTES - _NOTE_BYTES)
    links: list[ResourceLink] = []
    try:
        path = _kept(folder, tool, whole)
        note = f"Long parts are cut here; the whole reply is in {path} (resource {URI}{path.name})."
        links.append(_link(path))
    except OSError as error:  # the work is done all the same, and most of what it found is here
        note = f"Long parts are cut here, and the whole could not be kept ({error.strerror})."
    if "next_step" in short:
        short["next_step"] = f"{short['next_step']} {note}"
    pictures = [block for block in result.content if block.type == "image"]
    content = [TextContent(type="text", text=_text(short)), *pictures, *links]
    return CallToolResult(content=content, structured_content=short)


def _link(path: Path) -> ResourceLink:
    return ResourceLink(
        type="resource_link",
        uri=f"{URI}{path.name}",
        name=path.name,
        description="The whole reply.",
        mime_type="application/json",
        size=path.stat().st_size,
    )


def _size(value: Any) -> int:
    return len(_text(value).encode())


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _shortened(whole: dict[str, Any], limit_bytes: int) -> dict[str, Any]:
    """The least cut version that fits: first long texts and series, then rows."""
    limits = [(text, 10**9) for text in _TEXT_LIMITS]
    limits += [(_TEXT_LIMITS[-1], rows) for rows in _ROW_LIMITS]
    short = whole
    for text, rows in limits:
        short = {
            key: value if key == "next_step" else _cut(value, text, rows)
            for key, value in whole.items()
        }
        if _size(short) <= limit_bytes:
            break
    return short


def _cut(value: Any, text: int, rows: int) -> Any:
    if isinstance(value, str):
        return _cut_text(value, text)
    if isinstance(value, dict):
        return {key: _cut(inner, text, rows) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    limit = rows if value and isinstance(value[0], dict | list) else text // 10
    kept = [_cut(inner, text, rows) for inner in value[:limit]]
    has_texts = bool(value) and isinstance(value[0], str)
    more = len(value) - len(kept)
    return [*kept, f"... ({more} more)"] if more and has_texts else kept


def _cut_text(value: str, limit: int) -> str:
    if len(value) <= limit:
        return value
    return f"{value[:limit]}... ({len(value) - limit} more characters)"


def _kept(folder: Path, tool: str, whole: dict[str, Any]) -> Path:
    """Write it for its owner only; the oldest of many such files go."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{tool}-{time.time_ns()}.json"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_text(whole))
    for old in sorted(folder.glob("*.json"), key=lambda kept: kept.stat().st_mtime)[:-KEPT_FILES]:
        old.unlink(missing_ok=True)
    return path
