"""The conformance suite: which scenarios a server passes, and which need the suite's fixtures."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.validators import node

REVISIONS = ("2025-11-25", "2026-07-28")

# These look at what any server has; all others call the suite's own tools, prompts and resources.
NEED_NO_FIXTURE = frozenset(
    {
        "server-initialize",
        "server-session-lifecycle",
        "server-stateless",
        "ping",
        "completion-complete",
        "tools-list",
        "resources-list",
        "prompts-list",
        "sep-2164-resource-not-found",
        "caching",
        "dns-rebinding-protection",
        "http-header-validation",
        "server-sse-multiple-streams",
    }
)
# Two of the 28 checks of server-stateless call `test_missing_capability`.
CHECKS_WITH_FIXTURE = frozenset(
    {"sep-2575-server-rejects-undeclared-capability", "sep-2575-missing-capability-http-400"}
)
# Of extensions, which no revision requires: the skill over MCP
SKILLS = ("sep-2640-skills-enumeration", "sep-2640-skills-manifest", "sep-2640-skills-directory")
EXTENSIONS = "extensions"


@dataclass(frozen=True)
class Outcome:
    """One scenario.

    Attributes:
        is_scored: The revision requires it; others are extensions or not settled yet.
        failures: Each failed check with its message.
    """

    revision: str
    scenario: str
    is_scored: bool
    checks_passed: int
    failures: dict[str, str]

    @property
    def needs_fixture(self) -> bool:
        return self.scenario not in NEED_NO_FIXTURE

    def without_fixture_checks(self) -> dict[str, str]:
        """The failures that the suite's fixtures have no part in."""
        return {key: text for key, text in self.failures.items() if key not in CHECKS_WITH_FIXTURE}


def conform(url: str, revision: str, folder: Path) -> list[Outcome]:
    """Run all server scenarios of `revision`; their records go to `folder`."""
    run = node.run(
        "conformance", ["server", "--url", url, "--requirements", revision, "-o", str(folder)]
    )
    scored = _scored(revision)
    outcomes = [_outcome(path, revision, scored) for path in sorted(folder.glob("*/checks.json"))]
    left_out = scored - {outcome.scenario for outcome in outcomes}
    if left_out:
        raise RuntimeError(f"{revision}: no record of {sorted(left_out)}: {run.stderr[-1000:]}")
    return outcomes


def conform_extensions(url: str, folder: Path) -> list[Outcome]:
    """Run the scenarios of the extensions that the server has."""
    for name in SKILLS:
        node.run("conformance", ["server", "--url", url, "--scenario", name, "-o", str(folder)])
    records = sorted(folder.glob("*/checks.json"))
    if len(records) != len(SKILLS):
        raise RuntimeError(f"Only {[path.parent.name for path in records]} left a record.")
    return [_outcome(path, EXTENSIONS, set(SKILLS)) for path in records]


def _outcome(path: Path, revision: str, scored: set[str]) -> Outcome:
    checks = json.loads(path.read_text())
    scenario = _scenario(path.parent.name)
    return Outcome(
        revision,
        scenario,
        scenario in scored,
        sum(check["status"] == "SUCCESS" for check in checks),
        {check["id"]: _message(check) for check in checks if check["status"] == "FAILURE"},
    )


def _scenario(record: str) -> str:
    """`server-ping-2026-11-21T17-03-46-949Z` is of `ping`."""
    return re.sub(r"-\d{4}-\d\d-\d\dT.*$", "", record.removeprefix("server-"))


def _message(check: dict[str, object]) -> str:
    details = json.dumps(check.get("details"))[:300]
    return str(check.get("errorMessage") or details)


def _scored(revision: str) -> set[str]:
    package = node.toolchain() / "node_modules" / "@modelcontextprotocol" / "conformance"
    requirements = yaml.safe_load((package / "requirements" / f"{revision}.yaml").read_text())
    return set(requirements["server"])
