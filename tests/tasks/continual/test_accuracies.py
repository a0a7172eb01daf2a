"""What a learner knows after each stage: in one run, in a resumed one and in a killed one."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metadist import OuterOptimizer, StepReport, Trainer
from metadist.algorithms import ITD
from metadist.tasks import (
    AccuracyMatrix,
    ContextualNetwork,
    ContinualLearning,
    FewShotProblem,
    ImageStream,
    JudgeAfterEachTask,
    PermutedImages,
    Sinusoid,
)
from metadist.trees import flatten

ROOT = Path(__file__).resolve().parents[3]


def trainer(run_dir: Path | None = None, resumes: bool = False) -> Trainer:
    stream = PermutedImages("digits", num_tasks=3, per_task=60, num_test=100, memory=20, semantic=5)
    torch.manual_seed(0)
    network = ContextualNetwork(64, width=16, num_tasks=3, embedding=4)
    made = Trainer(
        ContinualLearning(network, distillation=1.0, num_slots=stream.num_slots),
        stream,
        ITD(inner_steps=1, inner_lr=0.1, first_order=True),
        outer_optimizer=OuterOptimizer("sgd", lr=0.1),
        run_dir=run_dir,
        checkpoint_every=5,
        quiet=True,
    )
    if resumes:
        made.restore()
    return made


def run(folder: Path | None, last: int = 36, dies_at: int = 0, **options: Any) -> Any:
    """(what the judge found, x and y and what is carried)."""
    made = trainer(None if folder is None else folder / "run", **options)
    judge = JudgeAfterEachTask(made, None if folder is None else folder / "rows.json")

    def on_step(report: StepReport) -> bool:
        if report.step.version == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return judge(report)

    made.fit(last, on_step)
    state = [made.outer, made.inner(0), made.carried(0)]
    return judge.matrix, torch.cat([flatten(tree) for tree in state])


@pytest.fixture(scope="module")
def whole() -> Any:
    return run(None)


def test_each_task_is_judged_when_it_ends(whole):
    matrix, _ = whole
    made = trainer()
    made.fit(24)
    stream = made.sampler
    assert isinstance(stream, ImageStream)
    rows = stream.accuracies(made.problem, made.outer, made.inner(0), 2)
    assert matrix.rows[1] == tuple(rows)
    assert [len(row) for row in matrix.rows] == [1, 2, 3]
    made.fit(36)
    found = stream.solution_metrics(made.problem, made.outer, made.inner(0))
    assert found["test_accuracy"] == pytest.approx(matrix.accuracy)
    assert found["test_accuracy_first_task"] == matrix.rows[2][0]
    assert len({row[0] for row in matrix.rows}) > 1


def test_a_resumed_run_and_a_killed_one_have_the_same_bytes(whole, tmp_path):
    run(tmp_path, last=16)
    resumed, state = run(tmp_path, resumes=True)
    assert resumed == whole[0]
    assert torch.equal(state, whole[1])
    program = (
        "from pathlib import Path; from tests.tasks.continual.test_accuracies import run; "
        f"run(Path({str(tmp_path / 'killed')!r}), dies_at=28)"
    )
    (tmp_path / "killed").mkdir()
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    again, state = run(tmp_path / "killed", resumes=True)
    assert again == whole[0]
    assert torch.equal(state, whole[1])


def test_the_measures_are_those_of_their_definitions():
    matrix = AccuracyMatrix(((0.9,), (0.8, 0.7), (0.85, 0.5, 0.6)))
    assert matrix.metrics() == pytest.approx(
        {
            "accuracy": (0.85 + 0.5 + 0.6) / 3,
            "forgetting": ((0.9 - 0.85) + (0.7 - 0.5)) / 2,
            "learning_accuracy": (0.9 + 0.7 + 0.6) / 3,
        }
    )
    assert AccuracyMatrix(((0.5,),)).forgetting == 0
    assert matrix.picture().startswith(b"\x89PNG")


def test_messages(tmp_path):
    with pytest.raises(ValueError, match=r"matrix needs a stage that has ended, got none"):
        _ = JudgeAfterEachTask(trainer()).matrix
    run(tmp_path, last=16)
    with pytest.raises(
        ValueError, match=r"path must hold a row for each of 1 stages .* got 0 from"
    ):
        JudgeAfterEachTask(trainer(tmp_path / "run", resumes=True))
    other = Trainer(
        FewShotProblem(torch.nn.Linear(1, 1), loss="mse"), Sinusoid(), ITD(), quiet=True
    )
    with pytest.raises(
        ValueError, match=r"trainer must have an ImageStream as its sampler, got Sin"
    ):
        JudgeAfterEachTask(other)
