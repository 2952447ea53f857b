"""Saved weights: saving, listing and looking after them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tinker_mcp.errors import InvalidInputError, NotFoundError
from tinker_mcp.training.clients import OpenClient, Workspace
from tinker_mcp.training.order import Work, submitted_in_turn

if TYPE_CHECKING:
    import tinker
    from tinker.types import Checkpoint

SavedKind = Literal["state", "sampler", "both"]
ListedKind = Literal["state", "sampler", "external"]
Action = Literal["publish", "unpublish", "set_ttl", "delete"]

MIN_TTL_S = 3600  # both bounds are the SDK's: set_checkpoint_ttl_from_tinker_path
MAX_TTL_S = 315_360_000

_PAGE = 100
_SCANNED = 2_000  # at most, for one reply to a question about one kind

_Change: TypeAlias = "Callable[[tinker.RestClient], Awaitable[None]]"


@dataclass(frozen=True)
class Saved:
    """Where a client's weights of `step` were saved."""

    step: int
    state: str | None
    sampler: str | None


@dataclass(frozen=True)
class Page:
    """Some checkpoints, newest first, and where they stand in the whole list.

    Attributes:
        next_offset: None where there are no more.
    """

    backend: str
    checkpoints: list[Checkpoint]
    positions: list[int]
    total: int
    next_offset: int | None


@dataclass(frozen=True)
class Managed:
    """What is true of a checkpoint now, None where it does not exist any more.

    Attributes:
        is_changed: Whether anything had to be done.
        left_without: Open clients that can no longer be recreated, since this was their last state.
    """

    backend: str
    now: Checkpoint | None
    is_changed: bool
    left_without: list[str]


def kind_of(checkpoint: Checkpoint) -> str:
    """`state`, `sampler` or `external`."""
    kind = checkpoint.checkpoint_type
    return "state" if kind == "training" else kind


async def save(
    workspace: Workspace, client_id: str, name: str, kind: SavedKind, ttl_s: int | None
) -> Saved | None:
    """Save a client's weights; None when it takes longer than a call may."""

    async def prepare(client: OpenClient) -> Work[Saved]:
        async def start() -> Saved:
            step = client.step
            saving: dict[str, tinker.APIFuture[Any]] = {}
            # Both are submitted before either is awaited.
            if kind in ("state", "both"):
                saving["state"] = client.tinker_client.save_state(name, ttl_seconds=ttl_s)
            if kind in ("sampler", "both"):
                saving["sampler"] = client.tinker_client.save_weights_for_sampler(
                    name, ttl_seconds=ttl_s
                )
            paths = {saved_kind: str((await future).path) for saved_kind, future in saving.items()}
            if "state" in paths:
                client.last_checkpoint, client.saved_at_step = paths["state"], step
            return Saved(step, paths.get("state"), paths.get("sampler"))

        return Work(client.unfinished, ("save_checkpoint", name, kind, ttl_s), start)

    return await submitted_in_turn(workspace, client_id, workspace.deadline(), prepare)


async def page(
    workspace: Workspace, run_id: str | None, kind: ListedKind | None, limit: int, offset: int
) -> Page:
    """Checkpoints from position `offset` of all, or of all of one run, at most `limit` of a kind.

    Raises:
        NotFoundError: No such run.
    """

    async def look(rest: tinker.RestClient) -> tuple[list[tuple[int, Checkpoint]], int, int]:
        found: list[tuple[int, Checkpoint]] = []
        position, total = offset, 0
        async for checkpoint, total in _from(rest, run_id, offset):
            if len(found) == limit or position - offset == _SCANNED:
                return found, total, position
            if kind in (None, kind_of(checkpoint)):
                found.append((position, checkpoint))
            position += 1
        return found, total, position

    what = f"list_checkpoints {run_id} {kind} {limit} {offset}"
    backend, (found, total, position) = await workspace.ask(what, look)
    return Page(
        backend=backend.label,
        checkpoints=[checkpoint for _, checkpoint in found],
        positions=[position for position, _ in found],
        total=total,
        next_offset=position if position < total else None,
    )


async def manage(workspace: Workspace, path: str, action: Action, ttl_s: int | None) -> Managed:
    """Publish, unpublish, delete a checkpoint, or set when it expires (`ttl_s` None: never).

    Raises:
        InvalidInputError: `ttl_s` with another action, or `path` names no checkpoint.
        NotFoundError: There is no such checkpoint, or it is not the user's.
    """
    if ttl_s is not None and action != "set_ttl":
        raise InvalidInputError(
            f"ttl_s is for set_ttl, not for {action}.", next_step="Leave ttl_s out."
        )
    run_id = run_of(path)

    async def change(rest: tinker.RestClient) -> tuple[Checkpoint | None, bool]:
        before = await find(rest, path)
        if before is None:
            raise NotFoundError(
                f"No checkpoint {path!r} in {run_id}.", next_step="Call list_checkpoints."
            )
        # Asked again for what is so already, the hosted service answers 409, and the SDK repeats
        # that for five minutes.
        is_so = {"publish": before.public, "unpublish": not before.public}.get(action, False)
        if not is_so:
            await _changes(path, ttl_s)[action](rest)
        return await find(rest, path), not is_so

    backend, (now, is_changed) = await workspace.ask(f"{action} {path} {ttl_s}", change)
    left_without = [] if now is not None else _forget(workspace, path)
    return Managed(backend.label, now, is_changed, left_without)


def run_of(path: str) -> str:
    """The training run of a checkpoint.

    Raises:
        InvalidInputError: The path names no checkpoint.
    """
    import tinker

    try:
        return tinker.ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id
    except ValueError as error:
        raise InvalidInputError(
            f"{path!r} is no checkpoint's path, such as tinker://RUN/weights/NAME.",
            next_step="Call list_checkpoints for the paths there are.",
        ) from error


async def find(rest: tinker.RestClient, path: str) -> Checkpoint | None:
    """What the backend says of a checkpoint; None where its run has none of that path."""
    of_run = (await rest.list_checkpoints(run_of(path))).checkpoints
    return next((one for one in of_run if one.tinker_path == path), None)


async def _from(
    rest: tinker.RestClient, run_id: str | None, offset: int
) -> AsyncIterator[tuple[Checkpoint, int]]:
    """Checkpoints from a position on, each with how many there are in all."""
    if run_id is not None:
        of_run = (await rest.list_checkpoints(run_id)).checkpoints
        for checkpoint in of_run[offset:]:
            yield checkpoint, len(of_run)
        return
    for start in itertools.count(offset, _PAGE):
        found = await rest.list_user_checkpoints(limit=_PAGE, offset=start)
        total = found.cursor.total_count if found.cursor else start + len(found.checkpoints)
        for checkpoint in found.checkpoints:
            yield checkpoint, total
        if start + _PAGE >= total or not found.checkpoints:
            return


def _changes(path: str, ttl_s: int | None) -> dict[Action, _Change]:
    async def publish(rest: tinker.RestClient) -> None:
        await rest.publish_checkpoint_from_tinker_path(path)

    async def unpublish(rest: tinker.RestClient) -> None:
        await rest.unpublish_checkpoint_from_tinker_path(path)

    async def set_ttl(rest: tinker.RestClient) -> None:
        await rest.set_checkpoint_ttl_from_tinker_path(path, ttl_s)

    async def delete(rest: tinker.RestClient) -> None:
        await rest.delete_checkpoint_from_tinker_path(path)

    return {"publish": publish, "unpublish": unpublish, "set_ttl": set_ttl, "delete": delete}


def _forget(workspace: Workspace, path: str) -> list[str]:
    """Have no open client count on a state that is gone; those that did."""
    left: list[OpenClient] = [c for c in workspace.clients.values() if c.last_checkpoint == path]
    for client in left:
        client.last_checkpoint = client.saved_at_step = None
    return [client.client_id for client in left]
