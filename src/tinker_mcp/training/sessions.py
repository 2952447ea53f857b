"""The SDK's sessions: opened for a purpose, tagged with it, and ended when it is served.

A training client gets a session of its own, since ending that is the only way to free it. Knows
nothing of handles.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio.to_thread

from tinker_mcp.training import libraries, sdk_errors
from tinker_mcp.training.backend import Backend

if TYPE_CHECKING:
    import tinker

_CLOSE_LIMIT_S = 2.0


@dataclass(frozen=True)
class NewClient:
    """What create_training_client asks for: a fresh adapter, or one from a checkpoint."""

    base_model: str | None
    checkpoint: str | None
    rank: int
    seed: int | None
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    load_optimizer: bool

    def from_state(self, checkpoint: str) -> NewClient:
        """The same client from a state it saved; from the one it began with, as it began."""
        if checkpoint == self.checkpoint:
            return self
        return replace(self, base_model=None, checkpoint=checkpoint, load_optimizer=True)


@contextlib.asynccontextmanager
async def in_session(
    backend: Backend, new: NewClient, run_id: str | None = None
) -> AsyncIterator[tinker.TrainingClient]:
    """A training client in a session of its own, which ends with the block.

    Args:
        run_id: What the session is tagged with, so that the service's billing can be joined to it.
    """
    service, client = await opened(backend, new, run_id)
    try:
        yield client
    finally:
        await end([service], backend)


Opened: TypeAlias = "tuple[tinker.ServiceClient, tinker.TrainingClient]"


async def opened(backend: Backend, new: NewClient, run_id: str | None = None) -> Opened:
    """A training client in a session of its own: ending that is the only way to free it."""
    with sdk_errors.told():
        service = await anyio.to_thread.run_sync(open_service, backend, run_id)
        try:
            return service, await _submit(service, new)
        except BaseException:
            let_go(service)
            raise


async def end(services: list[tinker.ServiceClient], backend: Backend) -> None:
    """End sessions, if that is quick: without their heartbeats they expire anyway."""
    if not await backend.is_healthy():
        for service in services:
            let_go(service)
        return
    with contextlib.suppress(Exception):
        ends = [service.close("success").result_async() for service in services]
        await asyncio.wait_for(asyncio.gather(*ends), _CLOSE_LIMIT_S)


def let_go(service: tinker.ServiceClient) -> None:
    """Have the SDK end a session by itself, however long that takes; its heartbeats stop.

    In a thread: while a session is being opened, the SDK's close waits for that, and against a
    backend that has ended it tries for minutes.
    """

    def close() -> None:
        with contextlib.suppress(Exception):
            service.close("errored")

    threading.Thread(target=close, name="let go of a session", daemon=True).start()


def open_service(backend: Backend, run_id: str | None = None) -> tinker.ServiceClient:
    """A ServiceClient, in a thread: importing the SDK takes seconds."""
    with libraries.loading():
        import tinker

    tags = {"client": "tinker-mcp"}
    if run_id is not None:
        tags["run_id"] = run_id
    return tinker.ServiceClient(
        user_metadata=tags,
        base_url=backend.base_url,
        api_key=backend.api_key,
    )


def rest_client(backend: Backend) -> tinker.RestClient:
    """A RestClient, in a thread: the first one on a backend asks for its configuration."""
    with libraries.loading():
        import tinker

    return tinker.RestClient(base_url=backend.base_url, api_key=backend.api_key)


async def _submit(service: tinker.ServiceClient, new: NewClient) -> tinker.TrainingClient:
    # In a thread: the first use of a ServiceClient opens its session and blocks meanwhile.
    def submit() -> Any:
        if new.checkpoint is None:
            return service.create_lora_training_client(
                base_model=str(new.base_model),
                rank=new.rank,
                seed=new.seed,
                train_mlp=new.train_mlp,
                train_attn=new.train_attn,
                train_unembed=new.train_unembed,
            )
        if new.load_optimizer:
            return service.create_training_client_from_state_with_optimizer(new.checkpoint)
        return service.create_training_client_from_state(new.checkpoint)

    created: tinker.TrainingClient = await (await anyio.to_thread.run_sync(submit))
    return created
