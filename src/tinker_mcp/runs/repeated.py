"""A start that is repeated under its idempotency_key: it must ask for what the first one did."""

from __future__ import annotations

import json
from typing import Any

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.runs.planning.arguments import RunArguments
from tinker_mcp.store.rows import RunRow

_SHOWN_CHARACTERS = 80  # of a value; those of rl may be long


def kept(arguments: RunArguments) -> str:
    """What is kept of a start, to know it again."""
    return arguments.model_dump_json(exclude={"idempotency_key"})


def check_same(row: RunRow, arguments: RunArguments) -> None:
    """Whether the run was started with these arguments; not asked of one that kept none.

    Raises:
        InvalidInputError: It was not.
    """
    if row.arguments is None:
        return
    before, now = json.loads(row.arguments), json.loads(kept(arguments))
    told = [
        f"{name}={_shown(before.get(name))}, now {_shown(now.get(name))}"
        for name in dict.fromkeys((*before, *now))
        if before.get(name) != now.get(name)
    ]
    if told:
        raise InvalidInputError(
            f"This idempotency_key started {row.run_id} with other arguments: {'; '.join(told)}.",
            next_step="Use another key for another run, or repeat the first arguments to get "
            f"{row.run_id}.",
        )


def _shown(value: Any) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
