"""Every environment variable, read once into one frozen object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import urlsplit

import platformdirs

from tinker_mcp.errors import InvalidInputError

BackendChoice = Literal["auto", "hosted", "local"]

HOSTED_URL = "https://tinker.thinkingmachines.dev/services/tinker-prod"  # the SDK's own default
LOCAL_IDLE_EXIT_S = 900.0
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
        call_limit_s: How long a tool call may work before it answers; hosts drop a call at 60 s.
    """

    backend: BackendChoice = "auto"
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    has_stored_key: bool = False
    home: Path = field(default_factory=lambda: Path(platformdirs.user_state_dir("tinker-mcp")))
    local_cache: Path = field(
        default_factory=lambda: Path(platformdirs.user_cache_dir("tinker-local"))
    )
    call_limit_s: float = 45.0

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str], *, backend: BackendChoice | None = None
    ) -> Settings:
        """Read the variables; an empty one counts as unset.

        Raises:
            InvalidInputError: TINKER_MCP_BACKEND is none of auto, hosted, local, or
                TINKER_BASE_URL is no http(s) address.
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


def _url(value: str) -> str:
    try:
        url = urlsplit(value)
        is_usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number, half a bracket
        is_usable = False
    if not is_usable:
        raise InvalidInputError(
            f"TINKER_BASE_URL={value!r} is no address.",
            next_step="Give one such as http://127.0.0.1:8000, or unset it.",
        )
    return value.rstrip("/")


def _folder(value: str | None) -> Path | None:
    return Path(value).expanduser().resolve() if value else None
