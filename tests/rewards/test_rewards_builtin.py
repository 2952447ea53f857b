"""Built-in rewards, each on answers whose score can be said beforehand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.settings import Settings
from tinker_mcp.training.rewards.contract import Completion, Scored
from tinker_mcp.training.rewards.opening import opened
from tinker_mcp.training.rewards.specs import spec_of

Score = Callable[..., Awaitable[Scored]]
SQUARE = "```python\ndef square(x):\n    return x * x\n```"


async def score(
    spec: dict[str, Any], text: str, row: Mapping[str, Any] | None = None, tokens: int | None = None
) -> Scored:
    with opened(spec_of(spec), Settings()) as reward:
        (result,) = await reward.score([Completion(text, tokens)], [row or {}])
    return result


@pytest.mark.parametrize(
    ("spec", "text", "row", "value"),
    [
        ({"type": "exact_match"}, " Paris\n", {"answer": "Paris"}, 1.0),
        ({"type": "exact_match"}, "paris", {"answer": "Paris"}, 0.0),
        ({"type": "exact_match", "ignore_case": True}, "paris", {"answer": "Paris"}, 1.0),
        ({"type": "exact_match", "last_line": True}, "It is\nParis", {"answer": "Paris"}, 1.0),
        ({"type": "exact_match", "column": "city"}, "Rome", {"city": "Rome"}, 1.0),
        ({"type": "exact_match", "expected": "Rome"}, "Rome", {}, 1.0),
        ({"type": "exact_match"}, "42", {"answer": 42}, 1.0),
        ({"type": "number"}, "first 7, so 1,234.50.", {"answer": 1234.5}, 1.0),
        ({"type": "number"}, "-3", {"answer": "so -3"}, 1.0),
        ({"type": "number"}, "no idea", {"answer": 3}, 0.0),
        ({"type": "number", "tolerance": 0.1}, "3.05", {"answer": 3}, 1.0),
        ({"type": "number", "relative": 0.01}, "1009", {"answer": 1000}, 1.0),
        ({"type": "number", "relative": 0.01}, "1011", {"answer": 1000}, 0.0),
        ({"type": "regex", "pattern": r"<b>.*</b>"}, "<b>\n</b>", {}, 1.0),
        ({"type": "regex", "pattern": r"^\d+$"}, "12a", {}, 0.0),
        ({"type": "regex", "pattern": "A: (.*)", "column": "a"}, "A: x", {"a": "x"}, 1.0),
        ({"type": "regex", "pattern": "A: (.*)", "column": "a"}, "A: y", {"a": "x"}, 0.0),
        ({"type": "length", "target": 10}, "x" * 10, {}, 1.0),
        ({"type": "length", "target": 10}, "x" * 8, {}, 0.8),
        ({"type": "length", "target": 10}, "x" * 30, {}, 0.0),
        ({"type": "length", "min": 2, "max": 3}, "xxx", {}, 1.0),
        ({"type": "length", "max": 3}, "xxxx", {}, 0.0),
        ({"type": "json_schema", "schema": {"required": ["a"]}}, '{"a": 1}', {}, 1.0),
        ({"type": "json_schema", "schema": {"required": ["a"]}}, '{"b": 1}', {}, 0.0),
        ({"type": "json_schema", "schema": {"type": "object"}}, "```json\n{}\n```", {}, 1.0),
        ({"type": "json_schema"}, "[1]", {"schema": '{"type": "array"}'}, 1.0),
        ({"type": "json_schema", "schema": {"type": "object"}}, "{", {}, 0.0),
        ({"type": "unit_tests"}, SQUARE, {"tests": ["assert square(3) == 9"]}, 1.0),
        ({"type": "unit_tests"}, SQUARE, {"tests": "assert square(3) == 8"}, 0.0),
        (
            {"type": "unit_tests", "partial": True},
            SQUARE,
            {"tests": ["assert square(3) == 9", "assert square(2) == 5"]},
            0.5,
        ),
        (
            {"type": "unit_tests"},
            SQUARE,
            {"tests": "def check(f):\n    assert f(2) == 4", "entry_point": "square"},
            1.0,
        ),
        (
            {"type": "unit_tests"},
            SQUARE,
            {"tests": [{"input": [3], "output": 9, "func_name": "square"}]},
            1.0,
        ),
        (
            {"type": "unit_tests"},
            "class Solution:\n    def add(self, a, b):\n        return [a, b]",
            {
                "tests": [
                    {"input": "1\n2", "output": "[1, 2]", "testtype": "functional",
                     "metadata": {"func_name": "add"}}
                ]
            },
            1.0,
        ),
        (
            {"type": "unit_tests"},
            "print(int(input()) * 2)",
            {"tests": [{"input": "4\n", "output": "8\n"}]},
            1.0,
        ),
        (
            {"type": "unit_tests"},
            "import sys\nprint(sum(map(int, open(0))))\nexit()",
            {"tests": [{"input": "4\n5\n", "output": "9"}]},
            1.0,
        ),
        (
            {"type": "unit_tests"},
            "print(7)",
            {"tests": [{"input": "4\n", "output": "8\n"}]},
            0.0,
        ),
    ],
)  # fmt: skip
async def test_an_answer_has_the_value(
    spec: dict[str, Any], text: str, row: dict[str, Any], value: float
) -> None:
    assert await score(spec, text, row) == Scored(pytest.approx(value))


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "exact_match"},
        {"type": "number"},
        {"type": "regex", "pattern": "(x)", "column": "answer"},
        {"type": "json_schema"},
        {"type": "unit_tests"},
    ],
)
async def test_a_row_without_the_column_is_an_error_and_no_zero(spec: dict[str, Any]) -> None:
    scored = await score(spec, "x", {"other": 1})
    assert scored.value is None
    assert "the row has no '" in str(scored.error)


async def test_length_in_tokens_needs_their_number() -> None:
    spec = {"type": "length", "unit": "tokens", "max": 3}
    assert await score(spec, "x" * 30, tokens=3) == Scored(1.0)
    assert (await score(spec, "x")).value is None


async def test_a_pattern_that_explodes_costs_one_sample() -> None:
    spec = spec_of({"type": "regex", "pattern": "(a+)+$"})
    with opened(spec, Settings()) as reward:
        reward._limits = type(reward._limits)(wall_s=0.5)  # type: ignore[attr-defined]
        bad, good = await reward.score([Completion("a" * 40 + "b"), Completion("aa")], [{}, {}])
    assert bad == Scored(None, "it took longer than 0.5 s")
    assert good == Scored(1.0)


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "while True: pass",
        "import os\nwhile True: os.fork()",
        "x = bytearray(10 * 2**30)",
        "import os\nfor d in range(3, 64):\n    try: os.write(d, b'\\0\\0\\0\\x04true')\n"
        "    except OSError: pass\nos._exit(0)",
        "print('x' * 2**24)",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "class Always:\n    def __eq__(self, other): return True\ndef square(x): raise SystemExit",
        "import builtins\nbuiltins.all = builtins.sum = lambda x: 99\ndef square(x): 0",
        "import socket; socket.socket()\ndef square(x): return x * x",
        "import os; os.kill(os.getppid(), 9)",
    ],
)
async def test_a_program_that_cheats_or_attacks_fails_its_tests(code: str) -> None:
    spec = spec_of({"type": "unit_tests", "timeout_s": 1})
    texts = [SQUARE, code, SQUARE]
    printing = [{"input": "3", "output": "9"}]
    for tests in (
        ["assert square(3) == 9"],
        [{"input": [3], "output": 9, "func_name": "square"}],
        printing,
    ):
        completions = [Completion(text) for text in texts]
        with opened(spec, Settings()) as reward:
            results = await reward.score(completions, [{"tests": tests}] * 3)
        honest = 0.0 if tests == printing else 1.0  # SQUARE prints nothing
        assert [result.value for result in results] == [honest, 0.0, honest]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"type": "regexp"}, "does not match any of the expected tags"),
        ({"type": "regex"}, "pattern: Field required"),
        ({"type": "number", "tolerance": -1}, "tolerance"),
        ({"type": "length"}, "give either target, or min or max or both"),
        ({"type": "exact_match", "colour": "x"}, "colour: Extra inputs are not permitted"),
        ({"type": "judge"}, "give either base_model or checkpoint"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told) as caught:
        spec_of(spec)
    assert "exact_match, number, regex" in caught.value.next_step


def test_an_object_as_json_text_is_the_object() -> None:
    assert spec_of('{"type": "length", "max": 3}') == spec_of({"type": "length", "max": 3})


async def test_a_pattern_that_is_none_is_told_at_once() -> None:
    with pytest.raises(InvalidInputError, match="its pattern is no regular expression"):
        await score({"type": "regex", "pattern": "("}, "x")


async def test_math_verify_is_used_where_it_is_installed_and_named_where_not() -> None:
    spec = {"type": "math"}
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(InvalidInputError, match=r"pip install 'tinker-mcp\[math\]'"):
            await score(spec, r"\boxed{1/2}", {"answer": "0.5"})
        return
    assert await score(spec, r"so $\boxed{\frac{1}{2}}$", {"answer": "0.5"}) == Scored(1.0)
    assert await score(spec, r"so $\boxed{\frac{1}{3}}$", {"answer": "0.5"}) == Scored(0.0)
