"""Texts as numbers: bytes, or a tokenizer of Hugging Face."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metadist.tasks.language.hub import from_hub, require

BYTES = "bytes"


class Tokenizer(NamedTuple):
    """How texts become tokens.

    Args:
        name: "bytes", or a name or path of Hugging Face.
        digest: sha256 of all that decides which tokens a text has.
        vocabulary: Tokens are 0 .. vocabulary-1.
        end: The token after a text; None: there is none.
        pad: The token behind a text that is shorter than its row; None: there is none.
        encode: The tokens of a text, int64, shape (tokens,).
    """

    name: str
    digest: str
    vocabulary: int
    end: int | None
    pad: int | None
    encode: Callable[[str], NDArray[np.int64]]


def open_tokenizer(name: str, revision: str | None, local_files_only: bool) -> Tokenizer:
    """The tokenizer "bytes" (UTF-8, texts end with byte 0), or one of Hugging Face.

    Raises:
        ValueError: It is not in the cache and cannot be fetched; transformers is missing.
    """
    if name == BYTES:
        digest = hashlib.sha256(b"UTF-8, 256 tokens, texts end with 0").hexdigest()
        return Tokenizer(BYTES, digest, 256, end=0, pad=0, encode=_bytes_of)
    transformers = require("transformers")
    found: Any = from_hub(
        "tokenizer",
        name,
        transformers.AutoTokenizer.from_pretrained,
        revision=revision,
        local_files_only=local_files_only,
    )

    def encode(text: str) -> NDArray[np.int64]:
        # Longer than a model's context on purpose: rows are cut afterwards.
        ids = found(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    backend = getattr(found, "backend_tokenizer", None)
    rules = (
        backend.to_str() if backend is not None else json.dumps(sorted(found.get_vocab().items()))
    )
    return Tokenizer(
        name=name,
        digest=hashlib.sha256(rules.encode()).hexdigest(),
        vocabulary=len(found),
        end=found.eos_token_id,
        pad=found.pad_token_id,
        encode=encode,
    )


def _bytes_of(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
