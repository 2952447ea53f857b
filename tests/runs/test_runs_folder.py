"""A run's folder: the cookbook's layout, read by the cookbook's own classes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stored_runs import make_spec

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.store.rows import CheckpointRow
from tinker_mcp.training.prices import Price


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.of(tmp_path, "sft-1")
    made.create(make_spec(), "sft-1")
    return made


def checkpoint(step: int, *, is_final: bool = False) -> CheckpointRow:
    return CheckpointRow(step, 0.0, f"tinker://a/weights/{step}", f"tinker://a/s/{step}", is_final)


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]


def test_the_cookbooks_registry_finds_a_run_and_knows_its_kind(tmp_path: Path) -> None:
    from tinker_cookbook.stores import LocalStorage, RunRegistry

    for name, fields in (("sft-1", {}), ("dpo-1", {"method": "dpo", "beta": 0.1})):
        run = RunFolder.of(tmp_path, name)
        run.create(make_spec(**fields), name)
        run.append_metrics(1, {"train_mean_nll": 2.0})
        run.append_checkpoint(checkpoint(1))
    found = {run.run_id: run for run in RunRegistry([LocalStorage(tmp_path / "runs")]).get_runs()}
    assert {name: run.training_type for name, run in found.items()} == {
        "sft-1": "sl",
        "dpo-1": "dpo",
    }
    assert all(r.has_config and r.has_metrics and r.has_checkpoints for r in found.values())
    assert found["sft-1"].status == "running"


def test_the_cookbooks_registry_calls_an_old_run_with_a_final_checkpoint_completed(
    folder: RunFolder,
) -> None:
    from tinker_cookbook.stores import LocalStorage, RunRegistry

    folder.append_metrics(1, {"train_mean_nll": 2.0})
    folder.append_checkpoint(checkpoint(1, is_final=True))
    an_hour_ago = time.time() - 3600
    os.utime(folder.metrics, (an_hour_ago, an_hour_ago))
    (run,) = RunRegistry([LocalStorage(folder.path.parent)]).get_runs()
    assert run.status == "completed"


def test_the_cookbooks_store_reads_the_numbers_nan_too(folder: RunFolder) -> None:
    from tinker_cookbook.stores import LocalStorage, TrainingRunStore

    folder.append_metrics(0, {"test/nll": 3.0})
    folder.append_metrics(1, {"train_mean_nll": float("nan"), "num_tokens": 20.0})
    store = TrainingRunStore(LocalStorage(folder.path))
    first, second = store.read_metrics()
    assert first == {"step": 0, "test/nll": 3.0}
    assert second["train_mean_nll"] != second["train_mean_nll"]
    assert store.metric_keys() == {"test/nll", "train_mean_nll", "num_tokens"}
    config = store.read_config()
    assert config is not None
    assert (config["model_name"], config["lora_rank"]) == ("tinker-local/tiny", 4)


def test_the_cookbook_resumes_from_the_last_checkpoint(folder: RunFolder) -> None:
    from tinker_cookbook.checkpoint_utils import get_last_checkpoint

    for step in (5, 10):
        folder.append_checkpoint(checkpoint(step, is_final=step == 10))
    last = get_last_checkpoint(str(folder.path))
    assert last is not None
    assert (last.name, last.batch, last.final) == ("sft-1-000010", 10, True)
    assert (last.state_path, last.sampler_path) == ("tinker://a/weights/10", "tinker://a/s/10")


def test_the_config_tells_spec_data_versions_and_price(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path, "sft-1")
    price = Price(prefill=0.1, sample=0.6, train=0.44, source="models.json", date="2026-10-01")
    spec = make_spec(usd_per_million=0.44, max_usd=2.0)
    folder.create(spec, "sft-1", price)
    config = json.loads(folder.config.read_text())
    assert config["spec"] == spec.model_dump(mode="json")
    assert config["data_sha256"] == {"train": "ab" * 32, "held_out": "ab" * 32}
    assert config["price"]["train"] == 0.44
    assert (config["price"]["source"], config["price"]["date"]) == ("models.json", "2026-10-01")
    assert config["num_epochs"] == 25  # 100 steps of 2 on 8 datums
    assert set(config["versions"]) == {
        "python", "tinker-mcp", "tinker", "tinker-cookbook", "torch", "transformers",
    }  # fmt: skip
    assert all(config["versions"].values())


def test_a_changed_spec_keeps_the_price_that_was_there(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path, "sft-1")
    price = Price(prefill=None, sample=None, train=0.44, source="models.json", date="2026-10-01")
    folder.create(make_spec(), "sft-1", price)
    folder.write_config(make_spec(steps=200), "sft-1")
    config = json.loads(folder.config.read_text())
    assert (config["max_steps"], config["price"]["train"]) == (200, 0.44)


def test_only_its_owner_may_look_into_a_run(folder: RunFolder) -> None:
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.config.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "name", ["..", ".", "../a", "/etc", "a/b", "", "a\\b", "a\n", ".a", "x" * 200]
)
def test_a_run_id_never_leads_out_of_the_runs_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="is no run_id"):
        RunFolder.of(tmp_path, name)


def test_a_rewind_drops_what_comes_again(folder: RunFolder) -> None:
    folder.append_metrics(0, {"test/nll": 3.0})
    for step in range(1, 8):
        folder.append_metrics(step, {"train_mean_nll": 1.0 / step})
    folder.append_checkpoint(checkpoint(5))
    folder.append_checkpoint(checkpoint(7))
    folder.rewind(5)
    assert steps(folder) == [0, 1, 2, 3, 4, 5]
    assert folder.checkpoints.read_text().count("\n") == 1


def test_a_rewind_to_before_the_start_empties_the_files(folder: RunFolder) -> None:
    folder.append_metrics(0, {"test/nll": 3.0})
    folder.rewind(-1)
    assert folder.metrics.read_text() == ""


def test_a_torn_line_is_skipped_by_the_cookbook_and_gone_after_a_rewind(folder: RunFolder) -> None:
    from tinker_cookbook.checkpoint_utils import get_last_checkpoint
    from tinker_cookbook.stores import LocalStorage, TrainingRunStore

    folder.append_metrics(1, {"train_mean_nll": 1.0})
    folder.append_checkpoint(checkpoint(1))
    for path in (folder.metrics, folder.checkpoints):
        with path.open("ab") as file:
            file.write(b'{"step": 2, "na')
    store = TrainingRunStore(LocalStorage(folder.path))
    assert [line["step"] for line in store.read_metrics()] == [1]
    folder.rewind(2)
    last = get_last_checkpoint(str(folder.path))
    assert last is not None
    assert last.batch == 1
    assert steps(folder) == [1]


def test_a_line_after_a_torn_one_is_whole(folder: RunFolder) -> None:
    folder.append_metrics(1, {"train_mean_nll": 1.0})
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 2, "tr')
    folder.append_metrics(2, {"train_mean_nll": 0.5})
    assert steps(folder) == [1, 2]


def test_the_numbers_of_a_step_are_written_over_those_of_an_earlier_time(folder: RunFolder) -> None:
    folder.append_metrics(5, {"train_mean_nll": 1.0})
    folder.append_metrics(5, {"test/nll": 2.0})
    folder.append_metrics(6, {"train_mean_nll": 0.9})
    folder.append_metrics(5, {"test/nll": 2.5})
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert lines == [
        {"step": 5, "train_mean_nll": 1.0},
        {"step": 6, "train_mean_nll": 0.9},
        {"step": 5, "test/nll": 2.5},
    ]


def test_a_reader_sees_every_file_whole_while_it_is_rewound(folder: RunFolder) -> None:
    from tinker_cookbook.checkpoint_utils import load_checkpoints_file

    for step in range(1, 60):
        folder.append_checkpoint(checkpoint(step))
    writer = threading.Thread(target=lambda: [folder.rewind(60 - n) for n in range(60)])
    writer.start()
    while writer.is_alive():
        read = load_checkpoints_file(str(folder.path))  # raises on half a line
        assert [record.batch for record in read] == list(range(1, len(read) + 1))
    writer.join()


WRITER = """
import sys
from pathlib import Path
from tinker_mcp.runs.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
for step in range(1, 1_000_000):
    folder.append_metrics(step, {"train_mean_nll": 1.0 / step, "num_tokens": 20.0})
    print(step, flush=True)
"""


def test_a_writer_that_is_killed_tears_the_last_line_at_most(folder: RunFolder) -> None:
    for kill_after in (1, 20, 57):
        folder.rewind(-1)
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder.path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(kill_after):
                writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        whole = folder.metrics.read_bytes().rpartition(b"\n")[0].splitlines()
        written = [json.loads(line)["step"] for line in whole]
        assert len(written) >= kill_after
        assert written == list(range(1, len(written) + 1))
