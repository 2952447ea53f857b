"""Finding training clients again, and freeing them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from agents import TINY, in_memory

from servers import LocalServer, start_server
from tinker_mcp.settings import Settings


async def test_an_agent_that_lost_its_context_finds_everything_again(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data = await agent.new_data(eval_share=0.25)
        client_id = await agent.new_client()
        await agent.train(client_id, data["data_id"], steps=2)
        saved = await agent.call("save_checkpoint", client_id=client_id, name="two")
        await agent.train(client_id, data["data_id"], steps=1)
        other = await agent.new_client()
        found = await agent.call("list_clients")
    [first, second] = found["clients"]
    assert (first["client_id"], first["state"], first["step"]) == (client_id, "ready", 3)
    assert (first["last_checkpoint"], first["saved_at_step"]) == (saved["state"], 2)
    assert (first["base_model"], first["rank"], first["unsaved"]) == (TINY, 4, "1 steps")
    assert f'save_checkpoint(client_id="{client_id}"' in found["next_step"]
    assert (second["client_id"], second["unsaved"], second["saved_at_step"]) == (other, None, None)
    assert found["data"] == [
        f"{data['data_id']}: 6 supervised datums for {TINY}",
        f"{data['eval_data_id']}: 2 supervised datums for {TINY}",
    ]


async def test_none_open_names_the_tool_that_opens_one(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        found = await agent.call("list_clients")
    assert (found["clients"], found["data"], found["groups"]) == ([], [], [])
    assert "create_training_client" in found["next_step"]


async def test_closing_frees_the_client_and_leaves_the_others(settings: Settings) -> None:
    async with in_memory(settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        kept, closed = await agent.new_client(), await agent.new_client()
        await agent.train(closed, data_id, steps=2)
        reply = await agent.call("close_client", client_id=closed)
        assert reply["lost"] == "2 steps"
        assert reply["next_step"].startswith("Its 2 steps are gone.")
        assert "No training client" in await agent.error("close_client", client_id=closed)
        await agent.loss(kept, data_id)
        [left] = (await agent.call("list_clients"))["clients"]
    assert left["client_id"] == kept


@pytest.mark.filterwarnings("ignore:RestClient.search_sessions is experimental")
async def test_closing_ends_the_session_that_held_the_weights(
    settings: Settings, home_server: LocalServer
) -> None:
    import tinker

    rest = tinker.RestClient(base_url=home_server.base_url, api_key=home_server.api_key)
    async with in_memory(settings) as agent:
        client_id = await agent.new_client()
        saved = await agent.call("save_checkpoint", client_id=client_id, name="end")
        reply = await agent.call("close_client", client_id=client_id)
        session_id = saved["state"].removeprefix("tinker://").partition(":")[0]
        found = (await rest.search_sessions(tinker.types.SessionSearchRequest(limit=100))).sessions
        [session] = [one for one in found if one.session_id == session_id]
    assert "active" not in str(session.status)
    assert (reply["lost"], reply["last_checkpoint"]) == (None, saved["state"])
    assert f'create_training_client(checkpoint="{saved["state"]}")' in reply["next_step"]


async def test_a_client_of_a_silent_backend_is_listed_as_silent(own_home: Path) -> None:

    server = start_server(own_home / "local")
    async with in_memory(Settings(home=own_home)) as agent:
        await agent.new_client()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            found = await agent.call("list_clients")
        finally:
            os.kill(server.pid, signal.SIGCONT)
    server.stop()
    assert [client["state"] for client in found["clients"]] == ["silent"]
