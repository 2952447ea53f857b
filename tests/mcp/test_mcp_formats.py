"""Every layout of a row, in every file format, to what is trained on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import files
from tinker_mcp.training.building import check_columns
from tinker_mcp.training.datasets import read_file, read_inline
from tinker_mcp.training.formats import Conversation, Layout, Pair, Text, layout
from tinker_mcp.training.problems import Problem

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Hello"}
BAD = {"role": "assistant", "content": "Go away"}
TALK = [ASK, SAY]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": TALK}, "messages"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion"),
        ({"prompt": [ASK], "completion": [SAY]}, "prompt_completion"),
        ({"instruction": "Hi", "output": "Hello"}, "instruction_output"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, "instruction_output"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            "sharegpt",
        ),
    ],
)
def test_each_supervised_layout_is_the_same_conversation(row: Any, name: Layout) -> None:
    assert layout(row) == name
    assert read_inline([row]) == ([Conversation("conversations[0]", TALK)], [])


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, "preference_pair"),
        ({"prompt": [ASK], "chosen": [SAY], "rejected": [BAD]}, "preference_pair"),
        ({"chosen": TALK, "rejected": [ASK, BAD]}, "preference_pair"),
        ({"prompt": "Hi", "chosen": TALK, "rejected": [ASK, BAD]}, "preference_pair"),
        (
            {
                "comparison": {
                    "prompt_conversation": [ASK],
                    "completion_A": [BAD],
                    "completion_B": [SAY],
                },
                "label": "B",
            },
            "comparison",
        ),
    ],
)
def test_each_preference_layout_is_the_same_pair(row: Any, name: Layout) -> None:
    assert layout(row) == name
    found, problems = read_inline([row], "preference")
    assert (found, problems) == ([Pair("conversations[0]", TALK, [ASK, BAD])], [])


def test_an_instructions_input_stands_below_it() -> None:
    [found], _ = read_inline([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert isinstance(found, Conversation)
    assert found.messages[0]["content"] == "Add.\n\n1 2"


def test_a_system_column_comes_first() -> None:
    [found], _ = read_inline([{"system": "Be brief.", "prompt": "Hi", "completion": "Hello"}])
    assert isinstance(found, Conversation)
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant"]


def test_text_is_taken_as_it_is() -> None:
    assert read_inline([{"text": " a\n"}], "text") == ([Text("conversations[0]", " a\n")], [])


def test_columns_of_other_names_are_mapped() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    found, _ = read_inline([{"question": "Hi", "answer": "Hello"}], columns=columns)
    assert found == [Conversation("conversations[0]", TALK)]


def test_the_chosen_side_can_be_trained_on_by_itself() -> None:
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
    found, _ = read_inline([row], columns={"completion": "chosen"})
    assert found == [Conversation("conversations[0]", TALK)]


def test_a_mapping_to_a_name_that_no_layout_has_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"'reply'.*prompt.*completion"):
        check_columns({"reply": "answer"})


@pytest.mark.parametrize(
    ("row", "kind", "problem"),
    [
        ({"prompt": "Hi", "chosen": "x", "rejected": "x"}, "preference", "chosen equals rejected"),
        ({"chosen": "x", "rejected": "y"}, "preference", 'chosen is a reply without a "prompt"'),
        (
            {"prompt": "Hi", "chosen": "x", "rejected": " "},
            "preference",
            "rejected[1]: the assistant's content is empty",
        ),
        ({"chosen": TALK, "rejected": [*TALK, ASK]}, "preference", "rejected does not end with"),
        ({"comparison": {}, "label": "Tie"}, "preference", "label 'Tie' prefers neither"),
        ({"comparison": {"completion_A": []}, "label": "A"}, "preference", "not the three lists"),
        ({"messages": TALK}, "preference", 'no "comparison" and "label" in this dict'),
        ({"text": 3}, "text", '"text" is int, not text'),
        ({"text": "\n"}, "text", '"text" is empty'),
        ({"text": "a\ud83d"}, "text", "half a surrogate pair, \\ud83d, at position 2"),
        (
            {"prompt": "Hi \udc80", "completion": "x"},
            "supervised",
            "messages[0]: not UTF-8 text: byte 0x80",
        ),
        ({"prompt": "Hi", "completion": ""}, "supervised", "the assistant's content is empty"),
        ({"prompt": 3, "completion": "x"}, "supervised", "content is int"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            "supervised",
            "\"from\" 'alien' is no known role",
        ),
        (
            {"messages": [ASK, {**SAY, "weight": 0.5}]},
            "supervised",
            "weight 0.5 is neither 0 (not trained) nor 1",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: Any, kind: str, problem: str) -> None:
    found, [said] = read_inline([row], kind)
    assert found == []
    assert problem in str(said)


def _jsonl(path: Path, rows: list[Mapping[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def _json(path: Path, rows: list[Mapping[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def _csv(path: Path, rows: list[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
            writer.writerow(cells)


def _parquet(path: Path, rows: list[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("ending", "write", "places"),
    [
        ("jsonl", _jsonl, ["line 1", "line 2"]),
        ("json", _json, ["row 1", "row 2"]),
        ("csv", _csv, ["line 2", "line 3"]),
        ("parquet", _parquet, ["row 1", "row 2"]),
    ],
)
def test_each_file_format_holds_the_same_rows(
    tmp_path: Path, ending: str, write: Callable[..., None], places: list[str]
) -> None:
    path = tmp_path / f"rows.{ending}"
    write(path, [{"messages": TALK}, {"messages": [ASK, BAD]}])
    assert files.file_format(path, "rows") == ending
    found, problems = read_file(path, "rows")
    expected = [Conversation(places[0], TALK), Conversation(places[1], [ASK, BAD])]
    assert (found, problems) == (expected, [])


def test_a_csv_row_over_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb",c\nd,\ne,f,g\nh,i\n')
    found, problems = read_file(path, "rows")
    assert [example.place for example in found] == ["line 2", "line 6"]
    assert [problem.place for problem in problems] == ["line 4", "line 5"]


def test_an_array_is_read_to_where_it_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": TALK}] * 3)[:-40])
    found, [problem] = read_file(path, "rows")
    assert len(found) == 2
    assert str(problem).startswith("row 3: broken JSON")


def test_elements_longer_than_a_block_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    long = "x" * 200_000
    path.write_text(json.dumps([{"text": long}, {"text": "y"}]))
    found, problems = read_file(path, "rows", "text")
    assert [len(example.text) for example in found if isinstance(example, Text)] == [200_000, 1]
    assert problems == []


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1" + b"x" * 100)
    [(_, problem)] = files.rows(path, "rows")
    assert isinstance(problem, Problem)
    assert "broken Parquet" in str(problem)
