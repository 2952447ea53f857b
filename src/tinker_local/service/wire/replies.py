"""Results and failures as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tinker_local.service.futures import Failure, Reply

PROTO = "application/x-protobuf"


def json_reply(value: Mapping[str, object]) -> Reply:
    return Reply(json.dumps(value).encode(), "application/json")


def failure_body(failure: Failure) -> dict[str, str]:
    """What retrieve_future answers, with HTTP 200, for a request that failed."""
    return {"error": failure.error, "category": failure.category}
