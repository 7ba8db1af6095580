"""Limits on the cost of a request, and answering requests within them."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastgrad.checks import extra, lies_in
from fastgrad.deploy.file.answer import ResultError, answer
from fastgrad.deploy.file.description import Description
from fastgrad.deploy.file.images import MAX_PIXELS
from fastgrad.deploy.serve.child import Bytes, Child, ChildDiedError, RequestError
from fastgrad.deploy.serve.pool import Pool

with extra("serve"):
    from anyio import current_time, fail_after, move_on_after
    from starlette.requests import ClientDisconnect, Request

#: Seconds that any body may take, and bytes of the largest input.
_GRACE, _MAX_INPUT = 5.0, 2**28


@dataclass(frozen=True)
class Limits:
    """Limits on the cost of requests.

    Attributes:
        body: Bytes of a request body; a larger one is answered 413.
        pixels: Pixels of an image; more are answered 413 before anything is decoded.
        queue: Requests to /predict in progress whose body has arrived; more are answered 503 with Retry-After.
        seconds: From a request's headers to its answer; then 504, or 408 if its body is still arriving. A process that
            works on one batch for longer is killed.
        memory: Bytes of all bodies and inputs together; more are answered 503.
        rate: Bytes of a body that must arrive per second after the first five seconds; else 408.
        decode_seconds: Time to read one body; then 422, and the process that reads it is killed.
        load_seconds: Time to load a model.
        connections: Open connections, fewer if open files are limited; beyond, the longest-waiting one is closed.
        header_seconds: Time for a request's headers, or the rest of a refused body; then the connection is closed.
        drain_seconds: From SIGTERM to the end of the server, even if answers are missing.
        file: Bytes of a model file; a larger one is not loaded.

    Raises:
        TypeError, ValueError: A limit is not a positive number.
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
    drain_seconds: float = 25.0
    file: int = 2**30

    def __post_init__(self) -> None:
        lies_in("(0, inf]", **vars(self))


async def read_body(request: Request, limits: Limits, hold: Callable[[int], None]) -> bytearray:
    """Read a body within the limits; ``hold`` is called with the number of bytes so far.

    RequestError 400 if the body is empty or incomplete, 408 if too slow, 413 if too large; and what ``hold`` raises.
    """
    too_large = f"the body is too large; at most {limits.body} bytes are allowed"
    if (declared := request.headers.get("content-length", "")).isdecimal() and int(declared[:20]) > limits.body:
        raise RequestError(413, too_large)
    body, start = bytearray(), current_time()
    try:
        async with aclosing(request.stream()) as stream:
            with move_on_after(min(limits.seconds, _GRACE)) as scope:
                async for part in stream:
                    body += part
                    scope.deadline = start + min(limits.seconds, _GRACE + len(body) / limits.rate)
                    if len(body) > limits.body:
                        raise RequestError(413, too_large)
                    hold(len(body))
    except ClientDisconnect:
        raise RequestError(400, "the connection closed before the whole body came") from None
    if scope.cancelled_caught:
        least = f"{limits.seconds:g} s, or came slower than {limits.rate} bytes a second"
        raise RequestError(408, f"the body did not arrive within {least}")
    if not body:
        raise RequestError(400, "the body is empty")
    return body


class Readers:
    """Answers requests within the limits. Processes turn bodies into inputs and are killed if that takes too long.

    ``active`` is the number of requests in progress whose body has arrived.
    """

    def __init__(self, count: int, limits: Limits) -> None:
        self.limits, self.active = limits, 0
        self._held: dict[Request, int] = {}
        children = [Child("fastgrad.deploy.serve.decoder", (limits.pixels,), most=_MAX_INPUT) for _ in range(count)]
        self.pool = Pool(children, hang_timeout=limits.decode_seconds, load_timeout=60.0)

    def _hold(self, request: Request, size: int) -> None:
        """Set how many bytes a request holds; RequestError 503 if all requests together would hold too many."""
        more = size - self._held.get(request, 0)
        if more > 0 and sum(self._held.values()) + more > self.limits.memory:
            raise RequestError(503, "the bodies of other requests fill the memory; try again in a moment")
        self._held[request] = size

    async def answer(
        self, request: Request, description: Description, threshold: float | None,
        run: Callable[[bytes], Awaitable[Any]],
    ) -> dict[str, Any]:  # fmt: skip
        """Return the answer to a request; ``run`` turns its input into a row.

        RequestError for a bad body, a result that is not finite, too many requests, or too much time.
        """
        limits, end = self.limits, current_time() + self.limits.seconds
        try:
            body = await read_body(request, limits, functools.partial(self._hold, request))
            if self.active >= limits.queue:
                raise RequestError(503, "too many requests are waiting; try again in a moment")
            self.active += 1
            try:
                with fail_after(end - current_time()):
                    value = await self.read(request.headers.get("content-type", ""), body, description)
                    del body
                    self._hold(request, len(value))
                    return answer(description, threshold, await run(value))
            finally:
                self.active -= 1
        except TimeoutError:
            raise RequestError(504, f"no answer within {limits.seconds:g} s") from None
        except ChildDiedError as error:
            raise RequestError(500, f"the model failed on this input: {error}") from None
        except ResultError as error:
            raise RequestError(422, str(error)) from None
        finally:
            self._held.pop(request, None)

    async def read(self, content_type: str, body: Bytes, description: Description) -> bytes:
        """Read a body as `decoder.read_input` does; RequestError 422 also if it takes too long or kills processes."""
        arguments = json.dumps((content_type, description.input_shape, description.input_dtype))
        try:
            return await self.pool.submit(arguments.encode() + b"\n", body)
        except ChildDiedError as error:
            raise RequestError(422, f"the body cannot be read: {error}") from None
