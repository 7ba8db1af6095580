"""Descriptions and archives that claim what is not so: refused by name, before anything uses them."""

from __future__ import annotations

import dataclasses
import json
import random
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from deploy_models import write_archive

from fastgrad.deploy.file.package import MEMBER, Description, PackageError, read_description

GOOD = Description(
    (3, 8, 8), "float32", 4, 8, "cpu", labels=list("abcd"), mean=[0.5] * 3, std=[0.5] * 3, false_alarm_rate=0.05,
    threshold=1.5, thresholds=[(0.05, 1.5)], histogram={"edges": [0, 1, 2], "counts": [3, 4]},
    reference={"edges": [0.5], "counts": [3, 4]}, versions={"torch": "2.8"}, evidence={"a": "words"}, risk=True,
    risk_threshold=0.1, wrong_above=0.3,
)  # fmt: skip


def text_of(description: Description) -> str:
    return json.dumps({"format": 1, **dataclasses.asdict(description)})


def with_text(path: Path, content: dict[str, Any]) -> Path:
    return write_archive(path, None, (f"model/{MEMBER}", json.dumps(content).encode()))


def test_description_is_read_back(tmp_path: Path) -> None:
    assert read_description(write_archive(tmp_path / "m.pt2", GOOD)) == GOOD
    plain = Description((5,), "float64", 2, 1, "cpu")
    assert read_description(write_archive(tmp_path / "p.pt2", plain)) == plain
    with pytest.raises(ValueError, match=r"mean must be None or a finite number a channel of images \(5,\)"):
        dataclasses.replace(plain, mean=[0.5] * 5)


BAD = [
    ("input_shape", []), ("input_shape", [0]), ("input_shape", [-3, 8, 8]), ("input_shape", [3.5]), ("input_shape", 3),
    ("input_shape", [2**20, 2**20]), ("input_shape", [1] * 9), ("input_shape", [True]),
    ("input_dtype", "load"), ("input_dtype", "int64"), ("input_dtype", None), ("input_dtype", ["float32"]),
    ("classes", 0), ("classes", 1e9), ("classes", "4"), ("classes", 5),
    ("max_batch", 0), ("max_batch", -1), ("max_batch", 2**40), ("max_batch", None), ("max_batch", 1.5),
    ("device", "meta"), ("device", None),
    ("labels", ["a"]), ("labels", [1, 2, 3, 4]), ("labels", "abcd"),
    ("labels", ["caf\udce9", "b", "c", "d"]), ("labels", ["x" * 1001, "b", "c", "d"]),
    ("mean", [0.5]), ("mean", [0.5, 0.5, None]), ("mean", [0.5, 0.5, float("nan")]), ("mean", "abc"),
    ("std", [0.5, 0.5, 0]), ("std", [0.5, 0.5, -1]), ("std", [1, 1, float("inf")]),
    ("false_alarm_rate", 0), ("false_alarm_rate", 2), ("false_alarm_rate", "x"), ("threshold", float("nan")),
    ("threshold", []), ("thresholds", [[0.05, float("inf")]]), ("thresholds", [[2, 1]]), ("thresholds", [[0.05]]),
    ("thresholds", None), ("thresholds", [[0.05, 1]] * 1001),
    ("histogram", {"edges": [0, 1], "counts": [1, 2]}), ("histogram", {"edges": [1, 0], "counts": [1]}),
    ("histogram", {"edges": [0, 1], "counts": [-1]}), ("histogram", []), ("histogram", {}),
    ("reference", {"edges": [1, 1], "counts": [1, 1, 1]}), ("reference", {"edges": [1]}), ("reference", 3),
    ("versions", {"a": 1}), ("versions", None), ("evidence", {}), ("evidence", {"a": None}), ("evidence", ["a"]),
    ("risk", 1), ("risk", None), ("risk_threshold", 1.5), ("risk_threshold", "x"),
    ("wrong_above", -0.1), ("wrong_above", 1.1),
    ("colour", "red"), ("threshold", True), ("evidence", {"caf\udce9": "words"}),
    ("histogram", {"edges": [0, 1], "counts": [1], "more": 1}), ("histogram", {"edges": [0, 1e999], "counts": [1]}),
    ("reference", {"edges": {}, "counts": [1]}), ("reference", {"edges": "", "counts": [1]}),
    ("reference", {"edges": [*range(65_537)], "counts": [1] * 65_538}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_every_field_is_checked(tmp_path: Path, name: str, value: Any) -> None:
    content = {"format": 1, **dataclasses.asdict(GOOD), name: value}
    with pytest.raises(PackageError, match="damaged") as refused:
        read_description(with_text(tmp_path / "m.pt2", content))
    # Labels are one a class: what is wrong there shows at the labels.
    assert ("labels" if (name, value) == ("classes", 5) else name) in str(refused.value)


def test_random_descriptions(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "m.pt2"
    content = {"format": 1, **dataclasses.asdict(GOOD)}
    odd = [None, -1, 0, 1.5, 2**70, "x", [], [None], {}, {"edges": []}, True, float("nan"), [[]], "\ud800"]
    for _ in range(300):
        changed = dict(content)
        for name in rng.sample(sorted(content), rng.randint(1, 3)):
            changed[name] = rng.choice(odd)
        if rng.random() < 0.2:
            del changed[rng.choice(sorted(content))]
        try:
            found = read_description(with_text(path, changed))
        except PackageError:
            continue
        assert dataclasses.replace(found) == found


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("model/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def deflated() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("model/zeros")
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


PLACE = f"model/{MEMBER}"
#: What archives hold: a description or none, the members beside it, and the message.
ARCHIVES: dict[str, tuple[Description | None, list[Any], str]] = {
    "a link": (GOOD, [(link(), b"/etc/passwd")], "is a link"),
    "a name outside": (GOOD, [("../../escaped", b"")], "outside"),
    "an absolute name": (GOOD, [("/etc/escaped", b"")], "outside"),
    "a compressed entry": (GOOD, [(deflated(), bytes(1000))], "is compressed"),
    "two descriptions": (GOOD, [("model/a/" + MEMBER, b"{}")], "must hold one"),
    "a doubled entry": (GOOD, [("model/data", b"checked"), ("model/data", b"loaded")], "'model/data' twice"),
    "no description": (None, [], r"not written by fastgrad\.export"),
    "a newer description": (None, [(PLACE, b'{"format": 99}')], "another format"),
    "part of a description": (None, [(PLACE, b'{"format": 1, "input_shape": [1]}')], "damaged"),
    # PyTorch, which reads it as well, takes UTF-8 alone.
    "UTF-16": (None, [(PLACE, text_of(GOOD).encode("utf-16"))], "not a readable .*'utf-8' codec"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ARCHIVES)
def test_refused_archives(name: str, tmp_path: Path) -> None:
    description, members, message = ARCHIVES[name]
    path = write_archive(tmp_path / "m.pt2", description, *members)
    with pytest.raises(PackageError, match=message):
        read_description(path)


def test_lying_sizes(tmp_path: Path) -> None:
    large = write_archive(tmp_path / "large.pt2", None, (f"model/{MEMBER}", bytes(64 * 2**20)))
    claims = write_archive(tmp_path / "claims.pt2", GOOD)
    content = bytearray(claims.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    struct.pack_into("<II", content, end + 12, 100 * 2**20, 0)  # a table of contents of 100 MiB
    claims.write_bytes(bytes(100 * 2**20) + content)
    for path in (large, claims):
        tracemalloc.start()
        with pytest.raises(PackageError, match=r"at most|too large|not a readable"):
            read_description(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
        tracemalloc.stop()


def test_mutated_archives(tmp_path: Path) -> None:
    rng, whole = random.Random(1), write_archive(tmp_path / "m.pt2", GOOD).read_bytes()
    path, read = tmp_path / "mutated.pt2", 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            if rng.random() < 0.2:
                del content[place:]
                content += b"\0"
            else:
                content[place] = rng.randrange(256)
        path.write_bytes(content)
        try:
            read_description(path)
            read += 1
        except PackageError:
            pass
    assert 0 < read < 400
