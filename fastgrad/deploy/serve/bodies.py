"""What a request may cost, and bodies that are read within it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastgrad.checks import extra
from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.serve.decoder import RequestError

with extra("serve"):
    from anyio import CancelScope, current_time
    from starlette.requests import ClientDisconnect, Request

#: A body that is too large is read on and thrown away up to here, so that the client gets to read the refusal.
_DISCARD = 256 * 2**20
#: Seconds that a body may take however small it is.
_GRACE = 5.0


@dataclass(frozen=True)
class Limits:
    """What requests may cost.

    Attributes:
        body: bytes of a request body; more is answered 413.
        pixels: of an image; more is answered 413, before anything is decoded.
        queue: requests to /predict in progress at once whose body is there; more are answered 503 with Retry-After.
        seconds: from the first byte of a request to its answer; then 504, and what works on it is ended.
        memory: bytes of all bodies and inputs together; more are answered 503.
        rate: bytes a second that a body must bring, after the first five seconds; else 408.
        decode_seconds: to read one body; then 422, and the process that does it is ended.
        load_seconds: to load a model.
        connections: open at once; of more, the one is closed that has waited longest for a request to come.
        header_seconds: in which a request's headers must have come; then the connection is closed.
    """

    body: int = 16 * 2**20
    pixels: int = MAX_PIXELS
    queue: int = 256
    seconds: float = 30.0
    memory: int = 48 * 2**20
    rate: int = 16 * 2**10
    decode_seconds: float = 5.0
    load_seconds: float = 300.0
    connections: int = 512
    header_seconds: float = 10.0


class Budget:
    """Bytes that all requests together hold."""

    def __init__(self, total: int) -> None:
        self.total, self.used = total, 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """For one request; gives a function to say how many bytes it holds now.

        Raises:
            RequestError: 503, they would be too many.
        """
        own = 0

        def resize(size: int) -> None:
            nonlocal own
            if size > own and self.used + size - own > self.total:
                raise RequestError(503, "the bodies of other requests fill the memory; try again in a moment")
            self.used += size - own
            own = size

        try:
            yield resize
        finally:
            self.used -= own


async def read_body(
    request: Request, limits: Limits, hold: Callable[[int], None], scope: CancelScope
) -> bytearray:
    """Read a body.

    Args:
        request: whose.
        limits: it keeps to ``body``, ``rate`` and ``seconds``.
        hold: told how many bytes there are.
        scope: of the whole request; its deadline moves to when the next bytes must have come, at last to its end.

    Raises:
        RequestError: 400 empty or broken off, 413 too large, 503 too many at once.
    """
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared[:20]) > limits.body
    body, size, start = bytearray(), 0, current_time()
    scope.deadline = start + min(limits.seconds, _GRACE)
    try:
        async for part in request.stream():
            size += len(part)
            scope.deadline = start + min(limits.seconds, _GRACE + size / limits.rate)
            too_large = too_large or size > limits.body
            if too_large:
                body.clear()
                if size > _DISCARD:
                    break
            else:
                hold(size)
                body += part
    except ClientDisconnect:
        raise RequestError(400, "the connection closed before the whole body came") from None
    if too_large:
        raise RequestError(413, f"the body is too large; at most {limits.body} bytes are allowed")
    if not size:
        raise RequestError(400, "the body is empty")
    scope.deadline = start + limits.seconds
    return body
