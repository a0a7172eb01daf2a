"""`metadist train`: the same training by flags, YAML or a kept config."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from metadist import CheckpointStore, evaluate
from metadist.algorithms import ALGORITHMS
from metadist.cli import train
from metadist.compute import Compute
from metadist.outer import differences
from tests.cli.helpers import saved
from tests.helpers import CURVES, curves, last_state, make_trainer, words
from tests.tasks.helpers import write_tree


def test_flags_train_and_everything_is_in_the_run_folder(cli, here):
    out = cli.good(
        *("train", *CURVES, "--run_dir", "run", "--num_steps", 4, "--seed", 3),
        *("--val_split", "val", "--val_every", 2, "--val_tasks", 3),
        *("--test_split", "test", "--test_tasks", 5),
    )
    assert sorted(path.name for path in Path("run").iterdir()) == [
        *("checkpoints", "config.yaml", "events.jsonl", "result.json", "tensorboard")
    ]
    result = saved()
    assert (result["num_steps"], result["num_tasks"], result["num_dropped"]) == (4, 16, 0)
    store = CheckpointStore("run/checkpoints")
    assert result["best"] == store.best() in ("step-00000002", "step-00000004")
    assert result["test"]["checkpoint"] == result["best"]
    assert result["settings"]["sampler"].startswith("Sinusoid(k_shot=5, k_query=5, seed=0, split=")
    assert result["settings"]["executor"] == "local"

    # The test is that of the best checkpoint on the split that was asked for.
    trainer = make_trainer(seed=3)
    expected = evaluate(
        trainer.problem,
        curves("test"),
        trainer.algorithm,
        store.load("best")[1].state.outer,
        5,
        compute=Compute(seed=3),
    )
    assert result["test"]["metrics"] == expected.to_json()["metrics"]
    assert "trained 4 outer steps, 16 tasks in " in out
    assert f"test at {result['best']}:\n  loss {expected.metrics['query_loss']} (before" in out
    assert "run folder: run\nTensorBoard: tensorboard --logdir run\n" in out
    assert list(here.iterdir()) == [here / "run"]


def test_the_seed_decides_on_the_initial_weights(cli):
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        cli.good("train", *CURVES, "--run_dir", run, "--num_steps", 1, "--seed", seed)
    assert last_state(Path("a")) == last_state(Path("b")) != last_state(Path("c"))


def test_yaml_with_short_names_trains_as_flags_do(cli):
    cli.good("train", *CURVES, "--run_dir", "flags", "--num_steps", 3)
    Path("mine.yaml").write_text(
        yaml.safe_dump(
            {
                "sampler": {
                    "class_path": "sinusoid",
                    "init_args": {"k_shot": 5, "k_query": 5},
                },
                "problem": {
                    "class_path": "few_shot",
                    "init_args": {
                        "model": {"class_path": "mlp", "init_args": {"hidden": [8]}},
                        "loss": "mse",
                    },
                },
                "algorithm": {"class_path": "itd", "init_args": {"inner_steps": 2}},
                "outer_optimizer": {"lr": 0.01},
                "meta_batch_size": 4,
                "executor": "local",
                "quiet": True,
            }
        )
    )
    # Flags after the file change what it says.
    flags = ("--algorithm.inner_lr", "0.05", "--run_dir", "yaml", "--num_steps", "3")
    cli.good("train", "--config", "mine.yaml", *flags)
    assert last_state(Path("yaml")) == last_state(Path("flags"))


def test_the_printed_and_the_kept_config_train_the_same(cli):
    arguments = ("train", *CURVES, "--num_steps", 3, "--outer_optimizer.options", '{"eps": 1e-6}')
    printed = cli.good(*arguments, "--run_dir", "first", "--print_config")
    assert not Path("first").exists()
    Path("printed.yaml").write_text(printed)
    cli.good(*arguments, "--run_dir", "first")
    cli.good("train", "--config", "printed.yaml", "--run_dir", "second")
    cli.good("train", "--config", "first/config.yaml", "--run_dir", "third")
    assert last_state(Path("first")) == last_state(Path("second")) == last_state(Path("third"))
    kept = yaml.safe_load(Path("first/config.yaml").read_text())
    again = yaml.safe_load(Path("third/config.yaml").read_text())
    assert kept | {"run_dir": "third"} == again
    # What is kept does not depend on defaults that a later version may have.
    assert kept["algorithm"]["init_args"]["inner_optimizer"] is None
    assert kept["sampler"]["class_path"] == "metadist.tasks.Sinusoid"


def test_a_step_rule_is_named_like_any_class_and_resumed(cli):
    arguments = [word for word in CURVES if "inner_lr" not in word and word != "0.05"]
    arguments += ["--algorithm.inner_optimizer", "AdamW", "--algorithm.inner_optimizer.lr", "1e-2"]
    arguments += ["--algorithm.inner_optimizer.no_decay", '["*bias"]']
    cli.good("train", *arguments, "--num_steps", 3, "--run_dir", "whole")
    kept = yaml.safe_load(Path("whole/config.yaml").read_text())
    steps = kept["algorithm"]["init_args"]["inner_optimizer"]
    assert steps["class_path"] == "metadist.AdamW"
    assert steps["init_args"]["lr"] == 0.01 and steps["init_args"]["weight_decay"] == 0.01
    assert list(steps["init_args"]["no_decay"]) == ["*bias"]
    cli.good("train", *arguments, "--num_steps", 2, "--run_dir", "parts")
    cli.good("resume", "parts", "--num_steps", 3)
    assert last_state(Path("parts")) == last_state(Path("whole"))


@pytest.mark.parametrize("form", [("--algorithm", "reptile"), ("--algorithm=reptile",)])
def test_a_short_name_may_follow_a_space_or_an_equals_sign(cli, form):
    out = cli.good("train", "--sampler=sinusoid", *form, "--run_dir", "x", "--print_config")
    assert yaml.safe_load(out)["algorithm"]["class_path"] == "metadist.algorithms.Reptile"


def test_a_folder_of_images_is_trained_on_by_flags_only(cli, here):
    write_tree(here / "pictures", [f"class{i}" for i in range(9)], num_images=3)
    cli.good(
        *words("train --sampler image_folder --sampler.root pictures --sampler.n_way 2"),
        *words("--sampler.k_query 2 --sampler.image_size 16 --problem.model.n_way 2"),
        *words("--problem.model.width 4 --problem.model.image_size 16 --problem.adapt head"),
        *words("--algorithm.inner_steps 2 --meta_batch_size 2 --num_steps 2 --run_dir run"),
        *words("--test_split test --test_tasks 4 --val_split all --val_tasks 2"),
    )
    result = saved()
    assert "split='test'" in result["test"]["protocol"]["sampler"]
    assert 0 <= result["test"]["metrics"]["query_accuracy"]["mean"] <= 1


@pytest.mark.parametrize(
    ("flags", "config", "model"),
    [
        ("--sampler glyphs", "", "metadist.models.Conv4"),
        ("--sampler glyphs", "problem: {init_args: {adapt: head}}", "metadist.models.Conv4"),
        ("--sampler no_data --problem hyper_cleaning --problem.num_examples 9", "", None),
        ("--sampler no_data --problem=hyper_cleaning --problem.num_examples 9", "", None),
        ("", "{sampler: no_data, problem: {class_path: hyper_cleaning, init_args: "
         "{num_examples: 9}}}", None),
    ],
)  # fmt: skip
def test_a_named_problem_has_its_own_model(flags, config, model, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config or "num_steps: 1")
    arguments = [*flags.split(), "--config", str(file)]
    found = train.parser().parse_args(arguments).problem.init_args.model
    assert (found and found.class_path) == model


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_named_algorithm_has_its_own_defaults(name):
    """And not those of the class that would have been the default."""
    config = train.parser().parse_args(["--sampler", "sinusoid", "--algorithm", name])
    assert config.algorithm.class_path == f"metadist.algorithms.{ALGORITHMS[name].__name__}"
    found = ALGORITHMS[name](**vars(config.algorithm.init_args))
    assert found == ALGORITHMS[name]()


def test_a_stream_trains_by_short_names_and_is_resumed(cli):
    stream = words(
        "--sampler permuted_images --sampler.dataset digits --sampler.num_tasks 2 "
        "--sampler.per_task 20 --sampler.num_test 20 --sampler.batch 5"
    )
    problem = words(
        "--problem continual_learning --problem.model contextual_network "
        "--problem.model.in_features 64 --problem.model.num_tasks 2 "
        "--problem.distillation 1.0 --problem.num_slots 80"
    )
    method = words("--algorithm bome --algorithm.inner_steps 1")
    flags = ("train", *stream, *problem, *method)
    cli.good(*flags, "--run_dir", "whole", "--num_steps", 16)
    cli.good(*flags, "--run_dir", "parts", "--num_steps", 9)
    cli.good("resume", "parts", "--num_steps", 16)
    parts, whole = (CheckpointStore(f"{run}/checkpoints").load()[1] for run in ("parts", "whole"))
    assert not differences(parts.state, whole.state)
    ended = cli(*flags, "--run_dir", "more", "--num_steps", 17)
    assert ended.code and "num_steps must be <= 16" in ended.err
