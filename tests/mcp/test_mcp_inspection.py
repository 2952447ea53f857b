"""inspect_dataset: what a file is, what it is good for, what is wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import TINY, in_memory

from tinker_mcp.settings import Settings
from tinker_mcp.training import files, inspection
from tinker_mcp.training.rendering import ModelRenderer

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Hello"}
TALK = {"messages": [ASK, SAY]}
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}


def write(path: Path, rows: list[Any]) -> str:
    """A JSONL file; texts among the rows are lines as they are."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


async def report(settings: Settings, path: str, **arguments: Any) -> dict[str, Any]:
    async with in_memory(settings) as agent:
        return await agent.call("inspect_dataset", path=path, **arguments)


def verdict_of(found: dict[str, Any]) -> dict[str, str]:
    return {v["method"]: v["verdict"] for v in found["verdicts"]}


def call_of(found: dict[str, Any], method: str) -> str:
    return str(next(v["call"] for v in found["verdicts"] if v["method"] == method))


READY, MAP, NOT = "ready", "needs_mapping", "incompatible"


@pytest.mark.parametrize(
    ("row", "layout", "sft", "dpo", "rl"),
    [
        (TALK, "messages", READY, NOT, READY),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion", READY, NOT, READY),
        ({"instruction": "Hi", "output": "Hello"}, "instruction_output", READY, NOT, READY),
        (
            {"conversations": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "sharegpt",
            *(READY, NOT, READY),
        ),
        ({"text": "Once upon a time"}, "text", READY, NOT, NOT),
        (PAIR, "preference_pair", MAP, READY, READY),
        ({"chosen": [ASK, SAY], "rejected": [ASK, ASK]}, "preference_pair", MAP, NOT, NOT),
        ({"question": "Hi", "answer": "Hello"}, "unknown", MAP, NOT, MAP),
        ({"prompt": "Hi", "better": "Hello", "worse": "x"}, "prompt", NOT, MAP, READY),
        ({"prompt": "Hi"}, "prompt", NOT, NOT, READY),
        ({"image": 3, "id": 4}, "unknown", NOT, NOT, NOT),
    ],
)
async def test_each_layout_is_good_for_its_methods(
    tmp_path: Path, row: Any, layout: str, sft: str, dpo: str, rl: str
) -> None:
    found = await report(Settings(roots=(tmp_path,)), write(tmp_path / "rows.jsonl", [row]))
    assert found["layouts"] == {layout: 1}
    assert verdict_of(found) == {"sft": sft, "dpo": dpo, "rl": rl, "distillation": rl}
    assert all(v["why"] and (v["call"] or v["verdict"] == NOT) for v in found["verdicts"])


async def test_the_call_of_a_verdict_works_word_for_word(
    settings: Settings, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "Hi", "answer": "Hello"}] * 2)
    async with in_memory(settings) as agent:
        found = await agent.call("inspect_dataset", path=path, base_model=TINY)
        call = call_of(found, "sft")
        assert call == (
            f'build_datums(path="{path}", base_model="{TINY}", kind="supervised", '
            'columns={"prompt": "question", "completion": "answer"}) or start_run(method="sft", '
            f'data="{path}", base_model="{TINY}", '
            'columns={"prompt": "question", "completion": "answer"}, eval_share=0.1)'
        )
        mapping = {"prompt": "question", "completion": "answer"}
        built = await agent.call("build_datums", path=path, base_model=TINY, columns=mapping)
        again = await agent.call("inspect_dataset", path=path, base_model=TINY, columns=mapping)
    assert built["datums"] == 2
    assert verdict_of(again)["sft"] == "ready"
    assert call_of(again, "sft") == call
    assert again["example"].endswith("⟦Hello<|im_end|>⟧")


async def test_prompts_are_for_a_run_or_for_steps_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "Hi"}])
    found = await report(Settings(roots=(tmp_path,)), path)
    asked = f'data="{path}", base_model=..., columns={{"prompt": "question"}}, '
    assert call_of(found, "rl").startswith(
        f'start_run(method="rl", {asked}rl={{"reward": ...}}); or inspect_dataset('
    )
    assert call_of(found, "distillation").startswith(
        f'start_run(method="distill", {asked}distill={{"teacher": ...}}); or inspect_dataset('
    )


async def test_every_problem_is_counted_and_named_by_its_line(
    settings: Settings, tmp_path: Path
) -> None:
    long = {"messages": [ASK, {**SAY, "content": "x" * 100}]}
    rows = [
        *(TALK, "{", {"messages": [SAY, ASK]}, {"messages": [ASK, {**SAY, "content": ""}]}),
        *(TALK, PAIR, {**PAIR, "rejected": "Hello"}, long, {"messages": [ASK]}, "{", "[", "]"),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    async with in_memory(settings) as agent:
        found = await agent.call("inspect_dataset", path=path, base_model=TINY, max_length=64)
    problems = {p["problem"]: (p["count"], p["first"]) for p in found["problems"]}
    assert {name: count for name, (count, _) in problems.items()} == {
        **{"broken": 4, "role_order": 1, "empty_reply": 1, "duplicate": 1},
        **{"equal_pair": 1, "over_length": 1, "no_reply": 1},
    }
    first = {name: [line.split(":")[0] for line in lines] for name, (_, lines) in problems.items()}
    assert first == {
        **{"broken": ["line 2", "line 10", "line 11"], "role_order": ["line 3"]},
        **{"empty_reply": ["line 4"], "duplicate": ["line 5"], "equal_pair": ["line 7"]},
        **{"over_length": ["line 8"], "no_reply": ["line 9"]},
    }
    assert problems["duplicate"][1] == ["line 5: the same as line 1"]
    assert call_of(found, "sft").endswith("skip_invalid=true)")  # a run takes no row that is wrong
    assert found["rows"] == 12


async def test_tokens_are_counted_as_the_model_sees_them(
    settings: Settings, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [TALK, {"messages": [ASK, {**SAY, "content": "Hey"}]}])
    async with in_memory(settings) as agent:
        found = await agent.call("inspect_dataset", path=path, base_model=TINY)
        built = await agent.call("build_datums", path=path, base_model=TINY)
    assert found["tokens"] == built["tokens"]
    assert found["example"] == built["example"]
    assert found["tokens_of"] == "all usable rows"


async def test_columns_that_are_passed_over_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{**TALK, "tools": [], "id": 3}])
    found = await report(Settings(roots=(tmp_path,)), path)
    assert found["verdicts"][0]["why"] == "1 of 1 rows can be used; columns not used: tools, id"


async def test_given_columns_say_which_layout_is_meant(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [PAIR])
    found = await report(Settings(roots=(tmp_path,)), path, columns={"completion": "chosen"})
    assert found["layouts"] == {"prompt_completion": 1}
    assert verdict_of(found)["sft"] == READY
    assert 'columns={"completion": "chosen"}' in call_of(found, "sft")


async def test_a_file_that_takes_longer_than_a_call_is_collected_by_the_next(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "rows.jsonl", [TALK] * 3_000)
    async with in_memory(Settings(roots=(tmp_path,), call_limit_s=0.001)) as agent:
        first = await agent.call("inspect_dataset", path=path)
        found = first
        for _ in range(2_000):
            if found["finished"]:
                break
            found = await agent.call("inspect_dataset", path=path)
    assert not first["finished"]
    assert "call inspect_dataset again" in first["next_step"]
    assert found["rows"] == 3_000


async def test_without_a_model_no_backend_is_asked(tmp_path: Path) -> None:
    unreachable = Settings(roots=(tmp_path,), base_url="http://127.0.0.1:9", api_key="tml-x")
    found = await report(unreachable, write(tmp_path / "rows.jsonl", [TALK]))
    assert (found["finished"], found["rows"], found["tokens"]) == (True, 1, None)


async def test_columns_that_are_no_text_are_shown_escaped(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xffprompt,completion\na,b\n")
    found = await report(Settings(roots=(tmp_path,)), str(path))
    assert list(found["columns"]) == ["\\udcffprompt", "completion"]


async def test_a_reply_about_a_terrible_file_stays_short(tmp_path: Path) -> None:
    wide = [{f"column {n} {'x' * 80}": "y" * 500 for n in range(200)}] * 3
    strange = [{"messages": [{"role": "r" * 900, "content": "x"}]}] * 9
    path = write(tmp_path / "rows.jsonl", [*wide, *strange, *["{" * 2000] * 9])
    async with in_memory(Settings(roots=(tmp_path,))) as agent:
        await agent.call("inspect_dataset", path=path)
        assert len(agent.texts[-1]) < 4 * 4000


def rows_of(count: int) -> Iterator[files.Row]:
    for number in range(1, count + 1):
        yield f"line {number}", {"messages": [ASK, {**SAY, "content": f"{number} " * 50}]}


def peak_bytes(count: int) -> int:
    tracemalloc.start()
    try:
        seen = inspection.look(rows_of(count), {})
        assert seen.total == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows_but_for_their_digests() -> None:
    few, many = peak_bytes(2_000), peak_bytes(10_000)
    # A digest, the name of its line and their place in the table: about 250 bytes a row.
    assert many - few < 8_000 * 300


LOOK = """
import json, resource, sys
from pathlib import Path
from tinker_mcp.training import files, inspection
resident_kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = resident_kib()
seen = inspection.look(files.rows(Path(sys.argv[1]), "many"), {})
grown = 1024 * (resident_kib() - before)
counts = [seen.total, seen.usable["messages"], len(seen.findings), len(seen.sample)]
print(json.dumps([*counts, grown]))
"""


def test_a_hundred_thousand_lines_are_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for number in range(100_000):
            reply = {**SAY, "content": f"{number} " * 40}
            file.write(json.dumps({"messages": [ASK, reply]}) + "\n")
    counted = subprocess.run(
        [sys.executable, "-c", LOOK, str(path)], capture_output=True, text=True, check=True
    )
    total, usable, problems, sample, grown_bytes = json.loads(counted.stdout)
    assert (total, usable, problems) == (100_000, 100_000, 0)
    assert sample == inspection.SAMPLED_ROWS
    assert path.stat().st_size > 30e6
    assert grown_bytes < 48 * 2**20


def test_a_huge_files_tokens_come_from_a_sample_and_its_longest_rows(tiny: ModelRenderer) -> None:
    def rows() -> Iterator[files.Row]:
        yield from rows_of(3_000)
        yield "line 3001", {"messages": [ASK, {**SAY, "content": "x" * 5_000}]}

    seen = inspection.look(rows(), {})
    tokens = inspection.measured(seen, tiny, 2048)
    assert tokens.is_sample
    assert tokens.over_length == 1
    assert seen.findings["over_length"].first[0].place == "line 3001"
