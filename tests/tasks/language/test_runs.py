"""Runs of language models: saved, resumed, from the command line, and retrained."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metadist import Adam, AdamW, LocalExecutor, OuterOptimizer, Trainer
from metadist.algorithms import F2SA, ITD
from metadist.models import ModelFactory
from metadist.tasks import (
    ExampleWeights,
    FewShotProblem,
    LanguageModelProblem,
    Rater,
    Sinusoid,
    SourceWeights,
    TokenSources,
)
from metadist.tasks.language import retrain
from metadist.trees import Params
from tests.cluster.data_parallel.shards import InProcess, assert_same_state, solve
from tests.helpers import CommandLine, exact
from tests.tasks.helpers import refusal
from tests.tasks.language.helpers import LLAMA, token_sources

BYTES = ModelFactory("tests.tasks.language.helpers.bigram", {"vocabulary": 256})


def trainer(
    data: TokenSources, run_dir: Path, model: ModelFactory = BYTES, **options: Any
) -> Trainer:
    """Two inner models, each with moments that continue."""
    steps = AdamW(lr=1e-2, weight_decay=0.0, clip_norm=1.0, carry=True)
    return Trainer(
        LanguageModelProblem(model, SourceWeights(data.sources, floor=0.01), micro_batch=3),
        data,
        F2SA(inner_steps=1, inner_optimizer=steps, lam=10.0),
        outer_optimizer=OuterOptimizer("adam", lr=5e-2),
        batch_size=8,
        meta_batch_size=2,
        run_dir=str(run_dir),
        quiet=True,
        **options,
    )


def bytes_of(trainer: Trainer) -> Any:
    """x, and both inner models."""
    return exact(trainer.outer), exact(trainer.inner(0)), exact(trainer.inner(1))


def test_a_run_learns_the_good_source_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    whole = trainer(data, tmp_path / "whole")
    whole.fit(8)
    shares = whole.problem.source_weights(whole.outer)  # type: ignore[attr-defined]
    assert shares["good"] > 0.55 and sum(shares.values()) == pytest.approx(1)
    trainer(data, tmp_path / "parts").fit(3)
    again = trainer(data, tmp_path / "parts")
    again.restore()
    again.fit(8)
    assert bytes_of(again) == bytes_of(whole)
    found = data.solution_metrics(again.problem, again.outer, again.inner(0))
    assert found["test_perplexity"] == pytest.approx(torch.tensor(found["test_loss"]).exp().item())
    # Both inner models draw mini-batches of their own.
    first, second = again.inner(0), again.inner(1)
    assert not any(torch.equal(leaf, second[name]) for name, leaf in first.items())


def test_tasks_of_shares_need_a_multiple_of_them(tmp_path: Path) -> None:
    data = token_sources(tmp_path, num_tasks=3)
    message = refusal(lambda: trainer(data, tmp_path / "run"))
    assert "meta_batch_size must be a multiple of 3" in message


class InDouble(LanguageModelProblem):
    """With x, and so y, in float64."""

    def init_outer(self, generator: torch.Generator) -> Params:
        return {name: x.double() for name, x in super().init_outer(generator).items()}


def test_rows_in_shards_have_the_hypergradient_of_all_rows(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    problem = InDouble(BYTES, SourceWeights(data.sources, floor=0.01), micro_batch=3)
    f2sa = F2SA(inner_steps=1, inner_optimizer=Adam(1e-2, clip_norm=1.0, carry=True))
    given: dict[str, Any] = {"problem": problem, "sampler": data, "batch_size": 9}
    expected, _ = solve(LocalExecutor(), f2sa, **given)
    found, _ = solve(InProcess(3), f2sa, **given)
    assert_same_state(found, expected)
    by_tokens = InDouble(BYTES, SourceWeights(data.sources), mean="token")
    texts = {"good": ["the cat sat"] * 9 + ["on"] * 9, "bad": ["a mat", "a dog sat on it"] * 9}
    padded = TokenSources.from_texts(
        texts, texts["good"], "bytes", 16, tmp_path / "padded", pack=False
    )
    assert "inner_loss must be a mean over examples" in refusal(
        lambda: solve(InProcess(3), f2sa, problem=by_tokens, sampler=padded)
    )


def test_a_run_of_the_command_line_is_resumed_and_scored(
    tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    token_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = {**LLAMA, "vocab_size": 256, "num_hidden_layers": 1}
    problem = {
        "class_path": "language_model",
        "init_args": {
            "model": {"class_path": "metadist.tasks.HuggingFace", "init_args": {"model": config}},
            "weights": {
                "class_path": "source_weights",
                "init_args": {"sources": {"good": 60, "bad": 55}},
            },
            "logits_chunk": 40,
        },
    }
    (tmp_path / "lm.yaml").write_text(json.dumps({"problem": problem, "batch_size": 4}))
    options = ["--config", "lm.yaml", "--sampler", "TokenSources", "--sampler.folder", "tokens"]
    options += ["--algorithm", "meha", "--algorithm.inner_steps", "1", "--run_dir", "run"]
    cli.good("train", *options, "--num_steps", 1)
    cli.good("resume", "run", "--num_steps", 2)
    assert "2 outer steps: 2 scores" in cli.good("scores", "--run", "run", "--out", "scores.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["good", "bad"]
    assert sum(line["share"] for line in lines) == pytest.approx(1)


def test_the_yaml_of_the_guide_is_the_program_of_the_guide(
    tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    guide = (Path(__file__).resolve().parents[3] / "docs" / "language_models.md").read_text()
    program = guide.partition("```python\n")[2].partition("```")[0]
    config = guide.partition("```yaml\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    rows = token_sources(tmp_path).sources
    for name, file in (("news", "good"), ("web", "bad"), ("target", "validation")):
        (tmp_path / f"{file}.txt").rename(tmp_path / f"{name}.txt")
    (tmp_path / "tokens").rename(tmp_path / "other")
    tiny = json.dumps({**LLAMA, "vocab_size": 256})
    for found, put in (
        ('HuggingFace("gpt2"', f"HuggingFace({tiny}"),
        ('"gpt2"', '"bytes"'),
        ("length=1024", "length=16"),
        ("batch_size=64", "batch_size=8"),
        ("meta_batch_size=4", "meta_batch_size=1"),
        ("fit(500)", "fit(1)"),
    ):
        assert found in program
        program = program.replace(found, put)
    for found, put in (
        ("model: gpt2", f"model: {tiny}"),
        ("news: 5120, web: 20480", "news: {good}, web: {bad}".format(**rows)),
        ("batch_size: 64", "batch_size: 8"),
        ("meta_batch_size: 4", "meta_batch_size: 1"),
    ):
        assert found in config
        config = config.replace(found, put)
    exec(program, {})
    (tmp_path / "lm.yaml").write_text(config)
    cli.good("train", "--config", "lm.yaml", "--num_steps", 1, "--run_dir", "runs/cli")
    for name in ("lm", "cli"):
        cli.good("scores", "--run", f"runs/{name}", "--out", f"{name}.jsonl")
    assert (tmp_path / "lm.jsonl").read_text() == (tmp_path / "cli.jsonl").read_text()


def test_scores_of_examples_are_weights_or_ratings(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    task = data.sample(0)
    count = len(task.support.index)
    problem = LanguageModelProblem(BYTES, ExampleWeights(count))
    scores = list(problem.scores({"logits": torch.zeros(count)}, task))
    assert scores[-1] == {"row": count - 1, "weight": 1.0}
    problem = LanguageModelProblem(BYTES, Rater(256, kind="softmax"))
    outer = problem.init_outer(torch.Generator().manual_seed(0))
    scores = list(problem.scores(outer, task))
    assert len(scores) == count and scores[0].keys() == {"row", "rating"}


def test_retraining_on_equal_tokens_tells_mixtures_apart(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    learned = {"learned": {"good": 0.95, "bad": 0.05}}
    steps = AdamW(lr=0.05, clip_norm=1.0)
    found = retrain(
        BYTES, data, learned, ["good"], num_steps=30, batch_size=8, steps=steps, seeds=(0, 1)
    )
    assert found.num_tokens == 30 * 8 * 16
    assert set(found.losses) == {
        *("learned", "uniform", "validation only", "clean only", "random choice")
    }
    assert found.mean("learned") < found.mean("uniform")
    assert np.mean(found.accuracies["learned"]) > np.mean(found.accuracies["random choice"])
    gain, error = found.gain("learned", "uniform")
    assert gain > 0 and error >= 0
    assert str(found).count("+-") == 5
    again = retrain(BYTES, data, learned, num_steps=30, batch_size=8, steps=steps, seeds=(1,))
    assert again.losses["learned"][0] == found.losses["learned"][1]
    assert "sources must be among good, bad, got worse" in refusal(
        lambda: retrain(BYTES, data, {"x": {"worse": 1.0}})
    )
    assert "+-" not in str(again)
    assert "learned must have other names" in refusal(
        lambda: retrain(BYTES, data, {"clean only": {"good": 1.0}})
    )
    flat: Any = {"good": 0.9, "bad": 0.1}
    wrong: Any
    for wrong in (flat, [flat]):
        message = refusal(partial(retrain, BYTES, data, wrong))
        assert "learned must hold the shares of each mixture by its name" in message
    for shares in ({}, {"good": 0.0}):
        assert "shares of 'x' must have a sum > 0" in refusal(
            partial(retrain, BYTES, data, {"x": shares})
        )
    module: Any = torch.nn.Linear(2, 2)
    assert "model must be a ModelFactory" in refusal(lambda: retrain(module, data, learned))
    plain = TokenSources.from_texts(
        {"a": ["x" * 99], "b": ["y" * 99]}, ["x" * 99], "bytes", 16, tmp_path / "other"
    )
    assert "data must have a test text" in refusal(lambda: retrain(BYTES, plain, learned))


def test_a_factory_serves_few_shot_problems_too(tmp_path: Path) -> None:
    factory = ModelFactory("metadist.models.MLP", {"hidden": [8]}, seed=3)
    options: dict[str, Any] = {"sampler": Sinusoid(k_shot=5, k_query=5), "meta_batch_size": 2}
    options |= {"algorithm": ITD(inner_steps=2, inner_lr=0.05), "quiet": True}
    found = []
    for model in (factory, factory()):
        problem = FewShotProblem(model, adapt="head", loss="mse")
        payload = pickle.dumps(problem)
        assert (len(payload) < 600) == (model is factory)
        trainer = Trainer(pickle.loads(payload), **options)
        trainer.fit(3)
        found.append(exact(trainer.outer))
    assert found[0] == found[1]
