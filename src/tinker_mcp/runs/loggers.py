"""Weights & Biases, Trackio and TensorBoard, where a run asks for them: they watch, it goes on.

Each has a thread of its own, so that opening it, a slow network or a full queue never holds the
loop up. One that is not installed, has no key or raises is left out, and said so once.

The cookbook's loggers (`utils.ml_log`) would open a second run after a resume, and W&B would drop
evaluations that come in after a later step; so wandb and trackio are called directly here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import netrc
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from tinker_mcp.runs.folder import RunFolder
from tinker_mcp.runs.showing.log_tail import redacted
from tinker_mcp.runs.spec import LoggerName, RunSpec
from tinker_mcp.store.rows import MetricKind

PROJECT = "tinker-mcp"
_MAX_PROBLEM_CHARACTERS = 300
_WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the default of wandb 0.2x, of 0.31


class Sink(Protocol):
    """Where numbers go; all calls come from one thread."""

    def log(self, kind: MetricKind, step: int, numbers: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class Loggers:
    """The loggers of one attempt at a run. Use it from one thread.

    Args:
        start_step: Where the attempt begins.
        environ: Where WANDB_API_KEY and the like are looked up.
        warn: Told why a logger is left out, and what would help. Called in the thread of `log` and
            `close`, by them only.
    """

    def __init__(
        self,
        spec: RunSpec,
        folder: RunFolder,
        *,
        start_step: int,
        environ: Mapping[str, str],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._channels: list[_Channel] = []
        for name in dict.fromkeys(spec.loggers):
            if problem := missing(name, environ):
                warn(problem)
            else:
                sink = functools.partial(SINKS[name], spec, folder, start_step)
                self._channels.append(_Channel(name, sink, _sent(name, folder, start_step)))

    def log(self, kind: MetricKind, step: int, numbers: Mapping[str, float]) -> None:
        """Hand numbers on, and return at once."""
        for channel in self._channels:
            channel.put((kind, step, dict(numbers)))
        self._tell_failures()

    def close(self, within_s: float = 4.0) -> None:
        """Let the loggers finish; those that do not in time are left to their fate."""
        deadline = time.monotonic() + within_s
        for channel in self._channels:
            channel.put(None)
        late = [channel for channel in self._channels if not channel.is_done_by(deadline)]
        self._tell_failures()
        self._channels.clear()
        for channel in late:
            self._warn(
                f"The logger {channel.name} had not finished {within_s:g} s after the run."
                f" {_REMEDIES[channel.name]}"
            )

    def _tell_failures(self) -> None:
        for channel in [channel for channel in self._channels if channel.problem]:
            self._channels.remove(channel)
            self._warn(
                f"The logger {channel.name} failed ({channel.problem}); the run goes on without"
                f" it. {_REMEDIES[channel.name]}"
            )


def missing(name: LoggerName, environ: Mapping[str, str]) -> str | None:
    """What a logger lacks here, with the remedy; None where it can be tried."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a folder of that name is no package
        return (
            f"The logger {name} is not installed; the run goes on without it. Run"
            f" pip install 'tinker-mcp[{name}]', then resume the run."
        )
    if name == "wandb" and not _has_wandb_key(environ):
        return (
            "The logger wandb has no key; the run goes on without it. Set WANDB_API_KEY or run"
            " `wandb login`, or set WANDB_MODE=offline, then resume the run."
        )
    return None


class _Channel:
    """A queue, and the thread that opens a sink and writes to it what it has not yet."""

    def __init__(self, name: LoggerName, open_sink: Callable[[], Sink], sent: _Sent) -> None:
        self.name = name
        self.problem: str | None = None
        self._open_sink, self._sent = open_sink, sent
        self._waiting: queue.SimpleQueue[tuple[MetricKind, int, dict[str, float]] | None]
        self._waiting = queue.SimpleQueue()
        # A daemon: a logger that hangs must not keep the worker alive.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: tuple[MetricKind, int, dict[str, float]] | None) -> None:
        self._waiting.put(item)

    def is_done_by(self, deadline: float) -> bool:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with contextlib.closing(self._open_sink()) as sink:
                for kind, step, numbers in iter(self._waiting.get, None):
                    if self._sent.is_news(kind, step):
                        sink.log(kind, step, numbers)
        except (Exception, SystemExit) as error:  # whatever a logger does, the run goes on
            said = redacted(" ".join(f"{type(error).__name__}: {error}".split()))
            self.problem = said[:_MAX_PROBLEM_CHARACTERS]


class _Sent:
    """How far steps and evaluations were sent: a replayed step is no news."""

    def __init__(self, steps: Mapping[str, int], path: Path | None) -> None:
        self._steps, self._path = dict(steps), path

    @classmethod
    def of(cls, path: Path) -> _Sent:
        """As kept in a file, over all attempts at the run."""
        try:
            written = json.loads(path.read_text())
            return cls({kind: int(step) for kind, step in written.items()}, path)
        except (OSError, ValueError):
            return cls({}, path)

    def is_news(self, kind: MetricKind, step: int) -> bool:
        if step <= self._steps.get(kind, -1):
            return False
        self._steps[kind] = step
        if self._path is not None:
            self._path.write_text(json.dumps(self._steps))
        return True


def _sent(name: LoggerName, folder: RunFolder, start_step: int) -> _Sent:
    if name != "tensorboard":  # wandb and trackio keep all that they ever got
        return _Sent.of(folder.path / f".sent-{name}.json")
    return _Sent(dict.fromkeys(("train", "eval"), start_step) if start_step else {}, None)


class _TensorBoard:
    def __init__(self, spec: RunSpec, folder: RunFolder, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(folder.path / "tensorboard"),
            purge_step=start_step + 1 if start_step else 0,  # what comes again, it drops
            flush_secs=5,
        )

    def log(self, kind: MetricKind, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, spec: RunSpec, folder: RunFolder, start_step: int) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=PROJECT,
            id=folder.path.name,
            name=spec.name,
            resume="allow",
            dir=str(folder.path),
            config={"run_id": folder.path.name, **spec.model_dump(mode="json")},
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True),
        )
        self._run.define_metric("test/step", hidden=True)
        self._run.define_metric("test/*", step_metric="test/step")

    def log(self, kind: MetricKind, step: int, numbers: dict[str, float]) -> None:
        if kind == "eval":
            # It comes in after later steps, which W&B drops unless they have their own axis.
            self._run.log({**numbers, "test/step": step}, commit=False)
        else:
            self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, spec: RunSpec, folder: RunFolder, start_step: int) -> None:
        self._run = importlib.import_module("trackio").init(
            project=PROJECT,
            name=folder.path.name,
            resume="allow",
            config={"run_name": spec.name, **spec.model_dump(mode="json")},
            embed=False,
            auto_log_cpu=False,
        )

    def log(self, kind: MetricKind, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


SINKS: Mapping[LoggerName, Callable[[RunSpec, RunFolder, int], Sink]] = {
    "wandb": _Wandb,
    "trackio": _Trackio,
    "tensorboard": _TensorBoard,
}

_REMEDIES: Mapping[LoggerName, str] = {
    "wandb": "`wandb sync` on the folder wandb/ in the run's folder uploads what is missing.",
    "trackio": "`trackio show --project tinker-mcp` shows what arrived; metrics.jsonl has it all.",
    "tensorboard": "metrics.jsonl in the run's folder has all numbers.",
}


def _has_wandb_key(environ: Mapping[str, str]) -> bool:
    """As wandb looks for it: the environment, then netrc."""
    if environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    address = environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(address).hostname or ""] if address else _WANDB_HOSTS
    for name in filter(None, (environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            known = netrc.netrc(Path(name).expanduser())
            if any(known.authenticators(host) for host in hosts):
                return True
    return False
