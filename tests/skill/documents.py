"""What agents and users are told: SKILL.md, the README, the prompts and the manual, as texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SKILL = ROOT / "SKILL.md"
DOCS = ROOT / "src/tinker_mcp/docs"
PROMPTS = ROOT / "prompts"

FILES = [SKILL, ROOT / "README.md", *sorted(PROMPTS.glob("*.md")), *sorted(DOCS.glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in FILES}
"""Each document by its path."""

_BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks, in their order; `language` is all that stands behind the fence."""
    return [Block(language.strip(), code) for language, code in _BLOCK.findall(text)]


def prose(text: str) -> str:
    """What is not in a block."""
    return _BLOCK.sub("", text)


def section(text: str, title: str) -> str:
    """What stands under a heading of the second level."""
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
