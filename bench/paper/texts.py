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

from bench.paper import cache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = ("ag-news.csv", "wikitext2-test.txt", "webquestions-test.json")
CASES = ("encyclopedia", "questions", "shuffled words", "German")
#: News of each part, and texts of each case.
PARTS = {"train": 4800, "fit": 1000, "calibration": 800, "test": 1000}
CASE = 300
_PIECES, _LENGTH, _EPOCHS, _BATCH, _RATE = 4000, 96, 6, 32, 1e-3


def check(root: Path) -> None:
    """FileNotFoundError that names every file that is not there."""
    missing = [name for name in FILES if not (root / "text" / name).exists()]
    if missing:
        raise FileNotFoundError(f"{root / 'text'} must hold {', '.join(missing)}")


class News:
    """The news of one seed: split, tokenised, and classified by a network trained on them."""

    def __init__(self, root: Path, folder: Path, seed: int) -> None:
        self.root, self.folder, self.seed = root / "text", folder, seed
        self.name = f"news {seed + 1}"

    def prepare(self) -> None:
        """Train the network if the cache lacks it."""
        check(self.root.parent)
        _ = self.model

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

    def _inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        rows = [[2, *encoding.ids][:_LENGTH] for encoding in self._pieces.encode_batch(list(texts))]
        ids = torch.zeros(len(rows), _LENGTH, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            mask[place, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def news(self, part: str) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs ``(n, 96)`` and labels ``(n,)`` of a part."""
        texts, labels = self._news[part]
        return self._inputs(texts), labels

    def case(self, name: str) -> dict[str, Tensor]:
        """Inputs of one of `CASES`."""
        rng = np.random.default_rng(self.seed)
        if name == "encyclopedia":
            lines = (self.root / FILES[1]).read_text(encoding="utf-8").splitlines()
            texts = [line for line in lines if len(line.split()) > 30 and "=" not in line]
            return self._inputs([" ".join(texts[i].split()[:45]) for i in rng.permutation(len(texts))[:CASE]])
        if name == "questions":
            found = json.loads((self.root / FILES[2]).read_text(encoding="utf-8"))
            return self._inputs([found[i]["qText"] for i in rng.permutation(len(found))[:CASE]])
        if name == "shuffled words":
            words = [text.split() for text in self._news["test"][0][:CASE]]
            return self._inputs([" ".join(own[i] for i in rng.permutation(len(own))) for own in words])
        if name == "German":
            from faker import Faker

            fake = Faker("de_DE")
            fake.seed_instance(self.seed)
            return self._inputs([fake.paragraph(nb_sentences=4) for _ in range(CASE)])
        raise ValueError(f"name must be one of {', '.join(CASES)}; it was {name!r}")

    @cached_property
    def model(self) -> nn.Module:
        """The trained network, in evaluation mode."""
        from transformers import BertConfig, BertForSequenceClassification

        recipe = {"network": "BERT 4x128", "news": PARTS["train"], "epochs": _EPOCHS, "seed": self.seed}
        torch.manual_seed(self.seed)
        config = BertConfig(
            vocab_size=_PIECES, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=_LENGTH, num_labels=4,
        )  # fmt: skip
        net = BertForSequenceClassification(config)
        return cache.weights(self.folder / f"news-{self.seed}.pt", net, recipe, self._train)

    def _train(self, net: nn.Module) -> None:
        inputs, labels = self.news("train")
        steps = _EPOCHS * (len(labels) // _BATCH)
        optimizer = torch.optim.AdamW(net.parameters(), _RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        net.train()
        for _ in range(_EPOCHS):
            for batch in torch.randperm(len(labels)).split(_BATCH):
                if len(batch) < _BATCH:
                    continue
                out: Any = net(**{name: value[batch] for name, value in inputs.items()})
                optimizer.zero_grad()
                cross_entropy(out.logits, labels[batch]).backward()
                optimizer.step()
                schedule.step()


def batches(inputs: dict[str, Tensor], size: int = 50) -> list[dict[str, Tensor]]:
    """A loader of mappings."""
    count = len(inputs["input_ids"])
    return [
        {name: value[start : start + size] for name, value in inputs.items()}
        for start in range(0, count, size)
    ]
