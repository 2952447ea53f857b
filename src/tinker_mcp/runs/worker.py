"""The detached process that executes one run: `python -m tinker_mcp.runs.worker RUN_ID LEASE`.

It works under the lease that the supervisor took for it, and ends at once where it has lost that.
However it ends otherwise, the run's state says so; what it says on stderr is the run's `logs.log`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from types import FrameType

import structlog

from tinker_mcp.errors import NotFoundError
from tinker_mcp.runs import methods
from tinker_mcp.runs.attempt import Outcome
from tinker_mcp.runs.heartbeat import Heartbeat
from tinker_mcp.runs.journal import Journal
from tinker_mcp.runs.patience import Endeavour, RunFailedError, sentence
from tinker_mcp.runs.redaction import Redacted
from tinker_mcp.settings import LogSettings, Settings
from tinker_mcp.store.runs import LeaseLostError
from tinker_mcp.training.backend import BackendConnector

log = structlog.get_logger()

_CONNECT_LIMIT_S = 10.0  # after which a run says that it waits
_END_LIMIT_S = 15.0  # optional loggers get 10
_WRITE_LIMIT_S = 60.0
_AGAIN_S = 1.0


def main() -> None:
    run_id, lease = sys.argv[1:]
    sys.stderr = Redacted(sys.stderr, os.environ)
    _log_to_stderr(LogSettings.from_environment(os.environ))
    settings = Settings.from_environment(os.environ)
    try:
        journal = Journal(settings.home, run_id, lease)
    except (LeaseLostError, NotFoundError) as error:
        log.info("nothing_to_do", why=str(error))
        return
    _stop_at_sigterm(journal)
    with Heartbeat(settings.home, run_id, lease, journal):
        try:
            _end(journal, _executed(run_id, journal, settings))
        except LeaseLostError:
            log.info("replaced_by_another_worker")
    _end_soon()
    with contextlib.suppress(LeaseLostError):  # it may have a word on a logger
        journal.close()


def _executed(run_id: str, journal: Journal, settings: Settings) -> Outcome | RunFailedError:
    """Do the run; how it ended.

    Raises:
        LeaseLostError: Another worker has it.
    """
    connector = BackendConnector(replace(settings, call_limit_s=_CONNECT_LIMIT_S))
    try:
        return asyncio.run(_endeavour(run_id, journal, connector))
    except LeaseLostError:
        raise
    except RunFailedError as error:
        return error
    except BaseException as error:  # the run's death is recorded, whatever it is
        log.exception("failed")
        return RunFailedError(sentence(error))
    finally:
        connector.close()


async def _endeavour(run_id: str, journal: Journal, connector: BackendConnector) -> Outcome:
    spec, folder = journal.spec, journal.folder
    log.info("worker", run_id=run_id, pid=os.getpid(), method=spec.method)
    if connector.settings.is_local != (spec.backend == "local"):
        raise RunFailedError(f"It was planned for the {spec.backend} backend; this is another one.")
    method = methods.method(spec.method)
    train, held_out = await asyncio.to_thread(method.load, folder.path, spec)
    return await Endeavour(run_id, journal, connector, method, train, held_out).pursue()


def _end(journal: Journal, how: Outcome | RunFailedError) -> None:
    """Write the final state, again and again where the disk is full or the database locked.

    Raises:
        LeaseLostError: Another worker has the run.
    """
    deadline = time.monotonic() + _WRITE_LIMIT_S
    while True:
        try:
            if isinstance(how, Outcome):
                journal.end(how.state, how.reason, how.detail)
            else:
                journal.end("failed", None, str(how))
            return
        except LeaseLostError:
            raise
        except Exception:  # not even this can be recorded: only the log has it
            if time.monotonic() > deadline:
                raise
            log.exception("the_end_could_not_be_written")
            time.sleep(_AGAIN_S)


def _end_soon() -> None:
    """End by force where a library's threads would keep this process alive."""

    def force() -> None:
        time.sleep(_END_LIMIT_S)
        os._exit(0)

    threading.Thread(target=force, daemon=True).start()


def _stop_at_sigterm(journal: Journal) -> None:
    def note(_number: int, _frame: FrameType | None) -> None:
        journal.terminated = True

    signal.signal(signal.SIGTERM, note)


def _log_to_stderr(settings: LogSettings) -> None:
    """structlog's lines and the libraries'; one look for both, without local variables."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    processors: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=structlog.dev.plain_traceback
        )
        if settings.format == "console"
        else structlog.processors.JSONRenderer(),
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(
        stream=sys.stderr,
        level=max(level, logging.WARNING),
        format="%(asctime)s [%(levelname)s] %(name)s: %(message)s",
    )


if __name__ == "__main__":
    main()
