"""Slow: the configuration of nginx that the documentation prints, in front of a server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from serve_client import Server, image, running, wait_for

NGINX, OPENSSL = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"), shutil.which("openssl")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(None in (NGINX, OPENSSL), reason="needs nginx and openssl")]
PAGE = Path(__file__).parents[3] / "docs/how-to/file-and-server.md"


class Proxied(NamedTuple):
    server: Server
    port: int
    trusted: ssl.SSLContext

    def connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        return self.trusted.wrap_socket(plain, server_hostname="models.example")

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.trusted)
        connection.sock = self.connect()
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Host": "models.example", **headers})
            response = connection.getresponse()
            return response.status, response.read()

    def predict(self, body: bytes, **headers: str) -> tuple[int, bytes]:
        return self.request("POST", "/predict", body, **{"Content-Type": "image/png", **headers})


@pytest.fixture(scope="module")
def proxied(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """The page's configuration, with this test's ports, folders and certificate."""
    folder = tmp_path_factory.mktemp("nginx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    subprocess.run(
        [str(OPENSSL), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=models.example",
         "-addext", "subjectAltName=DNS:models.example", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    (text,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    with running(tiny_onnx, "--allowed-host", "models.example", env={"FASTGRAD_API_KEY": "secret"}) as server:
        changes = {
            "/etc/fastgrad/cert.pem": str(folder / "cert.pem"), "/etc/fastgrad/key.pem": str(folder / "key.pem"),
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl", "127.0.0.1:8000": f"127.0.0.1:{server.port}",
            # Of one address, like the clients of this test.
            "limit_conn per_client 20": "limit_conn per_client 1000",
        }  # fmt: skip
        for given, own in changes.items():
            assert given in text
            text = text.replace(given, own)
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            text = text.replace("http {", f"http {{\n    {kind}_temp_path {folder}/{kind};", 1)
        # A worker of another user could not enter this test's folder.
        user = "user root;" if os.getuid() == 0 else ""
        (folder / "nginx.conf").write_text(f"{user} pid {folder}/pid; error_log {folder}/error.log;\n{text}")
        command = [str(NGINX), "-c", str(folder / "nginx.conf"), "-p", str(folder), "-g", "daemon off;"]
        nginx = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = Proxied(server, port, ssl.create_default_context(cafile=str(folder / "cert.pem")))
        try:
            wait_for(lambda: _answers(found) or nginx.poll() is not None)
            assert nginx.poll() is None, (folder / "error.log").read_text()
            yield found
        finally:
            nginx.terminate()
            nginx.wait(30)


def _answers(proxied: Proxied) -> bool:
    with contextlib.suppress(OSError):
        return proxied.request("GET", "/health")[0] == 200
    return False


RIGHT = {"Authorization": "Bearer secret"}


def test_encrypted_requests(proxied: Proxied) -> None:
    status, body = proxied.predict(image(), **RIGHT)
    assert status == 200
    assert json.loads(body)["label"] in ("cat", "dog", "cow", "hen")
    assert proxied.predict(image())[0] == 401
    assert proxied.request("GET", "/")[0] == 200
    # The page's own requests, and those of another site.
    assert proxied.predict(image(), Origin="https://models.example", **RIGHT)[0] == 200
    assert proxied.predict(image(), Origin="https://evil.example", **RIGHT)[0] == 403
    assert proxied.predict(bytes(17 * 2**20), **RIGHT)[0] == 413
    assert proxied.predict(bytes(15 * 2**20), **RIGHT)[0] == 400
    # What the client says of its address does not reach the log.
    assert proxied.predict(image(), **{"X-Forwarded-For": "6.6.6.6\x1b"})[0] == 401
    assert "6.6.6.6" not in proxied.server.log


def test_slow_and_idle_clients_reach_no_server(proxied: Proxied) -> None:
    """600 idle connections, 100 slow headers and 100 slow bodies: the server has none of them, and answers others."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(proxied.connect()) for _ in range(600)]
        slow = [stack.enter_context(proxied.connect()) for _ in range(200)]
        head = b"POST /predict HTTP/1.1\r\nHost: models.example\r\nAuthorization: Bearer secret\r\n"
        for number, connection in enumerate(slow):
            whole = b"Content-Type: image/png\r\nContent-Length: 1000000\r\n\r\n" + bytes(1000) if number % 2 else b""
            connection.sendall(head + whole)
        slowest = 0.0
        for seed in range(40):
            start = time.perf_counter()
            assert proxied.predict(image(seed), **RIGHT)[0] == 200
            slowest = max(slowest, time.perf_counter() - start)
            for connection in slow:
                with contextlib.suppress(OSError):  # nginx has had enough
                    connection.sendall(b"x")
            assert proxied.server.request("GET", "/ready")[0] == 200
        connections = _connections(proxied.server)
        print(f"{len(idle)} idle, {len(slow)} slow; a request at most {slowest:.2f} s; the server has {connections}")
        assert connections < 20
        assert slowest < 5


def _connections(server: Server) -> int:
    """Established connections to the server's port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(own.endswith(f":{server.port:04X}") and state == "01" for _, own, _, state, *_ in fields)
