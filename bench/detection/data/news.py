"""News, and texts that are none, for a small text classifier trained here.

``ag-news.csv`` has four classes of news. Strangers: paragraphs of an encyclopedia (``wikitext2-test.txt``), questions
(``webquestions-test.json``), news with their words shuffled, and sentences of German words from the package ``faker``.
The network is a BERT of four layers on byte-pair pieces, both learned from the part ``train`` of the news.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.detection import cache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = ("ag-news.csv", "wikitext2-test.txt", "webquestions-test.json")
CASES = ("encyclopedia", "questions", "German")
#: What is done to news whose labels stay.
CORRUPTED = ("dropped words", "typos", "shuffled words")
#: News of each part, and texts of each case.
PARTS = {"train": 5600, "fit": 1000, "test": 1000}
CASE = 300
_PIECES, _LENGTH, _EPOCHS, _BATCH, _RATE = 4000, 96, 6, 32, 1e-3


def check(root: Path) -> None:
    """FileNotFoundError that names every file that is not there."""
    missing = [name for name in FILES if not (root / "text" / name).exists()]
    if missing:
        raise FileNotFoundError(f"{root / 'text'} must hold {', '.join(missing)}")


class Classifier(nn.Module):
    """A network of pieces ``(B, T)`` alone: what is padded is 0."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pieces: Tensor) -> Tensor:
        """Logits ``(B, N)``."""
        out: Any = self.net(input_ids=pieces, attention_mask=(pieces != 0).long())
        logits: Tensor = out.logits
        return logits


class News:
    """The news of one seed: split, tokenised, and classified by a network trained on them.

    Args:
        root: Folder with the data; its folder ``text`` has the files.
        folder: Where networks are kept.
        seed: Of the split, and of the network.
        short: Whether it reads half as many pieces and is trained half as long, in bfloat16: a tenth of the time.

    Raises:
        FileNotFoundError: Files are missing; the message names them.
    """

    def __init__(self, root: Path, folder: Path, seed: int, *, short: bool = False) -> None:
        check(root)
        self.root, self.folder, self.seed = root / "text", folder, seed
        self.short = short
        self.length, self.epochs = (_LENGTH // 2, _EPOCHS // 2) if short else (_LENGTH, _EPOCHS)

    @cached_property
    def _news(self) -> dict[str, tuple[list[str], Tensor]]:
        with (self.root / FILES[0]).open(encoding="utf-8", newline="") as file:
            rows = [(f"{title}. {text}", int(label) - 1) for label, title, text in csv.reader(file)]
        order = np.random.default_rng(self.seed).permutation(len(rows))
        found, start = {}, 0
        for part, count in PARTS.items():
            own = [rows[i] for i in order[start : start + count]]
            found[part] = [text for text, _ in own], torch.tensor([label for _, label in own])
            start += count
        return found

    @cached_property
    def _pieces(self) -> Tokenizer:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]"]
        trainer = trainers.BpeTrainer(vocab_size=_PIECES, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(self._news["train"][0], trainer)
        return tokenizer

    def _inputs(self, texts: Sequence[str]) -> Tensor:
        rows = [[2, *encoding.ids][: self.length] for encoding in self._pieces.encode_batch(list(texts))]
        ids = torch.zeros(len(rows), self.length, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        return ids

    def news(self, part: str) -> tuple[Tensor, Tensor]:
        """Inputs ``(n, pieces)`` and labels ``(n,)`` of a part."""
        texts, labels = self._news[part]
        return self._inputs(texts), labels

    def case(self, name: str) -> Tensor:
        """Inputs of one of `CASES`."""
        rng = np.random.default_rng(self.seed)
        if name == "encyclopedia":
            lines = (self.root / FILES[1]).read_text(encoding="utf-8").splitlines()
            texts = [line for line in lines if len(line.split()) > 30 and "=" not in line]
            return self._inputs([" ".join(texts[i].split()[:45]) for i in rng.permutation(len(texts))[:CASE]])
        if name == "questions":
            found = json.loads((self.root / FILES[2]).read_text(encoding="utf-8"))
            return self._inputs([found[i]["qText"] for i in rng.permutation(len(found))[:CASE]])
        if name == "German":
            from faker import Faker

            fake = Faker("de_DE")
            fake.seed_instance(self.seed)
            return self._inputs([fake.paragraph(nb_sentences=4) for _ in range(CASE)])
        raise ValueError(f"name must be one of {', '.join(CASES)}; it was {name!r}")

    def corrupted(self, name: str, part: str, count: int) -> Tensor:
        """Inputs of the first news of a part, in order, with one of `CORRUPTED` done to them."""
        if name not in CORRUPTED:
            raise ValueError(f"name must be one of {', '.join(CORRUPTED)}; it was {name!r}")
        rng = np.random.default_rng((self.seed, CORRUPTED.index(name)))
        change = {"dropped words": _dropped, "typos": _mistyped, "shuffled words": _shuffled}[name]
        return self._inputs([" ".join(change(text.split(), rng)) for text in self._news[part][0][:count]])

    @cached_property
    def model(self) -> nn.Module:
        """The trained network, in evaluation mode."""
        from transformers import BertConfig, BertForSequenceClassification

        recipe = {"network": "BERT 4x128", "news": PARTS["train"], "epochs": self.epochs, "seed": self.seed}
        name = f"news-{self.seed}"
        if self.short:
            recipe |= {"member": 0, "pieces": self.length}
            name = f"{name}-0-{self.length}"
        torch.manual_seed(self.seed)
        config = BertConfig(  # type: ignore[call-arg]
            vocab_size=_PIECES, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=self.length, num_labels=4,
        )  # fmt: skip
        net = BertForSequenceClassification(config)
        return Classifier(cache.weights(self.folder / f"{name}.pt", net, recipe, self._train)).eval()

    def _train(self, net: nn.Module) -> None:
        inputs, labels = self.news("train")
        steps = self.epochs * (len(labels) // _BATCH)
        optimizer = torch.optim.AdamW(net.parameters(), _RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        model = Classifier(net.train())
        for _ in range(self.epochs):
            for batch in torch.randperm(len(labels)).split(_BATCH):
                if len(batch) < _BATCH:
                    continue
                with torch.autocast("cpu", torch.bfloat16, enabled=self.short):
                    logits = model(inputs[batch])
                optimizer.zero_grad()
                cross_entropy(logits.float(), labels[batch]).backward()
                optimizer.step()
                schedule.step()


def _dropped(words: list[str], rng: np.random.Generator) -> list[str]:
    """Each word is left out with a chance of two fifths."""
    return [word for word, kept in zip(words, rng.random(len(words)) > 0.4, strict=True) if kept]


def _mistyped(words: list[str], rng: np.random.Generator) -> list[str]:
    """Two neighbouring inner letters change places in half of the words of at least four letters."""
    found = []
    for word in words:
        if len(word) >= 4 and rng.random() < 0.5:
            i = int(rng.integers(1, len(word) - 2))
            word = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        found.append(word)
    return found


def _shuffled(words: list[str], rng: np.random.Generator) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))]
