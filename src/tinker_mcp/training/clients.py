"""Handles to live training clients, and the one ServiceClient behind them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread

from tinker_mcp.errors import (
    BackendGoneError,
    BackendStartingError,
    BackendUnreachableError,
    ClientLostError,
    NotFoundError,
    RequestFailedError,
)
from tinker_mcp.training import recovery, sdk_errors, sessions
from tinker_mcp.training.backend import Backend, BackendConnector
from tinker_mcp.training.datums import DatumSet
from tinker_mcp.training.groups import Group
from tinker_mcp.training.loop import TrainLoop
from tinker_mcp.training.sessions import NewClient, Opened
from tinker_mcp.training.waiting import Turns, Unfinished

if TYPE_CHECKING:
    import tinker

T = TypeVar("T")

FRESH_S = 1.0  # a backend that answered within this is not asked again whether it is there


@dataclass
class OpenClient:
    """A training client of this process, in a session of its own, which ends with it.

    Attributes:
        origin: What it was opened from.
        step: optim_steps submitted so far; 0 when it was opened, from a checkpoint too.
        pending_gradients: forward_backwards since the last optim_step.
        last_checkpoint: The state it would be recreated from, saved at `saved_at_step`.
        lost_because: Why it accepts no more requests, once that is known.
        loops: `train` calls by their arguments, unfinished and finished.
        sampler: The newest sampling client and the step its weights are of.
        order: Held while a call submits its requests; calls get it in order of arrival.
        references: For dpo, by data_id: each datum's log-probability at `origin`.
    """

    client_id: str
    backend: Backend
    base_model: str
    rank: int
    tinker_client: tinker.TrainingClient
    service: tinker.ServiceClient
    origin: NewClient
    step: int = 0
    pending_gradients: int = 0
    last_checkpoint: str | None = None
    saved_at_step: int | None = None
    lost_because: str | None = None
    unfinished: Turns = field(default_factory=Turns)
    loops: dict[Any, TrainLoop] = field(default_factory=dict)
    sampler: tuple[int, tinker.SamplingClient] | None = None
    recovering: anyio.Lock = field(default_factory=anyio.Lock)
    order: asyncio.Lock = field(default_factory=asyncio.Lock)
    references: dict[str, Sequence[float]] = field(default_factory=dict)
    _heard_at: float = -math.inf

    def heard(self) -> None:
        """Take note that its backend has just answered."""
        self._heard_at = time.monotonic()

    def silent_s(self) -> float:
        """Seconds since its backend last answered."""
        return time.monotonic() - self._heard_at

    @contextlib.contextmanager
    def counting_step(self) -> Iterator[None]:
        """Count a step from its submission on, unless it fails in this block."""
        self.step += 1
        applied = self.pending_gradients
        try:
            yield
        except BaseException:
            self.step -= 1
            raise
        self.pending_gradients -= applied

    @contextlib.contextmanager
    def counting_gradient(self) -> Iterator[None]:
        """Count a forward_backward from its submission on, unless it fails in this block."""
        self.pending_gradients += 1
        try:
            yield
        except BaseException:
            self.pending_gradients = max(0, self.pending_gradients - 1)
            raise

    def abandon_work(self) -> None:
        """Give up what was left unfinished."""
        self.unfinished.close()
        for loop in self.loops.values():
            loop.close()
        self.loops.clear()

    def revive(self, backend: Backend, opened: Opened) -> int:
        """Go on with another client of the SDK in the place of the lost one.

        Returns:
            How many steps of unfinished `train` calls are taken again, their results being lost.
        """
        self.unfinished.close()
        sessions.let_go(self.service)
        self.backend, self.service, self.tinker_client = backend, *opened
        self.unfinished, self.sampler, self.lost_because = Turns(), None, None
        taken_again = 0
        for loop in self.loops.values():
            loop.close()
            taken_again += loop.submitted - len(loop.results)
            loop.submitted, loop.client = len(loop.results), self.tinker_client
        return taken_again


class Workspace:
    """All that one MCP server process has open: its backend, clients and datums."""

    def __init__(self, connector: BackendConnector) -> None:
        self.connector = connector
        self.unfinished = Unfinished()
        self.clients: dict[str, OpenClient] = {}
        self.data: dict[str, DatumSet] = {}
        self.groups: dict[str, Group] = {}
        self._service: tuple[Backend, tinker.ServiceClient] | None = None
        self._numbers = {"client": 0, "data": 0, "group": 0}
        self._lock = anyio.Lock()

    @property
    def call_limit_s(self) -> float:
        return self.connector.settings.call_limit_s

    def deadline(self) -> float:
        """When a call that begins now must answer (monotonic)."""
        return time.monotonic() + self.call_limit_s

    def next_id(self, kind: str) -> str:
        """A new handle: client-1, data-1 ..."""
        self._numbers[kind] += 1
        return f"{kind}-{self._numbers[kind]}"

    def was_given(self, kind: str, handle: str) -> bool:
        """Whether it is a handle of this server, of something that may be gone."""
        number = handle.removeprefix(f"{kind}-")
        return number.isdecimal() and 1 <= int(number) <= self._numbers[kind]

    async def service(self) -> tuple[Backend, tinker.ServiceClient]:
        """The backend, alive, and a ServiceClient on it."""
        backend = await self.connector.connect()
        async with self._lock:
            if self._service is None or self._service[0] != backend:
                if self._service is not None:
                    self._service[1].close("errored")  # its heartbeats would go on for ever
                with sdk_errors.told():
                    service = await anyio.to_thread.run_sync(sessions.open_service, backend)
                    self._service = (backend, service)
        return self._service

    async def ask(
        self, what: str, question: Callable[[tinker.RestClient], Awaitable[T]]
    ) -> tuple[Backend, T]:
        """Put a question to the backend's RestClient.

        Raises:
            BackendUnreachableError: No answer within the call's limit.
        """
        deadline = self.deadline()
        backend = await self.connector.connect()

        async def start() -> T:
            with sdk_errors.told():
                return await question(await anyio.to_thread.run_sync(sessions.rest_client, backend))

        answer = await self.unfinished.finish((what, backend), start, backend, deadline)
        if answer is None:
            raise BackendUnreachableError(
                f"The backend {backend.label} did not answer in time.", next_step="Call again."
            )
        return backend, answer

    def client(self, client_id: str) -> OpenClient:
        """An open training client.

        Raises:
            NotFoundError: No such handle.
        """
        if client_id not in self.clients:
            open_ids = ", ".join(self.clients) or "none"
            raise NotFoundError(
                f"No training client {client_id!r}; open: {open_ids}.",
                next_step="Call create_training_client to open one.",
            )
        return self.clients[client_id]

    async def live_client(self, client_id: str) -> OpenClient:
        """An open training client whose backend answers; a lost one is recreated if it can be.

        Raises:
            NotFoundError: No such handle.
            ClientLostError: It is lost, and work went with it.
            BackendStartingError: Recreating it takes longer than a call may.
            BackendUnreachableError: The backend does not answer.
        """
        client = self.client(client_id)
        if await self.loss(client) is not None:
            async with client.recovering:
                why = await self.loss(client)  # another call may have recreated it meanwhile
                if why is not None:
                    await self._recreate(client, why)
        return client

    async def loss(self, client: OpenClient) -> str | None:
        """Why a client is lost; None where it is not.

        Raises:
            BackendUnreachableError: The backend does not answer, but may come back with the client.
        """
        if client.lost_because is not None:
            return client.lost_because
        if recovery.is_poisoned(client):
            return recovery.POISONED
        is_local = client.backend.kind == "local"
        if is_local and self.connector.running() not in (None, client.backend):
            return _ended(client.backend)
        if client.silent_s() < FRESH_S and client.backend.is_still_there():
            return None
        absence = await client.backend.absence()
        if absence is None:
            client.heard()
            return None
        if is_local and isinstance(absence, BackendGoneError):
            return _ended(client.backend)
        raise absence

    async def _recreate(self, client: OpenClient, why: str) -> None:
        new = recovery.recipe(client)
        if new is None:
            raise recovery.lost(client, why)
        deadline = self.deadline()
        backend = await self.connector.connect()

        async def start() -> int:
            return client.revive(backend, await sessions.opened(backend, new))

        key = ("recreate", client.client_id, new)
        try:
            taken_again = await self.unfinished.finish(key, start, backend, deadline)
        except (NotFoundError, RequestFailedError) as error:
            raise recovery.cannot_be_loaded(client, why, error.problem) from error
        if taken_again is None:
            raise BackendStartingError(
                f"{client.client_id} was lost ({why}) and is being recreated.",
                next_step="Nothing is lost: call again in 20 s.",
            )
        recovery.note(recovery.recreated(client, new, why, taken_again))

    def datums(self, data_id: str) -> DatumSet:
        """Datums by handle.

        Raises:
            NotFoundError: No such handle.
        """
        if data_id not in self.data:
            known = ", ".join(self.data) or "none"
            raise NotFoundError(
                f"No data {data_id!r}; there is: {known}.", next_step="Call build_datums first."
            )
        return self.data[data_id]

    async def create(self, new: NewClient) -> OpenClient | None:
        """Open a training client; None when it takes longer than a call may (ask again)."""
        deadline = self.deadline()
        backend = await self.connector.connect()

        async def start() -> OpenClient:
            service, tinker_client = await sessions.opened(backend, new)
            info = tinker_client.get_info()
            client = OpenClient(
                client_id=self.next_id("client"),
                backend=backend,
                base_model=str(info.model_data.model_name),
                rank=info.lora_rank or new.rank,
                tinker_client=tinker_client,
                service=service,
                origin=new,
                last_checkpoint=new.checkpoint,
                saved_at_step=None if new.checkpoint is None else 0,
            )
            self.clients[client.client_id] = client
            return client

        return await self.unfinished.finish(new, start, backend, deadline)

    @contextlib.asynccontextmanager
    async def frozen(self, client: OpenClient) -> AsyncIterator[tinker.TrainingClient]:
        """A second training client on what this one was opened from, for as long as the block."""
        async with sessions.in_session(
            client.backend, replace(client.origin, load_optimizer=False)
        ) as frozen:
            yield frozen

    async def close_client(self, client_id: str) -> OpenClient:
        """Free a training client, with the session that was opened for it.

        Raises:
            NotFoundError: No such handle.
        """
        client = self.clients.pop(self.client(client_id).client_id)
        client.abandon_work()
        await sessions.end([client.service], client.backend)
        return client

    async def close(self) -> None:
        """Give up what is unfinished and end the sessions."""
        self.unfinished.close()
        services: dict[Backend, list[tinker.ServiceClient]] = {}
        for client in self.clients.values():
            client.abandon_work()
            services.setdefault(client.backend, []).append(client.service)
        if self._service is not None:
            services.setdefault(self._service[0], []).append(self._service[1])
        await asyncio.gather(*(sessions.end(group, backend) for backend, group in services.items()))


@contextlib.contextmanager
def told_about(client: OpenClient) -> Iterator[None]:
    """Like `sdk_errors.told`; a lost client is marked, and its error says what went with it."""
    asked = client.tinker_client
    try:
        with sdk_errors.told():
            yield
    except ClientLostError as error:
        why = recovery.POISONED if recovery.is_poisoned(client) else _session_ended(client.backend)
        raise _marked(client, asked, why) from error
    except BackendGoneError as error:
        if client.backend.kind == "local":  # what a local backend had in memory ends with it
            raise _marked(client, asked, _ended(client.backend)) from error
        raise


def _marked(client: OpenClient, asked: tinker.TrainingClient, why: str) -> ClientLostError:
    if client.tinker_client is asked:  # else it was recreated while this request was on its way
        client.lost_because = why
    return recovery.lost(client, why)


def _ended(backend: Backend) -> str:
    return f"its backend {backend.label} has ended"


def _session_ended(backend: Backend) -> str:
    return f"its session on {backend.label} has ended"
