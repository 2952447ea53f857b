"""Our own Hugging Face cache: where served models lie, and how one gets there.

    cache/
      huggingface/              what clients set as HF_HOME
        hub/models--ORG--NAME/
          refs/main             40 hex digits: the snapshot that the name means
          snapshots/<40 hex>/   config.json, *.safetensors, tokenizer.json ...
      making/                   unfinished work; nothing reads it but the next try
      locks/                    one file a model

The layout of `hub/` is that of huggingface_hub, so `from_pretrained("ORG/NAME")` finds a model
by name, in any process, with HF_HOME set to ours and HF_HUB_OFFLINE=1. A snapshot is prepared
under `making/` and renamed into place, so it is whole or absent. One that we made (instead of
downloading it from the hub) says so in its file `tinker-local.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from tinker_local.weights.progress import Progress

PROVENANCE_FILE = "tinker-local.json"


@dataclass(frozen=True)
class Staged:
    """A finished folder that waits to be published.

    Attributes:
        folder: On the cache's file system; it is renamed, not copied.
        revision: 40 hex digits: the hub's commit, or `recipe_revision` of what made it.
    """

    folder: Path
    revision: str


def cache_dir() -> Path:
    """Return the folder for everything we keep: $TINKER_LOCAL_CACHE, else the user's cache."""
    if configured := os.environ.get("TINKER_LOCAL_CACHE"):
        return Path(configured).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("tinker-local"))


def hf_home(cache: Path) -> Path:
    """Return what clients set as HF_HOME; its `hub/` holds every served model."""
    return cache / "huggingface"


def recipe_revision(recipe: Mapping[str, str]) -> str:
    """Return 40 hex digits that change whenever the recipe does."""
    return hashlib.sha1(
        json.dumps(recipe, sort_keys=True).encode(), usedforsecurity=False
    ).hexdigest()


def write_provenance(folder: Path, recipe: Mapping[str, str]) -> None:
    """Record in a folder that we made it, and from what (`recipe["made_from"]`)."""
    (folder / PROVENANCE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", "utf-8")


def is_from_hub(snapshot: Path) -> bool:
    """Tell a snapshot as the hub published it from one that we made."""
    return not (snapshot / PROVENANCE_FILE).exists()


def find_snapshot(cache: Path, name: str, accept: Callable[[Path], bool]) -> Path | None:
    """Return the cached snapshot of a model that `accept` takes, and make the name mean it.

    The one that `refs/main` names is asked about first; None when no snapshot is accepted.
    """
    repo = _repo_folder(cache, name)
    main = _read_main(repo)
    candidates = sorted((repo / "snapshots").glob("*/"), key=lambda folder: folder.name != main)
    snapshot = next(filter(accept, candidates), None)
    if snapshot is not None and snapshot.name != main:
        _write_main(repo, snapshot.name)
    return snapshot


def lend(cache: Path, names: Sequence[str], other: Path) -> None:
    """Make models of a cache visible by their names in another one, by links."""
    for name in names:
        place = _repo_folder(other, name)
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            shutil.rmtree(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(_repo_folder(cache, name), target_is_directory=True)


@contextmanager
def work_folder(cache: Path, name: str, progress: Progress) -> Iterator[Path]:
    """Lend the folder to prepare one model in, to one process at a time.

    It may hold what an interrupted try left (a download that can go on). It is removed after
    success and kept after an error.
    """
    lock_file = cache / "locks" / f"{_flat(name)}.lock"
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(filelock.FileLock(lock_file), name, progress):
        work = cache / "making" / _flat(name)
        work.mkdir(parents=True, exist_ok=True)
        yield work
        shutil.rmtree(work)


def publish(cache: Path, name: str, staged: Staged) -> Path:
    """Move a staged folder to its place in `hub/` and make the name mean it.

    Older snapshots that we made from the same source go. Call it inside `work_folder`.
    """
    repo = _repo_folder(cache, name)
    snapshot = repo / "snapshots" / staged.revision
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    if snapshot.exists():
        shutil.rmtree(snapshot)
    staged.folder.rename(snapshot)
    _write_main(repo, staged.revision)
    _remove_predecessors(snapshot)
    return snapshot


@contextmanager
def _locked(lock: filelock.BaseFileLock, name: str, progress: Progress) -> Iterator[None]:
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        progress(f"waiting for another process that prepares {name}", 0, None)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_predecessors(snapshot: Path) -> None:
    source = _made_from(snapshot)
    if source is None:
        return
    for sibling in snapshot.parent.glob("*/"):
        if sibling.name != snapshot.name and _made_from(sibling) == source:
            shutil.rmtree(sibling)


def _made_from(snapshot: Path) -> str | None:
    if is_from_hub(snapshot):
        return None
    recipe = json.loads((snapshot / PROVENANCE_FILE).read_text("utf-8"))
    return str(recipe["made_from"])


def _flat(name: str) -> str:
    return name.replace("/", "--")


def _repo_folder(cache: Path, name: str) -> Path:
    return hf_home(cache) / "hub" / f"models--{_flat(name)}"


def _read_main(repo: Path) -> str | None:
    try:
        return (repo / "refs" / "main").read_text("utf-8").strip()
    except FileNotFoundError:
        return None


def _write_main(repo: Path, revision: str) -> None:
    refs = repo / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    # Two processes may point the name at once, so each writes a file of its own name first.
    unfinished = refs.parent / f".main-{os.getpid()}"
    unfinished.write_text(revision, "utf-8")
    unfinished.replace(refs / "main")
