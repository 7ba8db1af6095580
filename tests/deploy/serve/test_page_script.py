"""The page's script without a browser, on a document that keeps what it is told: runs wherever Node is."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.resources import files

import pytest

NODE = shutil.which("node")

DOCUMENT = """
const element = () => ({
  classList: { add() {}, remove() {} }, style: {}, value: "", clientWidth: 500, told: {},
  addEventListener() {}, append() {}, replaceChildren() {}, getComputedTextLength: () => 50,
  setAttribute(name, value) { this.told[name] = value; },
});
const found = {};
globalThis.document = {
  getElementById: id => found[id] ??= element(), createElement: element, createElementNS: element,
};
globalThis.window = element();
URL.createObjectURL = () => "";
globalThis.fetch = async path => ({ ok: true, status: 200, json: async () => path === "model" ? served : answer });
const file = { type: "image/png" };
"""


@pytest.mark.skipif(NODE is None, reason="needs Node")
def test_new_file_and_its_words() -> None:
    model = {"threshold": 1.0, "false_alarm_rate": 0.07, "histogram": {"edges": [0, 1, 2], "counts": [3, 4]}}
    answer = {"class": 0, "uncertainty": 1.5, "reliable": True, "risk": 0.5, "accepted": False, "probabilities": [1.0]}
    page = (files("fastgrad.deploy.serve") / "page.html").read_text("utf-8")
    script = page.split("<script>")[1].split("</script>")[0]
    shown = "$('class').textContent, $('chart').told['aria-label'], $('risk').textContent"
    ask = f"await send(file); console.log(JSON.stringify([{shown}]));"
    models = [json.dumps({**model, "labels": [label]}) for label in ("cat", "dog")]
    steps = "".join(f"served = {each}; {ask}" for each in models)
    code = f"{DOCUMENT}let served, answer = {json.dumps(answer)};{script};(async () => {{{steps}}})();"
    done = subprocess.run([str(NODE), "-"], input=code, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    (first, told, risk), (second, _, _) = map(json.loads, done.stdout.splitlines())
    assert (first, second) == ("cat", "dog")
    assert risk.startswith("Risk 50.0\u00a0%.")
    assert risk.endswith("It is above the accepted limit.")
    assert "limit 1.00, 7\u00a0% of good images lie above" in told
