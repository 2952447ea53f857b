"""Resources: the docs, and what is known of models, clients, checkpoints and runs, as JSON.

Their scheme is tinker-mcp://, since tinker:// is that of checkpoints. Reading one starts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import anyio.to_thread
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp.server.mcpserver.resources import FunctionResource

from tinker_mcp.errors import NotFoundError, TinkerMcpError
from tinker_mcp.server import docs
from tinker_mcp.server.boundary import told
from tinker_mcp.server.tools import run_reading
from tinker_mcp.training.clients import OpenClient, Workspace

SCHEME = "tinker-mcp://"
JSON = "application/json"
MARKDOWN = "text/markdown"
_SHOWN = 100

Opened = Callable[[], Workspace]


def add_resources(server: MCPServer[Workspace], opened: Opened) -> None:
    """Offer all of them; `opened` gives the workspace of the running server."""
    for name in docs.page_names():
        server.add_resource(
            FunctionResource(
                uri=f"{docs.URI}{name}",
                name=name,
                title=name.replace("-", " ").replace("_", " ").capitalize(),
                mime_type=MARKDOWN,
                fn=partial(docs.page, name),
            )
        )
    for name, fn in _LISTS.items():
        server.add_resource(
            FunctionResource(
                uri=f"{SCHEME}{name}",
                name=name,
                title=name.capitalize(),
                description=(fn.__doc__ or "").strip(),
                mime_type=JSON,
                fn=_reading(fn, opened),
            )
        )
    _add_templates(server, opened)


def _add_templates(server: MCPServer[Workspace], opened: Opened) -> None:
    @server.resource(f"{docs.URI}{{page}}", name="docs", mime_type=MARKDOWN)
    def docs_page(page: str) -> str:
        """A page of the manual."""
        try:
            return docs.page(page)
        except KeyError:
            raise ResourceNotFoundError(
                f"No page {page!r}; there are: {', '.join(docs.page_names())}."
            ) from None

    @server.resource(f"{SCHEME}clients/{{client_id}}", name="client", mime_type=JSON)
    async def client(client_id: str) -> str:
        """An open training client."""

        async def one(workspace: Workspace) -> Any:
            return _client(workspace.client(client_id))

        return await _reading(one, opened)()

    @server.resource(f"{SCHEME}models/{{+base_model}}", name="model", mime_type=JSON)
    async def model(base_model: str) -> str:
        """A model that can be trained."""

        async def one(workspace: Workspace) -> Any:
            for row in (await models(workspace))["models"]:
                if row["name"] == base_model:
                    return row
            raise NotFoundError(f"No model {base_model!r} is served.", next_step="list_models.")

        return await _reading(one, opened)()

    @server.resource(f"{SCHEME}checkpoints/{{+checkpoint}}", name="checkpoint", mime_type=JSON)
    async def checkpoint(checkpoint: str) -> str:
        """A saved checkpoint, by its path without tinker://."""
        path = f"tinker://{checkpoint.removeprefix('tinker://')}"

        async def one(workspace: Workspace) -> Any:
            _, weights = await workspace.ask(
                f"resource {path}", lambda rest: rest.get_weights_info_by_tinker_path(path)
            )
            return {"checkpoint": path, **weights.model_dump(mode="json")}

        return await _reading(one, opened)()

    @server.resource(f"{SCHEME}runs/{{run_id}}", name="run", mime_type=JSON)
    async def run(run_id: str) -> str:
        """A training run: its state, losses and checkpoints."""

        async def one(workspace: Workspace) -> Any:
            settings = workspace.connector.settings
            found = await anyio.to_thread.run_sync(run_reading.details, settings, run_id)
            return found.model_dump(mode="json", exclude={"next_step"})

        return await _reading(one, opened)()

    @server.resource(f"{SCHEME}replies/{{name}}", name="reply", mime_type=JSON)
    async def reply(name: str) -> str:
        """A reply that was too long to be shown whole."""
        path = opened().connector.settings.home / "replies" / name
        try:
            return await anyio.to_thread.run_sync(path.read_text, "utf-8")
        except OSError:
            raise ResourceNotFoundError(f"No reply {name!r} is kept.") from None


async def models(workspace: Workspace) -> dict[str, Any]:
    """The models that can be trained; none while the local backend is not running."""
    backend = await _running(workspace)
    if backend is None:
        return {"backend": "not running", "models": []}
    _, told_of = await workspace.ask("models", lambda rest: rest.get_server_capabilities())
    served = [m for m in told_of.supported_models if m.model_name and m.trainable is not False]
    rows = [{"name": m.model_name, "max_context_length": m.max_context_length} for m in served]
    return {"backend": backend, "models": rows}


async def clients(workspace: Workspace) -> dict[str, Any]:
    """The training clients that are open in this server."""
    return {"clients": [_client(client) for client in workspace.clients.values()]}


async def checkpoints(workspace: Workspace) -> dict[str, Any]:
    """The newest saved checkpoints; none while the local backend is not running."""
    backend = await _running(workspace)
    if backend is None:
        return {"backend": "not running", "checkpoints": []}
    _, found = await workspace.ask(
        "checkpoints", lambda rest: rest.list_user_checkpoints(limit=_SHOWN)
    )
    rows = [
        {
            "checkpoint": c.tinker_path,
            "kind": "state" if c.checkpoint_type == "training" else c.checkpoint_type,
            "time": c.time.isoformat(timespec="seconds"),
        }
        for c in found.checkpoints
    ]
    return {"backend": backend, "checkpoints": rows}


async def runs(workspace: Workspace) -> dict[str, Any]:
    """The newest training runs, those of earlier servers too."""
    settings = workspace.connector.settings
    found = await anyio.to_thread.run_sync(run_reading.listed, settings, None, _SHOWN)
    return found.model_dump(mode="json", exclude={"next_step"})


_LISTS: Mapping[str, Callable[[Workspace], Awaitable[Any]]] = {
    "models": models,
    "clients": clients,
    "checkpoints": checkpoints,
    "runs": runs,
}


async def _running(workspace: Workspace) -> str | None:
    """The backend's label; None for a local one that would have to be started."""
    backend = workspace.connector.running()
    if backend is None:
        return None
    is_local = workspace.connector.settings.is_local
    return None if is_local and not await backend.is_healthy() else backend.label


def _client(client: OpenClient) -> dict[str, Any]:
    return {
        "client_id": client.client_id,
        "base_model": client.base_model,
        "rank": client.rank,
        "step": client.step,
        "last_checkpoint": client.last_checkpoint,
        "backend": client.backend.label,
    }


def _reading(
    fn: Callable[[Workspace], Awaitable[Any]], opened: Opened
) -> Callable[[], Awaitable[str]]:
    """`fn` of the running server's workspace as JSON, its errors in MCP's terms."""

    async def read() -> str:
        try:
            return json.dumps(await fn(opened()), indent=2)
        except NotFoundError as error:
            raise ResourceNotFoundError(told(error)) from error
        except TinkerMcpError as error:
            raise ResourceError(told(error)) from error

    return read
