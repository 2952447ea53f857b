from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tinker_local.errors import NotFoundError, UserInputError
from tinker_local.ops import LoraSpec
from tinker_local.service.checkpoints import Catalog, Checkpoint, NewCheckpoint, Run

RUN = "00000000-0000-0000-0000-000000000001:train:0"
OTHER_RUN = "00000000-0000-0000-0000-000000000001:train:1"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog(tmp_path)
    catalog.add_run(Run(RUN, "org/base", LoraSpec(rank=4), "2026-01-01T00:00:00+00:00", {}))
    return catalog


def _write(content: str = "weights") -> Any:
    return lambda folder: (folder / "weights.bin").write_text(content)


def _save(catalog: Catalog, name: str = "first", **options: Any) -> Checkpoint:
    content = options.pop("content", "weights")
    return catalog.save(NewCheckpoint(RUN, "weights", name, **options), _write(content))


def _names(catalog: Catalog) -> list[str]:
    return [checkpoint.name for checkpoint in catalog.all()]


def test_a_saved_checkpoint_is_found_by_its_path(catalog: Catalog) -> None:
    saved = _save(catalog, user_metadata={"step": "3"})

    assert saved.path == f"tinker://{RUN}/weights/first"
    assert catalog.get(saved.path) == saved
    assert (catalog.folder(saved) / "weights.bin").read_text() == "weights"
    assert saved.size_bytes == len("weights")


def test_checkpoints_and_runs_outlive_the_catalog(catalog: Catalog, tmp_path: Path) -> None:
    saved = _save(catalog)

    again = Catalog(tmp_path)

    assert again.all() == [saved]
    assert again.run(RUN).lora == LoraSpec(rank=4)


def test_the_newest_comes_first(catalog: Catalog) -> None:
    for name in ("a", "c", "b"):
        _save(catalog, name)

    assert _names(catalog) == ["b", "c", "a"]


@pytest.mark.parametrize(
    "name", ["..", ".", ".hidden", "a/b", "../../x", "", "a" * 129, "a\n", "a b", "ä", "a\0"]
)
def test_a_name_that_could_leave_its_folder_is_refused(
    catalog: Catalog, tmp_path: Path, name: str
) -> None:
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(UserInputError, match="no usable checkpoint name"):
        _save(catalog, name)

    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "path",
    [
        f"tinker://{RUN}/weights/../../x",
        f"tinker://{RUN}/external_weights/first",
        f"tinker://{RUN}/weights",
        f"{RUN}/weights/first",
        "/etc/passwd",
        "",
    ],
)
def test_what_is_no_checkpoint_path_says_how_one_looks(catalog: Catalog, path: str) -> None:
    with pytest.raises(UserInputError, match=r"tinker://<run>/weights/<name>"):
        catalog.get(path)


@pytest.mark.parametrize(
    "path",
    [
        f"tinker://{RUN}/weights/..",
        f"tinker://{RUN}/weights/other",
        f"tinker://{RUN}/sampler_weights/first",
        f"tinker://{OTHER_RUN}/weights/first",
        "tinker://../weights/first",
    ],
)
def test_an_unknown_checkpoint_is_not_found(catalog: Catalog, path: str) -> None:
    _save(catalog)

    with pytest.raises(NotFoundError):
        catalog.get(path)


@pytest.mark.parametrize("run_id", [OTHER_RUN, "..", "", "../runs", "x" * 400])
def test_an_unknown_run_is_not_found(catalog: Catalog, run_id: str) -> None:
    with pytest.raises(NotFoundError, match="No training run"):
        catalog.of_run(run_id)


def test_a_taken_name_is_refused_and_kept(catalog: Catalog) -> None:
    saved = _save(catalog, content="old")

    with pytest.raises(UserInputError, match=r"'first' is taken.*overwrite=True"):
        _save(catalog, content="new")

    assert (catalog.folder(saved) / "weights.bin").read_text() == "old"


def test_overwrite_replaces_the_checkpoint_whole(catalog: Catalog, tmp_path: Path) -> None:
    _save(catalog, content="old")

    saved = _save(catalog, content="new", overwrite=True)

    assert catalog.all() == [saved]
    assert (catalog.folder(saved) / "weights.bin").read_text() == "new"
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_checkpoint(catalog: Catalog, tmp_path: Path) -> None:
    saved = _save(catalog)

    def fail(folder: Path) -> None:
        (folder / "weights.bin").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        catalog.save(NewCheckpoint(RUN, "weights", "first", overwrite=True), fail)

    assert catalog.all() == [saved]
    assert (catalog.folder(saved) / "weights.bin").read_text() == "weights"
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_checkpoint_is_not_listed_while_it_is_written(catalog: Catalog) -> None:
    listed: list[str] = []

    catalog.save(NewCheckpoint(RUN, "weights", "w"), lambda _: listed.extend(_names(catalog)))

    assert listed == []
    assert _names(catalog) == ["w"]


def test_what_a_killed_server_left_half_written_is_removed_at_the_next_start(
    catalog: Catalog, tmp_path: Path
) -> None:
    saved = _save(catalog)
    for left in (tmp_path / "unfinished" / "half", tmp_path / "ephemeral" / "sampler"):
        left.mkdir()
        (left / "weights.bin").write_text("half")

    again = Catalog(tmp_path)

    assert again.all() == [saved]
    assert list((tmp_path / "unfinished").iterdir()) == []
    assert list((tmp_path / "ephemeral").iterdir()) == []


def test_a_folder_without_its_description_is_no_checkpoint(
    catalog: Catalog, tmp_path: Path
) -> None:
    saved = _save(catalog)
    (catalog.folder(saved) / "checkpoint.json").unlink()

    assert catalog.all() == []


def test_an_expired_checkpoint_is_gone_from_lists_and_disk(catalog: Catalog) -> None:
    saved = _save(catalog, ttl_s=3600)
    assert _names(catalog) == ["first"]
    folder = catalog.folder(saved)
    stored = json.loads((folder / "checkpoint.json").read_text())
    stored["expires_at"] = "2026-01-01T00:00:00+00:00"
    (folder / "checkpoint.json").write_text(json.dumps(stored))

    assert _names(catalog) == []
    assert not folder.exists()
    with pytest.raises(NotFoundError):
        catalog.get(saved.path)


@pytest.mark.parametrize("ttl_s", [0, -1, 3599, 315_360_001])
def test_a_ttl_out_of_range_is_refused(catalog: Catalog, ttl_s: int) -> None:
    with pytest.raises(UserInputError, match=f"ttl_seconds is {ttl_s}"):
        _save(catalog, ttl_s=ttl_s)


def test_a_deleted_checkpoint_is_gone_and_its_name_free(catalog: Catalog) -> None:
    saved = _save(catalog)

    catalog.delete(saved.path)

    assert catalog.all() == []
    with pytest.raises(NotFoundError):
        catalog.delete(saved.path)
    assert _save(catalog).name == "first"
