"""Who calls: the key of this server, or a short-lived JWT that was made from it.

There is one user, the one who may read the key. The SDK exchanges its key for a JWT when the
server asks for that, reads `whoami` from the claims, and renews it at half of its life.
"""

from __future__ import annotations

import base64
import enum
import hmac
import json
import time

from starlette.requests import Request

ORGANIZATION = "local"
USER_URN = "tml:organization_user:local"
TOKEN_LIFE_S = 3600.0


class Verdict(enum.Enum):
    VALID = enum.auto()
    EXPIRED = enum.auto()
    UNKNOWN = enum.auto()


class Identity:
    """Makes and checks the tokens of one server; its key is new at each start, so are they."""

    def __init__(self, api_key: str) -> None:
        self._api_key = api_key.encode()
        # Not the key itself: a token must not help to guess it, nor be taken for something else.
        self._secret = hmac.digest(self._api_key, b"tinker-local jwt", "sha256")

    def token(self, made_from: str, life_s: float = TOKEN_LIFE_S) -> str:
        """A JWT (HS256) for the holder of a valid credential; one made from a JWT ends with it."""
        now = time.time()
        expires = min([now + life_s, *_expiries(made_from)])
        claims = {
            "iss": "tinker-local",
            "sub": USER_URN,
            "org_id": ORGANIZATION,
            "email": "",
            "iat": now,
            "exp": expires,
        }
        signed = f"{_encode(_HEADER)}.{_encode(json.dumps(claims).encode())}"
        return f"{signed}.{_encode(self._signature(signed))}"

    def check(self, credential: str) -> Verdict:
        if hmac.compare_digest(credential.encode(), self._api_key):
            return Verdict.VALID
        signed, dot, signature = credential.rpartition(".")
        if not dot or not hmac.compare_digest(
            signature.encode(), _encode(self._signature(signed)).encode()
        ):
            return Verdict.UNKNOWN
        [expires] = _expiries(credential)
        return Verdict.VALID if time.time() < expires else Verdict.EXPIRED

    def _signature(self, signed: str) -> bytes:
        return hmac.digest(self._secret, signed.encode(), "sha256")


def identity_of(request: Request) -> Identity:
    """The identity that the guard has put beside the request."""
    identity: Identity = request.state.identity
    return identity


_HEADER = json.dumps({"alg": "HS256", "typ": "JWT"}).encode()


def _expiries(credential: str) -> list[float]:
    """When a checked JWT ends; nothing for the key, which has no dots."""
    parts = credential.split(".")
    if len(parts) != 3:
        return []
    padded = parts[1] + "=" * (-len(parts[1]) % 4)
    return [float(json.loads(base64.urlsafe_b64decode(padded))["exp"])]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
