"""Weights as folders that PEFT and transformers load.

The work is done by a process of its own, `export_worker`: it loads whole models, and the SDK's
event loop in this one must not wait for it. Here: what may be exported, and where to.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError, NotFoundError, RequestFailedError
from tinker_mcp.training import checkpoints
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import Workspace

if TYPE_CHECKING:
    import tinker

ExportFormat: TypeAlias = Literal["adapter", "merged"]

_END_S = 10.0


@dataclass(frozen=True)
class ExportJob:
    """What the worker does.

    Attributes:
        state: The checkpoint whose weights are written.
        sampler: The one that they must agree with; None compares with the state's own.
        output_dir: A folder that is empty or does not exist.
    """

    state: str
    sampler: str | None
    output_dir: str
    format: ExportFormat


@dataclass(frozen=True)
class Exported:
    """A folder that was written, loaded and compared.

    Attributes:
        max_difference: Of all tokens' logprobs, the export's against the checkpoint's, in nats.
        remark: What is unusual about it: a sentence with a space behind it, or nothing.
    """

    folder: str
    files: list[str]
    size_bytes: int
    base_model: str
    max_difference: float
    remark: str
    backend: str = ""


async def export(
    workspace: Workspace, checkpoint: str, output_dir: str, export_format: ExportFormat
) -> Exported | None:
    """Write a checkpoint's weights into a folder; None when it takes longer than a call may.

    Raises:
        InvalidInputError: The folder is not empty or not allowed, or the checkpoint is neither a
            state nor saved together with one.
        RequestFailedError: The export failed, or does not agree with the checkpoint; nothing was
            written.
    """
    from tinker_mcp.training.roots import allowed

    deadline = workspace.deadline()
    folder = allowed(output_dir, workspace.connector.settings)
    backend = await workspace.connector.connect()

    async def start() -> Exported:
        await anyio.to_thread.run_sync(_check_empty, folder)
        state = await _state_of(workspace, checkpoint)
        sampler = None if state == checkpoint else checkpoint
        return await _run(ExportJob(state, sampler, str(folder), export_format), backend)

    key = ("export_weights", checkpoint, folder, export_format)
    return await workspace.unfinished.finish(key, start, backend, deadline)


def _check_empty(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InvalidInputError(
            f"output_dir {str(folder)!r} is not an empty folder.",
            next_step="Name a folder that does not exist yet.",
        )


async def _state_of(workspace: Workspace, path: str) -> str:
    """The state to export a checkpoint by: itself, or the one of the same name in its run.

    The SDK has no way to fetch a sampler's weights, nor to train on from them.
    """
    run_id = checkpoints.run_of(path)

    async def look(rest: tinker.RestClient) -> list[str]:
        return [one.tinker_path for one in (await rest.list_checkpoints(run_id)).checkpoints]

    _, paths = await workspace.ask(f"export of {path}", look)
    if path not in paths:
        raise NotFoundError(f"No checkpoint {path!r}.", next_step="Call list_checkpoints.")
    state = f"tinker://{run_id}/weights/{path.rpartition('/')[2]}"
    if state not in paths:
        raise InvalidInputError(
            f"{path} cannot be downloaded, and no state of its name was saved with it.",
            next_step="Give a state (tinker://.../weights/...); save_checkpoint makes both.",
        )
    return state


async def _run(job: ExportJob, backend: Backend) -> Exported:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tinker_mcp.training.export_worker"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # the libraries' chatter, signed URLs among it
        env=_environment(backend),
        start_new_session=True,
    )
    if process.stdin is None or process.stdout is None:  # never: both are pipes
        raise RuntimeError("The export's process has no pipes.")
    try:
        # Its input stays open: it ends when this process does.
        process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        answer = await process.stdout.read()
        await process.wait()
    finally:
        await _end(process)
        process.stdin.close()
    return _told(answer, process.returncode, backend)


def _environment(backend: Backend) -> dict[str, str]:
    environ = {**os.environ, "TINKER_BASE_URL": backend.base_url}
    if backend.api_key is not None:
        environ["TINKER_API_KEY"] = backend.api_key
    return environ


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _END_S)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def _told(answer: bytes, status: int | None, backend: Backend) -> Exported:
    try:
        said = json.loads(answer)
    except ValueError:
        raise RequestFailedError(
            f"The export ended with status {status} and no word; memory may have run out. "
            "Nothing was written.",
            next_step='Try format="adapter", which is the smaller one, or a larger machine.',
        ) from None
    if "problem" in said:
        raise RequestFailedError(said["problem"], next_step=said["next_step"])
    return Exported(**said, backend=backend.label)
