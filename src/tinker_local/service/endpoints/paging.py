"""Listings in pages, as `limit` and `offset` ask for them."""

from __future__ import annotations

from starlette.requests import Request

from tinker_local.errors import UserInputError


def page(request: Request, total: int, *, limit: int = 100) -> tuple[slice, dict[str, int]]:
    """The part of a listing that is asked for, and the cursor that says so.

    Args:
        limit: Where the request names none.

    Raises:
        UserInputError: limit or offset is no number, or out of range.
    """
    query = request.query_params
    try:
        limit, offset = int(query.get("limit", limit)), int(query.get("offset", 0))
    except ValueError:
        raise UserInputError(f"limit or offset is no number: {query}.", "Use integers.") from None
    if limit < 1 or offset < 0:
        raise UserInputError(f"limit {limit}, offset {offset}.", "limit >= 1, offset >= 0.")
    cursor = {"limit": limit, "offset": offset, "total_count": total}
    return slice(offset, offset + limit), cursor
