"""Whose weights to sample or score with: a client's, a checkpoint's or a base model's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import anyio.to_thread

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.training import rendering, sdk_errors
from tinker_mcp.training.backend import Backend
from tinker_mcp.training.clients import OpenClient, Workspace
from tinker_mcp.training.order import Work, submitted_in_turn
from tinker_mcp.training.rendering import ModelRenderer

if TYPE_CHECKING:
    import tinker

SOURCES: Mapping[str, Sequence[str]] = {
    "sample": ("client_id", "checkpoint", "run_id", "base_model"),
    "compute_logprobs": ("client_id", "checkpoint", "base_model"),
}
"""Whose weights a tool takes, by the names of its arguments."""

Rendered = TypeVar("Rendered")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Source:
    """Whose weights; exactly one is set, and for a run its newest sampler weights as well."""

    client_id: str | None = None
    checkpoint: str | None = None
    base_model: str | None = None
    run_id: str | None = None
    newest_of_run: str | None = None

    @property
    def model_path(self) -> str | None:
        """Sampler weights that are saved."""
        return self.checkpoint or self.newest_of_run

    def check(self, tool: str) -> None:
        """Refuse none or several.

        Raises:
            InvalidInputError: Not exactly one is set.
        """
        takes = SOURCES[tool]
        given = [name for name in takes if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "nothing"
            raise InvalidInputError(
                f"{tool} got {said} to sample from.",
                next_step=f"Give exactly one of {', '.join(takes[:-1])} and {takes[-1]}.",
            )


@dataclass(frozen=True)
class Sampler:
    """A sampling client; `weights` is a phrase that says whose they are."""

    client: tinker.SamplingClient
    backend: Backend
    base_model: str
    weights: str


async def ask(
    workspace: Workspace,
    source: Source,
    *,
    key: tuple[Hashable, ...],
    renderer_name: str | None,
    render: Callable[[ModelRenderer], Rendered],
    use: Callable[[Sampler, ModelRenderer, Rendered], Awaitable[Result]],
) -> Result | None:
    """Render what is asked, then use a sampler on it; None when it takes longer than a call may.

    A client's weights are those after all requests that arrived before. Where the model is known,
    rendering comes first: what is wrong with the question shows before weights are saved.
    """
    deadline = workspace.deadline()
    if source.client_id is not None:

        async def prepare(client: OpenClient) -> Work[Result]:
            renderer = await _loaded(client.backend, client.base_model, renderer_name)
            rendered = render(renderer)

            async def start() -> Result:
                sampler = await _of_client(client)
                with sdk_errors.told():
                    return await use(sampler, renderer, rendered)

            return Work(workspace.unfinished, (*key, source, client.step), start)

        return await submitted_in_turn(workspace, source.client_id, deadline, prepare)

    backend, service = await workspace.service()

    async def start() -> Result:
        if source.base_model is not None:
            renderer = await _loaded(backend, source.base_model, renderer_name)
            rendered = render(renderer)
            sampler = await _of_source(backend, service, source)
        else:
            sampler = await _of_source(backend, service, source)
            renderer = await _loaded(backend, sampler.base_model, renderer_name)
            rendered = render(renderer)
        with sdk_errors.told():
            return await use(sampler, renderer, rendered)

    return await workspace.unfinished.finish((*key, source), start, backend, deadline)


async def _of_client(client: OpenClient) -> Sampler:
    """A sampler of the weights after all steps submitted so far.

    A sampling client keeps the weights it was made from, so a new one is made after each step.
    """
    step = client.step
    if client.sampler is None or client.sampler[0] != step:
        sampler = await client.tinker_client.save_weights_and_get_sampling_client()
        client.sampler = (step, sampler)
    else:
        sampler = client.sampler[1]
    weights = f"{client.client_id} at step {step}"
    return Sampler(sampler, client.backend, client.base_model, weights)


async def _of_source(backend: Backend, service: tinker.ServiceClient, source: Source) -> Sampler:
    with sdk_errors.told():
        pending = await anyio.to_thread.run_sync(
            lambda: service.create_sampling_client(
                model_path=source.model_path, base_model=source.base_model
            )
        )
        client = await pending
        base_model = str(client.get_base_model())
    weights = source.model_path or f"{source.base_model}, untrained"
    return Sampler(client, backend, base_model, weights)


async def _loaded(backend: Backend, base_model: str, renderer_name: str | None) -> ModelRenderer:
    return await anyio.to_thread.run_sync(rendering.load, backend, base_model, renderer_name)
