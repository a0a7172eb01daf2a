"""Small language models and texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from metadist.task import Batch, Task
from metadist.tasks import HuggingFace, TokenSources

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": 32,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def llama(**options: Any) -> HuggingFace:
    """A Llama of two layers and 32 tokens."""
    return HuggingFace({**LLAMA, **options.pop("config", {})}, **options)


def gpt2(**options: Any) -> HuggingFace:
    """A GPT-2 of two layers and 32 tokens, whose embeddings are tied."""
    return HuggingFace({**GPT2, **options.pop("config", {})}, **options)


class Bigram(nn.Module):
    """Logits of the next token from this one alone: a model that is no transformer."""

    def __init__(self, vocabulary: int = 32, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.head(self.embedding(ids).tanh())


def bigram(vocabulary: int = 32) -> nn.Module:
    """What a factory names."""
    return Bigram(vocabulary)


def rows(seed: int, num: int, length: int = 8, vocabulary: int = 32) -> torch.Tensor:
    """Random tokens, (num, length)."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (num, length), generator=random)


def task(num_sources: int = 2, is_padded: bool = False, num: int = 6) -> Task:
    """A task of random rows, of unequal lengths if it is padded."""
    ids = rows(0, num)
    columns = {"ids": ids, "source": torch.arange(num) % num_sources}
    query = {"ids": rows(1, 4)}
    if is_padded:
        lengths = 4 + torch.arange(num) % 5
        columns["mask"] = torch.arange(8) < lengths[:, None]
        columns["labels"] = torch.where(torch.arange(8) < 2, -100, ids)
        query["mask"] = torch.arange(8) < torch.tensor([8, 5, 6, 3])[:, None]
    return Task(Batch.named(**columns), Batch.named(**query), 0)


def write_texts(folder: Path) -> dict[str, Path]:
    """Files of two sources, a validation and a test text."""
    texts = {
        "good": "the cat sat on the mat. " * 40,
        "bad": "xq zzk wvv jjq pp kk! " * 40,
        "validation": "the mat sat on the cat. " * 20,
        "test": "the cat sat on the cat. " * 20,
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return {name: folder / f"{name}.txt" for name in texts}


def token_sources(folder: Path, **options: Any) -> TokenSources:
    """Rows of 16 bytes of both sources."""
    texts = write_texts(folder)
    return TokenSources.from_text(
        {"good": texts["good"], "bad": texts["bad"]},
        validation=texts["validation"],
        test=texts["test"],
        length=16,
        folder=folder / "tokens",
        **options,
    )
