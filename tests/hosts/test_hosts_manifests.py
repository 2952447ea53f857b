"""What hosts read at the repository's top says what the package is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.manifests import BUNDLE, ROOT, renewed
from tinker_mcp import __version__
from tinker_mcp.server.skills import installed
from tinker_mcp.settings import Settings

PLUGIN = ROOT / ".claude-plugin" / "plugin.json"
MARKETPLACE = ROOT / ".claude-plugin" / "marketplace.json"
REGISTRY = ROOT / "server.json"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_the_bundle_names_the_tools_and_prompts_of_now() -> None:
    assert BUNDLE.read_text() == renewed(BUNDLE.read_text())


def test_what_a_user_leaves_empty_in_the_bundle_counts_as_unset(tmp_path: Path) -> None:
    manifest = read(BUNDLE)
    options = {**manifest["user_config"], "root": {"default": str(tmp_path)}}
    env = {
        name: re.sub(r"\$\{user_config\.(\w+)\}", lambda m: options[m[1]]["default"], value)
        for name, value in manifest["server"]["mcp_config"]["env"].items()
    }
    settings = Settings.from_environment(env)
    assert (settings.api_key, settings.home) == (None, Settings().home)
    assert settings.roots == (tmp_path.resolve(),)


def test_the_key_is_a_secret_to_every_host() -> None:
    assert read(BUNDLE)["user_config"]["api_key"]["sensitive"]
    [package] = read(REGISTRY)["packages"]
    secrets = [v["name"] for v in package["environmentVariables"] if v.get("isSecret")]
    assert secrets == ["TINKER_API_KEY"]


def test_the_plugin_brings_the_skill_at_the_top_and_the_server() -> None:
    plugin = read(PLUGIN)
    assert plugin["version"] == __version__
    assert [ROOT / folder / "SKILL.md" for folder in plugin["skills"]] == [
        installed().files["SKILL.md"]
    ]
    assert plugin["mcpServers"] == {"tinker": {"command": "tinker-mcp", "args": ["serve"]}}
    assert plugin["name"] in [listed["name"] for listed in read(MARKETPLACE)["plugins"]]


# The limits are those of the schema that the file names.
def test_the_registry_is_told_of_the_package_on_pypi() -> None:
    server = read(REGISTRY)
    [package] = server["packages"]
    assert re.fullmatch(r"[a-zA-Z0-9.-]+/[a-zA-Z0-9._-]+", server["name"])
    assert 1 <= len(server["description"]) <= 100
    assert server["version"] == package["version"] == __version__
    assert (package["registryType"], package["identifier"]) == ("pypi", "tinker-mcp")
    assert package["transport"] == {"type": "stdio"}


def test_the_readme_claims_no_other_name_in_the_registry() -> None:
    claimed = re.findall(r"mcp-name: (\S+)", (ROOT / "README.md").read_text())
    assert set(claimed) <= {read(REGISTRY)["name"]}


@pytest.mark.skipif(shutil.which("claude") is None, reason="Claude Code validates its own files")
@pytest.mark.parametrize("path", [PLUGIN, MARKETPLACE])
def test_claude_code_finds_nothing_to_warn_of(path: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        ["claude", "plugin", "validate", "--strict", str(path)],  # noqa: S607 - the user's own
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
