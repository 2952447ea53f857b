"""When the server ends, and that it does.

It ends when its input has ended, on SIGINT and SIGTERM, and over stdio also when its parent has
died, which a third process that holds the pipe would hide. Whatever still works then gets
END_LIMIT_S; a second signal does not wait. All return the exit status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, Future
from types import FrameType
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

END_LIMIT_S = 6.0  # closing the SDK's session takes at most 4.5 s
_PARENT_LOOK_S = 1.0
_READ_BYTES = 2**16
_CLOSED = (anyio.ClosedResourceError, anyio.BrokenResourceError)


class Ending:
    """The end of this process: asked for once, from any thread, and then sure to come."""

    def __init__(self, on_ask: Callable[[], None]) -> None:
        """`on_ask` starts an orderly end; it is called in the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._on_ask = on_ask
        self._lock = threading.Lock()
        self._is_asked = False

    def ask(self) -> None:
        """Begin to end, and end by force when that takes longer than END_LIMIT_S."""
        with self._lock:
            if self._is_asked:
                return
            self._is_asked = True
        threading.Thread(target=_force, daemon=True).start()
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._on_ask)

    def on_signals(self) -> None:
        """Ask at SIGINT and SIGTERM; a second one ends at once."""
        # Not the loop's own handlers: they would wait for whatever blocks the loop.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._signalled)

    def on_death_of(self, parent: int) -> None:
        """Ask when the process that started this one is gone."""
        threading.Thread(target=self._watch_parent, args=(parent,), daemon=True).start()

    def _signalled(self, number: int, _: FrameType | None) -> None:
        if self._is_asked:
            os._exit(0)
        self.ask()

    def _watch_parent(self, parent: int) -> None:
        # PR_SET_PDEATHSIG fires when the parent's thread ends, and is Linux's alone.
        while os.getppid() == parent:
            time.sleep(_PARENT_LOOK_S)
        self.ask()


async def serve_stdio(server: MCPServer[Any], parent: int) -> None:
    """Speak MCP over the standard streams until there is a reason to end.

    `parent` is the process that started this one, read before anything else took time.
    """
    from mcp.server.stdio import stdio_server

    lines = _Lines(_claim_stdin())
    ending = Ending(lines.end)
    ending.on_signals()
    ending.on_death_of(parent)
    lines.start(ending)
    async with stdio_server(stdin=lines) as (read, write):  # type: ignore[arg-type]  # it only iterates
        low = server._lowlevel_server  # as run_stdio_async, which takes no streams
        await low.run(read, write, low.create_initialization_options())


def _claim_stdin() -> int:
    """Take descriptor 0 for the protocol: children and stray reads see an empty input."""
    wire = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return wire


class _Lines:
    """The lines of a descriptor, as the transport iterates over them.

    A thread of its own reads, since a pending read cannot be cancelled: the SDK's reader keeps the
    process alive after SIGINT. It is a daemon and holds no buffer that Python would want to lock
    while it ends.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._send, self._receive = anyio.create_memory_object_stream[str](0)
        self._sending: asyncio.Task[None] | None = None

    def start(self, ending: Ending) -> None:
        threading.Thread(target=self._read, args=(ending,), daemon=True).start()

    def end(self) -> None:
        """Make the transport see the end of its input."""
        self._send.close()

    async def __aiter__(self) -> AsyncIterator[str]:
        async with self._receive:
            async for line in self._receive:
                yield line

    def _read(self, ending: Ending) -> None:
        rest = b""
        with contextlib.suppress(OSError, RuntimeError, CancelledError, *_CLOSED):
            while chunk := os.read(self._descriptor, _READ_BYTES):
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    self._hand_over(line)
            if rest:
                self._hand_over(rest)
        ending.ask()

    def _hand_over(self, line: bytes) -> None:
        taken: Future[None] = Future()
        # Not run_coroutine_threadsafe: where the loop closes meanwhile, that leaves a coroutine
        # behind that nobody awaits, and Python says so on stderr.
        self._loop.call_soon_threadsafe(self._send_now, line.decode("utf-8", "replace"), taken)
        taken.result()

    def _send_now(self, text: str, taken: Future[None]) -> None:
        def settle(sending: asyncio.Task[None]) -> None:
            if sending.cancelled():
                taken.cancel()
            elif error := sending.exception():
                taken.set_exception(error)
            else:
                taken.set_result(None)

        self._sending = self._loop.create_task(self._send.send(text))  # kept: the loop does not
        self._sending.add_done_callback(settle)


def _force() -> None:
    time.sleep(END_LIMIT_S)
    sys.stderr.write("tinker-mcp: what was still working is given up.\n")
    sys.stderr.flush()
    os._exit(0)
