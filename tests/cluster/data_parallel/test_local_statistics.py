"""Batch norm on shards: each worker's own part of a batch, and the problem that this solves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from ray import exceptions
from torch import Tensor
from torch.nn import functional as F

from metadist import LocalExecutor
from metadist.algorithms import ITD
from metadist.cluster import DataParallelExecutor
from metadist.cluster.data_parallel.data import OwnDraws, ShardOracle, check_own_draws, cut
from metadist.compute import Compute
from metadist.draws import Draw, MiniBatches
from metadist.optimizer import OuterOptimizer
from metadist.run.checkpoint import CheckpointError
from metadist.step_rules import SGD
from metadist.task import Batch
from metadist.trees import Params
from tests.cluster.data_parallel.shards import (
    Cleaning,
    InProcess,
    Whole,
    assert_same_state,
    bytes_of,
    cleaning,
    cleaning_task,
    solve,
)
from tests.cluster.data_parallel.test_executor import ALL, Summed
from tests.problems import DOUBLE, assert_close, generator

CPU = torch.device("cpu")
T = 3


class Normed(Cleaning):
    """A hidden layer with batch norm, whose statistics are those of the batch."""

    def init_inner(self, outer: Params, task: Any) -> Params:
        random = generator(5)
        hidden = torch.randn(4, 3, generator=random, dtype=DOUBLE)
        return {
            "hidden": hidden,
            # Batch norm cancels it: its gradient is rounding errors.
            "shift": torch.zeros(4, dtype=DOUBLE),
            "slope": torch.randn(4, generator=random, dtype=DOUBLE),
            "offset": torch.ones(1, dtype=DOUBLE),
        }

    def _residuals(self, inner: Params, batch: Batch) -> Tensor:
        inputs, targets = batch.tensors
        hidden = F.linear(inputs, inner["hidden"], inner["shift"])
        hidden = F.batch_norm(hidden, None, None, training=True).tanh()
        return hidden @ inner["slope"] + inner["offset"] - targets


class TwoParts(Normed):
    """The same in one process: the mean of the losses of two parts, by their examples."""

    def _mean(self, loss: Any, context: Params, inner: Params, batch: Batch) -> Any:
        size = len(batch.index)
        parts = [batch.take(torch.arange(size // 2)), batch.take(torch.arange(size // 2, size))]
        return sum(len(part.index) / size * loss(context, inner, part) for part in parts)

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._mean(super().inner_loss, context, inner, batch)

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._mean(super().outer_loss, context, inner, batch)

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        def error(*arguments: Any) -> Tensor:
            return super(TwoParts, self).metrics(*arguments)["error"]

        return {"error": self._mean(error, context, inner, batch)}


def local(num_workers: int) -> InProcess:
    return InProcess(num_workers, batch_statistics="local")


def test_the_hypergradient_is_that_of_two_parts_by_plain_autograd():
    problem, task = Normed(), cleaning_task()
    outer = problem.init_outer(torch.Generator().manual_seed(3))
    x = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}

    def mean(loss: Any, source: str, y: Params) -> Tensor:
        parts = [getattr(cut(task, part, 2), source) for part in range(2)]
        total = sum(len(part.index) for part in parts)
        values = [len(part.index) / total * loss(x, y, part) for part in parts]
        return values[0] + values[1]

    y = {name: leaf.requires_grad_() for name, leaf in problem.init_inner(outer, task).items()}
    for _ in range(T):
        g = mean(problem.inner_loss, "support", y)
        gradients = torch.autograd.grad(g, list(y.values()), create_graph=True)
        y = {name: y[name] - 0.1 * d for name, d in zip(y, gradients, strict=True)}
    f = mean(problem.outer_loss, "query", y)
    expected = dict(zip(x, torch.autograd.grad(f, list(x.values())), strict=True))

    state, _ = solve(
        local(2),
        ITD(T, inner_optimizer=SGD(0.1)),
        1,
        problem=problem,
        sampler=Whole(),
        optimizer=OuterOptimizer("sgd", lr=1.0),
    )
    assert_close({name: outer[name] - state.outer[name] for name in outer}, expected, 1e-10)


@pytest.mark.parametrize(
    "name", ["aid", "bome", "f2sa", "fg2u_adam", "itd_adam", "lancbio", "meha", "sama_adam", "soba"]
)
def test_two_workers_solve_the_problem_of_two_parts(name):
    expected, reference = solve(LocalExecutor(), ALL[name], problem=TwoParts(), sampler=Whole())
    found, reports = solve(local(2), ALL[name], problem=Normed(), sampler=Whole())
    assert_same_state(found, expected, 1e-8)
    for mine, theirs in zip(reports, reference, strict=True):
        for metric, value in theirs.results[0].metrics.items():
            assert mine.results[0].metrics[metric] == pytest.approx(value, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(("name", "batch_size"), [("soba", None), ("soba", 4), ("saba", 4)])
def test_one_worker_gives_the_bytes_of_one_process(name, batch_size):
    given: dict[str, Any] = {"problem": Normed(), "batch_size": batch_size}
    expected, _ = solve(LocalExecutor(), ALL[name], **given)
    assert bytes_of(solve(local(1), ALL[name], **given)[0]) == bytes_of(expected)


def test_a_lost_worker_changes_no_byte():
    given: dict[str, Any] = {"problem": Normed(40), "sampler": Whole(40, 30), "batch_size": 9}
    expected, _ = solve(local(3), ALL["fsla"], 4, **given)
    executor = local(3)
    solve(executor, ALL["fsla"], 1, **given)
    executor.pool._slots[1].actor.faults.append(exceptions.RayActorError())
    reports = list(executor.run(4))
    assert sum(report.lost_workers for report in reports) == 1
    assert bytes_of(executor.state()) == bytes_of(expected)


# Draws.

SIZES = ((20, 7, 13), (12, 12, 12))


def draws(part: int, step: int = 0) -> OwnDraws:
    return OwnDraws(SIZES, part, 0, 12, 5, step)


def places(draws: MiniBatches, draw: Draw) -> Tensor:
    chosen = draws.chosen(draw, CPU)
    assert chosen is not None
    return chosen


def test_every_worker_draws_its_share_and_every_example_is_drawn_as_often():
    times: list[Counter[int]] = [Counter() for _ in range(3)]
    for step in range(1000):
        chosen = [places(draws(part, step), Draw("support", 7)).tolist() for part in range(3)]
        assert sum(map(len, chosen)) == 12
        assert all(
            abs(len(own) - 12 * size / 40) < 2 for own, size in zip(chosen, SIZES[0], strict=True)
        )
        for count, own in zip(times, chosen, strict=True):
            assert len(set(own)) == len(own)
            count.update(own)
    for count, size in zip(times, SIZES[0], strict=True):
        assert len(count) == size
        # 300 expected, with a standard deviation of at most 14.5
        assert all(abs(number - 300) < 75 for number in count.values())


def test_shards_of_one_size_choose_other_places():
    first, second = (places(draws(part), Draw("query", 1)).tolist() for part in (0, 1))
    assert first != second


def test_parts_hold_every_example_once():
    for part in range(3):
        found = torch.cat([places(draws(part), draw) for draw in draws(part).parts("support")])
        assert sorted(found.tolist()) == list(range(SIZES[0][part]))
    for number, draw in enumerate(draws(0).parts("support")):
        held = sum(len(places(draws(part), draw)) for part in range(3))
        assert held == draws(0).size(draw) == (12, 12, 12, 4)[number]


def test_one_shard_draws_what_one_process_draws():
    alone, usual = OwnDraws(((40,), (36,)), 0, 0, 12, 5, 3), MiniBatches((40, 36), 0, 12, 5, 3)
    for draw in (Draw("support", 2), Draw("query", 3), *usual.parts("support")):
        assert torch.equal(places(alone, draw), places(usual, draw))


def test_a_worker_takes_its_own_examples_and_shares_add_up():
    task = cleaning_task(40, 36)
    shards = [cut(task, part, 3) for part in range(3)]
    sizes = (13, 13, 14), (12, 12, 12)
    oracles = [
        ShardOracle(Normed(40), shard, (40, 36), 12, 5, shard_sizes=sizes, part=part)
        for part, shard in enumerate(shards)
    ]
    for draw in (Draw("support", 2), Draw("query", 3)):
        assert sum(oracle.share(draw) for oracle in oracles) == pytest.approx(1)
        for oracle, shard in zip(oracles, shards, strict=True):
            held = shard.support if draw.source == "support" else shard.query
            assert set(oracle.batch(draw).index.tolist()) <= set(held.index.tolist())


# Refusals.


def test_without_it_batch_norm_is_refused_and_the_option_is_named():
    with pytest.raises(ValueError, match=r"inner_loss must be a mean .*batch_statistics='local'"):
        solve(InProcess(2), ALL["soba"], problem=Normed())


def test_sums_are_refused_all_the_same():
    with pytest.raises(ValueError, match=r"in shard 0 inner_loss must be a mean .* twice it is"):
        solve(local(2), ALL["soba"], problem=Summed())


def test_a_part_of_one_example_is_refused():
    message = "batch_size must leave every worker two .* got 4 of 11 support examples, .* hold 0: "
    with pytest.raises(ValueError, match=message):
        solve(local(3), ALL["soba"], problem=Normed(), sampler=Whole(), batch_size=4)
    check_own_draws(((6, 5), (4, 3)), (6, None))


def test_it_is_one_of_two():
    with pytest.raises(
        ValueError, match=r"batch_statistics must be one of \('whole', 'local'\), got"
    ):
        DataParallelExecutor(batch_statistics="global")  # type: ignore[arg-type]


def test_a_run_keeps_its_number_of_workers(tmp_path):
    def trainer(executor: Any, **options: Any) -> Any:
        compute = Compute(device="cpu")
        return cleaning(ALL["soba"], executor, sampler=Whole(), compute=compute, **options)

    whole = trainer(local(2))
    whole.fit(4)
    trainer(local(2), run_dir=tmp_path / "run").fit(2)
    for other in (local(3), local(1), InProcess(2), LocalExecutor()):
        again = trainer(other, run_dir=tmp_path / "run")
        with pytest.raises(CheckpointError, match="batch_statistics must be the parts of 2 work"):
            again.restore()
    again = trainer(local(2), run_dir=tmp_path / "run")
    again.restore()
    again.fit(4)
    for name, leaf in whole.outer.items():
        assert torch.equal(again.outer[name], leaf)


def test_a_run_of_whole_batches_does_not_go_on_with_parts(tmp_path):
    options: dict[str, Any] = {"sampler": Whole(), "compute": Compute(device="cpu")}
    options["run_dir"] = tmp_path / "run"
    cleaning(ALL["soba"], LocalExecutor(), **options).fit(1)
    again = cleaning(ALL["soba"], local(2), **options)
    with pytest.raises(CheckpointError, match="batch_statistics must be whole batches as in"):
        again.restore()
    one = cleaning(ALL["soba"], local(1), **options)
    assert one.restore() is not None


def test_a_result_says_so():
    executor = DataParallelExecutor(batch_statistics="local")
    assert executor.describe()["batch_statistics"] == "local"
    assert "batch_statistics" not in DataParallelExecutor().describe()
