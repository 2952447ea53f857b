"""Download a model from the Hugging Face hub, without touching the user's own cache.

huggingface_hub reads HF_HOME when it is imported, and writes there besides what it is asked
for. So it runs in a process of its own (`hub_child`) whose HF_HOME is a folder of ours; only the
user's token is still read from where it is.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tinker_local.errors import ModelUnavailableError
from tinker_local.weights.child_process import (
    Watch,
    folder_bytes,
    module_command,
    module_environment,
    run_watched,
)
from tinker_local.weights.hub_cache import Staged
from tinker_local.weights.model_folder import check_config_and_tokenizer
from tinker_local.weights.progress import Progress

_CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE")


@dataclass(frozen=True)
class Repository:
    """A model on the hub: its commit (40 hex digits), and the bytes of the files we want."""

    commit: str
    wanted_bytes: int


def download_from_hub(name: str, work: Path, progress: Progress) -> Staged:
    """Download config, tokenizer and safetensors; an interrupted download goes on.

    Raises:
        ModelUnavailableError: The hub is off limits, cannot be reached, or refuses.
        ModelFolderError: The small files show that the model cannot be served.
    """
    if is_offline():
        raise ModelUnavailableError(
            "The hub was not asked, because HF_HUB_OFFLINE is set.",
            "Unset HF_HUB_OFFLINE to allow the download.",
        )
    room = work / "hub"
    staged = room / "staged"
    staged.mkdir(parents=True, exist_ok=True)
    description = f"downloading {name} from the hub"
    answer = _run_child(["small", name, "main"], room, Watch(description), progress)
    repository = Repository(**json.loads(answer))
    check_config_and_tokenizer(staged)
    watch = Watch(description, room, folder_bytes(room) + repository.wanted_bytes)
    _run_child(["weights", name, repository.commit], room, watch, progress)
    shutil.rmtree(staged / ".cache")  # what huggingface_hub needs to go on, no part of the model
    return Staged(staged, repository.commit)


def is_offline() -> bool:
    """Tell whether the user forbids requests to the hub, in the words huggingface_hub takes."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def _run_child(arguments: list[str], room: Path, watch: Watch, progress: Progress) -> str:
    """Run one half of a download; return what it printed."""
    command = module_command("tinker_local.weights.hub_child", *arguments, str(room / "staged"))
    result = run_watched(command, _environment(room / "home"), watch, progress)
    if result.returncode != 0:
        raise ModelUnavailableError(
            f"The hub could not deliver it ({result.last_line}).",
            "Check the name, the network, and for a gated model your access (HF_TOKEN).",
        )
    return result.stdout


def _environment(home: Path) -> dict[str, str]:
    from huggingface_hub.constants import HF_TOKEN_PATH

    changes = {
        "HF_HOME": str(home),
        "HF_TOKEN_PATH": HF_TOKEN_PATH,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    environment = module_environment(changes)
    return {key: value for key, value in environment.items() if key not in _CACHE_VARIABLES}
