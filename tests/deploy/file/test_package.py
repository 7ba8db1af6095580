"""Descriptions and archives that claim what is not so: refused by name, before anything uses them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import random
import re
import shutil
import stat
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch._inductor.config
from deploy_models import write_archive

from fastgrad._torch import X86, compile_package
from fastgrad.atomic import replace_atomically
from fastgrad.deploy.file import package
from fastgrad.deploy.file.package import MEMBER, Description, ModelPackage, PackageError, read_description

GOOD = Description(
    (3, 8, 8), "float32", 4, 8, "cpu", labels=list("abcd"), mean=[0.5] * 3, std=[0.5] * 3, false_alarm_rate=0.05,
    threshold=1.5, thresholds=[(0.05, 1.5)], histogram={"edges": [0, 1, 2], "counts": [3, 4]},
    reference={"edges": [0.5], "counts": [3, 4]}, versions={"torch": "2.8"}, evidence={"a": "words"}, risk=True,
    risk_threshold=0.1, excess=0.01,
)  # fmt: skip


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
    ("risk", 1), ("risk", None), ("risk_threshold", 1.5), ("risk_threshold", "x"), ("excess", 0), ("excess", 1.0),
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


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([(link(), b"/etc/passwd")], "is a link"),
        ([("../../escaped", b"")], "outside"),
        ([("/etc/escaped", b"")], "outside"),
        ([(deflated(), bytes(1000))], "is compressed"),
        ([("model/a/" + MEMBER, b"{}")], "must hold one"),
    ],
)
def test_hostile_archives(tmp_path: Path, members: list[Any], message: str) -> None:
    path = write_archive(tmp_path / "m.pt2", GOOD, *members)
    with pytest.raises(PackageError, match=message):
        read_description(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_doubled_entry(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.pt2", GOOD, ("model/data", b"checked"), ("model/data", b"loaded"))
    with pytest.raises(PackageError, match="'model/data' twice"):
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


def test_code_for_another_processor(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    if read_description(tiny_package).versions["cpu"] == "DEFAULT":
        pytest.skip("compiled for every processor")
    with pytest.raises(PackageError, match="this one has DEFAULT"):
        ModelPackage(tiny_package)


def test_code_for_another_system(
    tiny_package: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, portable = sys.platform, ModelPackage(tiny_onnx)
    monkeypatch.setattr(sys, "platform", "plan9")
    with pytest.raises(PackageError, match=rf"was compiled on {made}; this system is plan9; an \.onnx runs on both$"):
        ModelPackage(tiny_package)
    assert ModelPackage(tiny_onnx).description == portable.description
    renamed = shutil.copyfile(tiny_package, tmp_path / "model.bin")
    with pytest.raises(PackageError, match="this system is plan9"):
        ModelPackage(renamed)


def test_names_in_ascii(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, and some locales, open another name than Python's; a name that is no UTF-8 ends the process."""
    given: list[Path] = []

    def load(path: Path, plain: Any) -> Any:
        given.append(path)
        return plain(path)

    monkeypatch.setattr(package, "_load_archive", functools.partial(load, plain=package._load_archive))
    monkeypatch.setattr(package.onnx_file, "load", functools.partial(load, plain=package.onnx_file.load))
    x, odd = torch.randn(2, 3, 8, 8), tmp_path / f"\u00e9{model_file.suffix}"
    replace_atomically(lambda path: given.append(shutil.copyfile(model_file, path)), odd)
    np.testing.assert_array_equal(ModelPackage(odd).rows(x), ModelPackage(model_file).rows(x))
    assert [path.suffix for path in given if str(path).isascii()] == [model_file.suffix] * 3
    assert len(given) == 3


def test_instructions_of_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for all that this machine has; a file with fewer runs on more processors."""
    given: dict[str, Any] = {}

    def keep(*_: Any, inductor_configs: dict[str, Any], **__: Any) -> None:
        given.update(inductor_configs)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", keep)
    for name, compiled in (("AVX2", "haswell"), ("AVX512", "skylake-avx512"), ("DEFAULT", "x86-64"), ("SVE256", None)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=name: name)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        compile_package(cast(Any, None), tmp_path / "m.pt2")
        assert given.get("cpp.march") == (compiled if hasattr(torch._inductor.config.cpp, "march") else None)
        assert name in X86 or compiled is None


def test_file_of_another_pytorch(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of a newer one calls what an older one lacks."""

    def lacks(path: Path) -> None:
        raise RuntimeError("undefined symbol: aoti_torch_is_defined")

    monkeypatch.setattr(package, "load_package", lacks)
    with pytest.raises(PackageError, match=r"aoti_torch_is_defined$"):
        ModelPackage(tiny_package)
    made = str(torch.__version__)
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    with pytest.raises(PackageError, match=rf"it was made with PyTorch {re.escape(made)}, and here is 2\.8\.0$"):
        ModelPackage(tiny_package)


def test_description_in_utf_16(tmp_path: Path) -> None:
    """PyTorch, which reads it as well, takes UTF-8 alone."""
    text = json.dumps({"format": 1, **dataclasses.asdict(GOOD)}).encode("utf-16")
    with pytest.raises(PackageError, match=r"not a readable .*'utf-8' codec"):
        read_description(write_archive(tmp_path / "m.pt2", None, (f"model/{MEMBER}", text)))


def changed(file: Path, to: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Write an archive whose members are others; None leaves one out."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return to


@pytest.mark.parametrize("content", [None, b"no code"])
def test_damaged_code(content: bytes | None, tiny_package: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"m\.pt2 cannot be loaded: "):
        ModelPackage(changed(tiny_package, tmp_path / "m.pt2", lambda name, own: content if ".so" in name else own))


def test_graph_of_another_dtype(tiny_package: Path, tmp_path: Path) -> None:
    def wider(name: str, content: bytes) -> bytes:
        return content.replace(b'"float32"', b'"float64"') if name.endswith(MEMBER) else content

    wrong = ModelPackage(changed(tiny_package, tmp_path / "m.pt2", wider))
    with pytest.raises(PackageError, match=r"m\.pt2 cannot be run: .*dtype.*$") as raised:
        wrong(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", [{"classes": 3, "labels": None}, {"risk": True}, {"evidence": {"a": "words"}}])
def test_description_of_another_graph(change: dict[str, Any], tiny_package: Path, tmp_path: Path) -> None:
    """With three classes for four, the last probability would pass for the uncertainty."""
    with zipfile.ZipFile(tiny_package) as old, zipfile.ZipFile(tmp_path / "m.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, json.dumps(json.loads(content) | change) if name.endswith(MEMBER) else content)
    with pytest.raises(PackageError, match=r"m\.pt2 gives .* says"):
        ModelPackage(tmp_path / "m.pt2").rows(torch.zeros(1, 3, 8, 8))


def test_rows_are_what_explain_gives(tiny_explained: Path) -> None:
    model, x = ModelPackage(tiny_explained), torch.randn(3, 3, 8, 8)
    prediction, evidence = model.explain(x)
    columns = [prediction.probabilities, prediction.uncertainty[:, None], *(v[:, None] for v in evidence.values())]
    np.testing.assert_array_equal(model.rows(x), torch.cat(columns, 1).double().numpy())


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    """Whoever can write the folder cannot foresee the temporary name, and nothing that is there is written to."""
    victim, target = tmp_path / "victim", tmp_path / "model.pt2"
    victim.write_bytes(b"precious")
    (tmp_path / f".model.pt2.{os.getpid()}").symlink_to(victim)
    replace_atomically(lambda path: path.write_bytes(b"new"), target)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*'.*none'"):
        replace_atomically(lambda path: path.write_bytes(b"new"), tmp_path / "none" / "file")
    assert (target.read_bytes(), victim.read_bytes()) == (b"new", b"precious")
    assert not target.is_symlink()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask
    assert len(list(tmp_path.iterdir())) == 3
