"""A run before it is started: what is settled, and what cannot be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from planning import (
    TINY,
    arguments,
    built,
    conversations,
    pairs,
    planned,
    refusal,
    workspace_on,
    write,
)

from servers import LocalServer
from tinker_mcp.runs.planning.plan import forecast
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.settings import Settings
from tinker_mcp.training import checkpoints, models
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.sessions import NewClient


@pytest.fixture
async def workspace(runs_home: Path, tmp_path: Path) -> AsyncIterator[Workspace]:
    async with workspace_on(Settings(home=runs_home, roots=(tmp_path,))) as opened:
        yield opened


@pytest.fixture
def hosted(runs_server: LocalServer, tmp_path: Path) -> Settings:
    """As if the backend were one that costs money."""
    return Settings(
        backend="hosted",
        base_url=runs_server.base_url,
        api_key=runs_server.api_key,
        home=tmp_path / "hosted-home",
        roots=(tmp_path,),
    )


@pytest.fixture
def hub_cache(runs_server: LocalServer) -> Path:
    return Path(runs_server.env["HF_HOME"]) / "hub"


async def test_all_that_was_left_open_is_settled(workspace: Workspace, tmp_path: Path) -> None:
    data = write(tmp_path, conversations(100))
    found = await planned(workspace, data, eval_share=0.1, name="first")
    spec = found.spec
    assert (spec.base_model, spec.backend, spec.renderer) == (TINY, "local", "qwen3_instruct")
    assert (spec.batch_size, spec.steps, spec.rank) == (32, 3, 32)  # 90 rows once: 2.8 batches
    assert (spec.train.datums, len(found.train), len(found.held_out)) == (90, 90, 10)
    assert (spec.save_every, spec.eval_every, spec.ttl_s) == (1, 1, 604_800)
    assert (spec.learning_rate, spec.learning_rate_source) == (3e-4, models.SWEEP_SOURCE)
    assert (spec.max_usd, spec.usd_per_million, spec.beta) == (None, None, None)
    assert spec.train.tokens == sum(datum.model_input.length for datum in found.train)
    assert spec.train.source == data
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    assert found.warnings == []


@pytest.mark.parametrize(
    ("asked", "steps", "save_every", "eval_every"),
    [
        ({"steps": 100}, 100, 13, 20),
        ({"epochs": 4, "batch_size": 2}, 200, 25, 40),
        ({"epochs": 0.5, "batch_size": 10}, 5, 1, 1),
        ({"steps": 100, "save_every": 0, "eval_every": 7}, 100, 0, 7),
    ],
)
async def test_steps_and_the_cadence_follow_from_each_other(
    workspace: Workspace,
    tmp_path: Path,
    asked: dict[str, Any],
    steps: int,
    save_every: int,
    eval_every: int,
) -> None:
    train = write(tmp_path, conversations(100))
    held_out = write(tmp_path, conversations(105)[100:], "held_out.jsonl")
    found = await planned(workspace, train, eval_share=None, eval_data=held_out, **asked)
    spec = found.spec
    assert (spec.steps, spec.save_every, spec.eval_every) == (steps, save_every, eval_every)


async def test_dpo_takes_pairs_with_a_rate_and_a_beta_of_its_own(
    workspace: Workspace, tmp_path: Path
) -> None:
    found = await planned(
        workspace, write(tmp_path, pairs(20)), method="dpo", eval_share=0.2, epochs=2
    )
    spec = found.spec
    assert (spec.learning_rate, spec.learning_rate_source) == (1e-5, models.DPO_SOURCE)
    assert (spec.beta, spec.train_on_what) == (0.1, "last_assistant_message")
    assert (spec.batch_size, spec.steps) == (16, 2)  # of 16 pairs
    assert (spec.train.datums, len(found.held_out)) == (32, 8)


async def test_text_is_found_in_a_file_and_by_a_mapped_column(
    workspace: Workspace, tmp_path: Path
) -> None:
    plain = write(tmp_path, [{"text": "Once upon a time"}] * 2)
    spec = (await planned(workspace, plain)).spec
    assert (spec.train_on_what, spec.train.trained_tokens) == ("all_tokens", 2 * 15)
    both = [{**row, "body": "Once"} for row in conversations(2)]
    mapped = write(tmp_path, both, "mapped.jsonl")
    spec = (await planned(workspace, mapped, columns={"text": "body"})).spec
    assert spec.train_on_what == "all_tokens"


async def test_a_handle_brings_its_renderer_and_is_split_by_pairs(workspace: Workspace) -> None:
    made = await built(workspace, pairs(10), "preference")
    found = await planned(workspace, made.train.data_id, method="dpo", eval_share=0.3)
    assert (len(found.train), len(found.held_out)) == (14, 6)
    assert found.spec.train.source == made.train.data_id
    kept = list(made.train.datums)
    for side in (found.train, found.held_out):
        for chosen, rejected in zip(side[::2], side[1::2], strict=True):
            assert kept.index(rejected) == kept.index(chosen) + 1


async def test_a_checkpoint_brings_its_model_and_its_rank(
    workspace: Workspace, tmp_path: Path
) -> None:
    new = NewClient(TINY, None, 4, 0, True, True, True, load_optimizer=True)
    client = await workspace.create(new)
    assert client is not None
    saved = await checkpoints.save(workspace, client.client_id, "start", "both", None)
    assert saved is not None and saved.state is not None
    data = write(tmp_path, conversations(4))
    spec = (await planned(workspace, data, checkpoint=saved.state)).spec
    assert (spec.base_model, spec.rank, spec.checkpoint) == (TINY, 4, saved.state)
    said = await refusal(workspace, data, checkpoint=saved.sampler)
    assert "holds sampler weights" in said
    said = await refusal(workspace, data, checkpoint=saved.state, rank=8, base_model="a/b")
    assert "has rank 4, not rank=8" in said
    assert f"is of {TINY}, not of base_model=a/b" in said
    said = await refusal(workspace, data, checkpoint=saved.state + "x")
    assert "cannot be used" in said and "list_checkpoints" in said


async def test_all_problems_are_told_at_once_each_with_its_fix(
    workspace: Workspace, tmp_path: Path
) -> None:
    rows = [*conversations(3), {"messages": [{"role": "user", "content": "Hi"}]}]
    said = await refusal(
        workspace,
        write(tmp_path, rows),
        base_model="Qwen/Qwen3-30B-A3B",
        eval_share=None,
        steps=3,
        epochs=1,
        beta=0.2,
        ttl_s=60,
        columns={"colour": "red"},
    )
    for part in (
        "7 things stand in the way",
        "steps=3 and epochs=1 are both given",
        "beta=0.2 is for dpo only. Leave beta out.",
        "ttl_s=60 is not between 3600",
        "columns maps 'colour'",
        "Neither eval_data nor eval_share is given",
        "Tinker retired it on 2026-06-12. On the hosted service Qwen/Qwen3.6-35B-A3B takes",
        "1 of 4 rows of data=",
        "- line 4: ",
    ):
        assert part in said, (part, said)


@pytest.mark.parametrize("wrong", [{"renderer": "no_such"}, {"eval_data": "none.jsonl"}])
async def test_what_cannot_be_rendered_does_not_hide_the_rest(
    workspace: Workspace, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    data = write(tmp_path, [*conversations(3), {"messages": []}])
    said = await refusal(
        workspace, data, **{"learning_rate": 0.3, "epochs": 1, "steps": 1, **wrong}
    )
    assert "1 of 4 rows of data=" in said
    assert "steps=1 and epochs=1" in said
    assert next(iter(wrong.values())) in said
    assert "renderer" in wrong or "learning_rate=0.3 is 1000 times above" in said


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"base_model": "tinker-local/tinny"}, ["is not among the", f"such as {TINY}"]),
        ({"base_model": None}, ["Neither base_model nor checkpoint is given"]),
        ({"checkpoint": "nowhere"}, ["is no checkpoint's path", "list_checkpoints"]),
        ({"checkpoint": "tinker://a:train:0/weights/b"}, ["cannot be used", "list_checkpoints"]),
        ({"renderer": "no_such"}, ["The renderer 'no_such' cannot be used"]),
        ({"renderer": "role_colon"}, ["does not fit", "qwen3_instruct", 'accept=["renderer"]']),
        ({"learning_rate": 3e-3}, ["10 times above the 0.0003", 'accept=["learning_rate"]']),
        ({"learning_rate": 2e-5}, ["15 times below"]),
        ({"batch_size": 9}, ["batch_size=9 is more than the 8 datums", "batch_size=8"]),
        (
            {"max_length": 30},
            ["8 of 8 rows of data", "30 tokens", "16 tokens in all", 'accept=["truncation"]'],
        ),
        ({"eval_share": 0.01}, ["eval_share 0.01 of 8 conversations is 0"]),
        ({"eval_share": None}, ['accept=["no_held_out"]']),
        ({"eval_data": "data-9"}, ["No data 'data-9'", "build_datums"]),
        ({"eval_data": "/etc/hosts"}, ["outside the allowed folders"]),
        ({"eval_data": "none.jsonl"}, ["No file", "none.jsonl"]),
        ({"method": "dpo"}, ["8 of 8 rows", "inspect_dataset"]),
        ({"method": "dpo", "train_on_what": "all_tokens"}, ["does not go with dpo"]),
    ],
)
async def test_each_check_names_value_and_fix(
    workspace: Workspace, tmp_path: Path, asked: dict[str, Any], parts: list[str]
) -> None:
    said = await refusal(workspace, write(tmp_path, conversations(8)), **asked)
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize(
    ("asked", "warning"),
    [
        ({"renderer": "role_colon", "accept": ("renderer",)}, "does not fit"),
        ({"learning_rate": 3e-3, "accept": ("learning_rate",)}, "10 times above"),
        ({"max_length": 30, "accept": ("truncation",)}, "would lose their ends"),
        ({"eval_share": None, "accept": ("no_held_out",)}, "No held-out data"),
        ({"eval_share": 0}, "No held-out data"),
    ],
)
async def test_what_is_accepted_is_a_warning(
    workspace: Workspace, tmp_path: Path, asked: dict[str, Any], warning: str
) -> None:
    found = await planned(workspace, write(tmp_path, conversations(8)), **asked)
    assert warning in " ".join(found.warnings)


async def test_divergence_may_be_accepted_beforehand(workspace: Workspace, tmp_path: Path) -> None:
    data = write(tmp_path, conversations(8))
    assert (await planned(workspace, data)).spec.stops_on_divergence
    accepted = await planned(workspace, data, accept=("divergence",))
    assert not accepted.spec.stops_on_divergence


async def test_held_out_rows_that_are_trained_on_are_counted(
    workspace: Workspace, tmp_path: Path
) -> None:
    rows = conversations(8)
    train = write(tmp_path, rows)
    held_out = write(tmp_path, [*rows[:3], *conversations(20)[15:]], "held_out.jsonl")
    found = await planned(workspace, train, eval_share=None, eval_data=held_out)
    assert found.warnings == [
        "3 of 8 held-out rows are trained on as well, so the held-out loss will look better than "
        "it is: remove duplicates."
    ]


async def test_a_handle_of_another_kind_or_renderer_is_refused(workspace: Workspace) -> None:
    made = await built(workspace, conversations(4))
    data_id = made.train.data_id
    said = await refusal(workspace, data_id, method="dpo")
    assert f"data={data_id} holds supervised datums" in said
    assert 'method="sft"' in said
    said = await refusal(workspace, data_id, renderer="role_colon", accept=("renderer",))
    assert "was rendered by qwen3_instruct, not by role_colon" in said


async def test_an_unchanged_file_is_rendered_once_and_a_changed_one_again(
    workspace: Workspace, tmp_path: Path
) -> None:
    data = write(tmp_path, conversations(4))
    first, second = await planned(workspace, data), await planned(workspace, data, steps=7)
    assert second.train is first.train
    write(tmp_path, conversations(5))
    assert len((await planned(workspace, data)).train) == 5


async def test_where_it_can_cost_money_a_price_and_a_cap_are_needed(
    hosted: Settings, hub_cache: Path, tmp_path: Path
) -> None:
    data = write(tmp_path, conversations(8))
    own = hosted.home / "prices.json"
    async with workspace_on(hosted, hub_cache) as workspace:
        said = await refusal(workspace, data, max_usd=5)
        assert f"The price of {TINY} is unknown" in said
        assert str(own) in said
        own.parent.mkdir(exist_ok=True)
        own.write_text(f'{{"{TINY}": {{"train": 1000}}}}')
        said = await refusal(workspace, data)
        assert "max_usd is missing, and this run will cost about $" in said
        said = await refusal(workspace, data, max_usd=0.01, epochs=100)
        assert "max_usd=0.01 is below the estimate of $" in said
        found = await planned(workspace, data, max_usd=5)
        assert (found.spec.max_usd, found.spec.usd_per_million) == (5, 1000)
        assert found.estimate.usd_low == pytest.approx(found.spec.train.tokens / 1000)
        own.write_text(f'{{"{TINY}": {{"train": 0}}}}')
        free = await planned(workspace, data)
        assert free.estimate.usd_high == 0


async def test_a_cap_that_dpos_references_alone_would_pass_is_refused(
    hosted: Settings, hub_cache: Path, tmp_path: Path
) -> None:
    data = write(tmp_path, pairs(8))
    own = hosted.home / "prices.json"
    own.parent.mkdir(exist_ok=True)
    own.write_text(f'{{"{TINY}": {{"train": 1000}}}}')
    async with workspace_on(hosted, hub_cache) as workspace:
        asked = {"method": "dpo", "steps": 1, "batch_size": 1, "learning_rate": 1e-5}
        told = await planned(workspace, data, max_usd=100, **asked)
        references = told.estimate.tokens["references"] / 1000
        said = await refusal(workspace, data, max_usd=references * 0.9, **asked)
    assert references > (told.estimate.usd_low or 0) / 2
    assert "it is not enough for the pass over all pairs before the first step, $" in said


async def test_a_forecast_needs_neither_a_cap_nor_a_price(
    hosted: Settings, hub_cache: Path, tmp_path: Path
) -> None:
    async with workspace_on(hosted, hub_cache) as workspace:
        found = await forecast(workspace, arguments(write(tmp_path, conversations(8))))
    assert found is not None
    assert (found.estimate.backend, found.estimate.usd_low) == ("hosted", None)
    assert found.estimate.tokens["train"] == 8 * 31


async def test_a_call_that_runs_out_of_time_is_taken_up_by_the_next(
    runs_home: Path, tmp_path: Path
) -> None:
    asked = arguments(write(tmp_path, conversations(300)))
    settings = Settings(home=runs_home, roots=(tmp_path,), call_limit_s=0.05)
    async with workspace_on(settings) as workspace:
        found, calls = None, 0
        while found is None and calls < 2000:
            found = await forecast(workspace, asked)
            calls += 1
    assert found is not None and calls > 1
    assert len(found.train) == 300
