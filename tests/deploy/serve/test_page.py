"""The page in a real browser: drop an image, read the answer."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deploy_models import TinyTwoStage
from onnx_needed import WARNINGS, skip_without_onnx
from serve_client import Server, image, running

from fastgrad.deploy.file.export import export

webdriver = pytest.importorskip("selenium.webdriver")
skip_without_onnx()
pytestmark = WARNINGS
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs Chromium and chromedriver", allow_module_level=True)


@pytest.fixture(scope="module")
def server(servers: dict[str, tuple[Server, Path]]) -> Server:
    """Of one kind: the page knows answers alone."""
    return servers["pt2"][0]


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose file gives no evidence."""
    x, file = torch.zeros(1, 3, 8, 8), tmp_path_factory.mktemp("silent") / "m.onnx"
    with running(export(TinyTwoStage(), x, file, mean=[0.5] * 3, std=[0.25] * 3)) as started:
        yield started


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    switches = (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "disable-sync",
        "disable-background-networking", "disable-component-update", "window-size=1000,800",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    )  # fmt: skip
    for switch in switches:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(10)
    yield driver
    driver.quit()


def wait_for(browser: Any, part: str) -> None:
    """Wait until the page shows the part of this id."""
    from selenium.webdriver.support.ui import WebDriverWait

    script = f"return !document.getElementById('{part}').hidden"
    WebDriverWait(browser, 10).until(lambda driver: driver.execute_script(script))


DROP = """
const data = new DataTransfer();
const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
data.items.add(new File([bytes], "a.png", {type: "image/png"}));
const event = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
document.getElementById("drop").dispatchEvent(event);
"""


def drop(browser: Any, content: bytes) -> None:
    browser.execute_script(DROP, base64.b64encode(content).decode())


def ask(browser: Any, server: Server, content: bytes) -> None:
    """Open the page, drop an image and wait for the answer."""
    browser.get(f"http://127.0.0.1:{server.port}/")
    drop(browser, content)
    wait_for(browser, "result")


def test_dropped_image(server: Server, browser: Any) -> None:
    browser.get(f"http://127.0.0.1:{server.port}/")
    content = image(5, (64, 64))
    drop(browser, content)
    wait_for(browser, "result")
    _, answer = server.predict(content, "image/png")
    assert browser.find_element("id", "class").text == answer["label"]
    verdict = browser.find_element("id", "verdict").text
    assert ("Do not rely" in verdict) == (not answer["reliable"])
    assert f"{answer['uncertainty']:.2f}" in browser.find_element("id", "where").text
    assert "known-good image" in browser.find_element("id", "where").text
    assert len(browser.find_elements("css selector", "#chart rect")) == 40
    assert browser.find_element("id", "marker").get_attribute("x1")


def test_chosen_file_and_unreadable_one(server: Server, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image(1, (30, 20), "JPEG"))
    (tmp_path / "b.jpg").write_bytes(b"this is not an image")
    browser.get(f"http://127.0.0.1:{server.port}/")
    browser.find_element("id", "file").send_keys(str(tmp_path / "a.jpg"))
    wait_for(browser, "result")
    browser.find_element("id", "file").send_keys(str(tmp_path / "b.jpg"))
    wait_for(browser, "error")
    assert "cannot be read" in browser.find_element("id", "error").text
    assert not browser.find_element("id", "result").is_displayed()


def odd_one(server: Server) -> tuple[bytes, dict[str, Any]]:
    """An image that raises an alarm, and the answer to it."""
    for seed in range(200):
        content = image(seed, (8, 8))
        _, answer = server.predict(content, "image/png")
        if answer["reliable"] is False:
            return content, answer
    raise AssertionError("no image raised an alarm")


def test_alarm_names_its_reasons(server: Server, browser: Any) -> None:
    content, answer = odd_one(server)
    ask(browser, server, content)
    assert browser.find_element("id", "verdict").text.endswith("Do not rely on this answer")
    parts = sorted(answer["evidence"].items(), key=lambda part: -part[1])
    total = sum(value for _, value in parts)
    rows = [row.text.splitlines() for row in browser.find_elements("css selector", "#evidence li")]
    assert rows == [[TinyTwoStage.alarms[name], f"{int(100 * value / total + 0.5)} %"] for name, value in parts]
    named = [TinyTwoStage.alarms[name] for name, _ in parts]
    named = named[:1] if parts[0][1] >= 2 / 3 * total else named
    assert browser.find_element("id", "why").text == f"Mostly because: {'; '.join(named)}."


def test_no_reasons_without_alarm(server: Server, silent: Server, browser: Any) -> None:
    usual = next(
        other
        for other in (image(seed, (64, 64)) for seed in range(200))
        if server.predict(other, "image/png")[1]["reliable"]
    )
    for asked, sent in ((silent, odd_one(silent)[0]), (server, usual)):
        ask(browser, asked, sent)
        assert browser.find_element("id", "why").text == ""
        assert not browser.find_element("id", "reasons").is_displayed()


def test_screen_reader(server: Server, browser: Any) -> None:
    content, answer = odd_one(server)
    browser.get(f"http://127.0.0.1:{server.port}/")
    assert browser.find_element("id", "file").accessible_name == "Drop an image here, or choose one"
    drop(browser, content)
    wait_for(browser, "result")
    chart = browser.find_element("id", "chart")
    assert chart.aria_role in ("img", "image")
    assert f"limit {json.loads(server.request('GET', '/model')[1])['threshold']:.2f}" in chart.accessible_name
    assert browser.find_element("id", "where").text in chart.accessible_name
    spoken = browser.find_element("css selector", "[role=status]").text
    for part in (answer["label"], "Do not rely", "Mostly because", f"{answer['uncertainty']:.2f}"):
        assert part in spoken
    for id_ in ("bars", "evidence"):
        (listed,) = browser.find_elements("id", id_)
        assert listed.aria_role == "list"
        assert all(row.text for row in listed.find_elements("css selector", "li"))


def test_narrow_and_dark_without_errors(server: Server, browser: Any) -> None:
    browser.set_window_size(420, 900)
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get_log("browser")
    ask(browser, server, image(7, (20, 60)))
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.execute_script("console.error('the last message')")
    (message,) = [entry["message"] for entry in browser.get_log("browser")]
    assert "the last message" in message
