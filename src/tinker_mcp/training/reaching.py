"""Whether a service answers over HTTP, asked before each call and every two seconds while waiting.

A client of httpx takes 2.5 ms to be made, ask and be closed; a socket 0.6 ms. So what is plain HTTP
on this machine is asked by a socket, and the rest, which may need TLS or a proxy, by httpx.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tinker_mcp.training import proxies

if TYPE_CHECKING:
    import httpx  # 40 ms, of which the first call has more to spare than `initialize`


async def status(url: str, timeout_s: float) -> int:
    """The HTTP status of a GET.

    Raises:
        ConnectionRefusedError: Nothing accepts a connection there.
        TimeoutError: Something may, but it gave no answer.
    """
    return await (_by_socket if is_plain_loopback(url) else _by_httpx)(url, timeout_s)


def is_plain_loopback(url: str) -> bool:
    """Whether it is reached without TLS, a proxy or a network."""
    return url.startswith("http://") and is_loopback(url)


def is_loopback(url: str) -> bool:
    """Whether it is on this machine."""
    return proxies.is_loopback(urlsplit(url).hostname or "")


def http_client(url: str, timeout_s: float) -> httpx.AsyncClient:
    """A client for requests below `url`."""
    import httpx

    # Loading certificates takes 20 ms, which plain HTTP does not need; nor loopback a proxy.
    needs_certificates = not url.startswith("http://")
    return httpx.AsyncClient(
        timeout=timeout_s, verify=needs_certificates, trust_env=not is_loopback(url)
    )


async def _by_socket(url: str, timeout_s: float) -> int:
    parts = urlsplit(url)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.hostname}\r\nConnection: close\r\n\r\n"
    async with asyncio.timeout(timeout_s):
        try:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        except OSError as error:
            raise ConnectionRefusedError(str(error)) from error
        try:
            writer.write(request.encode())
            line = await reader.readline()  # HTTP/1.1 200 OK
            return int(line.split()[1])
        except (OSError, ValueError, IndexError) as error:
            raise TimeoutError("no answer") from error
        finally:
            writer.close()


async def _by_httpx(url: str, timeout_s: float) -> int:
    import httpx

    try:
        async with http_client(url, timeout_s) as http:
            return (await http.get(url)).status_code
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ConnectionRefusedError(str(error)) from error
    except httpx.HTTPError as error:
        raise TimeoutError(str(error)) from error
