"""Exports: PEFT files that are fetched by URL, with the SDK, the cookbook and plain urllib."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pyrage
import pytest
import tinker
from starlette.testclient import TestClient

from servers import LocalServer
from tinker_local.service.downloads import ExpiredError, Grants
from tiny_data import TINY, sdk_datum, tokens_of

if TYPE_CHECKING:
    import torch

BOUND_S = 30.0
TEXT = "the cat sat"
PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def client(service_client: tinker.ServiceClient) -> tinker.TrainingClient:
    client = service_client.create_lora_training_client(TINY, rank=2, seed=0).result(BOUND_S)
    _train(client)
    return client


@pytest.fixture(scope="module")
def export(client: tinker.TrainingClient) -> str:
    return client.save_weights_external("shared").result(BOUND_S).path


@pytest.fixture(scope="module")
def tiny_folder(client: tinker.TrainingClient) -> Path:
    tokenizer_id = client.get_info().model_data.tokenizer_id
    assert tokenizer_id is not None
    return Path(tokenizer_id)


def _name() -> str:
    return f"x-{uuid.uuid4().hex}"


def _urls(rest_client: tinker.RestClient, path: str) -> dict[str, str]:
    return rest_client.get_external_weights_urls(path).result(BOUND_S).urls


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=BOUND_S) as response:  # noqa: S310  # http, ours
        content: bytes = response.read()
    return content


def _refusal(url: str) -> int:
    """The status of an answer that must not be the file."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        _fetch(url)
    with raised.value:
        return raised.value.code


def _download(rest_client: tinker.RestClient, path: str, folder: Path) -> Path:
    folder.mkdir()
    for name, url in _urls(rest_client, path).items():
        (folder / name).write_bytes(_fetch(url))
    return folder


def _logprobs(model: torch.nn.Module) -> np.ndarray:
    """log p of each byte of TEXT but the first, shape (10,)."""
    import torch

    tokens = torch.tensor([tokens_of(TEXT)])
    with torch.no_grad():
        logprobs = model(tokens).logits.float().log_softmax(-1)  # (1, 11, V)
    return logprobs[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0].numpy()


def _adapted(base: Path, adapter: Path) -> torch.nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


def _train(client: tinker.TrainingClient) -> None:
    """Two steps, after which the B factors are not zero."""
    for _ in range(2):
        client.forward_backward([sdk_datum(TEXT)], "cross_entropy")
        client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result(BOUND_S)


def _trained(client: tinker.TrainingClient) -> np.ndarray:
    """What the training client says of TEXT, shape (10,)."""
    done = client.forward([sdk_datum(TEXT)], "cross_entropy").result(BOUND_S)
    return done.loss_fn_outputs[0]["logprobs"].to_numpy()


# PEFT warns of any adapter on a head that shares its weights with the embedding.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_export_is_the_adapter_as_peft_reads_it(
    client: tinker.TrainingClient,
    rest_client: tinker.RestClient,
    export: str,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    folder = _download(rest_client, export, tmp_path / "adapter")

    assert {file.name for file in folder.iterdir()} == PEFT_FILES
    np.testing.assert_allclose(
        _logprobs(_adapted(tiny_folder, folder)), _trained(client), atol=1e-4
    )


def test_an_export_is_listed_with_its_size_and_its_end(
    client: tinker.TrainingClient, rest_client: tinker.RestClient
) -> None:
    path = client.save_weights_external(_name(), ttl_seconds=7200).result(BOUND_S).path

    run_id = path.removeprefix("tinker://").partition("/")[0]
    all_of_run = rest_client.list_checkpoints(run_id).result(BOUND_S).checkpoints
    [listed] = [c for c in all_of_run if c.tinker_path == path]
    sizes = [len(_fetch(url)) for url in _urls(rest_client, path).values()]
    assert listed.checkpoint_type == "external"
    assert listed.size_bytes == sum(sizes)
    assert listed.expires_at is not None


def test_the_answer_to_an_export_holds_its_size(
    tiny_server: LocalServer, service_client: tinker.ServiceClient
) -> None:
    """The SDK leaves it out of what it returns."""
    client = service_client.create_lora_training_client(TINY, rank=2).result(BOUND_S)
    with httpx.Client(
        base_url=f"{tiny_server.base_url}/api/v1", headers={"X-API-Key": tiny_server.api_key}
    ) as http:
        wanted = {"model_id": client.model_id, "path": "x", "seq_id": 1}
        promised = http.post("/save_weights_external", json=wanted).json()
        saved = http.post("/retrieve_future", json={"request_id": promised["request_id"]}).json()

    assert saved["path"] == f"tinker://{client.model_id}/external_weights/x"
    assert saved["size_bytes"] > 1000


def test_urls_tell_when_they_end(rest_client: tinker.RestClient, export: str) -> None:
    answer = rest_client.get_external_weights_urls(export).result(BOUND_S)

    left = answer.expires - datetime.now(UTC)
    # The cookbook asks for new ones five minutes before the end.
    assert timedelta(minutes=50) < left <= timedelta(minutes=60)


def test_a_url_opens_its_own_file_alone(
    tiny_server: LocalServer, rest_client: tinker.RestClient, export: str
) -> None:
    urls = _urls(rest_client, export)
    config_url, weights_url = urls["adapter_config.json"], urls["adapter_model.safetensors"]
    config_token, weights_token = (url.split("/")[-2] for url in (config_url, weights_url))

    assert config_token != weights_token
    assert json.loads(_fetch(config_url))["r"] == 2
    for wrong in (
        config_url.replace("adapter_config.json", "adapter_model.safetensors"),
        config_url.replace("adapter_config.json", "checkpoint.json"),
        config_url.replace("adapter_config.json", "..%2Fcheckpoint.json"),
        config_url.replace("adapter_config.json", "..%2F..%2F..%2Frun.json"),
        config_url.replace(config_token, "0" * 43),
        config_url.replace(config_token, config_token[:-1]),
        config_url.rpartition("/")[0],
        f"{tiny_server.base_url}/api/v1/downloads/",
        f"{tiny_server.base_url}/api/v1/downloads/../checkpoints",
        f"{tiny_server.base_url}/api/v1/downloads/%2E%2E/checkpoints",
    ):
        assert _refusal(wrong) == 404, wrong
    for keyless in ("checkpoints", "training_runs", f"training_runs?token={config_token}"):
        assert _refusal(f"{tiny_server.base_url}/api/v1/{keyless}") == 401


def test_a_token_is_no_api_key(
    tiny_server: LocalServer, rest_client: tinker.RestClient, export: str
) -> None:
    token = _urls(rest_client, export)["adapter_config.json"].split("/")[-2]

    answer = httpx.get(f"{tiny_server.base_url}/api/v1/checkpoints", headers={"X-API-Key": token})

    assert answer.status_code == 401


def test_a_url_is_not_for_web_pages(rest_client: tinker.RestClient, export: str) -> None:
    url = _urls(rest_client, export)["adapter_config.json"]

    for headers in ({"Origin": "https://example.com"}, {"Host": "example.com"}):
        assert httpx.get(url, headers=headers).status_code == 403


def test_a_token_ends() -> None:
    from tinker_local.service.checkpoints import Checkpoint

    export = Checkpoint("run", "external_weights", "x", "2026-01-01", 1, None, None)
    grants = Grants(lifetime=timedelta(0))
    token = grants.give(export, "adapter_config.json", grants.expiry())

    with pytest.raises(ExpiredError, match="get_external_weights_urls"):
        grants.find(token, "adapter_config.json")


def test_a_url_that_has_ended_is_forbidden(tmp_path: Path, tiny_folder: Path) -> None:
    from tinker_local.engine import TorchEngine
    from tinker_local.ops import LoraSpec
    from tinker_local.service import create_app
    from tinker_local.service.checkpoints import NewCheckpoint, Run

    run_id = f"{uuid.uuid4()}:train:0"
    app = create_app(TorchEngine({TINY: tiny_folder}, "float32"), tmp_path)
    with TestClient(app) as http:
        catalog = app.state.backend.catalog
        catalog.add_run(Run(run_id, TINY, LoraSpec(), "2026-01-01T00:00:00+00:00", {}))
        catalog.save(
            NewCheckpoint(run_id, "external_weights", "x"),
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
        )
        where = f"/api/v1/training_runs/{run_id}/checkpoints/external_weights/x"
        app.state.grants = Grants(lifetime=timedelta(0))
        [url] = http.get(f"{where}/external_weights_urls").json()["urls"].values()

        answer = http.get(urllib.parse.urlsplit(url).path)

    assert answer.status_code == 403
    assert "Ask get_external_weights_urls for new ones" in answer.json()["detail"]


def test_a_url_dies_with_its_export_even_if_the_name_is_used_again(
    client: tinker.TrainingClient, rest_client: tinker.RestClient
) -> None:
    name = _name()
    path = client.save_weights_external(name).result(BOUND_S).path
    url = _urls(rest_client, path)["adapter_config.json"]
    assert _fetch(url)

    rest_client.delete_checkpoint_from_tinker_path(path).result(BOUND_S)
    assert _refusal(url) == 404

    assert client.save_weights_external(name).result(BOUND_S).path == path
    assert _refusal(url) == 404


def test_urls_are_given_for_exports_alone(
    tiny_server: LocalServer, client: tinker.TrainingClient
) -> None:
    name = _name()
    client.save_state(name).result(BOUND_S)
    where = f"/api/v1/training_runs/{client.model_id}/checkpoints/weights/{name}"

    answer = httpx.get(
        f"{tiny_server.base_url}{where}/external_weights_urls",
        headers={"X-API-Key": tiny_server.api_key},
    )

    assert answer.status_code == 400
    assert "is no export" in answer.json()["detail"]


def test_an_encrypted_export_opens_with_the_recipients_key_alone(
    client: tinker.TrainingClient, rest_client: tinker.RestClient, tiny_server: LocalServer
) -> None:
    mine, theirs = (pyrage.x25519.Identity.generate() for _ in range(2))
    saved = client.save_weights_external(
        _name(), age_encryption_recipients=[str(mine.to_public())]
    ).result(BOUND_S)

    files = {name: _fetch(url) for name, url in _urls(rest_client, saved.path).items()}

    assert set(files) == {f"{name}.age" for name in PEFT_FILES}
    assert json.loads(pyrage.decrypt(files["adapter_config.json.age"], [mine]))["r"] == 2
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(files["adapter_config.json.age"], [theirs])
    folder = tiny_server.state_dir / "runs" / client.model_id.replace(":", "_")
    on_disk = (folder / "external_weights" / saved.path.rpartition("/")[2]).iterdir()
    assert {file.name for file in on_disk} == {*files, "checkpoint.json"}


def test_an_ssh_public_key_can_be_the_recipient(
    client: tinker.TrainingClient, rest_client: tinker.RestClient, tmp_path: Path
) -> None:
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        pytest.skip("no ssh-keygen on this machine")
    key = tmp_path / "key"
    subprocess.run(
        [keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True, timeout=30
    )
    saved = client.save_weights_external(
        _name(), age_encryption_recipients=[key.with_suffix(".pub").read_text()]
    ).result(BOUND_S)

    content = _fetch(_urls(rest_client, saved.path)["adapter_config.json.age"])

    identity = pyrage.ssh.Identity.from_buffer(key.read_bytes())
    assert json.loads(pyrage.decrypt(content, [identity]))["r"] == 2


@pytest.mark.parametrize(
    ("recipients", "problem"),
    [
        (["age1nonsense"], r"\[0\] is no age recipient"),
        ([""], r"\[0\] is no age recipient"),
        (["ssh-ed25519 nonsense"], r"\[0\] is no age recipient"),
        ([], "holds 0 keys"),
        (["age1nonsense"] * 11, "holds 11 keys"),
    ],
)
def test_bad_recipients_are_refused_and_the_client_goes_on(
    client: tinker.TrainingClient, recipients: list[str], problem: str
) -> None:
    name = _name()

    with pytest.raises(tinker.RequestFailedError, match=problem) as raised:
        client.save_weights_external(name, age_encryption_recipients=recipients).result(BOUND_S)

    assert raised.value.category == "user"
    assert client.save_weights_external(name).result(BOUND_S).path.endswith(name)


def test_a_private_key_sent_by_mistake_is_not_repeated(client: tinker.TrainingClient) -> None:
    private = str(pyrage.x25519.Identity.generate())

    with pytest.raises(tinker.RequestFailedError, match="is no age recipient") as raised:
        client.save_weights_external(_name(), age_encryption_recipients=[private]).result(BOUND_S)

    assert private not in str(raised.value)


def test_training_from_an_export_is_refused(
    service_client: tinker.ServiceClient, export: str
) -> None:
    with pytest.raises(tinker.RequestFailedError, match="holds weights for download"):
        service_client.create_training_client_from_state(export).result(BOUND_S)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the cookbook calls what 0.38 deprecates
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_the_cookbook_downloads_a_state_and_builds_a_peft_adapter_of_it(
    tiny_server: LocalServer,
    client: tinker.TrainingClient,
    rest_client: tinker.RestClient,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tinker_cookbook import weights

    monkeypatch.setenv("TINKER_API_KEY", tiny_server.api_key)
    state = client.save_state(_name()).result(BOUND_S).path

    folder = weights.download(
        tinker_path=state, output_dir=str(tmp_path / "adapter"), base_url=tiny_server.base_url
    )
    weights.build_lora_adapter(
        base_model=str(tiny_folder), adapter_path=folder, output_path=str(tmp_path / "peft")
    )

    assert {file.name for file in Path(folder).iterdir()} == PEFT_FILES
    left = rest_client.list_user_checkpoints(limit=1000).result(BOUND_S).checkpoints
    assert "download" not in [c.tinker_path.rpartition("/")[2] for c in left]
    np.testing.assert_allclose(
        _logprobs(_adapted(tiny_folder, tmp_path / "peft")), _trained(client), atol=1e-4
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the cookbook calls what 0.38 deprecates
def test_the_cookbook_merges_an_adapter_that_leaves_tied_embeddings_alone(
    tiny_server: LocalServer,
    service_client: tinker.ServiceClient,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of lm_head as well cannot be merged into a model whose head is its embedding."""
    from tinker_cookbook import weights
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("TINKER_API_KEY", tiny_server.api_key)
    client = service_client.create_lora_training_client(
        TINY, rank=2, seed=0, train_unembed=False
    ).result(BOUND_S)
    _train(client)
    export = client.save_weights_external("x").result(BOUND_S).path

    folder = weights.download(
        tinker_path=export, output_dir=str(tmp_path / "adapter"), base_url=tiny_server.base_url
    )
    weights.build_hf_model(
        base_model=str(tiny_folder),
        adapter_path=folder,
        output_path=str(tmp_path / "merged"),
        dtype="float32",
    )

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(_logprobs(merged), _trained(client), atol=1e-4)
