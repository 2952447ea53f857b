"""`--alias NAME=MODEL`: a server that answers to another model's name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from servers import LocalServer, serve_command, start_server
from tinker_local import weights
from tinker_local.server import ServeOptions, _prepared
from tiny_data import TINY, sdk_datum, tokens_of

BOUND_S = 30.0
NAME = "Qwen/Qwen3-4B-Instruct-2507"
PROMPT = types.ModelInput.from_ints(tokens_of("the cat"))
GREEDY = types.SamplingParams(max_tokens=3, temperature=0.0, stop=[])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    state_dir = tmp_path_factory.mktemp("alias") / "state"
    server = start_server(state_dir, "--alias", f"{NAME}={TINY}")
    yield server
    server.stop()


@pytest.fixture
def service(server: LocalServer) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=server.base_url, api_key=server.api_key) as client:
        yield client


def test_both_names_are_served(server: LocalServer) -> None:
    rest = tinker.RestClient(base_url=server.base_url, api_key=server.api_key)

    told = rest.get_server_capabilities().result(BOUND_S).supported_models

    assert [model.model_name for model in told] == [TINY, NAME]
    assert server.models == [TINY, NAME]


def test_a_run_and_its_checkpoints_remember_the_name_they_were_asked_for_by(
    server: LocalServer, service: tinker.ServiceClient
) -> None:
    client = service.create_lora_training_client(NAME, rank=2, seed=0).result(BOUND_S)
    client.forward_backward([sdk_datum("the cat sat")], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result(BOUND_S)
    state = client.save_state("a").result(BOUND_S).path
    resumed = service.create_training_client_from_state(state).result(BOUND_S)
    rest = tinker.RestClient(base_url=server.base_url, api_key=server.api_key)

    for trained in (client, resumed):
        assert trained.get_info().model_data.model_name == NAME
        assert rest.get_training_run(trained.model_id).result(BOUND_S).base_model == NAME
    assert rest.get_weights_info_by_tinker_path(state).result(BOUND_S).base_model == NAME
    sampler = client.save_weights_and_get_sampling_client().result(BOUND_S)
    assert sampler.get_base_model() == NAME
    assert len(sampler.sample(PROMPT, 1, GREEDY).result(BOUND_S).sequences[0].tokens) == 3


def test_the_name_samples_what_the_model_samples(service: tinker.ServiceClient) -> None:
    sampled = [
        service.create_sampling_client(base_model=name)
        .result(BOUND_S)
        .sample(PROMPT, 1, GREEDY)
        .result(BOUND_S)
        .sequences[0]
        for name in (NAME, TINY)
    ]

    assert sampled[0].tokens == sampled[1].tokens
    assert sampled[0].logprobs == sampled[1].logprobs


def test_to_other_servers_the_name_means_what_it_meant(server: LocalServer) -> None:
    folder = f"models--{NAME.replace('/', '--')}"
    assert (Path(server.env["HF_HOME"]) / "hub" / folder / "refs" / "main").exists()
    assert not (weights.hf_home(weights.cache_dir()) / "hub" / folder).exists()


def test_a_folders_name_is_found_by_the_clients_of_its_server_alone(
    server: LocalServer, tmp_path: Path
) -> None:
    folder = Path(server.env["HF_HOME"]) / "hub/models--tinker-local--tiny/snapshots"
    tiny = next(folder.iterdir()).resolve()
    options = ServeOptions([f"a/b={tiny}", TINY], "127.0.0.1", 0, tmp_path, "float32", 0)

    models, hf_home = _prepared(options)

    assert [model.name for model in models] == ["a/b", TINY]
    assert hf_home.is_relative_to(tmp_path)
    assert {path.name for path in (hf_home / "hub").iterdir()} == {
        "models--a--b",
        "models--tinker-local--tiny",
    }
    assert not (weights.hf_home(weights.cache_dir()) / "hub/models--a--b").exists()


_TOKENIZE = f"""
import tinker
from transformers import AutoTokenizer

assert AutoTokenizer.from_pretrained({NAME!r}).encode("a\\u00e9") == [97, 195, 169]
with tinker.ServiceClient() as service:
    for client in (
        service.create_sampling_client(base_model={NAME!r}).result(30),
        service.create_lora_training_client({NAME!r}, rank=2).result(30),
    ):
        assert client.get_tokenizer().encode("a\\u00e9") == [97, 195, 169]
"""


def test_the_tokenizer_is_found_by_the_name_without_network(
    server: LocalServer, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TOKENIZE],
        env={**os.environ, **server.env, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("aliases", "said"),
    [
        ("Qwen/Qwen3-4B=org/unknown", f"use one of: {TINY}"),
        (f"{TINY}={TINY}", f"The name '{TINY}' is taken"),
        (f"a/b={TINY} a/b={TINY}", "The name 'a/b' is taken"),
        (f"no-slash={TINY}", "'no-slash=tinker-local/tiny' is no alias"),
        (f"../a={TINY}", "is no alias"),
        ("Qwen/Qwen3-4B", "Give NAME=MODEL"),
    ],
)
def test_an_alias_that_cannot_be_is_a_sentence(tmp_path: Path, aliases: str, said: str) -> None:
    done = subprocess.run(
        serve_command(tmp_path / "state"),
        env={**os.environ, "TINKER_LOCAL_ALIASES": aliases},
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )

    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr
