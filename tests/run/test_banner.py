"""What a run says before its first step, and of the time it takes."""

from __future__ import annotations

import pytest
import torch

from metadist import Batch, Problem, Trainer
from metadist.algorithms import ITD
from metadist.models import Conv4
from metadist.run.progress import Forecast, duration
from metadist.tasks import FewShotProblem, Glyphs, OneTask
from tests.helpers import make_trainer


def test_a_run_says_what_it_trains_on_what_and_where(capsys):
    torch.manual_seed(0)
    problem = FewShotProblem(Conv4(n_way=3, width=16), adapt="head")
    trainer = Trainer(problem, Glyphs(3, 1, 2), ITD(inner_steps=1, inner_lr=0.1), meta_batch_size=2)
    numbers = sum(leaf.numel() for leaf in trainer.outer.values())
    trainer.fit(1)
    assert numbers > 1000
    assert capsys.readouterr().err.splitlines()[:2] == [
        f"FewShotProblem of Conv4, by ITD: {numbers:,} numbers in x, 51 in y",
        "2 tasks a step on cpu: support 3 examples of 1x28x28, query 6 examples of 1x28x28",
    ]


def test_a_single_task_without_images_is_said_too(capsys):
    class Shrink(Problem):
        def init_outer(self, generator):
            return {"strength": torch.ones(())}

        def init_inner(self, outer, task):
            return {"weight": torch.ones_like(outer["strength"])}

        def outer_loss(self, context, inner, batch):
            return (batch.tensors[0] - inner["weight"]).square().mean()

        def inner_loss(self, context, inner, batch):
            loss = self.outer_loss(context, inner, batch)
            return loss + context["strength"] * inner["weight"] ** 2

    numbers = Batch.of(torch.arange(3.0))
    data = OneTask(numbers, Batch.of(torch.arange(4.0) + 10))
    Trainer(Shrink(), data, ITD(inner_steps=1, inner_lr=0.1)).fit(1)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "Shrink, by ITD: 1 numbers in x, 1 in y",
        "1 task a step on cpu: support 3 examples, query 4 examples",
    ]


def test_a_quiet_run_says_nothing(capsys):
    make_trainer(quiet=True).fit(1)
    assert capsys.readouterr().err == ""


def test_a_long_run_says_once_how_long_it_takes():
    forecast = Forecast(num_steps=103)
    assert forecast.after(1, 60.0) is None  # compiles
    assert forecast.after(2, 62.0) is None
    assert forecast.after(3, 64.0) == (
        "2 s a step: about 3 min for the remaining 100 steps, validation apart"
    )
    assert forecast.after(4, 66.0) is None


def test_a_run_that_slows_down_says_so_when_it_is_long():
    forecast = Forecast(num_steps=20)
    assert [forecast.after(step, 0.1 * step) for step in range(1, 6)] == [None] * 5
    assert forecast.after(6, 10.1) == (
        "2 s a step: about 28 s for the remaining 14 steps, validation apart"
    )


def test_a_resumed_run_counts_from_where_it_begins():
    forecast = Forecast(num_steps=1000)
    assert forecast.after(501, 0.0) is forecast.after(502, 5.0) is None
    assert "about 41 min for the remaining 497 steps" in str(forecast.after(503, 10.0))


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (89.0, "89 s"), (150.0, "2 min"), (9000.0, "2.5 h")]
)
def test_durations_have_the_unit_that_fits(seconds: float, text: str):
    assert duration(seconds) == text
