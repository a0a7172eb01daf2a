"""`encode_precision`: features in bfloat16, all that comes after them in the dtype of x."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from metadist import Trainer, adapt, evaluate, task_hypergradients
from metadist.algorithms import AID, BOME, ITD, SOBA
from metadist.compute import Compute
from metadist.models import Conv4
from metadist.problem import Problem
from metadist.run.checkpoint import CheckpointError
from metadist.task import Batch, Task, to_device
from metadist.tasks import FewShotProblem, Glyphs
from metadist.trees import flatten
from tests.helpers import (
    ADAM,
    Images,
    exact_state,
    fresh,
    images_of_conv4,
    make_trainer,
    small_conv4,
)
from tests.problems import generator, image_task

HALF = Compute(encode_precision="bf16", device="cpu")
ANIL = ITD(inner_steps=3, inner_lr=0.1)


def anil(**options):
    chosen: dict[str, Any] = {
        **images_of_conv4(),
        "algorithm": ANIL,
        "compute": HALF,
        "seed": None,
        "outer_optimizer": ADAM,
        "meta_batch_size": 4,
        "quiet": True,
    }
    return Trainer(**(chosen | options))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("algorithm", [ANIL, AID(inner_steps=5, inner_lr=0.1), BOME(), SOBA()])
def test_the_hypergradient_of_conv4_keeps_its_direction(algorithm, vectorize):
    torch.manual_seed(0)
    problem = FewShotProblem(Conv4(width=16), adapt="head", weight_decay=0.01)
    outer = problem.init_outer(generator(0))
    tasks = [Glyphs(n_way=5, k_shot=5, k_query=15).sample(index) for index in range(2)]
    found = []
    for precision in ("highest", "bf16"):
        total = task_hypergradients(
            *(problem, algorithm, outer, tasks),
            compute=Compute(encode_precision=precision, vectorize=vectorize, num_threads=1),
            states={} if algorithm.needs_kept_state else None,
            is_checked=True,
        ).total
        assert {leaf.dtype for leaf in total.values()} == {torch.float32}
        found.append(flatten(total))
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99
    assert not torch.equal(*found)


class Seeing(FewShotProblem):
    """Notes the dtypes that products have where."""

    def __init__(self):
        super().__init__(small_conv4(), adapt="head")
        self.seen = set()

    def encode(self, outer, task):
        self._note("encode", outer)
        return super().encode(outer, task)

    def init_inner(self, outer, task):
        self._note("init_inner", outer)
        return super().init_inner(outer, task)

    def inner_loss(self, context, inner, batch):
        self._note("inner_loss", context)
        return super().inner_loss(context, inner, batch)

    def outer_loss(self, context, inner, batch):
        self._note("outer_loss", context)
        return super().outer_loss(context, inner, batch)

    def _note(self, where, tree):
        leaf = next(iter(tree.values()))[:1].detach().flatten()
        self.seen.add((where, (leaf @ leaf).dtype))
        self.seen |= {(where, leaf.dtype) for leaf in tree.values()}


def test_only_encode_computes_in_bfloat16():
    problem = Seeing()
    outer = problem.init_outer(generator(0))
    tasks = [to_device(image_task(index), "cpu", torch.float32) for index in range(2)]
    for vectorize in (True, False):
        compute = Compute(encode_precision="bf16", vectorize=vectorize)
        task_hypergradients(problem, ANIL, outer, tasks, compute=compute, is_checked=True)
    evaluate(problem, Images(), ANIL, outer, 2, compute=HALF)
    adapt(problem, ANIL, outer, tasks[0], compute=HALF)
    rough = {where for where, dtype in problem.seen if dtype == torch.bfloat16}
    assert rough == {"encode"}
    assert {where for where, _ in problem.seen} == {
        *("encode", "init_inner", "inner_loss", "outer_loss"),
    }
    assert not torch.is_autocast_enabled("cpu")


class Ridge(Problem):
    """A user's problem, whose features go through `encode_tasks` as it is: under vmap."""

    def init_outer(self, generator):
        return {"w": torch.randn(6, 4, generator=generator)}

    def encode(self, outer, task):
        inputs = task.support.tensors[0]
        return {"features": torch.tanh(inputs @ outer["w"]), "w": outer["w"]}

    def init_inner(self, outer, task):
        return {"y": outer["w"].sum(0)}

    def inner_loss(self, context, inner, batch):
        return (context["features"][batch.index] @ inner["y"] - batch.tensors[1]).square().mean()

    def outer_loss(self, context, inner, batch):
        predicted = torch.tanh(batch.tensors[0] @ context["w"]) @ inner["y"]
        return (predicted - batch.tensors[1]).square().mean()


def test_a_problem_of_ones_own_may_encode_under_vmap():
    problem = Ridge()
    outer = problem.init_outer(generator(0))
    sets = [Batch.of(fresh((8, 6), seed), fresh((8,), 9 + seed)) for seed in range(4)]
    tasks = [Task(sets[0], sets[1], 0), Task(sets[2], sets[3], 1)]
    found = []
    for compute in (Compute(), replace(HALF, vectorize=True), replace(HALF, vectorize=False)):
        sums = task_hypergradients(problem, ANIL, outer, tasks, compute=compute, is_checked=True)
        found.append(flatten(sums.total))
    exact, together, alone = found
    assert torch.cosine_similarity(together, alone, dim=0) > 0.9999
    assert torch.cosine_similarity(together, exact, dim=0) > 0.999
    assert not torch.equal(together, exact)


class Cancelling(FewShotProblem):
    """Features of differences that bfloat16 does not have."""

    def encode(self, outer, task):
        context = super().encode(outer, task)
        return context | {
            name: ((1000 + leaf) @ torch.eye(leaf.shape[-1]) - 1000).float()
            for name, leaf in context.items()
            if name.startswith("features")
        }


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (FewShotProblem(small_conv4(), adapt="all"), "its encode multiplies nothing"),
        (FewShotProblem(small_conv4(), adapt="features.*"), "its encode multiplies nothing"),
        (
            FewShotProblem(small_conv4().double(), adapt="head"),
            "float32, got .bf16. and torch.float64",
        ),
        (Cancelling(small_conv4(), adapt="head"), "the cosine between the hypergradients"),
    ],
)
def test_what_bfloat16_does_not_help_is_refused(problem, message):
    with pytest.raises(ValueError, match=rf"encode_precision must be 'highest' .*{message}"):
        anil(problem=problem)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="encode_precision must be one of"):
        Compute(encode_precision="fp16")  # type: ignore[arg-type]


def test_a_run_says_that_it_has_it_and_keeps_to_it(tmp_path):
    trainer = anil(run_dir=tmp_path)
    trainer.fit(2)
    assert trainer.settings()["encode_precision"] == "bf16"
    protocol = trainer.test(Images(), 2).protocol
    assert (protocol["precision"], protocol["encode_precision"]) == ("highest", "bf16")
    resumed = anil(run_dir=tmp_path)
    resumed.restore()
    resumed.fit(4)
    whole = anil()
    whole.fit(4)
    assert exact_state(resumed) == exact_state(whole)
    other = anil(run_dir=tmp_path, compute=Compute(device="cpu"))
    with pytest.raises(CheckpointError, match="encode_precision must be bf16"):
        other.restore()


def test_runs_without_it_do_not_speak_of_it():
    trainer = make_trainer()
    assert "encode_precision" not in trainer.settings()
