"""Files and inline rows to conversations; each problem names its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinker_mcp.errors import InvalidInputError, NotFoundError, TinkerMcpError
from tinker_mcp.training import datasets
from tinker_mcp.training.datasets import read_inline, split
from tinker_mcp.training.formats import Conversation, Example
from tinker_mcp.training.problems import Problem, refuse

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = json.dumps({"messages": [USER, ASSISTANT]})


def read_file(path: str | Path) -> tuple[list[Example], list[Problem]]:
    return datasets.read_file(Path(path).expanduser(), str(path))


def problem_of(row: Any) -> str:
    _, problems = read_inline([row])
    return " / ".join(map(str, problems))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "not a list with at least one message"),
        ("Hi", "not a list with at least one message"),
        ([USER, "Hello"], 'messages[1]: not an object with "role" and "content"'),
        ([USER, {"role": "assistant"}], 'messages[1]: not an object with "role" and "content"'),
        ([{"role": "boss", "content": "x"}], "messages[0]: role 'boss' is none of system,"),
        ([USER, {**ASSISTANT, "content": 3}], "messages[1]: content is int, not text"),
        ([USER, {**ASSISTANT, "content": " \n"}], "messages[1]: the assistant's content is empty"),
        (
            [USER, {**ASSISTANT, "content": [{"type": "text", "text": ""}]}],
            "messages[1]: the assistant's content is empty",
        ),
        (
            [USER, {**ASSISTANT, "content": [{"type": "video"}]}],
            "messages[1]: content[0] is no {type: text, text: ...}",
        ),
        ([USER, USER, ASSISTANT], "messages[1]: user follows user; turns must alternate"),
        ([USER, ASSISTANT, ASSISTANT], "messages[2]: assistant follows assistant"),
        ([ASSISTANT, USER], "messages[0]: the assistant speaks before any user"),
        ([USER, SYSTEM, ASSISTANT], "messages[1]: system after user; it must come first"),
        ([USER, {"role": "tool", "content": "4"}], "messages[1]: tool follows user"),
        ([SYSTEM, USER], "no assistant message, so nothing to train on"),
    ],
)
def test_a_row_is_refused_with_its_place_and_reason(messages: Any, problem: str) -> None:
    said = problem_of({"messages": messages})
    assert said.startswith("conversations[0]: ")
    assert problem in said


def test_a_row_of_no_known_layout_says_which_keys_it_has() -> None:
    assert "no \"messages\" in this dict with ['answer', 'question']" in problem_of(
        {"question": "Hi", "answer": "Hello"}
    )


def test_a_bare_list_of_messages_is_a_conversation() -> None:
    found, problems = read_inline([[USER, ASSISTANT]])
    assert found == [Conversation("conversations[0]", [USER, ASSISTANT])]
    assert problems == []


def test_a_system_message_and_tool_answers_are_in_order() -> None:
    call = {**ASSISTANT, "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    tool = {"role": "tool", "content": "4"}
    assert problem_of([SYSTEM, USER, call, tool, tool, ASSISTANT, USER]) == ""


def test_bom_crlf_and_blank_lines_are_no_problem_and_lines_keep_their_numbers(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n  \r\n{GOOD}\r\n".encode())
    found, problems = read_file(str(path))
    assert [c.place for c in found] == ["line 1", "line 4"]
    assert problems == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"messages": [', "line 2: broken JSON: Expecting value at column 15"),
        (b"caf\xe9", "line 2: not UTF-8 text: byte 0xe9 at position 4"),
        (b"[" * 100_000, "line 2: JSON that cannot be read"),
        (b"9" * 5_000, "line 2: JSON that cannot be read"),
        (b"42", 'line 2: no "messages" in this int'),
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_the_others_are_kept(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([GOOD.encode(), line, GOOD.encode()]))
    found, problems = read_file(str(path))
    assert [c.place for c in found] == ["line 1", "line 3"]
    assert [str(p)[: len(problem)] for p in problems] == [problem]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"No file '.*nowhere\.jsonl'"):
        read_file(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (".", "is a folder"),
        ("/dev/zero", "is no regular file"),
        ("x" * 300, "cannot be read"),
    ],
)
def test_what_is_no_readable_file_is_refused(name: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        read_file(name)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_says_what_belongs_in_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r'is empty.*"messages"'):
        read_file(str(path))


def test_no_inline_rows_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="conversations is empty"):
        read_inline([])


def test_a_refusal_lists_five_problems_and_counts_the_rest() -> None:
    problems = [Problem(f"line {n}", "x" * 1000) for n in range(1, 8)]
    error: TinkerMcpError = refuse(problems, 10)
    assert error.problem.startswith("7 of 10 conversations cannot be used")
    assert [f"line {n}:" in error.problem for n in range(1, 8)] == [True] * 5 + [False] * 2
    assert error.problem.endswith("and 2 more")
    assert "skip_invalid=true" in error.next_step


rows = st.integers(2, 60).map(
    lambda count: [Conversation(f"line {n}", []) for n in range(1, count + 1)]
)


@given(rows=rows, share=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_a_split_is_repeatable_disjoint_and_complete(
    rows: list[Conversation], share: float, seed: int
) -> None:
    held_out = round(len(rows) * share)
    if not 0 < held_out < len(rows):
        with pytest.raises(InvalidInputError, match="leaves at least one on each side"):
            split(rows, share, seed)
        return
    train, kept = split(rows, share, seed)
    assert (train, kept) == split(rows, share, seed)
    assert len(kept) == held_out
    assert sorted([*train, *kept], key=rows.index) == rows


def test_without_a_share_all_rows_are_trained_on() -> None:
    rows = [Conversation("line 1", [])]
    assert split(rows, 0, seed=0) == (rows, [])
