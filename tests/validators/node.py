"""The validators' own programs, installed by npm in a cache outside of the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import platformdirs

PACKAGES = (
    "node@22",  # the Inspector wants 22.19; as a package it comes with its executable
    "@modelcontextprotocol/conformance@0.2.0-alpha.12",
    "@modelcontextprotocol/inspector@2.12.0",
    "@anthropic-ai/mcpb@2.1.2",
)
INSTALL_BOUND_S = 300.0
RUN_BOUND_S = 120.0


class NodeMissingError(Exception):
    """There is no npm, or it could not fetch the packages."""


def toolchain() -> Path:
    """The folder with the packages in its node_modules; installed at the first call.

    Raises:
        NodeMissingError: They cannot be had here.
    """
    key = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    folder = platformdirs.user_cache_path("tinker-mcp") / "validators" / key
    if (folder / "node_modules").exists():
        return folder
    npm = shutil.which("npm")
    if npm is None:
        raise NodeMissingError("npm is not on the PATH.")
    partial = folder.with_name(f"{key}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _install(npm, partial)
        if not folder.exists():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _install(npm: str, folder: Path) -> None:
    (folder / "package.json").write_text("{}")
    command = [npm, "install", "--no-audit", "--no-fund", "--loglevel=error", *PACKAGES]
    try:
        subprocess.run(
            command, cwd=folder, check=True, capture_output=True, timeout=INSTALL_BOUND_S, text=True
        )
    except subprocess.TimeoutExpired:
        raise NodeMissingError(f"npm took longer than {INSTALL_BOUND_S:.0f} s.") from None
    except subprocess.CalledProcessError as error:
        raise NodeMissingError(f"npm could not install: {error.stderr[-500:]}") from None


def run(
    name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run an executable of the packages on their Node, in an empty standard input."""
    modules = toolchain() / "node_modules"
    node = modules / "node" / "bin"
    path = os.pathsep.join([str(node), os.environ.get("PATH", "")])
    return subprocess.run(
        [str(node / "node"), str(modules / ".bin" / name), *arguments],
        env={**os.environ, **(env or {}), "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
        timeout=RUN_BOUND_S,
    )
