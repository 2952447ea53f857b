"""search_docs."""

from __future__ import annotations

from typing import Annotated

import anyio.to_thread
from pydantic import BaseModel, Field

from tinker_mcp.server import docs


class DocsHit(BaseModel):
    page: str
    section: str
    excerpt: str
    uri: str


class DocsFound(BaseModel):
    results: list[DocsHit]
    pages: list[str]
    next_step: str


async def search_docs(
    query: Annotated[str, Field(min_length=1, max_length=500)],
    limit: Annotated[int, Field(ge=1, le=10)] = 5,
) -> DocsFound:
    """Search the manual: pitfalls, losses, hyper-parameters, errors, tools, workflows. Free.

    A result's uri is a resource, the whole page.
    """
    found = await anyio.to_thread.run_sync(lambda: docs.index().search(query, limit))
    hits = [
        DocsHit(
            page=hit.section.page,
            section=hit.section.title,
            excerpt=hit.excerpt,
            uri=hit.section.uri,
        )
        for hit in found
    ]
    pages = docs.page_names()
    next_step = (
        f"Read the resource {hits[0].uri} for the whole page, or search again with its words."
        if hits
        else f"No word of it occurs. Search for one of the pages: {', '.join(pages)}."
    )
    return DocsFound(results=hits, pages=pages, next_step=next_step)
