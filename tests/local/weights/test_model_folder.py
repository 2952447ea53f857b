"""Folders as models: how they are named, linked, and refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tinker_local.errors import ModelFolderError, ModelSpecError
from tinker_local.weights import ModelFiles, hf_home


@pytest.fixture
def folder(tiny: ModelFiles, tmp_path: Path) -> Path:
    """A folder as a user has it: a model, and files that are none of our business."""
    folder = tmp_path / "my-model"
    shutil.copytree(tiny.folder, folder, ignore=shutil.ignore_patterns("tinker-local.json"))
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "checkpoint-1").mkdir()
    return folder


def test_a_folder_is_served_under_its_own_name(resolve: Any, folder: Path) -> None:
    assert resolve(str(folder)) == ModelFiles("local/my-model", folder)


def test_a_folder_can_be_given_a_name(resolve: Any, folder: Path) -> None:
    assert resolve(f"acme/one={folder}") == ModelFiles("acme/one", folder)


def test_a_relative_folder_and_one_at_home_are_found(
    resolve: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))

    assert resolve("my-model").folder == folder
    assert resolve("./my-model").folder == folder
    assert resolve("~/my-model").folder == folder
    assert resolve("acme/one=~/my-model").folder == folder


def test_a_folder_whose_path_reads_like_name_and_dir_is_a_folder(
    resolve: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = folder.parent / "runs"
    runs.mkdir()
    folder.rename(runs / "lr=1e-4")
    monkeypatch.chdir(folder.parent)

    assert resolve("runs/lr=1e-4") == ModelFiles("local/lr-1e-4", runs / "lr=1e-4")


@pytest.mark.parametrize(
    ("folder_name", "name"),
    [
        ("my model (v2)", "local/my-model-v2"),
        ("a--b..c", "local/a-b-c"),
        (".hidden", "local/hidden"),
        ("模型", "local/model"),
    ],
)
def test_a_folder_name_that_is_no_model_name_is_made_one(
    resolve: Any, folder: Path, folder_name: str, name: str
) -> None:
    renamed = folder.rename(folder.with_name(folder_name))

    assert resolve(str(renamed)).name == name


def test_the_hub_shows_links_to_the_models_files_only(
    resolve: Any, folder: Path, cache: Path
) -> None:
    resolve(f"acme/one={folder}")

    snapshot = _snapshot(cache, "acme--one")
    assert sorted(file.name for file in snapshot.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tinker-local.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (snapshot / "model.safetensors").resolve() == folder / "model.safetensors"


def test_files_are_copied_where_links_are_impossible(
    resolve: Any, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)

    resolve(f"acme/one={folder}")

    copy = _snapshot(cache, "acme--one") / "config.json"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (folder / "config.json").read_bytes()


def test_a_changed_folder_replaces_what_the_name_meant(
    resolve: Any, folder: Path, cache: Path
) -> None:
    resolve(f"acme/one={folder}")
    (folder / "chat_template.jinja").write_text("{{ messages }}", "utf-8")

    resolve(f"acme/one={folder}")

    assert (_snapshot(cache, "acme--one") / "chat_template.jinja").exists()
    assert len(list(_snapshot(cache, "acme--one").parent.iterdir())) == 1


def test_one_name_can_mean_another_folder_later(resolve: Any, folder: Path, cache: Path) -> None:
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    resolve(f"acme/one={folder}")

    assert resolve(f"acme/one={other}") == ModelFiles("acme/one", other)
    assert (_snapshot(cache, "acme--one") / "config.json").resolve().parent == other


def test_a_folder_out_of_our_own_cache_is_left_as_it_is(resolve: Any, tiny: ModelFiles) -> None:
    before = {file: file.read_bytes() for file in tiny.folder.iterdir()}

    resolve(f"acme/one={tiny.folder}")

    assert {file: file.read_bytes() for file in tiny.folder.iterdir()} == before


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(resolve: Any, folder: Path, file: str) -> None:
    (folder / file).unlink()

    with pytest.raises(ModelFolderError) as caught:
        resolve(str(folder))

    assert caught.value.problem == f"{file} is missing in {folder}."


def test_a_missing_shard_is_named(resolve: Any, folder: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / first)
    index = {"weight_map": {"a": first, "b": second}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")

    with pytest.raises(ModelFolderError) as caught:
        resolve(str(folder))

    assert caught.value.problem == f"{second} is missing in {folder}."


def test_another_architecture_is_refused_with_the_table_of_those_served(
    resolve: Any, folder: Path
) -> None:
    _change_config(folder, model_type="t5")

    with pytest.raises(ModelFolderError) as caught:
        resolve(str(folder))

    assert caught.value.problem == (
        f"config.json in {folder} says model_type 't5'; "
        "served are llama, mistral, qwen2, qwen3, smollm3, qwen3_vl."
    )


def test_quantized_weights_are_refused(resolve: Any, folder: Path) -> None:
    _change_config(folder, quantization_config={"quant_method": "gptq"})

    with pytest.raises(ModelFolderError, match="quantized weights"):
        resolve(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_git_lfs_pointer_is_called_damaged(resolve: Any, folder: Path, file: str) -> None:
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\n", "utf-8")

    with pytest.raises(ModelFolderError) as caught:
        resolve(str(folder))

    assert f"{file} in {folder} is damaged" in caught.value.problem
    assert "Git LFS pointer" in caught.value.next_step


@pytest.mark.parametrize(
    "spec",
    [
        "gpt2",
        "/no/such/folder",
        "a/b/c",
        "",
        "Org/",
        "-a/b",
        "a/b--c",
        "a/b:c",
        "a=b",
        "~nobody-here/x/y",
    ],
)
def test_a_value_that_is_no_model_is_named(resolve: Any, spec: str) -> None:
    with pytest.raises(ModelSpecError) as caught:
        resolve(spec)

    assert caught.value.problem == (
        f"{spec!r} is neither an existing folder nor a name like org/model."
    )


@pytest.mark.parametrize("folder", ["/no/such", "", "~nobody-here/x"])
def test_a_named_folder_that_does_not_exist_is_named(resolve: Any, folder: str) -> None:
    with pytest.raises(ModelSpecError) as caught:
        resolve(f"acme/one={folder}")

    assert caught.value.problem == f"The folder {folder!r} in 'acme/one={folder}' does not exist."


def _snapshot(cache: Path, flat_name: str) -> Path:
    repo = hf_home(cache) / "hub" / f"models--{flat_name}"
    return repo / "snapshots" / (repo / "refs" / "main").read_text("utf-8")


def _change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), "utf-8")
