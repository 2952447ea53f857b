"""Optional loggers: what they get, and that a run goes on without them.

The three services run for real where their package is installed; elsewhere those tests are skipped.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from detached import ended, planned
from stored_runs import make_spec

from tinker_mcp.runs import loggers
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.loggers import Loggers
from tinker_mcp.runs.supervisor import Supervisor
from tinker_mcp.settings import Settings
from tinker_mcp.store.rows import MetricKind
from tinker_mcp.store.runs import RunStore

BOUND_S = 60.0


class Attempt:
    """The loggers of one attempt at a run, and what they warned of."""

    def __init__(
        self, home: Path, *names: str, start: int = 0, environ: Mapping[str, str] | None = None
    ) -> None:
        self.folder = RunFolder.of(home, "sft-1")
        spec = make_spec(loggers=names)
        self.folder.create(spec, "sft-1")
        self.warnings: list[str] = []
        self.thread_of_warnings: set[int] = set()
        self.loggers = Loggers(
            spec, self.folder, start_step=start, environ=environ or {}, warn=self._warn
        )

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        self.thread_of_warnings.add(threading.get_ident())

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.loggers.log("train", step, {"train_mean_nll": 1.0 / step})


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that nobody has installed; the test writes one."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(str(packages))
    for name in ("trackio", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield packages
    for name in ("trackio", "wandb"):
        sys.modules.pop(name, None)


def test_a_run_without_loggers_does_nothing(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    attempt.steps(1, 3)
    attempt.loggers.close()
    assert attempt.warnings == []


def test_a_logger_that_is_not_installed_is_left_out_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    attempt = Attempt(tmp_path, "wandb", "trackio", "tensorboard")
    attempt.steps(1, 3)
    attempt.loggers.close()
    assert len(attempt.warnings) == 3
    for name, warning in zip(("wandb", "trackio", "tensorboard"), attempt.warnings, strict=True):
        assert f"pip install 'tinker-mcp[{name}]'" in warning


def test_a_folder_of_the_same_name_is_no_package(stand_in: Path) -> None:
    (stand_in / "trackio").mkdir()
    sys.path_importer_cache.clear()
    if "trackio" in sys.modules or _is_installed("trackio"):
        pytest.skip("the real one is installed")
    assert "is not installed" in str(loggers.missing("trackio", {}))


def test_wandb_without_a_key_is_left_out_with_its_remedy(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stand_in / "wandb.py").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "WANDB_API_KEY" in str(loggers.missing("wandb", {}))
    assert loggers.missing("wandb", {"WANDB_API_KEY": "k" * 40}) is None
    assert loggers.missing("wandb", {"WANDB_MODE": "offline"}) is None
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password " + "k" * 40 + "\n")
    netrc.chmod(0o600)
    assert loggers.missing("wandb", {}) is None
    assert loggers.missing("wandb", {"WANDB_BASE_URL": "https://wandb.example.org"}) is not None


def test_a_logger_that_cannot_be_opened_is_told_once_without_its_secrets(
    stand_in: Path, tmp_path: Path
) -> None:
    (stand_in / "trackio.py").write_text(
        "def init(**_): raise RuntimeError('no space: token=hf_abcdefgh')\n"
    )
    attempt = Attempt(tmp_path, "trackio")
    deadline = time.monotonic() + BOUND_S
    while not attempt.warnings and time.monotonic() < deadline:
        attempt.steps(1, 1)
    attempt.steps(2, 9)
    attempt.loggers.close()
    (warning,) = attempt.warnings
    assert "trackio failed (RuntimeError: no space: token=[hidden])" in warning
    assert "the run goes on without it" in warning
    assert attempt.thread_of_warnings == {threading.get_ident()}


def test_a_logger_that_raises_later_is_told_once(stand_in: Path, tmp_path: Path) -> None:
    (stand_in / "trackio.py").write_text(
        "class Run:\n"
        "    def log(self, numbers, step):\n"
        "        if step == 3: raise ConnectionError('gone')\n"
        "    def finish(self): pass\n"
        "def init(**_): return Run()\n"
    )
    attempt = Attempt(tmp_path, "trackio")
    attempt.steps(1, 9)
    attempt.loggers.close(BOUND_S)
    assert len(attempt.warnings) == 1
    assert "ConnectionError: gone" in attempt.warnings[0]


def test_a_logger_that_hangs_holds_nobody_up(stand_in: Path, tmp_path: Path) -> None:
    (stand_in / "trackio.py").write_text(
        "import threading\ndef init(**_): threading.Event().wait()\n"
    )
    attempt = Attempt(tmp_path, "trackio")
    began = time.monotonic()
    attempt.steps(1, 1000)
    attempt.loggers.close(0.2)
    assert time.monotonic() - began < 2.0
    (warning,) = attempt.warnings
    assert "trackio had not finished 0.2 s after the run" in warning


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    with_resume(tmp_path, "trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = list(connection.execute("SELECT step, metrics FROM metrics"))
    trained = [step for step, numbers in rows if "train_mean_nll" in json.loads(numbers)]
    assert sorted(trained) == list(range(1, 11))
    assert [step for step, numbers in rows if "test/nll" in json.loads(numbers)] == [0, 5]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-not-found, unused-ignore]
        EventAccumulator,
    )

    attempt = with_resume(tmp_path, "tensorboard")
    read = EventAccumulator(str(attempt.folder.path / "tensorboard")).Reload()
    trained = [(event.step, event.value) for event in read.Scalars("train_mean_nll")]
    assert trained == [(step, pytest.approx(1.0 / step)) for step in range(1, 11)]
    assert [event.step for event in read.Scalars("test/nll")] == [0, 5]


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TINKER_API_KEY", "tml-must-not-be-seen")
    attempt = with_resume(tmp_path, "wandb", environ={"WANDB_MODE": "offline"})
    kept = [path for path in (attempt.folder.path / "wandb").rglob("*.wandb") if path.is_file()]
    assert kept
    written = b"".join(p.read_bytes() for p in attempt.folder.path.rglob("*") if p.is_file())
    assert b"train_mean_nll" in written
    assert b"tml-must-not-be-seen" not in written


def with_resume(home: Path, name: str, environ: Mapping[str, str] | None = None) -> Attempt:
    """Seven steps, then from the checkpoint of step 5 to 10."""
    first = Attempt(home, name, environ=environ)
    first.loggers.log("eval", 0, {"test/nll": 3.0})
    first.steps(1, 6)
    first.loggers.log("eval", 5, {"test/nll": 2.0})  # after a later step, as a pipeline has it
    first.steps(7, 7)
    first.loggers.close(BOUND_S)
    second = Attempt(home, name, start=5, environ=environ)
    second.steps(6, 10)
    second.loggers.close(BOUND_S)
    assert first.warnings + second.warnings == []
    return second


def _is_installed(name: str) -> bool:
    found = loggers.importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def test_what_was_sent_is_no_news_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "sent.json"
    kind: MetricKind = "train"
    assert loggers._Sent.of(path).is_news(kind, 3)
    again = loggers._Sent.of(path)
    assert [again.is_news(kind, step) for step in (2, 3, 4)] == [False, False, True]
    assert again.is_news("eval", 0)


@pytest.mark.timeout(300)
def test_a_real_run_ends_as_planned_whatever_its_loggers_lack(
    runs_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    supervisor = Supervisor(Settings(home=runs_home))
    names = ("wandb", "trackio", "tensorboard")
    run = ended(supervisor, supervisor.start(planned(steps=3, loggers=names)).run_id)
    assert run.state == "completed", run.detail
    with RunStore(runs_home) as store:
        warned = {e.what for e in store.events(run.run_id) if e.kind == "warning"}
    lacking = {name for name in names if name == "wandb" or not _is_installed(name)}
    assert {warning.split()[2] for warning in warned} == lacking
    for name in {"tensorboard"} - lacking:
        assert list((RunFolder.of(runs_home, run.run_id).path / name).glob("events.*"))
    for _ in {"trackio"} - lacking:
        assert list((tmp_path / "trackio").glob("*.db"))
