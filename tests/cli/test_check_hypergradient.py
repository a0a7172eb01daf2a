"""`metadist check-hypergradient`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.cli.helpers import flat
from tests.helpers import words

SMALL = words(
    "check-hypergradient --sampler sinusoid --sampler.k_shot 5 --problem.model mlp "
    "--problem.model.hidden [4] --problem.loss mse --algorithm.inner_lr 0.01"
)


"""A check of ITD that takes milliseconds."""


def test_a_hypergradient_is_checked_with_the_options_of_train(cli):
    out = flat(cli.good(*SMALL, "--algorithm.inner_steps", 3, "--max_error", "1e-6"))
    assert "ITD(inner_steps=3, inner_lr=0.01" in out
    assert "the unrolled map x -> f(x, A(x))" in out
    assert "3 inner_grad, 1 outer_grads, 3 hvp, 3 jvp" in out
    assert "13 and 13 numbers in float64" in out
    assert "the Hessian of g is not positive definite" in out


def test_a_check_may_be_a_yaml_file(cli):
    printed = cli.good(*SMALL, "--print_config")
    Path("check.yaml").write_text(printed)
    out = cli.good("check-hypergradient", "--config", "check.yaml", "--algorithm.inner_steps", 3)
    assert out == cli.good(*SMALL, "--algorithm.inner_steps", 3)
    settings = yaml.safe_load(printed)
    assert settings["sampler"]["class_path"] == "metadist.tasks.Sinusoid"
    assert settings["num_directions"] == 20 and list(settings["repeats"]) == [1, 10, 100]


def test_a_check_fails_where_max_error_is_exceeded(cli):
    code, out, err = cli(*SMALL, "--algorithm.first_order", "true", "--max_error", "0.01")
    assert code == 1 and "the unrolled map" in out
    assert re.search(
        r"metadist check-hypergradient: failed: the error against the unrolled map must be <= "
        r"max_error = 0.01, got 1\.\d+$",
        err,
    )
    implicit = ["--problem.adapt", "head", "--algorithm", "t1t2", "--algorithm.inner_lr", 0.01]
    with pytest.warns(RuntimeWarning, match=r"head\.weight, head\.bias"):
        code, _, err = cli(*SMALL, *implicit, "--max_error", "0.01")
    assert code == 1 and "against the solution must be" in err
    assert "got inf: that reference is not known here, see the note" in err
    cli.good(*SMALL, "--algorithm.first_order", "true")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_directions", 0], "num_directions must be >= 1, got 0"),
        (["--max_error", -1], "max_error must be >= 0, got -1.0"),
        (["--algorithm.inner_steps", 0], "inner_steps must be >= 1, got 0"),
        (["--algorithm.inner_lr", 1e300], "the hypergradient of task 0 must be finite, got NaN"),
        (["--algorithm", "newton"], "newton"),
        (["--sampler.k_shot", 0], "k_shot must be an integer >= 1"),
        (["--problem.model.in_features", 2], "inner_loss must be computable on task 0 of sampler"),
    ],
)
def test_a_check_refuses_what_it_cannot_do(cli, flags, message):
    code, out, err = cli(*SMALL, *flags)
    assert code == 2 and out == ""
    assert "metadist check-hypergradient: error: " in err and message in err
