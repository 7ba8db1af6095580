"""Refuse requests by their headers alone: without the key, or sent by a page of another site."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Callable, Collection

from fastgrad.checks import extra

with extra("serve"):
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Receive, Scope, Send

#: The server's logger, which uvicorn sets up.
LOG = logging.getLogger("uvicorn.error")
#: Paths that need no key: the page, which holds no data, and those for load balancers.
OPEN = ("/", "/health", "/ready")


class Guard:
    """Requires ``key``, if given, as ``Authorization: Bearer KEY``, and the server's own name as ``Origin``.

    ValueError if no header can carry the key.
    """

    def __init__(self, key: str | None) -> None:
        if key is not None and not (isinstance(key, str) and re.fullmatch("[!-~]([ -~]*[!-~])?", key)):
            raise ValueError("api_key must not be empty, and of printable ASCII without spaces at its ends")
        self._digest = None if key is None else hashlib.sha256(key.encode()).digest()
        self._wrong = 0

    def middleware(self, app: ASGIApp, refused: Callable[[int], None]) -> ASGIApp:
        """Return ``app`` behind the guard: refused requests do not reach it; ``refused`` gets their status."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                try:
                    self.check(scope, OPEN)
                except HTTPException as error:
                    refused(error.status_code)
                    await JSONResponse({"detail": error.detail}, error.status_code, error.headers)(scope, receive, send)
                    return
            await app(scope, receive, send)

        return guarded

    def check(self, scope: Scope, without_key: Collection[str] = ()) -> None:
        """Check a request's headers; HTTPException 401 or 403. Paths in ``without_key`` need no key."""
        headers = Headers(scope=scope)
        # A page of another site can have a browser send requests here, which carry the page's name.
        origin, host = headers.get("origin"), headers.get("host", "").lower()
        foreign = origin is not None and origin.lower().partition("://")[2] != host
        if foreign and scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(403, "pages of other sites must not send requests here")
        if self._digest is None or scope["path"] in without_key:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Digests have one length, and compare_digest takes the same time wherever they differ.
        right = hmac.compare_digest(hashlib.sha256(given.encode()).digest(), self._digest)
        if scheme.lower() != "bearer" or not right:
            self._wrong += 1
            if self._wrong & (self._wrong - 1) == 0:  # 1, 2, 4, 8: a flood must not fill the log
                client = (scope.get("client") or ("unknown",))[0]
                LOG.warning("%d requests without the right API key so far, this one from %r", self._wrong, client)
            raise HTTPException(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
