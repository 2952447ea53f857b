"""What `mcpb` says of the bundle for desktop hosts, and what it packs."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.validators import node

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Packed:
    """How a command of `mcpb` ended.

    Attributes:
        files: The names in the bundle; none where nothing is packed.
        size_bytes: Of the packed bundle.
    """

    command: str
    status: int
    summary: str
    files: tuple[str, ...] = ()
    size_bytes: int = 0


def validate() -> Packed:
    """Compare manifest.json with the specification."""
    run = node.run("mcpb", ["validate", str(ROOT / "manifest.json")])
    return Packed("validate", run.returncode, _last_line(run.stdout + run.stderr))


def pack(folder: Path) -> Packed:
    """Pack the checkout as a user would."""
    bundle = folder / "tinker-mcp.mcpb"
    run = node.run("mcpb", ["pack", str(ROOT), str(bundle)])
    if run.returncode or not bundle.exists():
        return Packed("pack", run.returncode or 1, _last_line(run.stdout + run.stderr))
    with zipfile.ZipFile(bundle) as packed:
        names = tuple(packed.namelist())
    return Packed("pack", 0, "", names, bundle.stat().st_size)


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or [""])[-1]
