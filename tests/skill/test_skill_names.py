"""Whatever SKILL.md, the README, the prompts and the manual name exists, and is not retired."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import tinker
import tinker_cookbook
from tinker_cookbook import model_info

import tinker_local.cli
import tinker_mcp.cli
from tests.skill.documents import DOCS, PROMPTS, ROOT, SKILL, TEXTS, section
from tinker_mcp.server import docs
from tinker_mcp.server.app import TOOLS
from tinker_mcp.server.boundary import StrictTool
from tinker_mcp.server.prompts import workflows
from tinker_mcp.training.models import NEAREST, REPLACEMENTS, RETIRED_ON

RETIRED = {**REPLACEMENTS, **NEAREST}
SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("[a-z]*.py")}
YOURS = {"reward", "your_tinker_program"}  # files that a user writes
LOCAL = {"HuggingFaceTB/SmolLM2-135M-Instruct", "tinker-local/tiny", "tinker-local/tiny-vl"}
CLIENTS = {
    client.__name__: client
    for client in (
        tinker.ServiceClient,
        tinker.TrainingClient,
        tinker.SamplingClient,
        tinker.RestClient,
    )
}

OLD = ("Where old examples fail", "FutureWarning about forward_backward_async")
"""Sections that may name what is gone."""
OTHERS = {"bearer_token_env_var", "env_vars"}  # Codex's
_NAME = re.compile(r"(?<![\w.$-])[a-z][a-z0-9]*(?:_[a-z0-9]+)+(?![\w./-]*\w)")

Check = Callable[[str], Iterable[object]]


def wrong(check: Check) -> dict[str, set[object]]:
    """What `check` finds in each document that it finds something in."""
    found = {name: set(check(text)) for name, text in TEXTS.items()}
    return {name: what for name, what in found.items() if what}


def without(text: str, *titles: str) -> str:
    """A document without some of its sections."""
    for title in titles:
        if f"\n## {title}\n" in text:
            text = text.replace(section(text, title), "").replace(title, "")
    return text


def test_every_path_exists() -> None:
    path = re.compile(r"(?<![\w/.~-])((?:src|scripts|prompts|tests)/[\w./-]*\w)")
    assert wrong(lambda text: [p for p in path.findall(text) if not (ROOT / p).exists()]) == {}


def test_every_script_exists() -> None:
    name = re.compile(r"(?<![\w/.])(?:scripts/)?(\w+)\.py\b")
    known = SCRIPTS | YOURS | {path.stem for path in (ROOT / "src").rglob("*.py")}
    assert wrong(lambda text: set(name.findall(text)) - known) == {}


def test_every_option_of_a_script_exists() -> None:
    shared = (ROOT / "src/tinker_mcp/scripting.py").read_text("utf-8")

    def unknown(text: str) -> Iterator[str]:
        for script, options in re.findall(r"scripts/(\w+)\.py((?: +[^\s`|]+)*)", text):
            source = (ROOT / f"scripts/{script}.py").read_text("utf-8") + shared
            for option in re.findall(r"--[a-z-]+", options):
                if f'"{option}"' not in source:
                    yield f"{script}.py {option}"

    assert wrong(unknown) == {}


def test_every_subcommand_exists() -> None:
    commands = {
        *(f"tinker-mcp {name}" for name in tinker_mcp.cli.main.commands),
        *(f"tinker-local {name}" for name in tinker_local.cli.main.commands),
    }
    named = re.compile(r"(?:^|[`(] ?|&& )((?:tinker-mcp|tinker-local) [a-z]\w*)", re.MULTILINE)
    assert wrong(lambda text: set(named.findall(text)) - commands) == {}


def test_every_environment_variable_is_read_somewhere() -> None:
    source = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = re.compile(r"\b(TINKER_[A-Z_]+)\b")
    assert wrong(lambda text: [name for name in named.findall(text) if name not in source]) == {}


def test_every_tool_that_is_called_takes_the_arguments_that_are_named() -> None:
    argument = re.compile(r"(?<![\w\"'])(\w+) ?= ?(?!=)")

    def unknown(text: str) -> Iterator[str]:
        for tool, given in calls(text):
            for name in set(argument.findall(outermost(given))) - parameters(tool):
                yield f"{tool}({name}=)"

    assert wrong(unknown) == {}


def test_every_name_in_small_letters_with_an_underscore_exists() -> None:
    known = vocabulary()

    def unknown(text: str) -> set[str]:
        text = re.sub(r"https?://\S+|tinker(?:-mcp)?://\S+", "", without(text, *OLD))
        return set(_NAME.findall(text)) - known

    assert wrong(unknown) == {}


def test_every_name_of_the_sdk_and_the_cookbook_exists() -> None:
    clients = "|".join(CLIENTS)
    dotted = re.compile(rf"\b((?:tinker|tinker_cookbook|{clients})(?:\.[a-zA-Z_]\w*)+)")
    imported = re.compile(r"^from (tinker\S*) import (\w+)$", re.MULTILINE)

    def unknown(text: str) -> list[str]:
        named = [*dotted.findall(text), *(".".join(pair) for pair in imported.findall(text))]
        return [path for path in named if not resolves(path)]

    assert wrong(unknown) == {}


def test_no_method_of_the_sdk_that_will_go_is_named() -> None:
    old = {name for client in CLIENTS.values() for name in dir(client) if name.endswith("_async")}
    old |= {"load_state", "load_state_with_optimizer"}
    assert wrong(lambda text: old & set(re.findall(r"\w+", without(text, *OLD)))) == {}


def test_every_model_is_known() -> None:
    makers = "Qwen|openai|deepseek-ai|moonshotai|meta-llama|nvidia|zai-org|thinkingmachines"
    named = re.compile(rf"\b((?:{makers}|HuggingFaceTB|tinker-local)/[\w.-]*\w)")
    known = LOCAL | set(cookbook_models())
    assert wrong(lambda text: set(named.findall(text)) - known) == {}


def test_no_retired_model_is_recommended() -> None:
    names = [re.escape(model.partition("/")[2]) for model in RETIRED]
    retired = re.compile(rf"(?<![\w.-])(?:{'|'.join(names)})(?![\w.-]*\w)")
    assert wrong(lambda text: retired.findall(without(text, "Retired models"))) == {}


def test_every_page_of_the_manual_that_is_named_exists() -> None:
    named = re.compile(r"\bpages? (?:`(\w+)`|(\w+)(?=[.,;):]| \())")

    def unknown(text: str) -> set[str]:
        return {a or b for a, b in named.findall(text)} - set(docs.page_names())

    assert wrong(unknown) == {}


def test_the_skill_names_every_tool_script_prompt_and_page() -> None:
    text = SKILL.read_text("utf-8")
    words = set(re.findall(r"\w+", text))
    assert {spec.fn.__name__ for spec in TOOLS} <= words
    assert {path.stem for path in DOCS.glob("*.md")} <= words
    assert set(re.findall(r"(\w+)\.py", text)) >= SCRIPTS
    prompts = {path.name for path in PROMPTS.glob("*.md")}
    assert set(re.findall(r"prompts/(\w+\.md)", text)) == prompts


def test_the_table_of_retired_models_is_the_one_the_checks_use() -> None:
    part = section(TEXTS["src/tinker_mcp/docs/models.md"], "Retired models")
    rows = dict(re.findall(r"^\| `(\S+)` \| (?:~ )?`(\S+)` \|$", part, re.MULTILINE))
    assert rows == RETIRED
    assert RETIRED_ON in part


def test_the_table_of_prices_is_the_one_the_estimates_use() -> None:
    part = section(TEXTS["src/tinker_mcp/docs/models.md"], "Prices of hosted models")
    rows = re.findall(r"^\| `(\S+)` \| (\S+) \| (\S+) \| (\S+?)\*? \|$", part, re.MULTILINE)
    prices = json.loads((ROOT / "src/tinker_mcp/training/prices.json").read_text())["models"]
    assert {name: [float(n) for n in numbers] for name, *numbers in rows} == {
        name: [price["prefill"], price["sample"], price["train"]] for name, price in prices.items()
    }


def calls(text: str) -> Iterator[tuple[str, str]]:
    """Each `tool(...)`, and what stands between its parentheses."""
    names = "|".join(spec.fn.__name__ for spec in TOOLS)
    for found in re.finditer(rf"(?<![\w.`])`?\b({names})\(", text):
        yield found[1], text[found.end() : closing(text, found.end())]


def closing(text: str, start: int) -> int:
    """Where the parenthesis that opened before `start` closes."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at
    raise AssertionError(f"A call is not closed: {text[start : start + 60]}")


def outermost(arguments: str) -> str:
    """Without strings and what stands in brackets and calls: those have names of their own."""
    text = re.sub(r'"[^"]*"', '""', arguments)
    while (less := re.sub(r"\{[^{}]*\}|\[[^\[\]]*\]|\([^()]*\)", "", text)) != text:
        text = less
    return text


@cache
def parameters(tool: str) -> frozenset[str]:
    """The arguments of a tool."""
    (spec,) = [spec for spec in TOOLS if spec.fn.__name__ == tool]
    return frozenset(StrictTool.of(spec, Path()).parameters.get("properties", {}))


def vocabulary() -> set[str]:
    """Tools with their arguments and replies, prompts with theirs, scripts, the SDK's and the
    cookbook's names; and the words of the source: options inside an argument, metrics, columns.
    """
    tools = {word for spec in TOOLS for word in words_of_tool(spec.fn)}
    flows = {word for f in workflows() for word in (f.name, *(a.name for a in f.arguments))}
    sdk = {word for client in CLIENTS.values() for word in dir(client)} | set(dir(tinker.types))
    files = [*(ROOT / "src/tinker_mcp").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    source = {word for file in files for word in re.findall(r"\w+", file.read_text("utf-8"))}
    return tools | flows | sdk | SCRIPTS | source | cookbook_words() | OTHERS


def cookbook_words() -> set[str]:
    """Its renderers and recipes, and what it says of a model."""
    rows = cookbook_models().values()
    renderers = {name for row in rows for name in row.recommended_renderers}
    fields = {field.name for field in dataclasses.fields(next(iter(rows)))}
    recipes = Path(tinker_cookbook.__file__).parent / "recipes"
    return renderers | fields | {path.stem for path in recipes.iterdir()}


def words_of_tool(fn: Any) -> Iterator[str]:
    yield fn.__name__
    yield from inspect.signature(fn).parameters
    reply = get_type_hints(fn)["return"]
    if hasattr(reply, "model_json_schema"):
        yield from re.findall(r"\w+", json.dumps(reply.model_json_schema()))


def resolves(path: str) -> bool:
    """Whether a dotted name of the SDK or the cookbook leads somewhere."""
    first, *names = path.split(".")
    if first in CLIENTS:
        return hasattr(CLIENTS[first], names[0])
    found: Any = importlib.import_module(first)
    for place, name in enumerate(names):
        if not hasattr(found, name):
            try:
                found = importlib.import_module(".".join([first, *names[: place + 1]]))
            except ImportError:
                return False
            continue
        found = getattr(found, name)
    return True


@cache
def cookbook_models() -> dict[str, Any]:
    """What the cookbook knows of each model."""
    tables = [fn() for name, fn in vars(model_info).items() if re.fullmatch(r"get_\w+_info", name)]
    return {f"{row.organization}/{name}": row for table in tables for name, row in table.items()}
