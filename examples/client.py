"""Start ``fastgrad serve`` on a model file and ask it about one image."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from PIL import Image
from small_model import digits, export


def ask(address: str, image: bytes) -> dict[str, object]:
    """Post a PNG file; return the answer."""
    request = urllib.request.Request(f"{address}/predict", image, {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer: dict[str, object] = json.load(reply)
    return answer


def main() -> None:
    """Export, serve, ask, stop."""
    pixels = (digits()[0][1700] * 255).byte().permute(1, 2, 0).numpy()
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        path = export(Path(folder) / "model.pt2")
        command = [sys.executable, "-m", "fastgrad", "serve", str(path), "--port", "0", "--threads", "1"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert server.stdout is not None
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            print(json.dumps(ask(address, png.getvalue()), indent=2))
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
