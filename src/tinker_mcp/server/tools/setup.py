"""check_setup and list_models."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
from pathlib import Path

import anyio.to_thread
from pydantic import BaseModel

from tinker_mcp.server.tools.replies import ToolContext, rounded, workspace_of
from tinker_mcp.settings import Settings
from tinker_mcp.training import models, rendering
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.rewards.probe import probe

_PACKAGES = ("tinker-mcp", "tinker", "tinker-cookbook", "mcp", "torch", "transformers")
_FREE_BYTES_WANTED = 3 * 2**30  # the default model, its conversion and some checkpoints
_FREE_MEMORY_WANTED = 2 * 2**30  # the default model in float32 while it trains, and PyTorch
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # a container's own limit


class Problem(BaseModel):
    problem: str
    fix: str


class Setup(BaseModel):
    backend: str
    backend_state: str
    has_api_key: bool
    versions: dict[str, str]
    state_folder: str
    model_cache: str
    free_disk_bytes: int
    free_memory_bytes: int | None
    is_memory_enough: bool | None
    jail: str
    problems: list[Problem]
    next_step: str


class Model(BaseModel):
    name: str
    max_context_length: int
    renderer: str | None
    renderer_source: str
    learning_rate: float
    learning_rate_source: str


class Models(BaseModel):
    backend: str
    models: list[Model]
    next_step: str


async def check_setup(ctx: ToolContext) -> Setup:
    """Check versions, backend, API key, disk and memory. Changes nothing.

    Call it first, and after a backend error. Next: list_models.
    """
    connector = workspace_of(ctx).connector
    settings = connector.settings
    backend = connector.running()
    state, problems = await _reach(settings, backend)
    free = shutil.disk_usage(_existing(settings.local_cache)).free
    if free < _FREE_BYTES_WANTED:
        problems.append(
            Problem(
                problem=f"Only {free / 2**30:.1f} GiB are free at {settings.local_cache}.",
                fix="Free some, or set TINKER_LOCAL_CACHE and TINKER_MCP_HOME to a larger disk.",
            )
        )
    memory = await anyio.to_thread.run_sync(_free_memory_bytes)
    is_memory_enough = None if memory is None else memory >= _FREE_MEMORY_WANTED
    if settings.is_local and state != "running" and is_memory_enough is False:
        problems.append(
            Problem(
                problem=f"Only {(memory or 0) / 2**30:.1f} GiB of memory are free; the default "
                f"model wants {_FREE_MEMORY_WANTED / 2**30:.0f}.",
                fix="Close something, or set TINKER_LOCAL_MODELS=tinker-local/tiny for a trial.",
            )
        )
    return Setup(
        backend=_label(settings, backend),
        backend_state=state,
        has_api_key=settings.has_api_key,
        versions={"python": platform.python_version(), **_versions()},
        state_folder=str(settings.home),
        model_cache=str(settings.local_cache),
        free_disk_bytes=free,
        free_memory_bytes=memory,
        is_memory_enough=is_memory_enough,
        jail=str(await anyio.to_thread.run_sync(probe)),  # what isolates a user's reward code
        problems=problems,
        next_step="Mend the problems listed, then check again."
        if problems
        else "Call list_models.",
    )


async def list_models(ctx: ToolContext) -> Models:
    """List the models that can be trained, with context length, renderer, learning-rate advice.

    Free. Starts the local backend if that is used; its first start fetches a model.
    """
    backend, capabilities = await workspace_of(ctx).ask(
        "list_models", lambda rest: rest.get_server_capabilities()
    )
    served = [m for m in capabilities.supported_models if m.model_name and m.trainable is not False]
    described = [
        await anyio.to_thread.run_sync(
            _describe, backend, str(m.model_name), m.max_context_length or 0
        )
        for m in served
    ]
    first = described[0].name if described else "..."
    return Models(
        backend=backend.label,
        models=described,
        next_step=f'Call build_datums(path=..., base_model="{first}", eval_share=0.1).',
    )


async def _reach(settings: Settings, backend: Backend | None) -> tuple[str, list[Problem]]:
    if backend is None or (settings.is_local and not await backend.is_healthy()):
        return "not running; starts when it is first needed", []
    if settings.is_local:
        return "running", []
    if not settings.has_api_key:
        fix = "Make a key at tinker-console.thinkingmachines.ai, or use --backend local."
        return "not tried", [Problem(problem="TINKER_API_KEY is not set.", fix=fix)]
    refusal = await backend.refusal()
    if refusal is None:
        return "reachable", []
    fix = "Check TINKER_API_KEY, TINKER_BASE_URL and the network; or use --backend local."
    return "unreachable", [Problem(problem=f"{backend.label}: {refusal}.", fix=fix)]


def _label(settings: Settings, backend: Backend | None) -> str:
    if backend is not None:
        return backend.label
    return "local" if settings.is_local else "hosted"


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _existing(folder: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    return folder if folder.exists() else _existing(folder.parent)


def _free_memory_bytes() -> int | None:
    """What programs may still take: of the machine, or of the container if that is less."""
    try:
        kib = re.search(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None  # not Linux
    if kib is None:
        return None
    free = int(kib[1]) * 1024
    try:
        limit, used = (
            int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return free
    return min(free, max(limit - used, 0))


def _describe(backend: Backend, name: str, max_context_length: int) -> Model:
    rate = models.learning_rate(name)
    renderer = rendering.advice(backend, name)
    return Model(
        name=name,
        max_context_length=max_context_length,
        renderer=None if renderer is None else str(renderer.value),
        renderer_source="the tokenizer cannot be loaded" if renderer is None else renderer.source,
        learning_rate=rounded(float(rate.value)),
        learning_rate_source=rate.source,
    )
