"""Which Tinker backend is used, and whether it is there.

The local one is a process of its own, `python -m tinker_local serve`, shared by all processes of
a user through the note `server.json` that it keeps in its state directory. It ends by itself when
the last process that used it is gone (`lifeline`), or when nobody has asked it for a while.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import structlog

from tinker_mcp.errors import (
    BackendGoneError,
    BackendStartingError,
    BackendUnreachableError,
    InvalidInputError,
)
from tinker_mcp.settings import HOSTED_URL, LOCAL_IDLE_EXIT_S, Settings
from tinker_mcp.training import proxies, reaching, sdk_logs
from tinker_mcp.training.lifeline import Lifeline, reading_end

log = structlog.get_logger()

HEALTH_TIMEOUT_S = 2.5
_SERVER_ERROR = 500
_POLL_S = 0.2
_SHOWN_CHARACTERS = 900


@dataclass(frozen=True)
class Backend:
    """One Tinker service that was seen to answer.

    Attributes:
        hub_cache: Where the local backend keeps its tokenizers, in the layout of a Hugging Face
            hub cache; None where names resolve as usual.
        pid: The local backend's process.
    """

    kind: Literal["local", "hosted"]
    base_url: str = field(repr=False)  # it may hold a password
    api_key: str | None = field(repr=False)
    hub_cache: Path | None = None
    pid: int | None = None

    @property
    def label(self) -> str:
        """How replies name it."""
        place = urlsplit(self.base_url).netloc.rpartition("@")[2]  # a password may stand before
        return f"{self.kind} ({place})"

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine."""
        return reaching.is_loopback(self.base_url)

    async def is_healthy(self) -> bool:
        """Whether it answers within HEALTH_TIMEOUT_S. Any answer below 500 counts."""
        return await self.absence() is None

    async def absence(self) -> BackendUnreachableError | None:
        """None for a healthy backend, else what to tell of it.

        BackendGoneError where nothing accepts a connection; a backend that accepts one and stays
        silent may only be busy.
        """
        try:
            status = await reaching.status(f"{self.base_url}/api/v1/healthz", HEALTH_TIMEOUT_S)
        except ConnectionRefusedError:
            return BackendGoneError(
                f"The backend {self.label} does not answer: nothing listens there.",
                next_step="Call check_setup; work that was saved as a checkpoint is not lost.",
            )
        except TimeoutError:
            return self._silence()
        return self._silence() if status >= _SERVER_ERROR else None

    def is_still_there(self) -> bool:
        """Whether one that has just answered still runs, so far as that can be had for nothing.

        To ask it would wake it, for which a busy machine makes a call wait some milliseconds.
        """
        return self.pid is None or _is_running(self.pid)

    def _silence(self) -> BackendUnreachableError:
        end_it = "" if self.pid is None else f" If it stays so, end its process {self.pid}."
        return BackendUnreachableError(
            f"The backend {self.label} does not answer; it may be busy.",
            next_step=f"Call again in 20 s.{end_it} What was saved as a checkpoint is not lost.",
        )

    async def refusal(self) -> str | None:
        """Why an authenticated request fails, or None when it succeeds.

        With a key that only the SDK can find, no more is asked than whether the backend answers.
        """
        import httpx

        if self.api_key is None:
            return None if await self.is_healthy() else "no answer"
        headers = {"X-API-Key": self.api_key}
        url = f"{self.base_url}/api/v1/get_server_capabilities"
        try:
            async with reaching.http_client(url, HEALTH_TIMEOUT_S) as http:
                answer = await http.get(url, headers=headers)
        except httpx.HTTPError as error:
            return f"no answer ({type(error).__name__})"
        if answer.status_code in (401, 403):
            return f"the API key was refused (HTTP {answer.status_code})"
        return None if answer.is_success else f"HTTP {answer.status_code}"


def _is_running(pid: int) -> bool:
    """Whether there is such a process, and one that has ended is not only left to be reaped."""
    try:
        os.kill(pid, 0)
        # "42 (python) S ...": the name may hold anything, a bracket too.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # another user's, or not Linux
        return True


class BackendConnector:
    """Leads to the backend that the settings mean; starts the local one when it is needed."""

    def __init__(self, settings: Settings, environ: Mapping[str, str] = os.environ) -> None:
        self.settings = settings
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = anyio.Lock()
        self._lifeline = Lifeline(settings.local_state_dir)

    def close(self) -> None:
        """Let the local backend end, if nobody else uses it."""
        self._lifeline.let_go()

    def running(self) -> Backend | None:
        """The backend as far as it is known without starting anything."""
        if self.settings.is_local:
            return self._noted()
        return Backend("hosted", self.settings.base_url or HOSTED_URL, self.settings.api_key)

    async def connect(self) -> Backend:
        """The backend, alive.

        Raises:
            BackendStartingError: The local one is not ready within the call's limit.
            BackendUnreachableError: It does not answer, or cannot be started.
            InvalidInputError: The hosted service is meant but no key is set.
        """
        if self.settings.is_local:
            self._lifeline.hold()  # first: what is seen to answer below shall not end after it
        backend = self.running()
        sdk_logs.tell_lost_heartbeats_once()
        if backend is not None and backend.is_loopback:
            proxies.bypass_on_loopback(os.environ)
        if not self.settings.is_local and not self.settings.has_api_key:
            raise InvalidInputError(
                "TINKER_API_KEY is not set, and the hosted backend needs it.",
                next_step="Set it and restart the server, or use --backend local.",
            )
        absence = None if backend is None else await backend.absence()
        if backend is not None and absence is None:
            return backend
        if absence is not None and not (
            self.settings.is_local and isinstance(absence, BackendGoneError)
        ):
            raise absence
        return await self._start()

    async def _start(self) -> Backend:
        deadline = time.monotonic() + self.settings.call_limit_s
        async with self._lock:
            if self._process is None or self._process.poll() is not None:
                try:
                    self._process = await anyio.to_thread.run_sync(self._spawn)
                except OSError as error:
                    raise BackendUnreachableError(
                        f"The local backend could not start: {error}.",
                        next_step="Set TINKER_MCP_HOME to a folder that can be written, restart.",
                    ) from error
        while time.monotonic() < deadline:
            self._lifeline.hold()  # another process may have been the one to start it
            backend = self._noted()
            if backend is not None and await backend.is_healthy():
                proxies.bypass_on_loopback(os.environ)
                return backend
            if self._process.poll() not in (None, 0) and not self._another_has_it():
                raise BackendUnreachableError(
                    f"The local backend could not start: {self._last_words()}",
                    next_step=f"Mend that, then call again. Its log: {self._log()}",
                )
            await anyio.sleep(_POLL_S)
        raise BackendStartingError(
            f"The local backend is still being prepared ({self._last_words()}).",
            next_step="Nothing is lost: call again in 20 s.",
        )

    def _spawn(self) -> subprocess.Popen[bytes]:
        folder = self.settings.local_state_dir
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        command = [sys.executable, "-m", "tinker_local", "serve", "--state-dir", str(folder)]
        command += ["--idle-exit-s", str(LOCAL_IDLE_EXIT_S), "--exit-with-stdin"]
        environ = {**self._environ, "TINKER_LOCAL_CACHE": str(self.settings.local_cache)}
        for secret in ("TINKER_API_KEY", "TINKER_MCP_TOKEN"):  # no business of this one
            environ.pop(secret, None)
        log.info("starting_local_backend", state_dir=str(folder))
        with self._log().open("wb") as output, os.fdopen(reading_end(folder), "rb") as users:
            self._lifeline.hold()
            # Not stdout: its ready line carries the key. The note has it, for its owner only.
            return subprocess.Popen(
                command,
                env=environ,
                stdin=users,
                stdout=subprocess.DEVNULL,
                stderr=output,
                start_new_session=True,
            )

    def _noted(self) -> Backend | None:
        try:
            note = json.loads((self.settings.local_state_dir / "server.json").read_text())
            hub_cache = Path(note["env"]["HF_HOME"]) / "hub"
            return Backend("local", note["base_url"], note["api_key"], hub_cache, note["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _log(self) -> Path:
        """Where the process that this one starts writes: one log a server, since two that start
        at once would write over each other's."""
        return self.settings.local_state_dir / f"server-{os.getpid()}.log"

    def _another_has_it(self) -> bool:
        return "Another tinker-local serves" in self._last_words()

    def _last_words(self) -> str:
        try:
            lines = self._log().read_text("utf-8", "replace")
        except OSError:
            return "no log yet"
        said = [line.strip() for line in lines.splitlines() if line.strip()]
        return said[-1][:_SHOWN_CHARACTERS] if said else "starting"
