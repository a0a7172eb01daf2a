"""`metadist evaluate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from metadist import evaluate
from tests.helpers import curves, make_trainer, store_of


def test_evaluate_judges_on_another_split(cli, run):
    out = cli.good("evaluate", run, "--num_tasks", 6, "--output", "mine.json")
    written = json.loads(Path("mine.json").read_text())
    checkpoint = store_of(run).load()[1]
    trainer = make_trainer()
    expected = evaluate(
        trainer.problem,
        curves("test"),
        trainer.algorithm,
        checkpoint.state.outer,
        6,
    )
    assert written == {"checkpoint": "step-00000005", **expected.to_json()}
    assert f"{run} step-00000005, 5 outer steps" in out
    assert f"  query_loss: {expected.metrics['query_loss']}\n" in out
    assert "  interval: 95 % Student t over tasks\n" in out


def metrics(cli, run, *flags):
    cli.good("evaluate", run, "--num_tasks", 4, "--output", "x.json", *flags)
    return json.loads(Path("x.json").read_text())


def test_evaluate_has_options_for_everything_that_is_judged(cli, run):
    plain = metrics(cli, run)
    assert metrics(cli, run) == plain
    more = metrics(cli, run, "--inner_steps", 7)
    assert "inner_steps=7" in more["protocol"]["algorithm"] and more != plain
    assert metrics(cli, run, "--checkpoint", "step-00000002")["checkpoint"] == "step-00000002"
    best = store_of(run).best()
    assert metrics(cli, run, "--checkpoint", "best")["checkpoint"] == best
    other = metrics(cli, run, "--sampler", "sinusoid", "--sampler.k_shot", 9)
    assert "k_shot=9" in other["protocol"]["sampler"]
    assert "split='val'" in metrics(cli, run, "--split", "val")["protocol"]["sampler"]
    assert metrics(cli, run, "--num_tasks", 2)["protocol"]["tasks"] == "2 (indices 0 .. 1)"


def test_evaluate_computes_as_the_run_did(cli, run, monkeypatch):
    import metadist.evaluation

    seen = []

    def watch(*arguments, compute, **options):
        seen.append((compute.vectorize, compute.chunk_size, compute.num_threads))
        return evaluate(*arguments, compute=compute, **options)

    monkeypatch.setattr(metadist.evaluation, "evaluate", watch)
    config = run / "config.yaml"
    text = config.read_text()
    try:
        config.write_text(
            text.replace("vectorize: auto", "vectorize: false").replace(
                "chunk_size: null", "chunk_size: 3"
            )
        )
        metrics(cli, run)
    finally:
        config.write_text(text)
    assert seen == [(False, 3, 1)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inner_steps", "0"], "inner_steps must be >= 1, got 0"),
        (["--executor", "data_parallel"], "executor must be local or ray, got data_parallel"),
        (["--num_tasks", "1"], "num_tasks must be >= 2 for an interval, got 1"),
        (["--checkpoint", "step-00000009"], "checkpoint must be one of .* got 'step-00000009'"),
    ],
)
def test_evaluate_refuses_what_it_cannot_do(cli, run, flags, message):
    code, _, err = cli("evaluate", run, *flags)
    assert code == 2 and re.search("metadist evaluate: error: " + message, err), err


def test_evaluate_says_what_was_taken_for_what(cli):
    flags = (
        "train --sampler glyphs --sampler.n_way 3 --sampler.k_query 3 --problem.model.width 4 "
        "--problem.model.n_way 3 --num_steps 1 --meta_batch_size 2 --quiet true --run_dir letters"
    )
    cli.good(*flags.split())
    flags = "evaluate letters --num_tasks 3 --per_task true --output x.json --device cpu"
    out = cli.good(*flags.split())
    found = json.loads(Path("x.json").read_text())
    assert len(found["per_task"]["query_accuracy"]) == 3
    assert sum(sum(row.values()) for row in found["confusion"].values()) == 3 * 9
    assert re.search(r"(?m)^    \w+ U\+[0-9A-F]{4}  for  \w+ U\+[0-9A-F]{4}: \d times", out)


def test_evaluate_tries_numbers_of_inner_steps_on_validation_tasks(cli, run):
    tried = "--try_inner_steps [1,4] --val_tasks 5 --num_tasks 4"
    flags = [*tried.split(), "--output", "x.json"]
    out = cli.good("evaluate", run, *flags)
    found = json.loads(Path("x.json").read_text())
    said = re.search(r"inner_steps=(\d), the best of 1: (\S+), 4: (\S+) on val", out)
    assert said is not None
    scores = {"1": float(said[2]), "4": float(said[3])}
    assert scores[said[1]] == max(scores.values())
    assert f"inner_steps={said[1]}," in found["protocol"]["algorithm"]
    alone = metrics(cli, run, "--inner_steps", said[1])
    assert alone["metrics"] == found["metrics"]
    code, _, err = cli("evaluate", run, *flags, "--split", "val")
    assert code == 2 and "val_split must be another split" in err
    code, _, err = cli("evaluate", run, *flags, "--inner_steps", 2)
    assert code == 2 and "must not be given beside try_inner_steps" in err
