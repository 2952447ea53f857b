"""The SDK's own command line, `tinker`, against this server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tinker

from servers import LocalServer
from tiny_data import TINY

BOUND_S = 60.0

# The commands one after the other in one process, since each would import the SDK for 4 s.
_DRIVER = """
import contextlib, io, json, sys
from tinker.cli.__main__ import main

done = {}
for name, args in json.loads(sys.argv[1]).items():
    sys.argv = ["tinker", *args]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
    done[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
print(json.dumps(done))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)


def _run(server: LocalServer, home: Path, *command: str, **env: str) -> str:
    """A process with HOME in `home`: the user's own credentials are never touched."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **server.env, "HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run_id(tiny_server: LocalServer) -> Iterator[str]:
    """A training run with a saved state and saved sampler weights."""
    with tinker.ServiceClient(
        base_url=tiny_server.base_url, api_key=tiny_server.api_key
    ) as service:
        client = service.create_lora_training_client(TINY, rank=2).result(BOUND_S)
        client.save_state("one").result(BOUND_S)
        client.save_weights_for_sampler("two").result(BOUND_S)
        yield client.model_id


@pytest.fixture(scope="module")
def cli(
    tiny_server: LocalServer, run_id: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Done]:
    """What each command of the tests below says."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = [(hour + timedelta(hours=n)).strftime("%Y-%m-%dT%H:00:00Z") for n in (0, 2)]
    as_json = ["--format", "json"]
    commands = {
        "model list": [*as_json, "model", "list", "TINY"],
        "model list nonsense": ["model", "list", "nonsense"],
        "run list": [*as_json, "run", "list", "--limit", "0"],
        "run info": [*as_json, "run", "info", run_id],
        "run info, a table": ["run", "info", run_id],
        "run info nonsense": ["run", "info", "nonsense"],
        "checkpoint list": [*as_json, "checkpoint", "list", "--limit", "0"],
        "checkpoint list of a run": [*as_json, "checkpoint", "list", "--run-id", run_id],
        "session export-trace": ["session", "export-trace", "some-session"],
        "billing usage": [*as_json, "billing", "usage", *window],
        "billing usage, a table": ["billing", "usage", *window],
        "billing checkpoint-storage": [*as_json, "billing", "checkpoint-storage"],
        "auth whoami": [*as_json, "auth", "whoami"],
        "auth status": ["auth", "status"],
    }
    home = tmp_path_factory.mktemp("home")
    said = _run(tiny_server, home, "-c", _DRIVER, json.dumps(commands))
    return {name: Done(**done) for name, done in json.loads(said).items()}


def test_version(tiny_server: LocalServer, tmp_path: Path) -> None:
    said = _run(tiny_server, tmp_path, "-m", "tinker.cli", "version")

    assert said == f"tinker {tinker.__version__}\n"


def test_model_list(cli: dict[str, Done]) -> None:
    [model] = cli["model list"].json["models"]

    assert (model["model_name"], model["trainable"], model["sampleable"]) == (TINY, True, True)


def test_model_list_without_a_match_names_the_organization(cli: dict[str, Done]) -> None:
    assert cli["model list nonsense"].status == 1
    assert "for organization tml:organization:local" in cli["model list nonsense"].err


def test_run_list_and_info(cli: dict[str, Done], run_id: str) -> None:
    told = cli["run info"].json

    assert told in cli["run list"].json["runs"]
    assert (told["training_run_id"], told["base_model"]) == (run_id, TINY)
    assert told["last_checkpoint"]["checkpoint_id"] == "weights/one"
    assert told["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/two"
    assert "Yes (Rank 2)" in cli["run info, a table"].out


def test_run_info_of_an_unknown_run_is_a_sentence(cli: dict[str, Done]) -> None:
    assert cli["run info nonsense"].status == 1
    assert "No training run 'nonsense' on this server" in cli["run info nonsense"].err


def test_checkpoint_list(cli: dict[str, Done], run_id: str) -> None:
    of_run = cli["checkpoint list of a run"].json["checkpoints"]
    of_all = cli["checkpoint list"].json["checkpoints"]

    paths = {saved["tinker_path"] for saved in of_run}
    assert paths == {f"tinker://{run_id}/weights/one", f"tinker://{run_id}/sampler_weights/two"}
    assert paths <= {saved["tinker_path"] for saved in of_all}


def test_session_export_trace_says_why_not(cli: dict[str, Done]) -> None:
    assert cli["session export-trace"].status == 1
    assert "keeps no timeline of requests" in cli["session export-trace"].err


def test_billing_usage(cli: dict[str, Done], run_id: str) -> None:
    usage, session_id = cli["billing usage"].json, run_id.partition(":")[0]

    rows = [row for row in usage["data"] if row["session_id"] == session_id]
    assert "checkpoint" in {row["event_info"]["type"] for row in rows}
    assert session_id in usage["sessions"]
    assert f"{len(usage['data'])} hourly usage row(s)" in cli["billing usage, a table"].out


def test_billing_checkpoint_storage(cli: dict[str, Done]) -> None:
    assert sum(row["size_bytes"] for row in cli["billing checkpoint-storage"].json["data"]) > 0


def test_auth_whoami_and_status(cli: dict[str, Done]) -> None:
    assert cli["auth whoami"].json["org_urn"] == "tml:organization:local"
    assert cli["auth status"].out == "Credentials available: yes\nTinker accessible: yes\n"


def test_auth_status_with_a_wrong_key_says_where_the_right_one_is(
    tiny_server: LocalServer, tmp_path: Path
) -> None:
    said = _run(
        tiny_server,
        tmp_path,
        *("-m", "tinker.cli", "auth", "status"),
        TINKER_API_KEY="tml-local-wrong",
    )

    assert "Tinker accessible: no" in said
    assert "tinker-local env" in said
    assert "Traceback" not in said
