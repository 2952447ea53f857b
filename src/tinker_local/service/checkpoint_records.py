"""Runs and checkpoints as they are remembered, and how they are called.

    tinker://<run>/<kind>/<name>        <run> is <session>:train:<number>

Names are letters, digits, '.', '_' and '-', so that no path made of them leaves its folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from tinker_local.errors import UserInputError
from tinker_local.ops import LoraSpec

TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
"""The middle part of a tinker:// path, and the SDK's name for that type of checkpoint."""

MAX_TTL_S = 315_360_000  # ten years, as the SDK says

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}:train:\d{1,9}", re.ASCII)
_PATH = re.compile(r"tinker://([^/]+)/([^/]+)/([^/]+)")


@dataclass(frozen=True)
class Run:
    """A training client as it is remembered after its server has gone."""

    run_id: str
    base_model: str
    lora: LoraSpec
    created_at: str
    user_metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """One saved set of weights; `kind` is a key of TYPES; times are ISO 8601 in UTC."""

    run_id: str
    kind: str
    name: str
    created_at: str
    size_bytes: int
    expires_at: str | None
    user_metadata: Mapping[str, str] | None
    is_public: bool = False

    @property
    def path(self) -> str:
        return checkpoint_path(self.run_id, self.kind, self.name)

    @property
    def is_expired(self) -> bool:
        if self.expires_at is None:
            return False
        return datetime.fromisoformat(self.expires_at) <= datetime.now(UTC)


@dataclass(frozen=True)
class NewCheckpoint:
    """What a save asks for."""

    run_id: str
    kind: str
    name: str
    ttl_s: int | None = None
    user_metadata: Mapping[str, str] | None = None
    overwrite: bool = False

    @property
    def path(self) -> str:
        return checkpoint_path(self.run_id, self.kind, self.name)


def is_run_id(run_id: str) -> bool:
    return _RUN_ID.fullmatch(run_id) is not None


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def checkpoint_path(run_id: str, kind: str, name: str) -> str:
    return f"tinker://{run_id}/{kind}/{name}"


def parse_checkpoint_path(path: str) -> tuple[str, str, str]:
    """The (run, kind, name) of a tinker:// path; `kind` is a key of TYPES, the rest unchecked.

    Raises:
        UserInputError: Not such a path.
    """
    match = _PATH.fullmatch(path)
    if match is None or match[2] not in TYPES:
        raise UserInputError(
            f"{path!r} is no checkpoint path.",
            "Use tinker://<run>/weights/<name>, or sampler_weights or external_weights.",
        )
    return match[1], match[2], match[3]


def folder_name(run_id: str) -> str:
    """A run's folder; ':' cannot be part of a file name everywhere."""
    return run_id.replace(":", "_")


def run_id_of(folder: str) -> str:
    return folder.replace("_", ":")


def check_name(name: str) -> None:
    """Raises UserInputError for a name that no checkpoint can have."""
    if not is_name(name):
        raise UserInputError(
            f"{name!r} is no usable checkpoint name.",
            "Use 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit.",
        )


def check_ttl(ttl_s: int | None) -> None:
    """Raises UserInputError for a TTL out of range.

    The SDK's documentation names an hour as the least, but it sends any number, and here any goes.
    """
    if ttl_s is not None and not 1 <= ttl_s <= MAX_TTL_S:
        raise UserInputError(
            f"ttl_seconds is {ttl_s}.",
            f"Use 1 to {MAX_TTL_S} (ten years); hosted Tinker wants 3600 or more.",
        )


def expiry(now: datetime, ttl_s: int | None) -> str | None:
    """When something that is `ttl_s` seconds old at most ends, in ISO 8601; None is never."""
    return None if ttl_s is None else (now + timedelta(seconds=ttl_s)).isoformat()
