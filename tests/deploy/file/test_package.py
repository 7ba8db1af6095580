"""Files that are broken, changed, or made for another machine: refused by name, before anything uses them."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fastgrad._torch import X86, compile_package
from fastgrad.atomic import replace_atomically
from fastgrad.deploy.file import package
from fastgrad.deploy.file.description import DTYPES
from fastgrad.deploy.file.package import MEMBER, ModelPackage, PackageError, read_description


def flipped(content: bytes, share: float) -> bytes:
    """One bit, at this share of the length, is another."""
    place = int(share * len(content))
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGED = r"damaged|not a readable|format"
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another file": (lambda content: b"hello", r"not a readable \."),
    "half": (lambda content: content[: len(content) // 2], r"not a readable \."),
    "empty": (lambda content: b"", r"not a readable \."),
    **{f"a bit flipped at {share}": (functools.partial(flipped, share=share), DAMAGED) for share in (0.1, 0.5, 0.7)},
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name: str, model_file: Path, tmp_path: Path) -> None:
    file, (break_it, message) = tmp_path / f"m{model_file.suffix}", BROKEN[name]
    with pytest.raises(PackageError, match="no such file"):
        ModelPackage(file)
    file.write_bytes(break_it(model_file.read_bytes()))
    with pytest.raises(PackageError, match=message):
        ModelPackage(file)


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
    import torch._inductor.config

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


def described(**fields: Any) -> Callable[[str, bytes], bytes]:
    """Change these fields of the description."""
    return lambda name, own: json.dumps(json.loads(own) | fields).encode() if name.endswith(MEMBER) else own


# PyTorch 2.8 prints the cause, and raises the name of what failed.
WRONG_DTYPE = "dtype" if torch.__version__ >= "2.9" else "run_func_"
#: What becomes of a member, by its name and content; None leaves it out.
MEMBERS: list[tuple[Callable[[str, bytes], bytes | None], str]] = [
    (lambda name, own: None if ".so" in name else own, r"m\.pt2 cannot be loaded: "),
    (lambda name, own: b"no code" if ".so" in name else own, r"m\.pt2 cannot be loaded: "),
    (described(input_dtype="float64"), rf"m\.pt2 cannot be run: .*{WRONG_DTYPE}"),
    # The last probability would pass for the uncertainty.
    (described(classes=3, labels=None), r"m\.pt2 gives .* says"),
    (described(risk=True), r"m\.pt2 gives .* says"),
    (described(evidence={"a": "words"}), r"m\.pt2 gives .* says"),
    (described(evidence=None), r"m\.pt2 gives .* says"),
]


@pytest.mark.parametrize(("change", "message"), MEMBERS)
def test_code_and_description_differ(
    change: Callable[[str, bytes], bytes | None], message: str, tiny_package: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tiny_package) as old, zipfile.ZipFile(tmp_path / "m.pt2", "w") as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)

    def run() -> None:
        model = ModelPackage(tmp_path / "m.pt2")
        model.rows(torch.zeros(1, 3, 8, 8, dtype=DTYPES[model.description.input_dtype]))

    with pytest.raises(PackageError, match=message) as raised:
        run()
    assert "\n" not in str(raised.value)


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
