"""The pages an agent can read offline, and a search over their sections.

Pages are the files of `tinker_mcp/docs`, the prompts, SKILL.md, and the tool reference, which is
made from the tools themselves.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tinker_mcp.server.prompts import folder, workflows

URI = "tinker-mcp://docs/"
EXCERPT_CHARACTERS = 400

_DOCS = Path(__file__).parents[1] / "docs"
_TOOLS_PAGE = "tools"
_SATURATION, _LENGTH_WEIGHT = 1.5, 0.75  # BM25's k1 and b, at their usual values
_FRONTMATTER = re.compile(r"\A---\n.*?\n---\n\s*", re.DOTALL)
_TITLE_WEIGHT = 3  # a word of the title counts as often


@dataclass(frozen=True)
class Section:
    """A headed part of a page, the unit that is searched."""

    page: str
    title: str
    text: str

    @property
    def uri(self) -> str:
        return f"{URI}{self.page}"


@dataclass(frozen=True)
class Found:
    """A section that fits a query, and the part of it that fits best."""

    section: Section
    score: float
    excerpt: str


class Index:
    """BM25 over sections: small enough to be built when the first question comes."""

    def __init__(self, sections: Iterable[Section]) -> None:
        self._sections = list(sections)
        self._counts = [
            Counter(_words(s.title) * _TITLE_WEIGHT + _words(s.text)) for s in self._sections
        ]
        self._lengths = [counts.total() for counts in self._counts]
        self._mean_length = sum(self._lengths) / max(len(self._lengths), 1)
        self._spread = Counter(word for counts in self._counts for word in counts)

    def search(self, query: str, limit: int) -> list[Found]:
        """The best sections, best first; none where no word of the query occurs."""
        words = set(_words(query))
        scored = [(self._score(words, number), number) for number in range(len(self._sections))]
        best = sorted((s for s in scored if s[0] > 0), key=lambda s: (-s[0], s[1]))[:limit]
        return [
            Found(self._sections[n], score, _excerpt(self._sections[n].text, words))
            for score, n in best
        ]

    def _score(self, words: set[str], number: int) -> float:
        counts = self._counts[number]
        length = 1 - _LENGTH_WEIGHT + _LENGTH_WEIGHT * self._lengths[number] / self._mean_length
        return sum(
            self._rarity(word)
            * counts[word]
            * (_SATURATION + 1)
            / (counts[word] + _SATURATION * length)
            for word in words
            if word in counts
        )

    def _rarity(self, word: str) -> float:
        having = self._spread[word]
        return math.log(1 + (len(self._sections) - having + 0.5) / (having + 0.5))


def page_names() -> list[str]:
    """The pages there are, without reading any."""
    pages = [path.stem for path in sorted(_DOCS.glob("*.md"))] + [_TOOLS_PAGE]
    pages += [f"prompt-{path.stem}" for path in sorted(folder("prompts").glob("*.md"))]
    return [*pages, "skill"] if folder("SKILL.md").exists() else pages


@cache
def page(name: str) -> str:
    """A page's Markdown.

    Raises:
        KeyError: There is no such page.
    """
    if name not in page_names():
        raise KeyError(name)
    if name == _TOOLS_PAGE:
        return _tool_reference()
    if name == "skill":
        return _FRONTMATTER.sub("", folder("SKILL.md").read_text("utf-8"))
    if name.startswith("prompt-"):
        workflow = next(w for w in workflows() if f"prompt-{w.name}" == name)
        return f"# {workflow.title}\n\n{workflow.description}\n\n{workflow.text}\n"
    return (_DOCS / f"{name}.md").read_text("utf-8")


@cache
def index() -> Index:
    """The index of all pages; some tens of milliseconds, once."""
    return Index(section for name in page_names() for section in sections(name, page(name)))


def sections(name: str, markdown: str) -> list[Section]:
    """A page's parts: what stands before the first `##`, under the page's title, and each after."""
    head, *parts = re.split(r"^## ", markdown, flags=re.MULTILINE)
    title = re.search(r"^# (.+)$", head, re.MULTILINE)
    intro = re.sub(r"^# .+$", "", head, flags=re.MULTILINE).strip()
    found = [Section(name, title[1] if title else name, intro)] if intro else []
    for part in parts:
        heading, _, text = part.partition("\n")
        found.append(Section(name, heading.strip(), text.strip()))
    return found


def _words(text: str) -> list[str]:
    """Lower-case words and the parts of names, without the plural's s."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words]


def _excerpt(text: str, words: set[str]) -> str:
    """The paragraph with most of the words, and what follows, in one line."""
    paragraphs = text.split("\n\n")
    hits = [len(words & set(_words(paragraph))) for paragraph in paragraphs]
    first = hits.index(max(hits))
    line = " ".join(" ".join(paragraphs[first:]).split())
    return line if len(line) <= EXCERPT_CHARACTERS else line[: EXCERPT_CHARACTERS - 3] + "..."


def _tool_reference() -> str:
    from tinker_mcp.server.app import TOOLS  # it imports the tool that searches these pages
    from tinker_mcp.server.boundary import StrictTool

    parts = ["# Tools", "Every tool with its arguments; * marks those that must be given."]
    for spec in TOOLS:
        tool = StrictTool.of(spec, Path())
        required = tool.parameters.get("required", [])
        arguments = [
            f"- `{name}`{'*' if name in required else ''}{_told(schema)}"
            for name, schema in tool.parameters.get("properties", {}).items()
        ]
        parts += [f"## {tool.name}", f"{tool.description} (group: {spec.toolset})"]
        parts += ["\n".join(arguments)] if arguments else []
    return "\n\n".join(parts) + "\n"


def _told(schema: dict[str, Any]) -> str:
    kind = " or ".join(map(str, schema["enum"])) if "enum" in schema else schema.get("type", "")
    default = f", default {schema['default']}" if "default" in schema else ""
    said = f": {schema['description']}" if "description" in schema else ""
    return f" ({kind}{default}){said}" if kind else said
