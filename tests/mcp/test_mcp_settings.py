"""Settings: each environment variable, and what they mean together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.settings import Settings


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("TINKER_MCP_BACKEND", "hosted", "backend", "hosted"),
        ("TINKER_BASE_URL", "http://127.0.0.1:8000/", "base_url", "http://127.0.0.1:8000"),
        ("TINKER_API_KEY", "tml-secret", "api_key", "tml-secret"),
        ("TINKER_MCP_TOKEN", "sixteen-or-more-x", "http_token", "sixteen-or-more-x"),
        ("TINKER_MCP_HOME", "/some/home", "home", Path("/some/home")),
        ("TINKER_LOCAL_CACHE", "~/models", "local_cache", Path.home() / "models"),
    ],
)
def test_each_variable_sets_one_field(name: str, value: str, field: str, expected: Any) -> None:
    defaults = vars(Settings.from_environment({}))
    read = vars(Settings.from_environment({name: value}))
    assert read == {**defaults, field: expected}


def test_an_empty_variable_counts_as_unset() -> None:
    names = ("MCP_BACKEND", "BASE_URL", "API_KEY", "MCP_HOME", "LOCAL_CACHE", "MCP_TOKEN")
    empty = {f"TINKER_{name}": "" for name in names}
    assert Settings.from_environment(empty) == Settings.from_environment({})


def test_the_option_wins_over_the_variable() -> None:
    read = Settings.from_environment({"TINKER_MCP_BACKEND": "hosted"}, backend="local")
    assert read.backend == "local"


@pytest.mark.parametrize(
    ("environ", "is_local"),
    [
        ({}, True),
        ({"TINKER_API_KEY": "tml-x"}, False),
        ({"TINKER_BASE_URL": "http://127.0.0.1:1"}, False),
        ({"TINKER_MCP_BACKEND": "local", "TINKER_API_KEY": "tml-x"}, True),
        ({"TINKER_MCP_BACKEND": "hosted"}, False),
    ],
)
def test_auto_is_local_until_a_key_or_an_address_is_set(
    environ: dict[str, str], is_local: bool
) -> None:
    assert Settings.from_environment(environ).is_local is is_local


def test_an_unknown_backend_is_named_with_those_that_exist() -> None:
    with pytest.raises(InvalidInputError, match=r"'cloud' is unknown.*auto, hosted or local"):
        Settings.from_environment({"TINKER_MCP_BACKEND": "cloud"})


@pytest.mark.parametrize("value", ["localhost:8000", "http://", "http://host:port", "http://[::1"])
def test_an_address_that_no_client_can_use_is_refused_at_the_start(value: str) -> None:
    with pytest.raises(InvalidInputError, match="TINKER_BASE_URL"):
        Settings.from_environment({"TINKER_BASE_URL": value})


def test_the_key_is_in_no_repr() -> None:
    assert "tml-secret" not in repr(Settings(api_key="tml-secret"))


def test_a_key_that_only_the_sdk_finds_serves_the_hosted_backend_but_does_not_choose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not Settings.from_environment({}).has_api_key

    (tmp_path / ".tinker").mkdir()
    (tmp_path / ".tinker" / "credentials.json").write_text("{}")
    stored = Settings.from_environment({})
    by_command = Settings.from_environment({"TINKER_CREDENTIAL_CMD": "print-key"})

    assert stored.has_api_key
    assert by_command.has_api_key
    assert stored.is_local


@pytest.mark.parametrize("token", ["too-short", "with a blank in it", "sixteen-or-more-ü"])
def test_a_token_that_cannot_stand_in_a_header_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(InvalidInputError, match="TINKER_MCP_TOKEN") as refused:
        Settings.from_environment({"TINKER_MCP_TOKEN": token})
    assert token not in str(refused.value)
