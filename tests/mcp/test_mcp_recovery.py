"""A client lost with its server, its session or to a custom loss goes on where nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import TINY, in_memory

from servers import LocalServer, start_server
from tinker_mcp.errors import ClientLostError
from tinker_mcp.settings import Settings
from tinker_mcp.training import checkpoints, recovery
from tinker_mcp.training.backend import BackendConnector
from tinker_mcp.training.clients import OpenClient, Workspace, told_about
from tinker_mcp.training.sessions import NewClient

ADAM = {"learning_rate": 1e-2}
NEW = NewClient(TINY, None, 4, 0, True, True, True, True)


class Crashing:
    """A home whose backend can be killed, as the kernel would, and started again on its state."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, roots=(home,))
        self._server: LocalServer = start_server(home / "local")

    def crash(self) -> None:
        state_dir = self._server.state_dir
        self._server.kill()
        self._server = start_server(state_dir)

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture
def crashing(own_home: Path) -> Iterator[Crashing]:
    backend = Crashing(own_home)
    yield backend
    backend.stop()


@pytest.fixture
async def opened(settings: Settings) -> Any:
    """A workspace and a client in it, without MCP."""
    workspace = Workspace(BackendConnector(settings))
    client = await workspace.create(NEW)
    assert client is not None
    yield workspace, client
    await workspace.close()


async def poison(client: OpenClient) -> None:
    """A custom loss that fails: the SDK's client accepts nothing after it."""
    import tinker

    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0, 1.0]},  # type: ignore[dict-item]  # the SDK converts
    )

    def failing(*_: Any) -> Any:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        await client.tinker_client.forward_backward_custom([datum], failing)


async def test_a_client_saved_at_its_step_survives_its_server_with_adams_moments(
    crashing: Crashing,
) -> None:
    async with in_memory(crashing.settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        crashed, spared = await agent.new_client(), await agent.new_client()
        losses: dict[str, list[float]] = {crashed: [], spared: []}
        on = {"data_id": data_id, "optim": ADAM}
        for client_id, seen in losses.items():
            for _ in range(3):
                seen.append(
                    (await agent.call("forward_backward", client_id=client_id, **on))["loss"]
                )
        await agent.call("save_checkpoint", client_id=crashed, name="three")
        for _ in range(2):
            stepped = await agent.call("forward_backward", client_id=spared, **on)
            losses[spared].append(stepped["loss"])
        crashing.crash()
        first = await agent.call("forward_backward", client_id=crashed, **on)
        second = await agent.call("forward_backward", client_id=crashed, **on)
    assert [*losses[crashed], first["loss"], second["loss"]] == losses[spared]
    assert first["step"] == 4
    assert first["next_step"].startswith(f"Note: {crashed} was lost (its backend ")
    assert "recreated from tinker://" in first["next_step"]
    assert "at step 3; nothing is lost." in first["next_step"]
    assert "Note:" not in second["next_step"]


async def test_steps_after_the_last_state_are_counted_and_the_handle_stays_lost(
    crashing: Crashing,
) -> None:
    async with in_memory(crashing.settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        saved = await agent.call("save_checkpoint", client_id=client_id, name="none")
        await agent.train(client_id, data_id, steps=3)
        crashing.crash()
        said = await agent.error("optim_step", client_id=client_id, **ADAM)
        [listed] = (await agent.call("list_clients"))["clients"]
    assert said.startswith(f"client_lost: {client_id} is lost: its backend ")
    assert "3 steps after it are gone" in said
    assert f'create_training_client(checkpoint="{saved["state"]}")' in said
    assert (listed["state"], listed["unsaved"]) == ("lost", "3 steps")


async def test_gradients_that_no_step_has_applied_are_lost_with_the_client(
    crashing: Crashing,
) -> None:
    async with in_memory(crashing.settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        await agent.call("forward_backward", client_id=client_id, data_id=data_id)
        crashing.crash()
        said = await agent.error("optim_step", client_id=client_id, **ADAM)
    assert "its gradients without an optim_step are gone" in said


@pytest.mark.parametrize(
    ("seed", "note"),
    [
        (5, "at step 0 with the same seed; nothing is lost."),
        (None, "at step 0; without a seed its initial adapter is a new random one."),
    ],
)
async def test_a_client_that_took_no_step_is_opened_afresh(
    crashing: Crashing, seed: int | None, note: str
) -> None:
    async with in_memory(crashing.settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client(seed=seed)
        loss = await agent.loss(client_id, data_id)
        crashing.crash()
        assert await agent.loss(client_id, data_id) == loss
    assert note in agent.texts[-1]


async def test_a_state_that_was_deleted_meanwhile_is_named(crashing: Crashing) -> None:
    async with in_memory(crashing.settings) as agent:
        client_id = await agent.new_client()
        saved = await agent.call("save_checkpoint", client_id=client_id, name="gone")
        async with in_memory(crashing.settings) as another:
            await another.call("manage_checkpoint", checkpoint=saved["state"], action="delete")
        crashing.crash()
        said = await agent.error("optim_step", client_id=client_id, **ADAM)
    assert said.startswith("client_lost: ")
    assert f"could not be recreated from {saved['state']}" in said
    assert "Call list_checkpoints" in said


async def test_a_train_call_goes_on_after_the_crash_and_takes_no_finished_step_again(
    crashing: Crashing,
) -> None:
    async with in_memory(crashing.settings) as agent:
        data_id = (await agent.new_data())["data_id"]
        client_id = await agent.new_client()
        done = await agent.train(client_id, data_id, steps=3)
        await agent.call("save_checkpoint", client_id=client_id, name="three")
        crashing.crash()
        more = await agent.train(client_id, data_id, steps=2)
        again = await agent.train(client_id, data_id, steps=3)
    assert (done["client_step"], more["client_step"], again["client_step"]) == (3, 5, 5)
    assert again["last_loss"] == done["last_loss"]


async def test_a_session_that_ended_is_told_and_the_next_call_recreates_the_client(
    opened: tuple[Workspace, OpenClient],
) -> None:
    workspace, client = opened
    await client.service.close("success").result_async()
    with pytest.raises(ClientLostError) as raised, told_about(client):
        await client.tinker_client.optim_step(_adam())
    assert "Nothing went with it." in raised.value.problem
    with recovery.notes() as said:
        assert await workspace.live_client(client.client_id) is client
    assert "with the same seed" in said[0]
    saved = await checkpoints.save(workspace, client.client_id, "works", "state", None)
    assert saved is not None


async def test_a_poisoned_client_is_recreated_from_its_last_state(
    opened: tuple[Workspace, OpenClient],
) -> None:
    workspace, client = opened
    saved = await checkpoints.save(workspace, client.client_id, "before", "state", None)
    assert saved is not None
    await poison(client)
    with recovery.notes() as said:
        after = await checkpoints.save(workspace, client.client_id, "after", "state", None)
    assert after is not None
    assert "a custom loss of it failed" in said[0]
    assert f"recreated from {saved.state} at step 0" in said[0]


async def test_a_poisoned_client_with_unsaved_steps_says_how_many_are_gone(
    opened: tuple[Workspace, OpenClient],
) -> None:
    workspace, client = opened
    client.step = 2  # as after two optim_steps
    await poison(client)
    with pytest.raises(ClientLostError, match=r"its 2 steps are gone"):
        await workspace.live_client(client.client_id)


async def test_a_late_failure_of_the_lost_client_leaves_the_recreated_one_alone(
    opened: tuple[Workspace, OpenClient],
) -> None:
    workspace, client = opened
    with pytest.raises(ClientLostError), told_about(client):
        await poison(client)
        await workspace.live_client(client.client_id)
        raise ClientLostError("late", next_step="")
    assert client.lost_because is None
    assert await workspace.loss(client) is None


def _adam() -> Any:
    import tinker

    return tinker.AdamParams(**ADAM)
