"""The README's table of tools, made from the code: `python -m tests.readme_tools` writes it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from tinker_mcp.server.app import TOOLS

README = Path(__file__).parent.parent / "README.md"
_PART = re.compile(r"(<!-- tools:.*?-->\n).*?(<!-- /tools -->)", re.DOTALL)


def table() -> str:
    """One row a tool: its name, the first sentence of its description, what it may change."""
    rows = ["| tool | what it does | |", "|---|---|---|"]
    for spec in TOOLS:
        first = (inspect.getdoc(spec.fn) or "").split("\n\n")[0].replace("\n", " ")
        effect = "reads" if spec.annotations.read_only_hint else "changes"
        rows.append(f"| `{spec.fn.__name__}` | {first} | {effect} |")
    return "\n".join(rows) + "\n"


def updated(readme: str) -> str:
    return _PART.sub(lambda part: part[1] + table() + part[2], readme)


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
