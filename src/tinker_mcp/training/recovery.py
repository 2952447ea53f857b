"""Lost training clients: whether anything went with them, what to recreate them from, what to say.

A client is lost with its backend, its session, or because a custom loss of it failed ("poisoned").
It is recreated under its handle where its last state is at its current step, or where it had taken
no step at all. Decides and words only; `clients.py` does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tinker_mcp.errors import ClientLostError

if TYPE_CHECKING:
    from tinker_mcp.training.clients import OpenClient
    from tinker_mcp.training.sessions import NewClient

POISONED = "a custom loss of it failed or was cancelled, after which it accepts no requests"

_heard: ContextVar[list[str] | None] = ContextVar("heard", default=None)


@contextlib.contextmanager
def notes() -> Iterator[list[str]]:
    """What was recreated during this block: sentences for the reply of the call."""
    said: list[str] = []
    token = _heard.set(said)
    try:
        yield said
    finally:
        _heard.reset(token)


def note(sentence: str) -> None:
    """Have the reply of the running call say this."""
    said = _heard.get()
    if said is not None and sentence not in said:
        said.append(sentence)


def is_poisoned(client: OpenClient) -> bool:
    """Whether the SDK's client refuses every further request.

    The SDK 0.38 says so only when it is asked for one; the attribute is where it keeps the reason.
    """
    return getattr(client.tinker_client, "_request_error", None) is not None


def recipe(client: OpenClient) -> NewClient | None:
    """What to recreate a client from so that nothing is lost; None where something would be."""
    if client.pending_gradients:
        return None
    if client.last_checkpoint is not None and client.saved_at_step == client.step:
        return client.origin.from_state(client.last_checkpoint)
    if client.step == 0 and client.origin.base_model is not None:
        return client.origin
    return None


def recreated(client: OpenClient, new: NewClient, why: str, taken_again: int) -> str:
    """What to say of a client that was recreated."""
    if new.checkpoint is not None:
        kept = f"recreated from {new.checkpoint} at step {client.step}; nothing is lost"
    elif new.seed is not None:
        kept = "recreated at step 0 with the same seed; nothing is lost"
    else:
        kept = "recreated at step 0; without a seed its initial adapter is a new random one"
    again = f" {taken_again} steps of a train call are taken again." if taken_again else ""
    return f"Note: {client.client_id} was lost ({why}) and has been {kept}.{again}"


def lost(client: OpenClient, why: str) -> ClientLostError:
    """What to say of a client that is lost, and how to go on."""
    problem = f"{client.client_id} is lost: {why}."
    if recipe(client) is not None:
        return ClientLostError(
            f"{problem} Nothing went with it.",
            next_step="Call again: it is recreated under the same handle.",
        )
    if client.last_checkpoint is None:
        return ClientLostError(
            f"{problem} It had no checkpoint, so its {_since(client)} are gone.",
            next_step="Call create_training_client, and save_checkpoint now and then.",
        )
    return ClientLostError(
        f"{problem} Its last checkpoint is kept; {_since(client)} after it are gone.",
        next_step=f'Call create_training_client(checkpoint="{client.last_checkpoint}").',
    )


def cannot_be_loaded(client: OpenClient, why: str, problem: str) -> ClientLostError:
    """What to say where the state that held everything does not open."""
    source = client.last_checkpoint or client.origin.base_model
    return ClientLostError(
        f"{client.client_id} is lost: {why}. It could not be recreated from {source}: {problem}",
        next_step="Call list_checkpoints for an older state, then create_training_client.",
    )


def unsaved(client: OpenClient) -> str | None:
    """The work that no state holds, in words; None where there is none."""
    is_new = client.step == 0 and not client.pending_gradients
    is_saved = client.saved_at_step == client.step and not client.pending_gradients
    return None if is_new or is_saved else _since(client)


def _since(client: OpenClient) -> str:
    steps = client.step - (client.saved_at_step or 0)
    words = [f"{steps} steps"] if steps or not client.pending_gradients else []
    if client.pending_gradients:
        words.append("gradients without an optim_step")
    return " and ".join(words)
