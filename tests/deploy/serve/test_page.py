"""The page in a real browser: drop an image, read the answer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deploy.serve.client import Server, image, running

webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("fastapi")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs Chromium and chromedriver", allow_module_level=True)

# Set to a folder to keep what the browser showed.
SCREENSHOTS = os.environ.get("FASTGRAD_SCREENSHOTS")


@pytest.fixture(scope="module")
def server(tiny_package: Path) -> Iterator[Server]:
    with running(tiny_package) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1000,800",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.implicitly_wait(10)
    yield driver
    driver.quit()


def keep(browser: Any, name: str) -> None:
    if SCREENSHOTS:
        browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))


def wait_until(browser: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda driver: driver.execute_script(f"return {script}"))


DROP = """
const data = new DataTransfer();
const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
data.items.add(new File([bytes], "a.png", {type: "image/png"}));
const event = new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
document.getElementById("drop").dispatchEvent(event);
"""


def drop(browser: Any, content: bytes) -> None:
    import base64

    browser.execute_script(DROP, base64.b64encode(content).decode())


def test_a_dropped_image_is_answered(server: Server, browser: Any) -> None:
    browser.get(f"http://127.0.0.1:{server.port}/")
    keep(browser, "start")
    content = image(5, (64, 64))
    drop(browser, content)
    wait_until(browser, "!document.getElementById('result').hidden")
    _, answer = server.predict(content, "image/png")
    assert browser.find_element("id", "class").text == answer["label"]
    verdict = browser.find_element("id", "verdict").text
    assert ("Do not rely" in verdict) == (not answer["reliable"])
    assert f"{answer['uncertainty']:.2f}" in browser.find_element("id", "where").text
    assert "known-good image" in browser.find_element("id", "where").text
    assert len(browser.find_elements("css selector", "#chart rect")) == 40
    assert browser.find_element("id", "marker").get_attribute("x1")
    keep(browser, "answer")


def test_a_chosen_file_and_an_unreadable_one(server: Server, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image(1, (30, 20), "JPEG"))
    (tmp_path / "b.jpg").write_bytes(b"this is not an image")
    browser.get(f"http://127.0.0.1:{server.port}/")
    browser.find_element("id", "file").send_keys(str(tmp_path / "a.jpg"))
    wait_until(browser, "!document.getElementById('result').hidden")
    browser.find_element("id", "file").send_keys(str(tmp_path / "b.jpg"))
    wait_until(browser, "!document.getElementById('error').hidden")
    assert "cannot be read" in browser.find_element("id", "error").text
    assert not browser.find_element("id", "result").is_displayed()
    keep(browser, "error")


def test_narrow_and_dark(server: Server, browser: Any) -> None:
    browser.set_window_size(420, 900)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    browser.get(f"http://127.0.0.1:{server.port}/")
    drop(browser, image(7, (20, 60)))
    wait_until(browser, "!document.getElementById('result').hidden")
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    keep(browser, "narrow-dark")


def test_the_console_stays_clean(server: Server, browser: Any) -> None:
    # The refused image above is a 400, which browsers note on the console; nothing else may be there.
    messages = [entry["message"] for entry in browser.get_log("browser")]
    assert [
        message for message in messages if "400 (Bad Request)" not in message and "favicon" not in message
    ] == []
