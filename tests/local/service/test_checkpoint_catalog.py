from __future__ import annotations

import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

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


def _expire(catalog: Catalog, saved: Checkpoint) -> None:
    """Let a checkpoint's time have come long ago."""
    description = catalog.folder(saved) / "checkpoint.json"
    stored = json.loads(description.read_text())
    stored["expires_at"] = "2026-01-01T00:00:00+00:00"
    description.write_text(json.dumps(stored))


def _wait_until(is_done: Callable[[], bool], bound_s: float = 10.0) -> None:
    limit = time.monotonic() + bound_s
    while not is_done():
        assert time.monotonic() < limit
        threading.Event().wait(0.02)


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
        f"tinker://{RUN}/other_weights/first",
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
        f"tinker://{RUN}/external_weights/first",
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


def test_a_reader_never_misses_a_checkpoint_that_is_overwritten(catalog: Catalog) -> None:
    saved = _save(catalog)
    writer = threading.Thread(
        target=lambda: [_save(catalog, overwrite=True) for _ in range(50)], daemon=True
    )
    writer.start()

    while writer.is_alive():
        assert catalog.get(saved.path).path == saved.path
        assert _names(catalog) == ["first"]


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


def test_an_overwrite_cut_off_between_its_two_renames_is_undone_at_the_next_start(
    catalog: Catalog, tmp_path: Path
) -> None:
    saved = _save(catalog, content="old")
    # What `_put` has done when the process is killed: the old one is out, the new one not yet in.
    catalog.folder(saved).rename(tmp_path / "unfinished" / "0123.replaced")
    (tmp_path / "unfinished" / "4567").mkdir()

    again = Catalog(tmp_path)

    assert again.all() == [saved]
    assert (again.folder(saved) / "weights.bin").read_text() == "old"


def test_an_overwrite_cut_off_after_its_renames_stays_done(
    catalog: Catalog, tmp_path: Path
) -> None:
    old = _save(catalog, content="old")
    catalog.folder(old).rename(tmp_path / "unfinished" / "0123.replaced")
    new = _save(catalog, content="new")

    again = Catalog(tmp_path)

    assert again.all() == [new]
    assert (again.folder(new) / "weights.bin").read_text() == "new"
    assert list((tmp_path / "unfinished").iterdir()) == []


def test_a_description_that_cannot_be_read_hides_its_checkpoint_alone(catalog: Catalog) -> None:
    broken = _save(catalog, "broken")
    (catalog.folder(broken) / "checkpoint.json").write_text('{"name": ')
    _save(catalog, "whole")

    assert _names(catalog) == ["whole"]
    with pytest.raises(NotFoundError):
        catalog.get(broken.path)


def test_a_checkpoint_moved_by_hand_is_not_taken_for_the_one_it_was(catalog: Catalog) -> None:
    saved = _save(catalog)
    catalog.folder(saved).rename(catalog.folder(saved).with_name("second"))

    assert catalog.all() == []


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
    _expire(catalog, saved)

    assert _names(catalog) == []
    assert not folder.exists()
    with pytest.raises(NotFoundError):
        catalog.get(saved.path)


def test_the_sweep_removes_what_nobody_asks_for_any_more(catalog: Catalog, tmp_path: Path) -> None:
    _save(catalog, "stays")
    going = _save(catalog, "goes", ttl_s=3600)
    assert not catalog.has_expired
    _expire(catalog, going)

    assert Catalog(tmp_path).folder(going).exists() is False


def test_the_sweep_is_due_when_the_first_checkpoint_expires(catalog: Catalog) -> None:
    _save(catalog, "late", ttl_s=7200)
    assert not catalog.has_expired

    first = _save(catalog, "early", ttl_s=1)
    _wait_until(lambda: catalog.has_expired)
    catalog.sweep()

    assert not catalog.has_expired
    assert not catalog.folder(first).exists()
    assert _names(catalog) == ["late"]


def test_an_expired_checkpoints_name_is_free(catalog: Catalog) -> None:
    _expire(catalog, _save(catalog, content="old", ttl_s=3600))

    saved = _save(catalog, content="new")

    assert (catalog.folder(saved) / "weights.bin").read_text() == "new"


def test_a_ttl_can_be_shortened_extended_and_removed(catalog: Catalog) -> None:
    saved = _save(catalog, ttl_s=3600)
    now = datetime.now(UTC)

    def seconds_left() -> float | None:
        expires_at = catalog.get(saved.path).expires_at
        return expires_at and (datetime.fromisoformat(expires_at) - now).total_seconds()

    catalog.set_ttl(saved.path, 60)
    assert seconds_left() == pytest.approx(60, abs=5)
    catalog.set_ttl(saved.path, 86_400)
    assert seconds_left() == pytest.approx(86_400, abs=5)
    catalog.set_ttl(saved.path, None)
    assert seconds_left() is None
    assert replace(catalog.get(saved.path), expires_at=saved.expires_at) == saved


@pytest.mark.parametrize("ttl_s", [0, -1, 315_360_001])
def test_a_ttl_out_of_range_is_refused(catalog: Catalog, ttl_s: int) -> None:
    with pytest.raises(UserInputError, match=f"ttl_seconds is {ttl_s}"):
        _save(catalog, ttl_s=ttl_s)
    saved = _save(catalog)
    with pytest.raises(UserInputError, match=f"ttl_seconds is {ttl_s}"):
        catalog.set_ttl(saved.path, ttl_s)
    with pytest.raises(UserInputError, match=f"ttl_seconds is {ttl_s}"):
        catalog.copy(saved.path, OTHER_RUN, ttl_s)


def test_a_deleted_checkpoint_is_gone_and_its_name_free(catalog: Catalog) -> None:
    saved = _save(catalog)

    catalog.delete(saved.path)

    assert catalog.all() == []
    with pytest.raises(NotFoundError):
        catalog.delete(saved.path)
    assert _save(catalog).name == "first"


def test_publishing_changes_nothing_else(catalog: Catalog) -> None:
    saved = _save(catalog, ttl_s=3600)
    assert not saved.is_public

    assert catalog.set_public(saved.path, True) == replace(saved, is_public=True)
    assert catalog.get(saved.path).is_public
    assert catalog.set_public(saved.path, False) == saved


def test_a_copy_outlives_its_source(catalog: Catalog) -> None:
    source = _save(catalog, ttl_s=3600, user_metadata={"step": "3"}, content="trained")

    copied = catalog.copy(source.path, OTHER_RUN, None)
    catalog.delete(source.path)

    assert catalog.all() == [copied]
    assert copied.path == f"tinker://{OTHER_RUN}/weights/first"
    assert (copied.expires_at, copied.user_metadata) == (None, {"step": "3"})
    assert copied.size_bytes == source.size_bytes
    assert (catalog.folder(copied) / "weights.bin").read_text() == "trained"
    assert catalog.run(OTHER_RUN).lora == LoraSpec(rank=4)


def test_the_same_copy_again_is_the_one_that_exists(catalog: Catalog) -> None:
    source = _save(catalog)
    copied = catalog.copy(source.path, OTHER_RUN, None)

    assert catalog.copy(source.path, OTHER_RUN, 3600) == copied
    with pytest.raises(UserInputError, match="holds other checkpoints"):
        catalog.copy(_save(catalog, "second").path, OTHER_RUN, None)


def test_overwriting_the_source_leaves_its_copy_alone(catalog: Catalog) -> None:
    source = _save(catalog, content="old")
    copied = catalog.copy(source.path, OTHER_RUN, None)

    _save(catalog, content="new", overwrite=True)

    assert (catalog.folder(copied) / "weights.bin").read_text() == "old"


_texts = st.text(max_size=140) | st.from_regex(r"[A-Za-z0-9./\\_~ :-]{0,20}", fullmatch=True)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=_texts, kind=_texts | st.just("weights"), run_id=_texts | st.just(RUN))
@example(name="..", kind="weights", run_id=RUN)
@example(name="first", kind="..", run_id=RUN)
@example(name="first", kind="weights", run_id="../../..")
@example(name="../../outside", kind="weights", run_id=RUN)
def test_no_name_reaches_outside_the_state_directory(name: str, kind: str, run_id: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outside = Path(folder) / "outside"
        outside.mkdir()
        secret = outside / "checkpoint.json"
        secret.write_text("{}")
        state_dir = Path(folder) / "state"
        catalog = Catalog(state_dir)
        catalog.add_run(Run(RUN, "org/base", LoraSpec(), "2026-01-01T00:00:00+00:00", {}))

        for use in (
            lambda: catalog.save(NewCheckpoint(run_id, "weights", name), _write()),
            lambda: catalog.get(f"tinker://{run_id}/{kind}/{name}"),
            lambda: catalog.copy(f"tinker://{run_id}/{kind}/{name}", run_id, None),
            lambda: catalog.delete(f"tinker://{run_id}/{kind}/{name}"),
        ):
            with contextlib.suppress(UserInputError, NotFoundError):
                use()

        assert sorted(path.name for path in Path(folder).iterdir()) == ["outside", "state"]
        assert list(outside.iterdir()) == [secret]
        assert secret.read_text() == "{}"
        assert {p.name for p in state_dir.iterdir()} == {"runs", "unfinished", "ephemeral"}
