"""Runs that were made in Python, and the command line goes on with; and the other way round."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from metadist import Compute, LocalExecutor, OuterOptimizer, Trainer
from metadist.algorithms import DARTS, ITD, LancBiO
from metadist.cli import train
from metadist.cli.workload import instantiate
from metadist.cluster import (
    SSP,
    DataParallelExecutor,
    Failures,
    RayExecutor,
    Server,
    StalenessWeight,
    Workers,
)
from metadist.models import MLP, Conv4
from metadist.run.rebuild import config_of, require_known
from metadist.tasks import (
    ArchitectureSearch,
    CorruptedImages,
    FewShotProblem,
    Glyphs,
    HyperCleaning,
    ImageData,
    LinearClassifier,
    ProtoNet,
    Sinusoid,
    Supernet,
)
from tests.helpers import last_state, make_trainer, store_of, words
from tests.problems import assert_same_bytes


def python_run(run_dir, steps=3, **options):
    torch.manual_seed(5)
    chosen = {
        "problem": FewShotProblem(Conv4(n_way=3, width=4), adapt="head", weight_decay=0.01),
        "sampler": Glyphs(n_way=3, k_query=3, seed=7),
        "algorithm": ITD(inner_steps=2, inner_lr=0.2),
        "outer_optimizer": OuterOptimizer("sgd", lr=0.1, options={"momentum": 0.5}),
        "val_sampler": Glyphs(n_way=3, k_query=3, split="val"),
        "val_tasks": 4,
        "eval_inner_steps": 4,
        "meta_batch_size": 4,
        "compute": Compute(device="cpu", chunk_size=2),
        "seed": 11,
        "quiet": True,
        **options,
    }
    trainer = Trainer(run_dir=run_dir, **chosen)
    trainer.fit(steps)
    return trainer


def test_a_run_of_python_is_resumed_to_the_same_bytes_and_evaluated(cli, here):
    python_run("whole", 6)
    python_run("half", 3)
    cli.good("resume", "half", "--num_steps", 6)
    assert last_state(here / "half") == last_state(here / "whole")
    trainer = python_run("again", 6)
    cli.good(*words("evaluate again --num_tasks 4 --output x.json --device cpu"))
    found = json.loads(Path("x.json").read_text())
    expected = trainer.test(Glyphs(n_way=3, k_query=3, split="test", seed=7), 4)
    assert found["metrics"] == expected.to_json()["metrics"]
    assert "inner_steps=4" in found["protocol"]["algorithm"]


def test_a_run_of_the_command_line_is_continued_and_evaluated_in_python(cli, run):
    before = (run / "config.yaml").read_bytes()
    trainer = make_trainer(
        problem=FewShotProblem(MLP(hidden=(8,)), loss="mse"),
        run_dir=run,
        seed=0,
        algorithm=ITD(inner_steps=2, inner_lr=0.05),
        outer_optimizer=OuterOptimizer(lr=0.01),
    )
    trainer.restore()
    assert trainer.version == 5
    trainer.fit(6)
    assert (run / "config.yaml").read_bytes() == before
    assert "6 outer steps" in cli.good("evaluate", run, "--num_tasks", 2)


def test_a_search_on_images_is_resumed(cli, here):
    def search(run_dir: str, steps: int) -> None:
        python_run(
            run_dir,
            steps,
            problem=ArchitectureSearch(Supernet(channels=2, cells="NR", nodes=1)),
            sampler=ImageData("digits", num_train=40, num_val=30, num_test=20),
            algorithm=DARTS(inner_steps=1, inner_lr=0.05),
            val_sampler=None,
            val_tasks=2,
            eval_inner_steps=None,
            meta_batch_size=None,
        )

    search("half", 1)
    search("whole", 2)
    cli.good("resume", "half", "--num_steps", 2)
    found, expected = (store_of(here / run).load()[1].state for run in ("half", "whole"))
    assert_same_bytes(found.outer, expected.outer)
    assert torch.equal(found.states[0], expected.states[0])


def test_a_run_on_one_task_is_exported_with_its_states(cli, here):
    data = CorruptedImages("digits", num_train=40, num_val=40, num_test=40)
    problem = HyperCleaning(40, LinearClassifier(64, 10))
    trainer = python_run(
        "run",
        problem=problem,
        sampler=data,
        algorithm=LancBiO(inner_steps=2, inner_lr=0.1),
        val_sampler=None,
        val_tasks=100,
        eval_inner_steps=None,
        meta_batch_size=1,
    )
    cli.good(*words("export run --output model.safetensors --device cpu"))
    from safetensors.torch import load_file

    torch.testing.assert_close(
        load_file("model.safetensors")["head.weight"], trainer.inner(0)["head.weight"]
    )


def test_problems_without_a_loop_and_other_samplers_are_rebuilt(cli, here):
    python_run("proto", 1, problem=ProtoNet(Conv4(width=4)), algorithm=ITD(inner_steps=1))
    cli.good(*words("evaluate proto --num_tasks 2"))
    python_run(
        "sine",
        1,
        problem=FewShotProblem(MLP(hidden=(4, 4)), loss="mse"),
        sampler=Sinusoid(domain=(-1.0, 1.0)),
        val_sampler=None,
        val_tasks=100,
    )
    assert "domain=(-1.0, 1.0)" in cli.good(*words("evaluate sine --num_tasks 2"))


class Forgetful(nn.Module):
    """Does not keep what it is made from."""

    def __init__(self, size: int):
        super().__init__()
        self.head = nn.Linear(784, size)

    def forward(self, x):
        return self.head(x.flatten(1))


class Renamed(Forgetful):
    """Keeps it wrong."""

    def __init__(self, size: int, factor: float = 1.0):
        super().__init__(size)
        self.size, self.factor = size, 1.0
        self.scale = factor

    def forward(self, x):
        return self.scale * super().forward(x)


def squared(output, target):
    return (output - target).square().mean()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: Forgetful(3), {}, "problem.model.size, which Forgetful does not keep"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 3)),
            {},
            "a Sequential made from *args",
        ),
        (
            lambda: Conv4(3, width=4),
            {"loss": lambda out, target: nn.functional.cross_entropy(out, target)},
            "problem.loss, a function <lambda> of tests.cli",
        ),
    ],
)
def test_what_cannot_be_rebuilt_is_said_by_name(cli, here, model, options, message):
    python_run("run", 1, problem=FewShotProblem(model(), **options))
    for command in ("resume", "evaluate"):
        code, _, err = cli(command, "run")
        assert code == 2
        assert message in err and "by hand" in err and "Trainer.restore" in err


def test_what_is_rebuilt_as_something_else_is_refused(cli, here):
    python_run("run", 1, problem=FewShotProblem(Renamed(3, factor=0.5)))
    code, _, err = cli("evaluate", "run")
    assert code == 2 and "got another loss" in err


def test_a_class_of_the_main_program_is_said(cli, here, monkeypatch):
    monkeypatch.setattr(Renamed, "__module__", "__main__")
    python_run("run", 1, problem=FewShotProblem(Renamed(3)))
    _, _, err = cli("resume", "run")
    assert "problem.model, a class Renamed of __main__ (move it to" in err


class Delicate(FewShotProblem):
    """Raises at any x but its own, and has an attribute that raises."""

    def __init__(self, model: nn.Module, secret: int = 0):
        super().__init__(model)
        self.first = self.init_outer(torch.Generator())["head.weight"]

    @property
    def secret(self):
        raise LookupError("not here")

    def inner_loss(self, context, inner, batch):
        if (inner["head.weight"].detach() - self.first).abs().max() > 0.2:
            raise ArithmeticError("far away")
        return super().inner_loss(context, inner, batch)


def test_training_does_not_mind_what_cannot_be_described(cli, here):
    trainer = python_run("run", 1, problem=Delicate(Conv4(3, width=4)))
    assert trainer.version == 1
    _, _, err = cli("evaluate", "run")
    assert "LookupError: not here" in err and "ArithmeticError: far away" in err


EXECUTORS = [
    LocalExecutor(max_user_errors=4, backoff_s=0.5),
    RayExecutor(
        Workers(num_workers=3),
        Server(num_shards=2),
        SSP(2, StalenessWeight("polynomial", 0.7)),
        Failures(max_losses=3),
        prefetch=2,
        backup_factor=2.5,
        compression="bfloat16",
        address="10.0.0.1:6379",
        object_store_bytes=200 << 20,
    ),
    RayExecutor(state="worker"),
    DataParallelExecutor(
        Workers(num_workers=3),
        Failures(max_losses=3),
        staleness=1,
        batch_statistics="local",
        allow_missing_classes=True,
        address="auto",
        object_store_bytes=200 << 20,
    ),
]


@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda executor: type(executor).__name__)
def test_an_executor_is_written_with_all_its_arguments(executor):
    settings = {"executor": executor, "sampler": Sinusoid()}
    text = config_of(settings, None)
    require_known(text, "run")
    options = json.loads(text.partition("\n")[2])
    again = instantiate(train.parse_training(options, {}), train.parser()).executor
    for name in inspect.signature(type(executor)).parameters:
        assert getattr(again, f"_{name}") == getattr(executor, f"_{name}")
