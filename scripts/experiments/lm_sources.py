"""Weights of news sources, half of which are spoilt, learned for a clean validation text.

    .venv/bin/python scripts/experiments/lm_sources.py --methods F2SA SAMA --seeds 0 1 2
    .venv/bin/python scripts/experiments/lm_sources.py --steps 300 --output lm_sources.json

The texts are the articles of eight publishers (`metadist data fetch news_articles`), 64 bytes a
row. The characters of every row of every other publisher are shuffled. A byte-level Llama of two
layers is trained on all of them, and x weights the publishers so that clean text of all of them is
predicted well. Then models are trained from scratch on the mixtures that were learned, on all rows
alike, on the clean publishers, on the validation text, and on four publishers drawn at random, all
on equally many tokens.

It prints a table and writes a file of JSON. A seed is that of the shuffled rows, the start of the
model and all draws.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch

from metadist import AdamW, Algorithm, OuterOptimizer, Trainer
from metadist.algorithms import AID, BOME, F2SA, ITD, MEHA, SAMA
from metadist.models import ModelFactory
from metadist.tasks import HuggingFace, LanguageModelProblem, SourceWeights, TokenSources, fetch
from metadist.tasks.data.random import Random
from metadist.tasks.language import Retrained, retrain

NUM_SOURCES, LENGTH = 8, 64
ARTICLES = "news_articles/NewsArticles.csv"
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


class Method(NamedTuple):
    """A bilevel method, and the rate of Adam on x."""

    algorithm: Algorithm
    outer_lr: float = 0.05


ADAM = AdamW(lr=2e-3, weight_decay=0.0, clip_norm=1.0, carry=True)
METHODS = {
    "F2SA": Method(F2SA(inner_steps=1, inner_optimizer=ADAM, lam=1.0)),
    "SAMA": Method(SAMA(inner_steps=1, inner_optimizer=ADAM, epsilon=0.1)),
    "MEHA": Method(
        MEHA(inner_steps=1, inner_optimizer=ADAM, y_lr=2e-3, gamma=100.0, c=1.0, c_power=0.0)
    ),
    "BOME": Method(BOME(inner_steps=1, inner_optimizer=ADAM, y_lr=2e-3)),
    "ITD": Method(ITD(inner_steps=2, inner_optimizer=ADAM)),
    "AID": Method(AID(inner_steps=1, inner_lr=0.3, solver="neumann", adjoint_steps=5)),
}


class Setting(NamedTuple):
    """How much there is of everything, without a seed.

    Args:
        rows: Rows of each source.
        validation: Rows to validate on, of each source if texts differ by their sources.
        held_out: Rows of the test text, likewise.
        steps: Outer steps.
        batch_size: Rows of a mini-batch.
        retrain_steps: Steps of each training from scratch; 0: none.
    """

    rows: int = 300
    validation: int = 50
    held_out: int = 50
    steps: int = 300
    batch_size: int = 16
    retrain_steps: int = 1500


class Study(NamedTuple):
    """What is trained, on what.

    Args:
        model: The factory; its seed is replaced.
        methods: What learns the weights, by name.
        sources: The names of the sources, every other of which is spoilt, see `spoilt`.
        prepare: The data, of a seed, written into a folder.
        retrain_lr: The first rate of AdamW where models are trained from scratch.
    """

    model: ModelFactory
    methods: Mapping[str, Method]
    sources: Sequence[str]
    prepare: Callable[[int, Path], TokenSources]
    retrain_lr: float = 1e-3


def news(num_bytes: int, root: Path | None = None) -> dict[str, bytes]:
    """The first ASCII bytes of the articles of each of eight publishers, joined."""
    csv.field_size_limit(1 << 24)
    texts: dict[str, list[str]] = defaultdict(list)
    with (fetch("news_articles", root) / ARTICLES).open(encoding="utf-8", newline="") as lines:
        for article in csv.DictReader(lines):
            texts[urlparse(article["article_source_link"]).netloc].append(article["text"])
    joined = {name: " ".join(texts[name]).encode("ascii", "ignore") for name in sorted(texts)}
    long = {name: text[:num_bytes] for name, text in joined.items() if len(text) >= num_bytes}
    if len(long) < NUM_SOURCES:
        raise ValueError(
            f"rows, validation and held_out must leave {NUM_SOURCES} publishers with {num_bytes} "
            f"characters, got {len(long)}: lower them"
        )
    return dict(list(long.items())[:NUM_SOURCES])


def spoilt(names: Sequence[str]) -> list[str]:
    """The sources whose rows are shuffled, or whose labels are redrawn."""
    return list(names)[::2]


def prepare(texts: Mapping[str, bytes], setting: Setting, seed: int, folder: Path) -> TokenSources:
    """The rows of the sources, half of them shuffled, and clean validation and test rows."""
    sources: dict[str, np.ndarray[Any, Any]] = {}
    validation, test = [], []
    for number, (name, text) in enumerate(texts.items()):
        rows = np.frombuffer(text, dtype=np.uint8).reshape(-1, LENGTH)
        kept = rows[: setting.rows].copy()
        if name in spoilt(list(texts)):
            draws = Random(seed, "shuffled rows", number)
            for row in kept:
                row[:] = row[draws.choose(LENGTH, LENGTH)]
        sources[name] = kept
        validation.append(rows[setting.rows :][: setting.validation])
        test.append(rows[setting.rows + setting.validation :][: setting.held_out])
    return TokenSources.from_ids(
        sources,
        validation=np.concatenate(validation),
        vocabulary=256,
        length=LENGTH,
        folder=folder,
        test=np.concatenate(test),
    )


def study(texts: Mapping[str, bytes], setting: Setting) -> Study:
    """A small Llama on these texts."""
    return Study(HuggingFace(LLAMA), METHODS, list(texts), partial(prepare, texts, setting))


def learn(
    model: ModelFactory, data: TokenSources, method: Method, setting: Setting, seed: int
) -> dict[str, float]:
    """The share of each source that a method has learned."""
    problem = LanguageModelProblem(model.with_seed(seed), SourceWeights(data.sources))
    trainer = Trainer(
        problem,
        data,
        method.algorithm,
        outer_optimizer=OuterOptimizer("adam", lr=method.outer_lr),
        batch_size=setting.batch_size,
        log_every=setting.steps,
        quiet=True,
        seed=seed,
    )
    trainer.fit(setting.steps)
    return problem.source_weights(trainer.outer)


def run(
    study: Study, names: Sequence[str], seeds: Sequence[int], setting: Setting
) -> dict[str, Any]:
    """What every method learns for each seed, and what it is worth."""
    bad = spoilt(study.sources)
    clean = [name for name in study.sources if name not in bad]
    shares: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    losses: dict[str, list[float]] = defaultdict(list)
    accuracies: dict[str, list[float]] = defaultdict(list)
    num_tokens = 0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            data = study.prepare(seed, Path(folder) / "tokens")
            for name in names:
                began = time.process_time()
                found = learn(study.model, data, study.methods[name], setting, seed)
                shares[name].append(found)
                of_bad = sum(found[source] for source in bad)
                _report(
                    f"seed {seed} {name}: share of the spoilt sources {of_bad:.3f}, "
                    f"{time.process_time() - began:.0f} s"
                )
            if setting.retrain_steps:
                learned = {name: shares[name][-1] for name in names}
                again = retrain(
                    study.model,
                    data,
                    learned,
                    clean,
                    num_steps=setting.retrain_steps,
                    batch_size=setting.batch_size,
                    steps=AdamW(
                        lr=study.retrain_lr,
                        clip_norm=1.0,
                        schedule="cosine",
                        num_steps=setting.retrain_steps,
                    ),
                    seeds=[seed],
                )
                num_tokens = again.num_tokens
                for name in again.losses:
                    losses[name] += again.losses[name]
                    accuracies[name] += again.accuracies[name]
                _report(f"seed {seed}\n{again}")
    result: dict[str, Any] = {
        "setting": setting._asdict(),
        "seeds": list(seeds),
        "spoilt": bad,
        "shares": shares,
        "separated": {name: [_separates(one, bad) for one in shares[name]] for name in names},
        "share_of_spoilt": {
            name: [sum(one[source] for source in bad) for one in shares[name]] for name in names
        },
    }
    if losses:
        retrained = Retrained(dict(losses), dict(accuracies), num_tokens)
        result["retrained"] = retrained.to_json()
        result["gain_over_uniform"] = {
            name: dict(zip(("mean", "error"), retrained.gain(name, "uniform"), strict=True))
            for name in losses
        }
        _report(retrained)
    _report(table(result))
    return result


def _separates(shares: Mapping[str, float], bad: Sequence[str]) -> bool:
    """Whether every spoilt source is below every other one."""
    return max(shares[name] for name in bad) < min(
        share for name, share in shares.items() if name not in bad
    )


def _report(what: object) -> None:
    print(what, flush=True)


def table(result: Mapping[str, Any]) -> str:
    """The methods, a line each."""
    lines = ["| method | share of spoilt | separated | test loss | gain over uniform | accuracy |"]
    lines.append("|---|---|---|---|---|---|")
    retrained = result.get("retrained", {"losses": {}})
    losses = retrained["losses"]
    for name in [*result["shares"], *(name for name in losses if name not in result["shares"])]:
        share = separated = loss = gain = accuracy = ""
        if name in result["shares"]:
            share = f"{np.mean(result['share_of_spoilt'][name]):.3f}"
            found = result["separated"][name]
            separated = f"{sum(found)} of {len(found)}"
        if name in losses:
            loss = f"{np.mean(losses[name]):.4f}"
            accuracy = f"{np.mean(retrained['accuracies'][name]):.4f}"
            over = result["gain_over_uniform"][name]
            gain = f"{over['mean']:.4f}"
            if math.isfinite(over["error"]):  # there are several seeds
                gain += f" (standard error {over['error']:.4f})"
        lines.append(f"| {name} | {share} | {separated} | {loss} | {gain} | {accuracy} |")
    return "\n".join(lines)


def _finite(value: Any) -> Any:
    """As JSON has it, which knows no infinity."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main_of(
    study: Callable[[Setting], Study],
    methods: Mapping[str, Method],
    default: Setting,
    about: str | None,
    arguments: Sequence[str] | None,
) -> int:
    """Run an experiment as a command line says."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(methods), choices=list(methods))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="a file of JSON")
    for field, value in default._asdict().items():
        parser.add_argument(f"--{field}", type=int, default=value)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setting = Setting(**{field: getattr(given, field) for field in Setting._fields})
    result = run(study(setting), given.methods, given.seeds, setting)
    if given.output is not None:
        given.output.write_text(json.dumps(_finite(result), indent=1) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment."""

    def of(setting: Setting) -> Study:
        num_rows = setting.rows + setting.validation + setting.held_out
        return study(news(num_rows * LENGTH), setting)

    return main_of(of, METHODS, Setting(), __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
