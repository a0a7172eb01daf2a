"""What comes from Hugging Face: from the local cache first, and never with code of its own."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

NEEDS = "pip install 'metadist[hf]'"


def require(package: str) -> Any:
    """An optional package; ValueError with the line that installs it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} must be installed for this, got none: {NEEDS}") from error


def cache_folder() -> Path:
    """Where Hugging Face keeps what it has fetched."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


WEIGHTS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""The files of a model and its tokenizer; no pickles, which are programs, and no code."""


def from_hub(
    kind: str,
    name: str,
    load: Callable[..., Any],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> Any:
    """What `load` finds in a folder, or under a name in the cache, else (unless forbidden) the net.

    Raises:
        ValueError: It is in neither, or it comes with code of its own.
    """
    reason = ""
    for folder in _folders(name, revision, local_files_only):
        if isinstance(folder, Exception):
            reason = " ".join(str(folder).split())
            continue
        try:
            with warnings.catch_warnings(), without_progress():
                warnings.simplefilter("ignore")
                return load(folder, local_files_only=True, trust_remote_code=False, **options)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise ValueError(
                    f"{kind} must be one that transformers itself knows, got {name!r}, which comes "
                    "with code of its own: that is never run. Use a model of a known type, or "
                    "build it in a function of your own and give ModelFactory its name"
                ) from error
            reason = " ".join(str(error).split())
    raise ValueError(
        f"{kind} must be a folder, or in the cache of Hugging Face or within reach, got {name!r} "
        f"on host {socket.gethostname()}: no such folder, not whole in {cache_folder()}, and "
        f"{'the net is not asked' if local_files_only else 'no way to the net'}. Fetch it where "
        f"there is one (hf download {name}) and copy the folder, or give a path. It said: {reason}"
    )


def _folders(name: str, revision: str | None, local_files_only: bool) -> Iterator[str | Exception]:
    """Where the files may be, one after the other: what the net has is fetched at the end."""
    if Path(name).is_dir():
        yield name
        return
    hub = require("huggingface_hub")
    for is_local in (True,) if local_files_only else (True, False):
        try:
            with without_progress():
                yield hub.snapshot_download(
                    name,
                    revision=revision,
                    local_files_only=is_local,
                    allow_patterns=WEIGHTS,
                )
        except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
            yield error


class without_progress:  # used like a function, as its neighbours in contextlib
    """Within the block transformers draws no progress bars."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._was = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *failure: object) -> None:
        from transformers.utils import logging

        if self._was:
            logging.enable_progress_bar()
