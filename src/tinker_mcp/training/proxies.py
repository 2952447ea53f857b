"""Proxies, which nothing on this machine is to be reached through."""

from __future__ import annotations

import ipaddress
from collections.abc import MutableMapping

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without brackets, is this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bypass_on_loopback(environ: MutableMapping[str, str]) -> None:
    """Add this machine to NO_PROXY: the SDK's clients can be told in no other way."""
    # The small one wins where both are set (urllib.request.getproxies_environment).
    hosts = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    known = {host.strip() for host in hosts.split(",") if host.strip()}
    if "*" in known or known.issuperset(_LOOPBACK):
        return
    all_hosts = ",".join([*sorted(known), *(host for host in _LOOPBACK if host not in known)])
    environ["no_proxy"] = environ["NO_PROXY"] = all_hosts
