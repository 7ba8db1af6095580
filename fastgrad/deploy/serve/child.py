"""A process that answers framed requests, one at a time, and is killed if it takes too long.

Only lengths and bytes cross the pipes, nothing that could be code. The process gets neither the server's secrets nor
its open files, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import struct
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from anyio import fail_after, move_on_after

Bytes = bytes | bytearray | memoryview
#: The server's logger, which ``fastgrad serve`` sets up.
LOG = logging.getLogger("uvicorn.error")
#: Head of a reply: a status (0 for success) and the number of bytes that follow.
REPLY = struct.Struct("<HQ")
#: Status of a failure whose reason goes to the server's log, not to the client.
_FAILED = 500
REQUEST = struct.Struct("<Q")
#: Bytes that are written at once.
_CHUNK = 2**18
#: Environment variables that a child inherits: paths, and settings of compute libraries by prefix. Others are secret.
_PLACES = {"PATH", "PATHEXT", "HOME", "HOMEDRIVE", "HOMEPATH", "LANG", "TZ", "TMP", "TMPDIR", "TEMP", "SYSTEMROOT"}
_SETTINGS = (
    "LC_", "LD_", "DYLD_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "TORCH_",
    "TORCHDYNAMO_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "MIOPEN_",
)  # fmt: skip
_PACKAGE = str(Path(__file__).parents[2])
# Isolated (-I), so that no file in the working folder shadows a module; then the server's own path. The package's
# __init__ is skipped because it imports PyTorch, which not every child needs.
_START = """
import json, sys, types
path, package, module, arguments = json.loads(sys.argv[1])
sys.path[:] = path
sys.modules["fastgrad"] = types.ModuleType("fastgrad")
sys.modules["fastgrad"].__path__ = [package]
from fastgrad.deploy.serve.child import answer_requests
answer_requests(module, arguments)
"""


class RequestError(Exception):
    """A request that cannot be answered: the HTTP status, and the reason for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ChildError(RuntimeError):
    """The process failed."""


class ChildDiedError(ChildError):
    """The process ended, or took too long and was killed."""


class ChildTimeoutError(ChildDiedError):
    """The process took too long."""


class Child:
    """One process, which answers with the function that a module's ``start(*arguments)`` returns, in ``most`` bytes.

    The arguments must fit JSON. ``alive`` says whether the process has started and can be asked; ``on_end`` is called
    when it ends for any reason. Its temporary files lie in ``folder`` and are removed when it has ended; None means the
    system's folder for such files.
    """

    def __init__(self, module: str, arguments: Sequence[object], *, most: int, folder: Path | None = None) -> None:
        self._start = json.dumps([sys.path, _PACKAGE, module, arguments], default=int)  # a limit may be NumPy's
        self._most, self._folder = most, folder
        self._own: str | None = None
        self.process: Process | None = None
        self.alive = False
        self.on_end: Callable[[], None] = lambda: None

    async def start(self, seconds: float) -> None:
        """Start the process; ChildError if it fails, ends, or does not reply in time."""
        environment = {k: v for k, v in os.environ.items() if k in _PLACES or k.startswith(_SETTINGS)}
        if self._folder is not None:
            self._own = tempfile.mkdtemp(dir=self._folder)
            environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), self._own)
        try:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-c", _START, self._start, stdin=PIPE, stdout=PIPE, stderr=None,
                env=environment, start_new_session=True, limit=2**20,
            )  # fmt: skip
        except NotImplementedError:
            loop = type(asyncio.get_running_loop()).__name__
            raise ChildError(f"the event loop {loop} starts no processes; on Windows ProactorEventLoop does") from None
        self._end = asyncio.ensure_future(self.process.wait())
        self._end.add_done_callback(self._ended)
        await self.ask((), seconds)
        self.alive = True

    def _ended(self, end: asyncio.Future[int]) -> None:
        if end is self._end:
            self.alive = False
            self.on_end()

    async def restart(self, seconds: float) -> None:
        """Restart the process; try until it can be asked."""
        while True:
            await self.stop(0.0)
            try:
                return await self.start(seconds)
            except (ChildError, OSError) as error:
                LOG.warning("a process cannot be started: %s; it is tried again", error)
            await asyncio.sleep(1)  # memory may be short for a moment

    async def ask(self, parts: Sequence[Bytes], seconds: float) -> bytes:
        """Send the parts, if any, as one request; return the reply.

        RequestError if the process refuses the request, ChildError if it fails, ChildDiedError if it ends or does not
        answer in time. In the last case, or if this call is cancelled, it is killed.
        """
        process = self.process
        if process is None or process.stdin is None or process.stdout is None or (parts and not self.alive):
            raise ChildDiedError("its process is not there")
        try:
            with fail_after(seconds):
                whole = [REQUEST.pack(sum(map(len, parts))), *parts] if parts else []
                if sum(map(len, whole)) <= _CHUNK:
                    # As one write, which wakes the other side only once.
                    whole = [b"".join(whole)]
                for part in whole:
                    for start in range(0, len(part), _CHUNK):
                        process.stdin.write(memoryview(part)[start : start + _CHUNK])
                        await process.stdin.drain()
                status, length = REPLY.unpack(await process.stdout.readexactly(REPLY.size))
                if length > self._most:
                    raise ChildDiedError("its reply is too long")
                reply = await process.stdout.readexactly(length)
        except BaseException as error:
            self.kill()
            if isinstance(error, TimeoutError):
                raise ChildTimeoutError(f"no answer within {seconds:g} s") from None
            if isinstance(error, EOFError | OSError):
                raise ChildDiedError("its process ended") from None
            raise
        if status:
            reason = reply.decode("utf-8", "replace")
            raise ChildError(reason) if status == _FAILED else RequestError(status, reason)
        return reply

    def kill(self) -> None:
        """Kill the process, whatever it is doing."""
        self.alive = False
        # `Process.kill` may take the exit status before asyncio's own thread. Windows ends a process by any signal, and
        # denies access to one that has just ended.
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    async def stop(self, patience: float = 1.0) -> None:
        """Let the process end, kill it after ``patience`` seconds, and wait until it is gone."""
        self.alive = False
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            with move_on_after(patience):
                await self.process.wait()
            self.kill()
            await self.process.wait()
        if self._own is not None:
            await asyncio.to_thread(shutil.rmtree, self._own, ignore_errors=True)


def ignore_signals(*names: str) -> None:
    """Ignore the named signals, as far as the system has them."""
    for name in names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def answer_requests(module: str, arguments: Sequence[object]) -> None:
    """Run in a child: reply when the module's ``start`` has returned a function, then answer requests with it."""
    # A service manager may signal all processes at a stop, but only the server decides when these end.
    ignore_signals("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # anything printed goes to standard error
    answer: Callable[[bytearray], Bytes] | None = None
    request = bytearray()
    while True:
        status = 0
        content: Bytes = b""
        try:
            if answer is None:
                answer = import_module(module).start(*arguments)
            else:
                content = answer(request)
        except RequestError as error:
            status, content = error.status, str(error).encode("utf-8", "replace")
        except Exception as error:
            status, content = _FAILED, str(error).encode("utf-8", "replace")
        replies.write(REPLY.pack(status, len(content)))
        replies.write(content)
        replies.flush()
        head = b"" if answer is None else requests.read(REQUEST.size)
        if len(head) < REQUEST.size:
            return
        request = bytearray(REQUEST.unpack(head)[0])
        if requests.readinto(request) < len(request):  # type: ignore[union-attr]
            return
