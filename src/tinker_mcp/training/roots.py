"""Which files an agent may name: those inside the allowed roots, links followed."""

from __future__ import annotations

from pathlib import Path

from tinker_mcp.errors import InvalidInputError
from tinker_mcp.settings import Settings


def allowed(path: str, settings: Settings) -> Path:
    """The resolved path of a file or folder to read or write; it need not exist.

    Args:
        path: `~` is the home folder; a relative path starts at the first root.

    Raises:
        InvalidInputError: It lies outside every root, where a link may lead to, or is no path.
    """
    try:
        resolved = (settings.roots[0] / Path(path).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; no such user; a NUL
        raise InvalidInputError(
            f"{path[:200]!r} is no usable path: {error}.", next_step="Name a file by its path."
        ) from error
    if any(resolved.is_relative_to(root.resolve()) for root in settings.roots):
        return resolved
    shown = ", ".join(str(root) for root in settings.roots[:5])
    raise InvalidInputError(
        f"{str(resolved)[:300]!r} lies outside the allowed folders ({shown}).",
        next_step="Name a path inside one, or ask the user to start tinker-mcp with --root DIR "
        "(or TINKER_MCP_ROOTS).",
    )
