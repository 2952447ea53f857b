"""A sign of life from every call that takes longer than a second.

Hosts drop or background a call that stays silent. A tool that knows its progress reports it
through the context; for the rest of the time the context says that it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from mcp.server.mcpserver import Context
from pydantic import PrivateAttr

from tinker_mcp.training.waiting import abandon

FIRST_AFTER_S = 1.0
EVERY_S = 2.0


class LiveContext(Context[Any, Any]):
    """A tool's context that notices when the tool reports by itself."""

    _began: float = PrivateAttr(default_factory=time.monotonic)
    _reported_at: float | None = PrivateAttr(default=None)
    _progress: float = PrivateAttr(default=0.0)
    _total: float | None = PrivateAttr(default=None)
    _beats: int = PrivateAttr(default=0)

    @classmethod
    def of(cls, context: Context[Any, Any]) -> LiveContext:
        """The same request's context."""
        return cls(
            request_context=context._request_context,
            mcp_server=context._mcp_server,
            input_params=context._input_params,
            subscriptions=context._subscriptions,
        )

    async def report_progress(
        self, progress: float, total: float | None = None, message: str | None = None
    ) -> None:
        self._reported_at = time.monotonic()
        self._progress, self._total, self._beats = progress, total, 0
        await super().report_progress(progress, total, message)

    def silent_s(self) -> float:
        """Seconds since the tool's last report, or since the next one is due for the first time."""
        if self._reported_at is None:
            return time.monotonic() - self._began - FIRST_AFTER_S + EVERY_S
        return time.monotonic() - self._reported_at

    async def beat(self, what: str) -> None:
        """Say that the call goes on: a progress that grows, yet stays below the next whole one."""
        self._beats += 1
        self._reported_at = now = time.monotonic()
        grown = self._progress + 1 - 1 / (1 + self._beats)
        message = f"{what}: waiting for {now - self._began:.0f} s"
        await super().report_progress(grown, self._total, message)


@contextlib.asynccontextmanager
async def signs_of_life(context: LiveContext, what: str) -> AsyncIterator[None]:
    """Report every two seconds for as long as the block lasts and is silent itself."""
    task = asyncio.create_task(_beat(context, what))
    try:
        yield
    finally:
        abandon(task)  # also where a notification could not be sent: the call says so by itself


async def _beat(context: LiveContext, what: str) -> None:
    while True:
        due_s = EVERY_S - context.silent_s()
        if due_s > 0:
            await asyncio.sleep(due_s)
        else:
            await context.beat(what)
