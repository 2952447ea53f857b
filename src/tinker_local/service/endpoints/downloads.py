"""Fetching external weights: signed URLs, and the files behind them, which need no API key."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from tinker_local.errors import NotFoundError, UserInputError
from tinker_local.service.backend import backend_of
from tinker_local.service.downloads import ExpiredError, Grants
from tinker_local.service.endpoints.checkpoints import path_of
from tinker_local.service.guard import DOWNLOADS


async def external_weights_urls(request: Request) -> Response:
    """One URL for each file of an export, and when they end."""
    catalog, grants = backend_of(request).catalog, _grants(request)
    checkpoint = catalog.get(path_of(request))
    if checkpoint.kind != "external_weights":
        raise UserInputError(
            f"{checkpoint.path} is no export.", "Save one with save_weights_external."
        )
    expires = grants.expiry()
    root = str(request.base_url).rstrip("/") + DOWNLOADS
    names = [file.name for file in catalog.files(checkpoint)]
    urls = {name: f"{root}{grants.give(checkpoint, name, expires)}/{name}" for name in names}
    return JSONResponse({"urls": urls, "expires": expires.isoformat()})


async def download(request: Request) -> Response:
    """The one file that the token in the URL opens."""
    where = request.path_params
    try:
        grant = _grants(request).find(where["token"], where["name"])
    except ExpiredError as error:
        return JSONResponse({"detail": str(error)}, 403)
    catalog = backend_of(request).catalog
    stored = catalog.get(grant.checkpoint.path)
    # The name may belong to another export by now.
    is_same = stored.created_at == grant.checkpoint.created_at
    file = catalog.folder(stored) / grant.file_name
    if not is_same or not file.is_file():
        raise NotFoundError(
            f"{grant.checkpoint.path} has been replaced.",
            "Ask get_external_weights_urls for new URLs.",
        )
    return FileResponse(
        file,
        media_type="application/octet-stream",
        filename=grant.file_name,
        headers={"Cache-Control": "no-store"},
    )


def _grants(request: Request) -> Grants:
    grants: Grants = request.app.state.grants
    return grants
