"""HTTP requests to an untrusted server, with a deadline and a size limit for everything that it sends.

Status lines, headers, chunk sizes, trailers and TLS records count like the body, because all received bytes pass
through a socket that checks the deadline and counts bytes. The server's address is checked when connecting, so that
neither a name nor a redirect leads to the cloud's metadata service or into a private network.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

from appo_jax.errors import ConfigError
from appo_jax.output import harmless

MAX_BYTES = 4 << 20  # of everything that is received
MAX_WAIT = 3600.0  # the longest wait in seconds that a server may ask for
MAX_SHOWN = 200  # characters of what a server says about an error

# Private networks that `ipaddress` does not know or counts as public.
_REFUSED = [
    ipaddress.ip_network(text)
    for text in (
        "192.0.0.0/24",  # protocol assignments: NAT64 discovery, DS-Lite
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's metadata and DNS
        "64:ff9b:1::/48",  # NAT64 of a local network
        "fec0::/10",  # site-local
        "5f00::/16",  # segment routing
        "3fff::/20", "2001:db8::/32",  # documentation
    )
]  # fmt: skip
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


class Fault(Exception):
    """A request that failed. `kind` is counted in the metrics; `retry` says whether another attempt may help.

    Its text never holds `said`, the server's words: a tool's faults are results, and the server must not write to the policy."""

    def __init__(self, kind: str, detail: str, retry: bool, wait: float = 0.0, said: str = ""):
        super().__init__(detail)
        self.kind = kind
        self.retry = retry
        self.wait = wait  # seconds the server asks for
        self.said = said  # the beginning of the body of an error's answer, on one line


def split_url(field: str, url: str) -> SplitResult:
    """The parts of an HTTP address in a field of the config. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:  # the port is read here
            return parts
        problem = ""
    except ValueError as error:
        problem = f" ({error})"
    raise ConfigError(f"{field} = {url!r}: expected http://host:port/path or https://…{problem}")


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    deadline: float,
    allow_private: bool,
    section: str = "tools.search",
) -> bytes:
    """POST, and read the whole answer before `deadline` (time.monotonic). No redirects, no proxies. Raises Fault.

    `section`: the part of the config that has `url` and `allow_private`, for messages."""
    parts = urlsplit(url)
    connection = _connection(parts.scheme, str(parts.hostname), parts.port, deadline, allow_private, section)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", target, body, dict(headers))
        response = connection.getresponse()
        if response.status != 200:
            passing = response.status == 429 or response.status >= 500
            detail = f"the server answered with status {response.status}"
            wait = _seconds(response.headers.get("Retry-After", ""))
            raise Fault(f"status_{response.status}", detail, passing, wait, _said(response))
        return response.read()
    except TimeoutError:
        raise Fault("timeout", "the server did not answer in time", retry=False) from None
    except _TooLarge:
        raise Fault("too_large", f"the server's answer is larger than {MAX_BYTES >> 20} MB", retry=False) from None
    except (http.client.IncompleteRead, http.client.RemoteDisconnected):
        raise Fault("cut_off", "the server's answer ended too early", retry=True) from None
    except (http.client.HTTPException, ValueError):
        raise Fault("garbage", "the server does not speak HTTP", retry=True) from None
    except OSError as error:
        raise Fault("connection", f"no connection to the server ({error})", retry=True) from None
    finally:
        connection.close()


def addresses(
    host: str, port: int, allow_private: bool, deadline: float | None = None, section: str = "tools.search"
) -> Sequence[tuple[str, int]]:
    """The host's addresses. Raises ConfigError if one of them is not public and `allow_private` is False, OSError if there is
    none, and TimeoutError if the name is not resolved before `deadline`."""
    found = [info[4] for info in _resolve(host, port, deadline)]
    if not allow_private:
        for address in found:
            if not is_public(str(address[0])):
                raise ConfigError(
                    f"{section}.url: {host} is at {address[0]}, which is not a public address; if that is meant, "
                    f"give --{section}.allow-private"
                )
    return [(str(address[0]), int(address[1])) for address in found]


def is_public(address: str) -> bool:
    """Whether an address, and each IPv4 address that it contains, is a public address of the Internet."""
    return all(
        ip.is_global
        and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)
        and not any(ip.version == network.version and ip in network for network in _REFUSED)
        for ip in _carried(ipaddress.ip_address(address.partition("%")[0]))
    )


def _carried(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses at which packets to `ip` may arrive: for a transition address, the IPv4 addresses that it
    contains."""
    low = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if isinstance(ip, ipaddress.IPv4Address):
        yield ip
    elif ip.ipv4_mapped is not None:
        yield ip.ipv4_mapped
    elif ip in _NAT64:
        yield low
    elif ip.sixtofour is not None:
        yield ip.sixtofour
    elif ip.teredo is not None:
        yield from ip.teredo
    elif ip in _COMPATIBLE and int(ip) > 1:
        yield low
    else:
        yield ip


def _resolve(host: str, port: int, deadline: float | None) -> list[Any]:
    """`getaddrinfo`, which has no time limit, in a thread that is abandoned at the deadline."""
    answer: list[Any] = []

    def resolve() -> None:
        try:
            answer.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    if deadline is None or _literal(host):
        resolve()
    else:
        thread = threading.Thread(target=resolve, name="resolve", daemon=True)
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
    if not answer:
        raise TimeoutError(f"the name {host} was not resolved in time")
    if isinstance(answer[0], Exception):
        raise OSError(f"the name {host} cannot be resolved ({answer[0]})") from answer[0]
    return answer[0]


def _literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _seconds(text: str) -> float:
    """The seconds in `Retry-After`; 0 if it is not a plain number."""
    return min(float(text), MAX_WAIT) if re.fullmatch(r"[0-9]{1,9}", text.strip()) else 0.0


def _said(response: http.client.HTTPResponse) -> str:
    """The beginning of an error's body, on one line. What arrives first is enough: a slow body must not use up the time limit."""
    try:
        body = response.read1(4 * MAX_SHOWN)
    except (OSError, http.client.HTTPException, ValueError, _TooLarge):
        return ""
    return harmless(" ".join(body.decode(errors="replace").split())[:MAX_SHOWN])


def _connected(places: Sequence[tuple[str, int]], deadline: float) -> socket.socket:
    """A connection to the first address that accepts one; each has an equal share of the time that is left. Raises OSError."""
    for waiting in range(len(places), 0, -1):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            return socket.create_connection(places[-waiting], left / waiting)
        except OSError:
            if waiting == 1:
                raise
    raise TimeoutError


class _TooLarge(Exception):
    """The answer is larger than allowed."""


class _Bounded:
    """A mixin for sockets: counts every received byte, and checks the deadline."""

    deadline: float
    received = 0

    def recv_into(self, *arguments: Any, **named: Any) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)  # type: ignore[attr-defined]
        count = super().recv_into(*arguments, **named)  # type: ignore[misc]
        self.received += count
        if self.received > MAX_BYTES:
            raise _TooLarge
        return count


class _BoundedSocket(_Bounded, socket.socket):
    pass


class _BoundedTls(_Bounded, ssl.SSLSocket):
    pass


def _connection(
    scheme: str, host: str, port: int | None, deadline: float, allow_private: bool, section: str
) -> http.client.HTTPConnection:
    timeout = max(0.01, deadline - time.monotonic())
    name = f"[{host}]" if ":" in host else host
    connection: http.client.HTTPConnection
    if scheme == "https":
        context = ssl.create_default_context()
        context.sslsocket_class = type("_", (_BoundedTls,), {"deadline": deadline})
        connection = http.client.HTTPSConnection(name, port or 443, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(name, port or 80, timeout=timeout)

    def checked(address: tuple[str, int], *_: Any) -> socket.socket:
        try:
            allowed = addresses(*address, allow_private, deadline, section)
        except ConfigError as error:
            raise Fault("refused", str(error), retry=False) from None
        plain = _connected(allowed, deadline)
        bounded = _BoundedSocket(plain.family, plain.type, plain.proto, plain.detach())
        bounded.deadline = deadline
        bounded.settimeout(max(0.01, deadline - time.monotonic()))
        return bounded

    connection._create_connection = checked  # type: ignore[attr-defined]
    return connection
