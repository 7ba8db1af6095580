"""The processes that read bodies, and one queue before them."""

from __future__ import annotations

import asyncio
import json

from fastgrad.deploy.file.description import Description
from fastgrad.deploy.serve.child import Bytes, Child, ChildDiedError, ChildTimeoutError
from fastgrad.deploy.serve.decoder import RequestError

#: Bytes of an input.
_REPLY = 2**28
#: Seconds to start.
_START = 60.0


class Decoders:
    """Turns bodies into inputs, each in a process that is killed when it takes too long.

    Args:
        count: processes.
        pixels: of an image, at most.
        seconds: that one body may take.
    """

    def __init__(self, *, count: int, pixels: int, seconds: float) -> None:
        self._pixels, self._seconds = pixels, seconds
        self.children = [
            Child("fastgrad.deploy.serve.decoder", (), most=_REPLY, small=True) for _ in range(count)
        ]
        self._idle: asyncio.Queue[Child] = asyncio.Queue()
        self._restarting: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start them.

        Raises:
            ChildDiedError: one ended.
        """
        await asyncio.gather(*(child.start(_START) for child in self.children))
        for child in self.children:
            self._idle.put_nowait(child)

    async def read(self, content_type: str, body: Bytes, description: Description) -> bytes:
        """Read one body, as `decoder.read_input` does.

        Raises:
            RequestError: what that raises; 422 if it takes too long, or ends three processes.
        """
        arguments = (content_type, description.input_shape, description.input_dtype, self._pixels)
        head = json.dumps(arguments).encode() + b"\n"
        for last in (False, False, True):
            child = await self._idle.get()
            try:
                status, content = await child.ask((head, body), self._seconds)
            except ChildTimeoutError:
                raise RequestError(422, f"reading the body took longer than {self._seconds:g} s") from None
            except ChildDiedError:
                if last:
                    raise RequestError(422, "reading the body ended the process that did it") from None
                continue
            finally:
                self._give_back(child)
            if status:
                raise RequestError(status, content.decode("utf-8", "replace"))
            return content
        raise AssertionError

    def _give_back(self, child: Child) -> None:
        if child.alive:
            self._idle.put_nowait(child)
            return

        async def revive() -> None:
            await child.restart(_START)
            self._idle.put_nowait(child)

        task = asyncio.get_running_loop().create_task(revive())
        self._restarting.add(task)
        task.add_done_callback(self._restarting.discard)

    async def close(self) -> None:
        """End them."""
        for task in self._restarting:
            task.cancel()
        await asyncio.gather(*self._restarting, return_exceptions=True)
        await asyncio.gather(*(child.stop() for child in self.children))
