"""A reward in jails: one process while that is fast enough, up to one a core while it is not."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio.to_thread

from tinker_mcp.training.rewards.cell import Limits, Program
from tinker_mcp.training.rewards.contract import Completion, Row, Scored
from tinker_mcp.training.rewards.jail import Jail, Sample

_CHUNK = 16  # samples a trip to a thread: 0.2 ms of overhead on each
_GROW_AFTER_S = 0.25  # twice what a further process takes to start


class JailedReward:
    """A program as a `Reward`; its processes start when they are first needed."""

    def __init__(
        self,
        program: Program,
        limits: Limits | None = None,
        *,
        allow_unjailed: bool = False,
        processes: int | None = None,
    ) -> None:
        self._program = program
        self._limits = limits or Limits()
        self._allow_unjailed = allow_unjailed
        self._free = asyncio.Semaphore(processes or os.cpu_count() or 1)
        self._most = processes or os.cpu_count() or 1
        self._idle: list[Jail] = []
        self._jails: list[Jail] = []
        self._is_closed = False

    async def score(
        self, completions: Sequence[Completion], rows: Sequence[Row]
    ) -> Sequence[Scored]:
        """One result a completion, in order.

        Raises:
            InvalidInputError: The program cannot be loaded, or too little isolates it here.
        """
        if not completions:
            return []
        async with self._borrowed() as jail:
            is_batch = jail.is_batch
        texts = [completion.text for completion in completions]
        if is_batch:
            samples = [Sample(tuple(texts), tuple(rows))]
        else:
            pairs = zip(texts, rows, strict=True)
            samples = [Sample((text,), (row,)) for text, row in pairs]
        results = await self._scored(samples)
        return [scored for result in results for scored in result]

    def close(self) -> None:
        """End all processes; scoring that still goes on fails."""
        self._is_closed = True
        for jail in self._jails:
            if jail in self._idle:
                jail.close()
            else:
                jail.abort()
        self._idle.clear()

    async def _scored(self, samples: Sequence[Sample]) -> list[list[Scored]]:
        chunks = deque(range(0, len(samples), _CHUNK))
        found: list[list[Scored]] = [[] for _ in samples]

        async def work() -> None:
            async with self._borrowed() as jail:
                while chunks:
                    first = chunks.popleft()
                    chunk = samples[first : first + _CHUNK]
                    found[first : first + len(chunk)] = await anyio.to_thread.run_sync(
                        jail.score, chunk, abandon_on_cancel=True
                    )

        workers = [asyncio.create_task(work())]
        try:
            while chunks and len(workers) < self._most:
                done, _ = await asyncio.wait(workers, timeout=_GROW_AFTER_S)
                if any(task.exception() for task in done):
                    break
                if chunks:
                    workers.append(asyncio.create_task(work()))
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
        return found

    @asynccontextmanager
    async def _borrowed(self) -> AsyncIterator[Jail]:
        """An open jail for this block alone; one that a cancelled block leaves is ended."""
        async with self._free:
            if self._idle:
                jail = self._idle.pop()
            else:
                jail = Jail(self._program, self._limits, allow_unjailed=self._allow_unjailed)
                self._jails.append(jail)
            try:
                await anyio.to_thread.run_sync(jail.open, abandon_on_cancel=True)
                yield jail
            except BaseException:
                jail.abort()  # a thread may still wait for it: that one takes it down
                self._jails.remove(jail)
                raise
            if self._is_closed:
                jail.close()
            else:
                self._idle.append(jail)
