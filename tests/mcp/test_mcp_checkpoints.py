"""Saving, listing and managing checkpoints."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from agents import Agent, in_memory

from tinker_mcp.settings import Settings


async def saved(agent: Agent, *names: str) -> tuple[str, list[dict[str, Any]]]:
    """A new client whose weights are saved under these names."""
    client_id = await agent.new_client()
    replies = [
        await agent.call("save_checkpoint", client_id=client_id, name=name) for name in names
    ]
    return client_id, replies


async def test_a_clients_checkpoints_are_listed_alone_newest_first(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        await saved(agent, "other")
        client_id, [one, two] = await saved(agent, "one", "two")
        listed = await agent.call("list_checkpoints", client_id=client_id)
        run_id = one["state"].removeprefix("tinker://").partition("/")[0]
        by_run = await agent.call("list_checkpoints", run_id=run_id)
    paths = [item["checkpoint"] for item in listed["checkpoints"]]
    assert set(paths[:2]) == {two["state"], two["sampler"]}
    assert set(paths[2:]) == {one["state"], one["sampler"]}
    assert (listed["total"], listed["next_offset"]) == (4, None)
    assert by_run["checkpoints"] == listed["checkpoints"]


async def test_weights_are_saved_after_the_steps_that_were_asked_for_before(
    settings: Settings,
) -> None:
    async with in_memory(settings) as agent:
        client_id, data_id = await agent.new_client(), (await agent.new_data())["data_id"]

        async def step(limit: int) -> None:
            asked = {"client_id": client_id, "data_id": data_id, "limit": limit}
            await agent.call("forward_backward", **asked, optim={"learning_rate": 0.01})

        saving = agent.call("save_checkpoint", client_id=client_id, name="two")
        _, _, kept, _ = await asyncio.gather(step(1), step(2), saving, step(3))
        clients = await agent.call("list_clients")
    [client] = [row for row in clients["clients"] if row["client_id"] == client_id]
    assert kept["step"] == 2
    assert (client["saved_at_step"], client["step"]) == (2, 3)


async def test_pages_of_one_kind_meet_without_a_gap(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        client_id, replies = await saved(agent, "a", "b", "c")
        asked: dict[str, Any] = {"client_id": client_id, "kind": "state", "limit": 2}
        first = await agent.call("list_checkpoints", **asked)
        assert f"offset={first['next_offset']}" in first["next_step"]
        rest = await agent.call("list_checkpoints", **asked, offset=first["next_offset"])
    pages = [[item["checkpoint"] for item in page["checkpoints"]] for page in (first, rest)]
    assert [len(page) for page in pages] == [2, 1]
    assert sorted(pages[0] + pages[1]) == sorted(reply["state"] for reply in replies)
    assert rest["next_offset"] is None


async def test_pages_of_all_runs_go_by_offset(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        await saved(agent, "a", "b")
        first = await agent.call("list_checkpoints", limit=2)
        rest = await agent.call("list_checkpoints", limit=2, offset=first["next_offset"])
        past = await agent.call("list_checkpoints", offset=first["total"] + 5)
    both = [item["checkpoint"] for page in (first, rest) for item in page["checkpoints"]]
    assert len(set(both)) == 4
    assert (past["checkpoints"], past["next_offset"]) == ([], None)


async def test_rows_that_do_not_fit_are_left_for_the_next_page(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        names = [f"{number:02}-{'n' * 120}" for number in range(20)]
        client_id, _ = await saved(agent, *names)
        seen: list[str] = []
        offset: int | None = 0
        while offset is not None:
            page = await agent.call(
                "list_checkpoints", client_id=client_id, limit=50, offset=offset
            )
            seen += [item["checkpoint"] for item in page["checkpoints"]]
            offset = page["next_offset"]
            assert len(agent.texts[-1]) < 4 * 4_000
    assert len(seen) == len(set(seen)) == 40


async def test_what_is_true_after_each_action_is_told(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        _, [reply] = await saved(agent, "managed")
        on = {"checkpoint": reply["sampler"]}
        published = await agent.call("manage_checkpoint", **on, action="publish")
        again = await agent.call("manage_checkpoint", **on, action="publish")
        unpublished = await agent.call("manage_checkpoint", **on, action="unpublish")
        limited = await agent.call("manage_checkpoint", **on, action="set_ttl", ttl_s=7200)
        kept = await agent.call("manage_checkpoint", **on, action="set_ttl")
        deleted = await agent.call("manage_checkpoint", **on, action="delete")
        gone = await agent.error("manage_checkpoint", **on, action="delete")
    assert [r["is_public"] for r in (published, again, unpublished)] == [True, True, False]
    assert again["next_step"].startswith("It was so already.")
    left = datetime.fromisoformat(limited["expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=7000) < left <= timedelta(seconds=7200)
    assert (kept["exists"], kept["expires_at"]) == (True, None)
    assert (deleted["exists"], deleted["is_public"]) == (False, False)
    assert gone.startswith("not_found: ")


async def test_deleting_a_clients_only_state_says_that_it_can_no_longer_be_recreated(
    settings: Settings,
) -> None:
    async with in_memory(settings) as agent:
        client_id, [first, last] = await saved(agent, "first", "last")
        earlier = await agent.call("manage_checkpoint", checkpoint=first["state"], action="delete")
        only = await agent.call("manage_checkpoint", checkpoint=last["state"], action="delete")
        [listed] = (await agent.call("list_clients"))["clients"]
    assert client_id not in earlier["next_step"]
    assert f'call save_checkpoint(client_id="{client_id}", name=...)' in only["next_step"]
    assert listed["last_checkpoint"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"action": "delete", "ttl_s": 3600}, "ttl_s is for set_ttl, not for delete"),
        ({"action": "set_ttl", "ttl_s": 60}, "greater than or equal to 3600"),
        ({"action": "burn"}, "Input should be 'publish', 'unpublish', 'set_ttl' or 'delete'"),
        ({"action": "publish", "checkpoint": "tinker://x"}, "is no checkpoint's path"),
        ({"action": "publish", "checkpoint": "tinker://x/weights/y"}, "not_found: "),
    ],
)
async def test_what_cannot_be_done_is_refused(
    settings: Settings, arguments: dict[str, Any], said: str
) -> None:
    async with in_memory(settings) as agent:
        asked = {"checkpoint": "tinker://none/weights/none", **arguments}
        assert said in await agent.error("manage_checkpoint", **asked)


@pytest.mark.parametrize("name", ["a/b", "../up", "-first", "", "é", "n" * 129])
async def test_a_name_that_no_checkpoint_may_have_is_refused_before_it_is_sent(
    settings: Settings, name: str
) -> None:
    async with in_memory(settings) as agent:
        said = await agent.error("save_checkpoint", client_id="client-1", name=name)
    assert said.startswith("invalid_input: save_checkpoint: name=")
