"""Handles to live training clients, and the one ServiceClient behind them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import anyio.to_thread

from tinker_mcp.errors import (
    BackendGoneError,
    BackendUnreachableError,
    ClientLostError,
    NotFoundError,
)
from tinker_mcp.training import sdk_errors
from tinker_mcp.training.backend import Backend, BackendConnector
from tinker_mcp.training.datums import DatumSet
from tinker_mcp.training.loop import TrainLoop
from tinker_mcp.training.waiting import Turns, Unfinished

if TYPE_CHECKING:
    import tinker

T = TypeVar("T")

_CLOSE_LIMIT_S = 2.0


@dataclass
class OpenClient:
    """A training client of this process.

    Attributes:
        step: optim_steps submitted so far; 0 when it was opened, from a checkpoint too.
        loops: Unfinished `train` calls by their arguments.
        sampler: The newest sampling client and the step its weights are of.
    """

    client_id: str
    backend: Backend
    base_model: str
    rank: int
    tinker_client: tinker.TrainingClient
    step: int = 0
    last_checkpoint: str | None = None
    unfinished: Turns = field(default_factory=Turns)
    loops: dict[Any, TrainLoop] = field(default_factory=dict)
    sampler: tuple[int, tinker.SamplingClient] | None = None

    @contextlib.contextmanager
    def counting_step(self) -> Iterator[None]:
        """Count a step from its submission on, unless it fails in this block."""
        self.step += 1
        try:
            yield
        except BaseException:
            self.step -= 1
            raise


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


class Workspace:
    """All that one MCP server process has open: its backend, clients and datums."""

    def __init__(self, connector: BackendConnector) -> None:
        self.connector = connector
        self.unfinished = Unfinished()
        self.clients: dict[str, OpenClient] = {}
        self.data: dict[str, DatumSet] = {}
        self._service: tuple[Backend, tinker.ServiceClient] | None = None
        self._numbers = {"client": 0, "data": 0}
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

    async def service(self) -> tuple[Backend, tinker.ServiceClient]:
        """The backend, alive, and a ServiceClient on it."""
        backend = await self.connector.connect()
        async with self._lock:
            if self._service is None or self._service[0] != backend:
                if self._service is not None:
                    self._service[1].close("errored")  # its heartbeats would go on for ever
                with sdk_errors.told():
                    self._service = (backend, await anyio.to_thread.run_sync(_open, backend))
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
                return await question(await anyio.to_thread.run_sync(_rest, backend))

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
        """An open training client whose backend answers.

        Raises:
            NotFoundError: No such handle.
            ClientLostError: Its local backend is gone, and the client went with it.
            BackendUnreachableError: The backend does not answer.
        """
        client = self.client(client_id)
        absence = await client.backend.absence()
        if absence is None:
            return client
        with told_about(client):
            raise absence

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
        backend, service = await self.service()

        async def start() -> OpenClient:
            with sdk_errors.told():
                tinker_client = await _submit(service, new)
            info = tinker_client.get_info()
            client = OpenClient(
                client_id=self.next_id("client"),
                backend=backend,
                base_model=str(info.model_data.model_name),
                rank=info.lora_rank or new.rank,
                tinker_client=tinker_client,
                last_checkpoint=new.checkpoint,
            )
            self.clients[client.client_id] = client
            return client

        return await self.unfinished.finish(new, start, backend, deadline)

    async def close(self) -> None:
        """Give up what is unfinished and end the session."""
        self.unfinished.close()
        for client in self.clients.values():
            client.unfinished.close()
            for loop in client.loops.values():
                loop.close()
        if self._service is None:
            return
        backend, service = self._service
        if await backend.is_healthy():
            with contextlib.suppress(Exception):  # we are leaving; the session expires anyway
                await asyncio.wait_for(service.close("success").result_async(), _CLOSE_LIMIT_S)


@contextlib.contextmanager
def told_about(client: OpenClient) -> Iterator[None]:
    """Like `sdk_errors.told`, and a lost client's error names its last checkpoint."""
    try:
        with sdk_errors.told():
            yield
    except ClientLostError as error:
        raise _lost(client) from error
    except BackendGoneError as error:
        if client.backend.kind == "local":  # what a local backend had in memory ends with it
            raise _lost(client) from error
        raise


def _lost(client: OpenClient) -> ClientLostError:
    label = client.backend.label
    problem = f"{client.client_id} is lost: its backend {label} has ended, or its session has"
    if client.last_checkpoint is None:
        return ClientLostError(
            f"{problem}. It had no checkpoint, so its {client.step} steps are gone.",
            next_step="Call create_training_client, and save_checkpoint now and then.",
        )
    return ClientLostError(
        f"{problem}. Its last checkpoint is kept.",
        next_step=f'Call create_training_client(checkpoint="{client.last_checkpoint}").',
    )


def _open(backend: Backend) -> tinker.ServiceClient:
    """A ServiceClient, in a thread: importing the SDK takes seconds."""
    import tinker

    return tinker.ServiceClient(
        user_metadata={"client": "tinker-mcp"},
        base_url=backend.base_url,
        api_key=backend.api_key,
    )


def _rest(backend: Backend) -> tinker.RestClient:
    """A RestClient, in a thread: the first one on a backend asks for its configuration."""
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
