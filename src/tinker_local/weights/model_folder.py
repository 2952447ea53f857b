"""What a Hugging Face folder must hold to be served, and how one is linked into the cache."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinker_local.errors import ModelFolderError
from tinker_local.weights.hub_cache import (
    PROVENANCE_FILE,
    Staged,
    recipe_revision,
    write_provenance,
)

# Decoders whose layers are named q_proj ... down_proj, as the engine's LoRA expects them.
TEXT_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
VISION_MODEL_TYPES = ("qwen3_vl",)  # they read images as well
SUPPORTED_MODEL_TYPES = (*TEXT_MODEL_TYPES, *VISION_MODEL_TYPES)

IMAGE_PROCESSOR_FILE = "preprocessor_config.json"

# A folder's other files (pickled weights, training state) are neither read nor linked.
SERVED_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".txt")

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"


def check_folder(folder: Path) -> None:
    """Check that a folder has a supported config, a tokenizer and whole safetensors files.

    Only the headers of the weights are read.

    Raises:
        ModelFolderError: A file is missing, is damaged, or is of a kind we do not serve.
    """
    check_config_and_tokenizer(folder)
    for file in _weight_files(folder):
        _check_safetensors(folder, file)


def is_complete(folder: Path) -> bool:
    """Tell whether `check_folder` would pass."""
    try:
        check_folder(folder)
    except ModelFolderError:
        return False
    return True


def check_config_and_tokenizer(folder: Path) -> None:
    """Check the small files, which can be had before gigabytes of weights are.

    Raises:
        ModelFolderError: config.json, tokenizer.json or a vision model's image processor is
            missing or damaged, the model_type is not in SUPPORTED_MODEL_TYPES, or the weights are
            quantized.
    """
    config = _read_json(folder, "config.json")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ModelFolderError(
            f"config.json in {folder} says model_type {model_type!r}; "
            f"served are {', '.join(SUPPORTED_MODEL_TYPES)}.",
            "Choose a model of one of these types.",
        )
    if "quantization_config" in config:
        raise ModelFolderError(
            f"config.json in {folder} describes quantized weights, which cannot be trained here.",
            "Choose the model's unquantized (bf16 or fp32) release.",
        )
    _read_json(folder, "tokenizer.json")
    if model_type in VISION_MODEL_TYPES:
        _read_json(folder, IMAGE_PROCESSOR_FILE)


def link_folder(folder: Path, work: Path) -> Staged:
    """Stage a view of a user's folder: symbolic links, or copies where links are impossible."""
    staged = work / "links"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for file in _served_files(folder):
        _link(file, staged / file.name)
    recipe = folder_recipe(folder)
    write_provenance(staged, recipe)
    return Staged(staged, recipe_revision(recipe))


def folder_recipe(folder: Path) -> dict[str, str]:
    """Describe a user's folder, so that a change of its files makes another revision."""
    states = [
        f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
        for file in _served_files(folder)
    ]
    return {"made_from": "folder", "folder": str(folder), "files": "\n".join(states)}


def _served_files(folder: Path) -> list[Path]:
    # A folder out of our own cache has a provenance file, whose link we would write through.
    return [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in SERVED_SUFFIXES and file.name != PROVENANCE_FILE
    ]


def _read_json(folder: Path, file: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / file).read_text("utf-8"))
    except FileNotFoundError:
        raise _missing(folder, file) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(folder, file, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(folder, file, "it holds no JSON object")
    return content


def _weight_files(folder: Path) -> list[str]:
    if not (folder / _INDEX_FILE).exists():
        return [_SINGLE_FILE]
    weight_map = _read_json(folder, _INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise _damaged(folder, _INDEX_FILE, "it has no weight_map")
    return sorted(set(weight_map.values()))


def _check_safetensors(folder: Path, file: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / file, framework="numpy"):
            pass
    except FileNotFoundError:
        raise _missing(folder, file) from None
    except SafetensorError as error:
        raise _damaged(folder, file, str(error)) from error


def _missing(folder: Path, file: str) -> ModelFolderError:
    return ModelFolderError(
        f"{file} is missing in {folder}.",
        "A model's folder needs config.json, tokenizer.json and model.safetensors "
        f"(or {_INDEX_FILE} with its files), a vision model {IMAGE_PROCESSOR_FILE} too, as "
        "save_pretrained writes them.",
    )


def _damaged(folder: Path, file: str, reason: str) -> ModelFolderError:
    return ModelFolderError(
        f"{file} in {folder} is damaged: {reason}.",
        "Copy or download it again (a file of a few lines may be a Git LFS pointer).",
    )


def _link(source: Path, target: Path) -> None:
    """Make `target` show `source`: Windows without developer mode has no symbolic links."""
    ways: tuple[Callable[[Path, Path], Any], ...] = (os.symlink, os.link)
    for way in ways:
        try:
            way(source, target)
        except (OSError, NotImplementedError):
            continue
        return
    shutil.copy2(source, target)
