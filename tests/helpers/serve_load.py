"""Load on a server whose every answer is checked."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path

import numpy as np
from serve_client import Server, image

from fastgrad.deploy.file.images import decode_image
from fastgrad.deploy.file.package import ModelPackage


class Load:
    """Connections that send numbered images, each ``pause`` seconds after an answer, and check what they are told."""

    def __init__(self, server: Server, package: Path, *, keep: bool = True, pause: float = 0.0) -> None:
        self.server, self.keep, self.pause = server, keep, pause
        model = ModelPackage(package)
        self.contents = [image(i, (8 + i % 5, 9)) for i in range(40)]
        inputs = [decode_image(content, model.description) for content in self.contents]
        self.expected = [float(model(x[None]).uncertainty) for x in inputs]
        assert len({round(value, 6) for value in self.expected}) == 40  # a swap would show
        self.lock = threading.Lock()
        self.right = self.wrong = self.unavailable = self.lost = self.cut = self.refused = 0
        self.stop = threading.Event()

    def client(self, number: int, requests: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        for i in range(requests):
            if self.stop.wait(self.pause):
                break
            index = (number * 7919 + i) % len(self.contents)
            made = sent = False
            try:
                if connection.sock is None:
                    connection.connect()
                made = True
                connection.request("POST", "/predict", self.contents[index], {"Content-Type": "image/png"})
                sent = True
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                with self.lock:
                    # An answer that began and broke off; no answer at all on a connection that was made; no connection.
                    if sent and not isinstance(error, (http.client.RemoteDisconnected, ConnectionResetError)):
                        self.lost += 1
                    elif made:
                        self.cut += 1
                    else:
                        self.refused += 1
                if isinstance(error, ConnectionRefusedError):
                    break
                continue
            if not self.keep:
                connection.close()
            with self.lock:
                if response.status == 503:
                    self.unavailable += 1
                elif response.status == 200 and np.isclose(
                    json.loads(content)["uncertainty"], self.expected[index], rtol=1e-5, atol=1e-5
                ):
                    self.right += 1
                else:
                    self.wrong += 1
        connection.close()

    def counts(self) -> str:
        """In words."""
        return (
            f"{self.right} right, {self.wrong} wrong or swapped, {self.lost} lost, {self.cut} cut, "
            f"{self.refused} turned away, {self.unavailable} told 503"
        )

    def start(self, connections: int, requests: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=self.client, args=(i, requests)) for i in range(connections)]
        for thread in threads:
            thread.start()
        return threads
