"""Run the conformance suite, the Inspector and mcpb; print what passes; exit 1 if anything fails.

    python -m tests.validators [--json FILE]

The server runs twice: as it is, where the scenarios count that need no fixture, and those of the
skills extension; and with the suite's fixtures mounted on the same server object, where all count
that the revision requires.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tests.validators import bundle, conformance, inspector, node
from tests.validators.conformance import REVISIONS, Outcome
from tests.validators.fixtures import mount
from tests.validators.serving import serving
from tinker_mcp.server import create_server
from tinker_mcp.settings import Settings


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Results for programs.")
def main(json_path: Path | None) -> None:
    try:
        node.toolchain()
    except node.NodeMissingError as error:
        raise click.ClickException(str(error)) from None
    with tempfile.TemporaryDirectory() as temporary:
        results = validated(Path(temporary))
    for line in table(results):
        click.echo(line)
    if json_path is not None:
        json_path.write_text(json.dumps(results))
    sys.exit(1 if any(row["counts"] and row["failures"] for row in results) else 0)


def validated(folder: Path) -> list[dict[str, Any]]:
    """One row a scenario and an inspection: what ran, whether it counts, what failed."""
    rows: list[dict[str, Any]] = []
    for fixtures in (False, True):
        settings = Settings(home=folder / "home", roots=(folder,))
        server = create_server(settings)
        if fixtures:
            mount(server)
        with serving(server) as url:
            for revision in REVISIONS:
                records = folder / f"{revision}-{fixtures}"
                outcomes = conformance.conform(url, revision, records)
                rows += [_row(outcome, fixtures) for outcome in outcomes]
            if not fixtures:
                outcomes = conformance.conform_extensions(url, folder / "extensions")
                rows += [_extension_row(outcome) for outcome in outcomes]
    home = folder / "inspected"
    home.mkdir()
    inspections = [*inspector.inspect_stdio(home), *inspector.inspect_http(home)]
    rows += [_inspection_row(seen) for seen in inspections]
    return rows + [_bundle_row(done) for done in (bundle.validate(), bundle.pack(folder))]


def _row(outcome: Outcome, fixtures: bool) -> dict[str, Any]:
    bare = {
        "counts": not outcome.needs_fixture,
        "failures": outcome.without_fixture_checks(),
    }
    mounted = {"counts": outcome.is_scored, "failures": outcome.failures}
    return {
        "run": f"{outcome.revision} {'with fixtures' if fixtures else 'as it is'}",
        "name": outcome.scenario,
        "passed": outcome.checks_passed,
        **(mounted if fixtures else bare),
    }


def _extension_row(outcome: Outcome) -> dict[str, Any]:
    return {
        "run": outcome.revision,
        "name": outcome.scenario,
        "passed": outcome.checks_passed,
        "counts": True,
        "failures": outcome.failures,
    }


def _inspection_row(seen: inspector.Inspection) -> dict[str, Any]:
    is_good = seen.status == 0 and seen.found > 0
    return {
        "run": "inspector",
        "name": f"{seen.check} on {seen.transport}",
        "passed": seen.found,
        "counts": True,
        "failures": {} if is_good else {f"exit {seen.status}": seen.summary},
    }


def _bundle_row(done: bundle.Packed) -> dict[str, Any]:
    return {
        "run": "mcpb",
        "name": done.command,
        "passed": len(done.files) or int(done.status == 0),
        "counts": True,
        "failures": {f"exit {done.status}": done.summary} if done.status else {},
        "files": done.files,
        "size_bytes": done.size_bytes,
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each row that counts, then the sums."""
    for row in (row for row in rows if row["counts"]):
        mark = "FAIL" if row["failures"] else "ok"
        yield f"{row['run']:26} {row['name']:46} {mark:4} {row['passed']:3} passed"
        yield from (f"    {check}: {text}" for check, text in row["failures"].items())
    for run in dict.fromkeys(row["run"] for row in rows):
        of_run = [row for row in rows if row["run"] == run and row["counts"]]
        good = sum(not row["failures"] for row in of_run)
        yield f"{run}: {good}/{len(of_run)}"


if __name__ == "__main__":
    main()
