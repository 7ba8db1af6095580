"""Files of this installation, and the network of magika, which tells kinds of files apart.

Fratantonio et al., "Magika: AI-Powered Content-Type Detection" (ICSE 2025), as in the package ``magika``. A file's kind
is that of its extension in magika's configuration, if there is only one. Files differ between machines: they are those
of Python's library and packages, and of ``/usr``. Folders are split, not files, so that similar files are in one part.
"""

from __future__ import annotations

import base64
import contextlib
import json
import lzma
import os
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Most files of a kind in a part, and of one folder among them; bytes of the largest.
OF_A_KIND, OF_A_FOLDER, LARGEST = 100, 10, 2**20
#: Bytes read from each end, tokens made of them, the token for padding, and the fewest tokens at a file's start.
BLOCK, ENDS, PADDING, FEWEST = 4096, 1024, 256, 8
#: Extensions that the configuration leaves ambiguous. Those that say little, such as plain text's, stay so.
OPEN = {"so": "elf"}
#: Kinds that the network does not know, by extension.
UNKNOWN = {"translations": "mo", "MATLAB data": "mat", "static libraries": "a"}
#: Its labels for bytes and characters of no kind.
NONE = ("randombytes", "randomtxt")
Change = Callable[[bytes, bytes, np.random.Generator], bytes | None]


def _flipped(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Replace one byte in ten by a random one."""
    chosen, found = rng.random(len(content)) < 0.1, rng.integers(0, 256, len(content), np.uint8)
    return np.where(chosen, found, np.frombuffer(content, np.uint8)).tobytes()


def _widened(content: bytes, other: bytes, rng: np.random.Generator) -> bytes | None:
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode().encode("utf-16")
    return None


#: Changes of a file, given another one, that keep its kind; None if impossible. At most half is overwritten.
CHANGED: Mapping[str, Change] = {
    "flipped bytes": _flipped, "UTF-16": _widened, "joined": lambda content, other, rng: content + other,
    "overwritten": lambda content, other, rng: rng.bytes(count := min(512, len(content) // 2)) + content[count:],
    "truncated": lambda content, other, rng: content[: len(content) // 3],
}  # fmt: skip
#: Changes that hide a file's kind.
DISGUISED: Mapping[str, Change] = {
    "base64": lambda content, other, rng: base64.encodebytes(content),
    "XOR": lambda content, other, rng: bytes(np.frombuffer(content, np.uint8) ^ rng.integers(1, 256, dtype=np.uint8)),
    "LZMA": lambda content, other, rng: lzma.compress(content, lzma.FORMAT_ALONE),
}  # fmt: skip


def tokens(content: bytes) -> list[int] | None:
    """Return the first and last bytes without white space at the ends, as magika reads them; None for small files."""
    first, last = content[:BLOCK].lstrip()[:ENDS], content[-BLOCK:].rstrip()[-ENDS:]
    padding = [[PADDING] * (ENDS - len(part)) for part in (first, last)]
    return [*first, *padding[0], *padding[1], *last] if len(first) >= FEWEST else None


class Network(nn.Module):
    """One convolution over groups of four tokens, then the largest value of each channel."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(PADDING + 1, 64), nn.LayerNorm(512, eps=1e-6)
        self.conv, self.last_norm = nn.Conv1d(256, 512, 5), nn.LayerNorm(512, eps=1e-6)
        self.head = nn.Linear(512, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, N)`` of tokens ``(B, 2048)``."""
        groups = F.gelu(self.embedding(x), approximate="tanh").view(len(x), 512, 256).transpose(1, 2)
        found = F.gelu(self.conv(self.norm(groups)), approximate="tanh").amax(2)
        return self.head(self.last_norm(found))


#: Names of the network's weights in the ONNX file, in the order of its state dict.
WEIGHTS = (
    "Const:0", "LayerNorm_0/Reshape_2:0", "LayerNorm_0/Reshape_3:0", "Conv_0/transpose_3:0", "const_fold_opt__209",
    "LayerNorm_1/Reshape_2:0", "LayerNorm_1/Reshape_3:0", "Const_24:0", "Dense_1/Reshape:0",
)  # fmt: skip


class Files:
    """The files of one seed, split by folder, and the network."""

    def __init__(self, seed: int) -> None:
        self.seed, self.folder = seed, Path(str(distribution("magika").locate_file("magika")))
        self.path = self.folder / "models/standard_v3_3/model.onnx"
        self.kinds: list[str] = json.loads((self.path.parent / "config.min.json").read_text())["target_labels_space"]
        self.none = torch.tensor([self.kinds.index(kind) for kind in NONE])

    @cached_property
    def _places(self) -> dict[str, int]:
        """Kinds by extension."""
        known: dict[str, list[str]] = defaultdict(list)
        for kind, about in json.loads((self.folder / "config/content_types_kb.min.json").read_text()).items():
            for extension in about["extensions"]:
                known[extension].append(kind)
        sure = {extension: kinds[0] for extension, kinds in known.items() if len(kinds) == 1}
        return {end: self.kinds.index(kind) for end, kind in (sure | OPEN).items() if kind in self.kinds}

    @cached_property
    def _parts(self) -> dict[str, list[tuple[bytes, int]]]:
        """Contents and kinds of each part, for kinds that both have; unknown kinds under the name of their case."""
        parts: dict[str, list[tuple[bytes, int]]] = {part: [] for part in ("fit", "test", *UNKNOWN)}
        unknown = {extension: name for name, extension in UNKNOWN.items()}
        folders = list(_folders())
        rng, seen, counts = np.random.default_rng(self.seed), set[bytes](), Counter[tuple[str, int, str]]()
        for turn, place in enumerate(rng.permutation(len(folders))):
            for path in rng.permutation(folders[place]):
                extension = path.rpartition(".")[2].lower()
                kind = self._places.get(extension, -1)
                part = unknown.get(extension, ("fit", "test")[turn % 2] if kind >= 0 else "")
                limits = {(part, kind, ""): OF_A_KIND, (part, kind, str(place)): OF_A_FOLDER}
                if not part or any(counts[key] >= limit for key, limit in limits.items()):
                    continue
                try:
                    content = Path(path).read_bytes() if os.path.getsize(path) <= LARGEST else b""
                except OSError:
                    continue
                if tokens(content) is not None and content not in seen:
                    seen.add(content)
                    counts.update(limits.keys())
                    parts[part].append((content, kind))
        common = set.intersection(*({kind for _, kind in parts[part]} for part in ("fit", "test"))) | {-1}
        kept = {part: [one for one in found if one[1] in common] for part, found in parts.items()}
        return {part: [found[i] for i in rng.permutation(len(found))] for part, found in kept.items()}

    def files(self, part: str, count: int) -> tuple[Tensor, Tensor]:
        """Return inputs ``(n, 2048)`` and labels ``(n,)`` of the first files of ``fit`` or ``test``."""
        contents, labels = zip(*self._parts[part][:count], strict=True)
        return torch.tensor([tokens(content) for content in contents]), torch.tensor(labels)

    def case(self, name: str, part: str, count: int) -> tuple[Tensor, Tensor]:
        """Return inputs of a case, and the places of the files of a part whose kind they have.

        The place is -1 for inputs of no known kind; of these, inputs that the network calls of no kind are left out.
        """
        if name in UNKNOWN:
            made = [(tokens(content), -1) for content, _ in self._parts[name][:count]]
        else:
            change, rng = (CHANGED | DISGUISED)[name], np.random.default_rng((self.seed, *name.encode()))  # type: ignore[operator]
            contents = [content for content, _ in self._parts[part][: count + 1]]
            changed = [change(*two, rng) for two in pairwise(contents)]
            made = [(tokens(content or b""), place if name in CHANGED else -1) for place, content in enumerate(changed)]
        if not (found := [one for one in made if one[0] is not None]):
            raise FileNotFoundError(f"this installation must hold files for the case {name!r}; it holds none")
        inputs, source = map(torch.tensor, zip(*found, strict=True))
        kept = (source >= 0) | ~torch.isin(self.model(inputs).argmax(1), self.none)
        return inputs[kept], source[kept]

    @cached_property
    def model(self) -> Network:
        """The network with the weights of the ONNX file, whose answers it must reproduce."""
        import onnx
        import onnxruntime

        held = {one.name.rpartition("get_logits_/")[2].removeprefix("MagikaV2/"): onnx.numpy_helper.to_array(one)
                for one in onnx.load(self.path).graph.initializer}  # fmt: skip
        held["Const:0"] = held["Const:0"] + held["Dense_0/Reshape:0"][0]
        held["Const_24:0"] = held["Const_24:0"].T
        model = Network(len(self.kinds)).eval()
        for value, name in zip(model.state_dict().values(), WEIGHTS, strict=True):
            value.copy_(torch.tensor(held[name]).reshape(value.shape))
        x = self.files("test", 32)[0]
        (expected,) = onnxruntime.InferenceSession(self.path).run(None, {"bytes": x.int().numpy()})
        # The file's layer norm takes the variance from the mean of squares: in float32, single files are off by .001.
        if (error := float(np.abs(model(x).softmax(1).detach().numpy() - expected).max(1).mean())) > 1e-4:
            raise ValueError(f"{self.path} must give the probabilities of this network; they differ by {error}")
        return model


def _folders() -> Iterator[list[str]]:
    """Yield the files of every package and folder; those directly in a root are one group."""
    python = sysconfig.get_paths()
    tops = (*Path("/usr/lib").iterdir(), *Path("/usr/share").iterdir())
    within = sorted(str(one) for one in tops if "python" not in one.name)
    for root in (python["purelib"], python["stdlib"], "/usr/include", *within):
        found: dict[str, list[str]] = defaultdict(list)
        for folder, folders, names in os.walk(root):
            folders.sort()
            first = os.path.relpath(folder, root).split(os.sep)[0]
            found[first] += [os.path.join(folder, name) for name in sorted(names)]
        yield from found.values()
