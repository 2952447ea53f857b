"""How start_run answers in under two seconds, whatever it has to check.

The checks go on when a call has answered `finished: false`, and the same call joins them. The run
itself begins only while a call waits that can tell its id: of a caller who went away nothing
remains, and no two runs come of calls that repeat one another.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync

from tinker_mcp.errors import TinkerMcpError
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.runs.repeated import check_same
from tinker_mcp.runs.spec import RunSpec
from tinker_mcp.server.tools import run_reading, run_replies
from tinker_mcp.server.tools.run_replies import StartedRun
from tinker_mcp.settings import Settings
from tinker_mcp.training import libraries, roots
from tinker_mcp.training.clients import Workspace
from tinker_mcp.training.waiting import Shared

if TYPE_CHECKING:
    from tinker_mcp.runs.planning.plan import Planned
    from tinker_mcp.store.rows import RunRow

LIMIT_S = 1.0  # the other second is for what holds the event loop: 0.3 s while torch is loaded


async def started(workspace: Workspace, arguments: RunArguments, deadline: float) -> StartedRun:
    """Check and start a run, or say what it waits for at `deadline` (monotonic).

    Raises:
        TinkerMcpError: What stands in its way, found by this call or since an equal one.
    """
    settings = workspace.connector.settings
    key = ("start_run", repr(arguments), await run_sync(_versions, arguments, settings))
    if workspace.unfinished.shared(key) is None:
        known = await run_sync(run_reading.of_key, settings, arguments.idempotency_key)
        if known is not None and known.lease is not None:
            check_same(known, arguments)
            return await run_sync(_reply, settings, known, None)
    work = partial(_checked_and_started, workspace, arguments)
    found = await workspace.unfinished.share(key, work, deadline)
    if found is None:
        return StartedRun(finished=False, next_step=_what_goes_on(workspace, arguments, key))
    return await run_sync(_reply, settings, *found)


async def _checked_and_started(
    workspace: Workspace, arguments: RunArguments, shared: Shared
) -> tuple[RunRow, Planned | None]:
    """The run's row, and its plan unless another call has started it meanwhile."""
    from tinker_mcp.runs.planning.plan import checked

    planned = await checked(workspace, arguments)
    await shared.commit()
    began = time.time()
    supervisor = run_reading.supervisor(workspace.connector.settings)
    start = partial(supervisor.start, planned, arguments.idempotency_key, arguments)
    row = await run_sync(start)
    return row, planned if row.created_at >= began else None


def _reply(settings: Settings, row: RunRow, planned: Planned | None) -> StartedRun:
    from tinker_mcp.runs.folder import RunFolder

    folder = RunFolder.of(settings.home, row.run_id).path
    run = run_reading.summary(settings, row.run_id)
    return run_replies.started(run, RunSpec.model_validate_json(row.spec), folder, planned)


def _what_goes_on(workspace: Workspace, arguments: RunArguments, key: Hashable) -> str:
    again = "call start_run again with the same arguments for its run_id."
    shared = workspace.unfinished.shared(key)
    if shared is not None and shared.is_committed:
        return f"The checks are passed and the run is being started: {again}"
    if workspace.connector.running() is None:
        what = "The local backend is starting"
    elif not libraries.are_loaded():
        what = "The server is loading its libraries, once"
    else:
        what = f"Still checking {arguments.data or 'the arguments'}"
    return f"{what}; nothing has been started or spent yet: {again}"


def _versions(arguments: RunArguments, settings: Settings) -> tuple[Hashable, ...]:
    """The files that the arguments name, as they are now: a changed one is checked anew. Blocks."""
    found: list[Hashable] = []
    for text in _texts(arguments.model_dump()):
        try:
            status = roots.allowed(text, settings).stat()
        except (OSError, TinkerMcpError):  # no file, or none that may be read
            continue
        found.append((text, status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
