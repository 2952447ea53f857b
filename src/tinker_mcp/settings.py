"""Every environment variable, read once into one frozen object."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import urlsplit

import platformdirs

from tinker_mcp.errors import InvalidInputError

BackendChoice = Literal["auto", "hosted", "local"]
LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
TOOLSETS = ("setup", "data", "training", "sampling", "checkpoints", "runs")

HOSTED_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"  # the SDK's own default
LOCAL_IDLE_EXIT_S = 900.0
MIN_TOKEN_CHARACTERS = 16
_SDK_CREDENTIALS = Path("~/.tinker/credentials.json")  # tinker.lib.credentials


@dataclass(frozen=True)
class Settings:
    """How this process was asked to work.

    Attributes:
        backend: Which backend `--backend` or TINKER_MCP_BACKEND asks for.
        base_url: TINKER_BASE_URL, without a trailing slash.
        api_key: TINKER_API_KEY; kept out of repr, so that no log shows it.
        has_stored_key: Whether the SDK would find a key elsewhere: in TINKER_CREDENTIAL_CMD or in
            the file that `tinker auth login` writes. It makes no service the chosen one.
        home: Where all state lies: TINKER_MCP_HOME or the platform's state directory.
        local_cache: Where the local backend keeps models: TINKER_LOCAL_CACHE or the platform's.
        roots: The folders whose files an agent may name: `--root`, TINKER_MCP_ROOTS (separated
            as in PATH), or the working directory.
        toolsets: The groups of tools that are offered: `--toolsets` or TINKER_MCP_TOOLSETS,
            separated by commas; all by default.
        read_only: Whether only tools that change and spend nothing are offered: `--read-only` or
            TINKER_MCP_READ_ONLY.
        http_token: TINKER_MCP_TOKEN, what callers of the HTTP transport must show; not in repr.
        call_limit_s: How long a tool call may work before it answers; hosts drop a call at 60 s.
        allow_unjailed: TINKER_MCP_ALLOW_UNJAILED: run a user's reward code even where this machine
            cannot isolate it.
    """

    backend: BackendChoice = "auto"
    base_url: str | None = field(default=None, repr=False)  # it may hold a password
    api_key: str | None = field(default=None, repr=False)
    has_stored_key: bool = False
    home: Path = field(default_factory=lambda: Path(platformdirs.user_state_dir("tinker-mcp")))
    local_cache: Path = field(
        default_factory=lambda: Path(platformdirs.user_cache_dir("tinker-local"))
    )
    roots: tuple[Path, ...] = field(default_factory=lambda: (Path.cwd(),))
    toolsets: frozenset[str] = frozenset(TOOLSETS)
    read_only: bool = False
    http_token: str | None = field(default=None, repr=False)
    call_limit_s: float = 45.0
    allow_unjailed: bool = False

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str],
        *,
        backend: BackendChoice | None = None,
        roots: Sequence[str] = (),
        toolsets: str | None = None,
        read_only: bool = False,
    ) -> Settings:
        """Read the variables; an empty one counts as unset.

        Raises:
            InvalidInputError: TINKER_MCP_BACKEND is none of auto, hosted, local,
                TINKER_BASE_URL is no http(s) address, TINKER_MCP_TOKEN is too short or cannot
                stand in a header, a root is no folder, a toolset is unknown, or
                TINKER_MCP_READ_ONLY is neither a yes nor a no.
        """
        values = {name: value for name, value in environ.items() if value}
        choice = backend or values.get("TINKER_MCP_BACKEND", "auto")
        if choice not in get_args(BackendChoice):
            raise InvalidInputError(
                f"The backend {choice!r} is unknown.", next_step="Use auto, hosted or local."
            )
        defaults = cls()
        base_url = values.get("TINKER_BASE_URL")
        return cls(
            backend=cast("BackendChoice", choice),
            base_url=_url(base_url) if base_url else None,
            api_key=values.get("TINKER_API_KEY"),
            has_stored_key="TINKER_CREDENTIAL_CMD" in values
            or _SDK_CREDENTIALS.expanduser().exists(),
            home=_folder(values.get("TINKER_MCP_HOME")) or defaults.home,
            local_cache=_folder(values.get("TINKER_LOCAL_CACHE")) or defaults.local_cache,
            toolsets=_toolsets(toolsets or values.get("TINKER_MCP_TOOLSETS")),
            read_only=read_only or _flag(values, "TINKER_MCP_READ_ONLY"),
            allow_unjailed=_flag(values, "TINKER_MCP_ALLOW_UNJAILED"),
            http_token=_token(values.get("TINKER_MCP_TOKEN")),
            roots=_roots(roots or values.get("TINKER_MCP_ROOTS", "").split(os.pathsep))
            or defaults.roots,
        )

    @property
    def has_api_key(self) -> bool:
        """Whether requests to the hosted service can be authenticated at all."""
        return self.api_key is not None or self.has_stored_key

    @property
    def is_local(self) -> bool:
        """Whether the embedded backend is meant: asked for, or nothing else is configured."""
        if self.backend == "auto":
            return self.base_url is None and self.api_key is None
        return self.backend == "local"

    @property
    def local_state_dir(self) -> Path:
        """The state directory of the local backend that this user's processes share."""
        return self.home / "local"


@dataclass(frozen=True)
class LogSettings:
    """How the log on stderr looks: TINKER_MCP_LOG_FORMAT and TINKER_MCP_LOG_LEVEL."""

    format: LogFormat = "console"
    level: LogLevel = "info"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> LogSettings:
        """Read the variables; an empty one counts as unset.

        Raises:
            InvalidInputError: One has an unknown value.
        """
        chosen = {
            "TINKER_MCP_LOG_FORMAT": environ.get("TINKER_MCP_LOG_FORMAT", "").lower() or "console",
            "TINKER_MCP_LOG_LEVEL": environ.get("TINKER_MCP_LOG_LEVEL", "").lower() or "info",
        }
        for (name, value), known in zip(
            chosen.items(), (get_args(LogFormat), get_args(LogLevel)), strict=True
        ):
            if value not in known:
                raise InvalidInputError(
                    f"{name}={value!r} is unknown.", next_step=f"Use one of: {', '.join(known)}."
                )
        log_format, level = chosen.values()
        return cls(cast("LogFormat", log_format), cast("LogLevel", level))


def _toolsets(value: str | None) -> frozenset[str]:
    names = [name.strip() for name in (value or "").split(",")]
    chosen = frozenset(name for name in names if name)
    if unknown := sorted(chosen - set(TOOLSETS) - {"all"}):
        raise InvalidInputError(
            f"Unknown toolset {', '.join(unknown)}.",
            next_step=f"Use some of: {', '.join(TOOLSETS)}; or all.",
        )
    return frozenset(TOOLSETS) if not chosen or "all" in chosen else chosen


def _flag(values: Mapping[str, str], name: str) -> bool:
    value = values.get(name, "0").lower()
    if value not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise InvalidInputError(f"{name}={value!r} is unclear.", next_step="Use true or false.")
    return value in ("1", "true", "yes", "on")


def _url(value: str) -> str:
    try:
        url = urlsplit(value)
        is_usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, half a bracket
        is_usable = False
    if not is_usable:
        raise InvalidInputError(
            f"TINKER_BASE_URL={value.rpartition('@')[2].partition('?')[0]!r} is no address.",
            next_step="Give one such as http://127.0.0.1:8000, or unset it.",
        )
    return value.rstrip("/")


def _token(value: str | None) -> str | None:
    is_usable = value is None or (
        len(value) >= MIN_TOKEN_CHARACTERS and all("!" <= character <= "~" for character in value)
    )
    if not is_usable:
        raise InvalidInputError(
            "TINKER_MCP_TOKEN cannot be used as a bearer token.",
            next_step=f"Give {MIN_TOKEN_CHARACTERS} or more visible ASCII characters, or unset it.",
        )
    return value


def _folder(value: str | None) -> Path | None:
    return Path(value).expanduser().resolve() if value else None


def _roots(names: Sequence[str]) -> tuple[Path, ...]:
    roots = tuple(folder for name in names if (folder := _folder(name)))
    for root in roots:
        if not root.is_dir():
            raise InvalidInputError(
                f"The root {str(root)!r} is no folder.",
                next_step="Give --root or TINKER_MCP_ROOTS a folder that exists.",
            )
    return roots
