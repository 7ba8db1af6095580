"""Refuse requests by their headers alone: host, origin, key and encoding."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Collection

from fastgrad.checks import extra
from fastgrad.deploy.serve.child import LOG, RequestError

with extra("serve"):
    from starlette.datastructures import Headers
    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Receive, Scope, Send

#: Paths that need no key: the page, which holds no data, and those for load balancers.
OPEN = ("/", "/health", "/ready")
#: Seconds between two lines of the log about refused keys.
_QUIET = 10.0
_PORT = re.compile(r":\d*$")
#: A name or an address, with or without a port.
_HOST = re.compile(r"[\w.%:\[\]-]+", re.ASCII)


def refusal(error: RequestError) -> JSONResponse:
    """Return the response that says why a request is refused."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse({"detail": str(error)}, error.status, headers)


class Guard:
    """Refuses requests by their headers, before anything else is read.

    A page of another site can make a browser send requests here. They carry its name in ``Origin``, or in ``Host`` if
    it lets its own name point here. IP addresses always pass.

    If ``key`` is given, requests must carry it as ``Authorization: Bearer KEY``; they may name ``hosts`` or
    ``localhost``. ValueError if no header can carry the key, or if ``hosts`` is not a list of names.
    """

    def __init__(self, key: str | None, hosts: Collection[str]) -> None:
        if key is not None and not (isinstance(key, str) and re.fullmatch("[!-~]([ -~]*[!-~])?", key)):
            raise ValueError("api_key must not be empty, and of printable ASCII without spaces at its ends")
        # A URL or a pattern would fit no request.
        if isinstance(hosts, str) or not all(isinstance(host, str) and _HOST.fullmatch(host) for host in hosts):
            raise ValueError(f"allowed_hosts must be a list of names such as example.com, in ASCII; it was {hosts!r}")
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()
        self._hosts = {"localhost", *(_PORT.sub("", host.lower()) for host in hosts)}
        self._wrong, self._quiet_until = 0, 0.0

    def middleware(self, app: ASGIApp, refused: Callable[[int], None]) -> ASGIApp:
        """Return ``app`` behind the guard: refused requests do not reach it; ``refused`` gets their status."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                try:
                    self.check(scope, OPEN)
                except RequestError as error:
                    refused(error.status)
                    await refusal(error)(scope, receive, send)
                    return
            await app(scope, receive, send)

        return guarded

    def check(self, scope: Scope, without_key: Collection[str] = ()) -> None:
        """Check a request's headers; RequestError 400, 401, 403 or 411. Paths in ``without_key`` need no key."""
        headers = Headers(scope=scope)
        if "transfer-encoding" in headers:
            raise RequestError(411, "send the body with its Content-Length alone; there was a Transfer-Encoding")
        host = headers.get("host", "localhost").lower()
        name = _PORT.sub("", host)
        if name not in self._hosts and address_of(name) is None:
            raise RequestError(400, "the server does not answer under this Host; name it with --allowed-host")
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and origin.lower().partition("://")[2] != host:
            raise RequestError(403, "pages of other sites must not send requests here")
        if self._digest is None or scope["path"] in without_key:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Digests have one length, and compare_digest takes the same time wherever they differ.
        right = hmac.compare_digest(hashlib.sha256(given.encode()).digest(), self._digest)
        if scheme.lower() != "bearer" or not right:
            self._log_wrong_key(scope)
            raise RequestError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    def _log_wrong_key(self, scope: Scope) -> None:
        self._wrong += 1
        if time.monotonic() >= self._quiet_until:
            client = (scope.get("client") or ("unknown",))[0]
            requests = "1 request" if self._wrong == 1 else f"{self._wrong} requests"
            LOG.warning("%s without the right API key, the last from %s", requests, client)
            self._wrong, self._quiet_until = 0, time.monotonic() + _QUIET


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return ``host`` as an IP address; None if it is a name."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    return None
