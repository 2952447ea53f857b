"""The cache: found by name in other processes, whole or absent, safe for two at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import filelock
import pytest

from tinker_local.errors import CacheError
from tinker_local.weights import (
    DEFAULT_MODEL,
    TINY_MODEL,
    ModelFiles,
    cache_dir,
    hf_home,
    quiet_progress,
    resolve_model,
)

ENCODE_BY_NAME = """
import json, sys
from tinker.lib.public_interfaces.sampling_client import _load_tokenizer_from_model_info
from tinker_cookbook.tokenizer_utils import get_tokenizer
from transformers import AutoTokenizer

loaders = (AutoTokenizer.from_pretrained, get_tokenizer, _load_tokenizer_from_model_info)
print(json.dumps([load(sys.argv[1]).encode("Hi 12") for load in loaders]))
"""

RESOLVE_TINY = """
from tinker_local.weights import TINY_MODEL, cache_dir, quiet_progress, resolve_model
print(resolve_model(TINY_MODEL, cache_dir(), progress=quiet_progress).folder)
"""


@pytest.mark.parametrize(
    ("fixture", "ids"),
    [("smollm2", [26843, 216, 33, 34]), ("tiny", [0x48, 0x69, 0x20, 0x31, 0x32])],
)
def test_transformers_cookbook_and_sdk_find_the_tokenizer_by_name_offline(
    request: pytest.FixtureRequest, fixture: str, ids: list[int]
) -> None:
    files: ModelFiles = request.getfixturevalue(fixture)
    home = files.folder.parents[3]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}

    output = _python(ENCODE_BY_NAME, files.name, environment=environment)

    assert json.loads(output) == [ids, ids, ids]


def test_a_snapshot_lies_where_huggingface_hub_looks_for_it(resolve: Any, cache: Path) -> None:
    files = resolve(TINY_MODEL)

    repo = hf_home(cache) / "hub" / "models--tinker-local--tiny"
    revision = (repo / "refs" / "main").read_text("utf-8")
    assert len(bytes.fromhex(revision)) == 20
    assert files == ModelFiles("tinker-local/tiny", repo / "snapshots" / revision)


def test_a_half_made_snapshot_is_not_used_but_made_again(resolve: Any) -> None:
    files = resolve(TINY_MODEL)
    (files.folder / "model.safetensors").unlink()

    assert resolve(TINY_MODEL) == files
    assert (files.folder / "model.safetensors").exists()


def test_a_truncated_weight_file_is_not_used_but_made_again(resolve: Any) -> None:
    files = resolve(TINY_MODEL)
    weights = files.folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])

    resolve(TINY_MODEL)

    assert weights.read_bytes() == whole


def test_what_a_killed_process_left_is_swept_away(resolve: Any, cache: Path) -> None:
    left = cache / "making" / "tinker-local--tiny" / "tiny" / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")

    files = resolve(TINY_MODEL)

    assert (files.folder / "model.safetensors").stat().st_size > 4
    assert list((cache / "making").iterdir()) == []


def test_a_snapshot_of_an_older_recipe_is_replaced(resolve: Any) -> None:
    files = resolve(TINY_MODEL)
    older = files.folder.with_name("0" * 40)
    files.folder.rename(older)
    older.parent.with_name("refs").joinpath("main").write_text(older.name, "utf-8")

    assert resolve(TINY_MODEL) == files
    assert [folder.name for folder in files.folder.parent.iterdir()] == [files.folder.name]


def test_two_processes_at_once_get_one_snapshot(cache: Path) -> None:
    environment = {**os.environ, "TINKER_LOCAL_CACHE": str(cache)}
    command = [sys.executable, "-c", RESOLVE_TINY]

    with (
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as first,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as second,
    ):
        outputs = {first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]}

    assert (first.returncode, second.returncode) == (0, 0)
    assert len(outputs) == 1


def test_a_process_waits_for_the_one_that_prepares_the_same_model(cache: Path) -> None:
    lock_file = cache / "locks" / "tinker-local--tiny.lock"
    lock_file.parent.mkdir(parents=True)
    said: list[str] = []
    is_waiting = threading.Event()

    def progress(description: str, done: int, total: int | None) -> None:
        said.append(description)
        is_waiting.set()

    with filelock.FileLock(lock_file):
        thread = threading.Thread(
            target=resolve_model, args=(TINY_MODEL, cache), kwargs={"progress": progress}
        )
        thread.start()
        assert is_waiting.wait(timeout=30)
        assert not hf_home(cache).exists()
    thread.join(timeout=60)

    assert said == ["waiting for another process that prepares tinker-local/tiny"]
    assert (hf_home(cache) / "hub" / "models--tinker-local--tiny" / "refs" / "main").exists()


def test_a_cache_that_cannot_be_written_names_the_variable_to_set(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(CacheError) as caught:
        resolve_model(TINY_MODEL, file, progress=quiet_progress)

    assert str(file) in caught.value.problem
    assert "TINKER_LOCAL_CACHE" in caught.value.next_step


def test_the_cache_is_where_the_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_LOCAL_CACHE", str(tmp_path))

    assert cache_dir() == tmp_path


def test_without_the_variable_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_LOCAL_CACHE", raising=False)

    assert cache_dir().is_absolute()
    assert "tinker-local" in cache_dir().parts


def test_a_cached_default_model_needs_no_network(smollm2: ModelFiles, no_network: None) -> None:
    assert resolve_model(DEFAULT_MODEL, cache_dir(), progress=quiet_progress) == smollm2


def _python(code: str, *arguments: str, environment: dict[str, str]) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=120,
    ).stdout
