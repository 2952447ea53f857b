"""Every route that the installed SDK can ask for is served, or refused for a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tinker
from starlette.routing import compile_path

from servers import LocalServer
from tinker_local.service.app import REFUSED, ROUTES

BOUND_S = 10.0
SDK = Path(tinker.__file__).parent
PREFIX = "/api/v1"
METHODS = {"get", "post", "put", "delete", "patch"}

# A checkpoint's id is "<kind>/<name>"; all other placeholders stand for one part of a path.
SAMPLES = {"checkpoint_id": "weights/a"}


def _source_files() -> list[Path]:
    return [file for file in sorted(SDK.rglob("*.py")) if not file.stem.endswith("_test")]


def _routes(file: Path) -> Iterator[tuple[str, str]]:
    """(method, path) of each call of the form `x.get("/api/v1/...")` in a source file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        for position, argument in enumerate(node.args[:2]):
            path = _path(argument)
            if path is not None:
                yield _method(node, position), path


def _method(call: ast.Call, position: int) -> str:
    """`client.get(path)`, `self._post(path)`, `self._request("GET", path)`."""
    if position == 1:
        method = call.args[0]
        assert isinstance(method, ast.Constant), ast.dump(call)
        return str(method.value)
    assert isinstance(call.func, ast.Attribute), ast.dump(call)
    name = call.func.attr.lstrip("_")
    assert name in METHODS, ast.dump(call)
    return name.upper()


def _path(node: ast.expr) -> str | None:
    """The path in a string or f-string, a sample in the place of each placeholder."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(
            str(part.value) if isinstance(part, ast.Constant) else _sample(part)
            for part in node.values
        )
    else:
        return None
    return text if text.startswith(f"{PREFIX}/") else None


def _sample(part: ast.expr) -> str:
    assert isinstance(part, ast.FormattedValue)
    return SAMPLES.get(ast.unparse(part.value), "x")


def _is_among(route: tuple[str, str], known: list[tuple[str, str]]) -> bool:
    method, path = route
    return any(
        method == other and compile_path(PREFIX + pattern)[0].fullmatch(path)
        for other, pattern in known
    )


ASKED = sorted({route for file in _source_files() for route in _routes(file)})
SERVED = [(method, path) for method, path, _ in ROUTES]
NOT_SERVED = [(method, path) for method, path, _ in REFUSED]


def test_the_routes_are_found_in_the_sdk() -> None:
    assert len(ASKED) >= 40
    assert ("POST", "/api/v1/forward_backward") in ASKED
    assert ("GET", "/api/v1/training_runs/x/checkpoints/weights/a/external_weights_urls") in ASKED
    assert ("DELETE", "/api/v1/auth/apikey/me") in ASKED


def test_no_route_of_the_sdk_is_written_in_a_way_that_was_not_understood() -> None:
    """Strings that begin with the prefix, be they in calls or anywhere else but in comments."""
    written = {
        path
        for file in _source_files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.expr) and (path := _path(node)) is not None
    }

    understood = {path for _, path in ASKED}
    in_f_strings = {path for path in written if path.endswith("/")}  # their constant beginnings
    assert written - in_f_strings == understood


@pytest.mark.parametrize(("method", "path"), ASKED)
def test_a_route_of_the_sdk_is_either_served_or_refused_on_purpose(method: str, path: str) -> None:
    assert _is_among((method, path), SERVED) != _is_among((method, path), NOT_SERVED)


@pytest.mark.parametrize(("method", "path", "reason"), REFUSED)
def test_a_refused_route_says_why_and_is_one_of_the_sdk(
    tiny_server: LocalServer, method: str, path: str, reason: str
) -> None:
    asked = path.replace("{session_id}", "x")
    assert (method, PREFIX + asked) in ASKED

    answer = httpx.request(
        method,
        tiny_server.base_url + PREFIX + asked,
        headers={"X-API-Key": tiny_server.api_key},
    )

    assert answer.status_code == 404
    assert answer.json() == {"detail": reason}


def test_what_is_refused_fails_at_once_in_the_sdk(rest_client: tinker.RestClient) -> None:
    with pytest.raises(tinker.NotFoundError, match="keeps no timeline"):
        rest_client.export_session_trace("some-session").result(BOUND_S)
