"""One running server: models, engine, socket, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from tinker_local import compiler_later, lifeline, running, weights
from tinker_local.errors import UserInputError

if TYPE_CHECKING:  # both load torch
    from tinker_local.engine.hardware import DtypeName
    from tinker_local.service.guard import Guard


@dataclass(frozen=True)
class ServeOptions:
    """What `tinker-local serve` was asked for.

    Attributes:
        aliases: NAME=MODEL each.
        cycle_s: Seconds between two ticks of the simulated clock; None runs work at once.
        exits_with_stdin: Whether it ends when its standard input does.
    """

    models: Sequence[str]
    host: str
    port: int
    state_dir: Path
    dtype: DtypeName
    idle_exit_s: float
    aliases: Sequence[str] = ()
    cycle_s: float | None = None
    exits_with_stdin: bool = False


def serve(options: ServeOptions) -> None:
    """Serve until a signal comes or, with `idle_exit_s`, nobody has asked for so long.

    Prints one JSON line to stdout when it is ready. Ends the process once it has served.

    Raises:
        LocalError: A model, the address or the state directory cannot be had.
    """
    for alias in options.aliases:
        weights.split_alias(alias)  # fails here, not after a download
    with _claimed(options.state_dir):
        if options.exits_with_stdin:
            lifeline.end_with(0, lambda: running.withdraw(options.state_dir))
        listener = _bind(options.host, options.port)
        models, hf_home = _prepared(options)
        host, port = listener.getsockname()[:2]
        base_url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        api_key = f"tml-local-{secrets.token_urlsafe(24)}"
        note = running.RunningServer(
            base_url=base_url,
            api_key=api_key,
            pid=os.getpid(),
            models=[model.name for model in models],
            env={
                "TINKER_BASE_URL": base_url,
                "TINKER_API_KEY": api_key,
                "HF_HOME": str(hf_home),
                "HF_HUB_OFFLINE": "1",
            },
        )
        # Imported here: torch and transformers take seconds, and a wrong argument none.
        compiler_later.stand_in()
        with _no_collections():
            from transformers.utils.logging import disable_progress_bar

            from tinker_local.engine import TorchEngine
            from tinker_local.service import CycleClock, create_app, say_goodbye
            from tinker_local.service.guard import Guard

        # Loading takes a second, and the log should stay readable.
        disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no annotation

        engine = TorchEngine({model.name: model.folder for model in models}, options.dtype)
        clock = CycleClock(options.cycle_s) if options.cycle_s else None
        app = create_app(engine, options.state_dir, clock=clock)
        guard = Guard(app, api_key)
        server = _AnnouncedServer(guard, note, options.state_dir, lambda: say_goodbye(app))
        # uvicorn raises the signal that ended it again once it has shut down.
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            asyncio.run(_run(server, guard, listener, options.idle_exit_s))
    # The engine's thread may be inside a step, and torch aborts a process whose interpreter is
    # torn down under it.
    os._exit(0 if server.started else 1)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Leave the garbage collector out, and what is made meanwhile out of its later rounds."""
    gc.disable()  # 3,000 modules are no garbage; looking through them takes a quarter more
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _prepared(options: ServeOptions) -> tuple[list[weights.ModelFiles], Path]:
    """The models that are served, and the HF_HOME in which clients find them by name.

    A name that the user gives, to a folder or as an alias, may mean another model elsewhere: with
    such names this server has an HF_HOME of its own.
    """
    cache, own = weights.cache_dir(), options.state_dir / "names"
    shared = {spec for spec in options.models if weights.is_name_for_all(spec)}
    models = [
        weights.resolve_model(
            spec, cache if spec in shared else own, progress=weights.stderr_progress
        )
        for spec in options.models
    ]
    if shared.issuperset(options.models) and not options.aliases:
        return models, weights.hf_home(cache)
    weights.lend(cache, [model.name for model in models if model.name in shared], own)
    models += weights.resolve_aliases(
        options.aliases, models, own, progress=weights.stderr_progress
    )
    return models, weights.hf_home(own)


class _AnnouncedServer(uvicorn.Server):
    """Tells where it is as soon as it accepts connections, and those who wait that it ends."""

    def __init__(
        self,
        app: Guard,
        note: running.RunningServer,
        state_dir: Path,
        say_goodbye: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
        super().__init__(config)
        self._note = note
        self._state_dir = state_dir
        self._say_goodbye = say_goodbye

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            running.publish(self._state_dir, self._note)
            sys.stdout.write(self._note.ready_line() + "\n")
            sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._say_goodbye()
        await super().shutdown(sockets)


async def _run(
    server: uvicorn.Server, guard: Guard, listener: socket.socket, idle_exit_s: float
) -> None:
    idle = asyncio.create_task(_exit_when_idle(guard, server, idle_exit_s))
    try:
        await server.serve(sockets=[listener])
    finally:
        idle.cancel()


async def _exit_when_idle(app: Guard, server: uvicorn.Server, idle_exit_s: float) -> None:
    """An open session sends a heartbeat every 10 s, so silence means that nobody is there."""
    while idle_exit_s > 0:
        await asyncio.sleep(min(idle_exit_s / 4, 10))
        if time.monotonic() - app.used_at > idle_exit_s:
            server.should_exit = True
            return


@contextlib.contextmanager
def _claimed(state_dir: Path) -> Iterator[None]:
    lock = running.claim(state_dir)
    # By default the signal ends the process before the note is withdrawn.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        running.withdraw(state_dir)
        lock.release()


def _bind(host: str, port: int) -> socket.socket:
    """Take the address; connections are refused until uvicorn listens on it.

    Raises:
        UserInputError: No loopback address, or the port is taken.
    """
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise UserInputError(
            f"--host {host} is no loopback address.",
            "tinker-local serves this machine only: use 127.0.0.1 or ::1.",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off; else each answer waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise UserInputError(
            f"Cannot listen on {host}:{port}: {error.strerror}.",
            "Use --port 0, which finds a free one.",
        ) from None
    return listener
