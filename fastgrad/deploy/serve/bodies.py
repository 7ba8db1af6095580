"""Requests in progress: how many there are, and how many bytes their bodies have together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from fastgrad.checks import extra

with extra("serve"):
    from fastapi import HTTPException, Request
    from starlette.requests import ClientDisconnect


class Bodies:
    """Reads bodies of at most ``max_body`` bytes, for ``max_queue`` requests and ``max_held`` bytes at a time."""

    def __init__(self, max_queue: int, max_body: int, max_held: int) -> None:
        self._max_queue, self._max_body, self._max_held = max_queue, max_body, max_held
        self._active = self._held = 0

    @property
    def full(self) -> bool:
        """Whether the next request would be refused."""
        return self._active >= self._max_queue or self._held >= self._max_held

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body of a request, which is in progress inside.

        HTTPException 413 if the body is too large, 503 if there are too many, before more is read.
        """
        if self._active >= self._max_queue:
            raise HTTPException(503, "too many requests wait", {"Retry-After": "1"})
        size, body = 0, bytearray()
        self._active += 1
        try:
            # What a client says that it will send counts from the start; chunks without a length, as they arrive.
            size = self._grow(0, int(request.headers.get("content-length", 0)))
            async with aclosing(request.stream()) as stream:
                async for part in stream:
                    size = self._grow(size, len(body) + len(part))
                    body += part
            content = bytes(body)
            body.clear()
            yield content
        except ClientDisconnect:
            raise HTTPException(400, "the connection closed before the whole body came") from None
        finally:
            self._active -= 1
            self._held -= size

    def _grow(self, size: int, wanted: int) -> int:
        """Count a body of ``size`` bytes as one of ``wanted``, if that is more; return which it is."""
        if wanted > self._max_body:
            raise HTTPException(413, f"the body is too large; at most {self._max_body} bytes are allowed")
        more = max(0, wanted - size)
        if more and self._held + more > self._max_held:
            raise HTTPException(503, "the bodies of other requests fill the memory", {"Retry-After": "1"})
        self._held += more
        return size + more
