"""External weights: an adapter as PEFT reads it, and nothing else; encrypted where asked for.

Encryption is age (filippo.io/age), to keys that the client names; this server never has the key
that reads the files again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyrage  # type: ignore[import-untyped]  # an extension module without stubs

from tinker_local.errors import UserInputError

PEFT_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
MAX_RECIPIENTS = 10  # as the SDK says
ENCRYPTED_SUFFIX = ".age"

Recipient: TypeAlias = Any  # pyrage carries no types
_pyrage: Any = pyrage


def parse_recipients(keys: Sequence[str]) -> list[Recipient]:
    """age recipients: native `age1...` keys or SSH public keys.

    Raises:
        UserInputError: None, too many, or one that is no public key. Never repeats a key, which
            may be a private one sent by mistake.
    """
    if not 1 <= len(keys) <= MAX_RECIPIENTS:
        raise UserInputError(
            f"age_encryption_recipients holds {len(keys)} keys.",
            f"Give 1 to {MAX_RECIPIENTS}, or leave it out for files that are not encrypted.",
        )
    return [_parse(number, key) for number, key in enumerate(keys)]


def keep_peft_files(folder: Path) -> None:
    """Remove what the engine saves beside them for itself."""
    for file in folder.iterdir():
        if file.name not in PEFT_FILES:
            file.unlink()


def encrypt_files(folder: Path, recipients: Sequence[Recipient]) -> None:
    """Replace every file by `<name>.age`."""
    for file in list(folder.iterdir()):
        encrypted = file.with_name(file.name + ENCRYPTED_SUFFIX)
        _pyrage.encrypt_file(str(file), str(encrypted), list(recipients))
        file.unlink()


def _parse(number: int, key: str) -> Recipient:
    is_ssh = key.startswith("ssh-")
    kind = _pyrage.ssh if is_ssh else _pyrage.x25519
    try:
        return kind.Recipient.from_str(key)
    except _pyrage.RecipientError:
        raise UserInputError(
            f"age_encryption_recipients[{number}] is no age recipient.",
            "Use public keys: age1... (age-keygen -y prints it), ssh-ed25519 or ssh-rsa.",
        ) from None
