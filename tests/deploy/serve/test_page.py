"""The page in a real browser: drop an image, read the answer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deploy_models import TinyTwoStage
from serve_client import Server, image, running

webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("fastapi")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs Chromium and chromedriver", allow_module_level=True)

# Set to a folder to keep what the browser showed.
SCREENSHOTS = os.environ.get("FASTGRAD_SCREENSHOTS")


# axe-core, from npm: a file, or what an install in this folder left.
AXE = Path(os.environ.get("FASTGRAD_AXE", "node_modules/axe-core/axe.min.js"))


@pytest.fixture(scope="module")
def server(tiny_package: Path) -> Iterator[Server]:
    with running(tiny_package) as started:
        yield started


@pytest.fixture(scope="module")
def explaining(tiny_explained: Path) -> Iterator[Server]:
    with running(tiny_explained) as started:
        yield started


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
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
    import base64

    browser.execute_script(DROP, base64.b64encode(content).decode())


def ask(browser: Any, server: Server, content: bytes) -> None:
    """Open the page, drop an image and wait for the answer."""
    browser.get(f"http://127.0.0.1:{server.port}/")
    drop(browser, content)
    wait_for(browser, "result")


def test_a_dropped_image_is_answered(server: Server, browser: Any) -> None:
    browser.get(f"http://127.0.0.1:{server.port}/")
    keep(browser, "start")
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
    keep(browser, "answer")


def test_a_chosen_file_and_an_unreadable_one(server: Server, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image(1, (30, 20), "JPEG"))
    (tmp_path / "b.jpg").write_bytes(b"this is not an image")
    browser.get(f"http://127.0.0.1:{server.port}/")
    browser.find_element("id", "file").send_keys(str(tmp_path / "a.jpg"))
    wait_for(browser, "result")
    browser.find_element("id", "file").send_keys(str(tmp_path / "b.jpg"))
    wait_for(browser, "error")
    assert "cannot be read" in browser.find_element("id", "error").text
    assert not browser.find_element("id", "result").is_displayed()
    keep(browser, "error")


def odd_one(server: Server) -> tuple[bytes, dict[str, Any]]:
    """An image that raises an alarm, and the answer to it."""
    for seed in range(200):
        content = image(seed, (8, 8))
        _, answer = server.predict(content, "image/png")
        if answer["reliable"] is False:
            return content, answer
    raise AssertionError("no image raised an alarm")


def test_an_alarm_says_what_raised_it(explaining: Server, browser: Any) -> None:
    content, answer = odd_one(explaining)
    ask(browser, explaining, content)
    assert browser.find_element("id", "verdict").text.endswith("Do not rely on this answer")
    parts = sorted(answer["evidence"].items(), key=lambda part: -part[1])
    total = sum(value for _, value in parts)
    rows = [row.text.splitlines() for row in browser.find_elements("css selector", "#evidence li")]
    assert rows == [[TinyTwoStage.alarms[name], f"{int(100 * value / total + 0.5)} %"] for name, value in parts]
    named = [TinyTwoStage.alarms[name] for name, _ in parts]
    named = named[:1] if parts[0][1] >= 2 / 3 * total else named
    assert browser.find_element("id", "why").text == f"Mostly because: {'; '.join(named)}."
    keep(browser, "alarm")


def test_nothing_is_explained_without_an_alarm_or_evidence(server: Server, explaining: Server, browser: Any) -> None:
    content, _ = odd_one(server)
    usual = next(
        other
        for other in (image(seed, (64, 64)) for seed in range(200))
        if explaining.predict(other, "image/png")[1]["reliable"]
    )
    for asked, sent in ((server, content), (explaining, usual)):
        ask(browser, asked, sent)
        assert browser.find_element("id", "why").text == ""
        assert not browser.find_element("id", "reasons").is_displayed()


def test_the_keyboard_alone(server: Server, browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.get(f"http://127.0.0.1:{server.port}/")
    # A click on the field opens the chooser, which nobody could close here.
    browser.execute_script(
        "window.clicks = 0; document.getElementById('file').addEventListener('click', event => {"
        " event.preventDefault(); window.clicks++; });"
    )
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.execute_script("return document.activeElement.id") == "file"
    outline = browser.find_element("id", "drop").value_of_css_property("outline-style")
    assert outline == "solid"
    for count, key in enumerate((Keys.ENTER, Keys.SPACE), 1):
        ActionChains(browser).send_keys(key).perform()
        assert browser.execute_script("return window.clicks") == count


def test_what_a_screen_reader_is_told(explaining: Server, browser: Any) -> None:
    content, answer = odd_one(explaining)
    browser.get(f"http://127.0.0.1:{explaining.port}/")
    assert browser.find_element("id", "file").accessible_name == "Drop an image here, or choose one"
    drop(browser, content)
    wait_for(browser, "result")
    chart = browser.find_element("id", "chart")
    assert chart.aria_role in ("img", "image")
    assert f"limit {json.loads(explaining.request('GET', '/model')[1])['threshold']:.2f}" in chart.accessible_name
    assert browser.find_element("id", "where").text in chart.accessible_name
    spoken = browser.find_element("css selector", "[role=status]").text
    for part in (answer["label"], "Do not rely", "Mostly because", f"{answer['uncertainty']:.2f}"):
        assert part in spoken
    for id_ in ("bars", "evidence"):
        (listed,) = browser.find_elements("id", id_)
        assert listed.aria_role == "list"
        assert all(row.text for row in listed.find_elements("css selector", "li"))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1000, 390])
def test_axe_finds_nothing(explaining: Server, browser: Any, theme: str, width: int) -> None:
    if not AXE.is_file():
        pytest.skip("needs axe-core (npm install axe-core, or FASTGRAD_AXE=axe.min.js)")
    show_as(browser, theme, width)
    browser.get(f"http://127.0.0.1:{explaining.port}/")
    for content, shown in ((None, "wait"), (odd_one(explaining)[0], "result"), (b"no image", "error")):
        if content is not None:
            drop(browser, content)
        wait_for(browser, shown)
        browser.execute_script(AXE.read_text())
        found = browser.execute_async_script("axe.run().then(arguments[0])")
        assert [(each["id"], each["help"]) for each in found["violations"]] == [], shown
        assert found["passes"]


def show_as(browser: Any, theme: str, width: int) -> None:
    browser.set_window_size(width, 900)
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def test_narrow_and_dark(server: Server, browser: Any) -> None:
    show_as(browser, "dark", 420)
    ask(browser, server, image(7, (20, 60)))
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    keep(browser, "narrow-dark")


def test_the_console_stays_clean(server: Server, browser: Any) -> None:
    browser.get_log("browser")
    ask(browser, server, image(7, (20, 60)))
    browser.execute_script("console.error('the last message')")
    (message,) = [entry["message"] for entry in browser.get_log("browser")]
    assert "the last message" in message
