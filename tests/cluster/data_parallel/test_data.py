"""Cutting a task into shards: no example lost, and derivatives that add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist.autograd import AutogradOracle
from metadist.cluster.data_parallel.checks import check_classes, check_partition, shard_fault
from metadist.cluster.data_parallel.data import ShardOracle, class_labels, cut, sample_shard, spread
from metadist.draws import Draw, Source
from metadist.problem import Problem
from metadist.task import Batch, Task, stay_on_host, stays_on_host
from metadist.trees import Params, add, scale
from tests.cluster.data_parallel.shards import Cleaning, Unequal, cleaning_task
from tests.problems import DOUBLE, Quadratic, assert_close, generator, quadratic_task

PROBLEM = Cleaning()
OUTER = PROBLEM.init_outer(generator(0))
INNER = {"slope": torch.tensor([0.3, -0.1, 0.2], dtype=DOUBLE), "offset": torch.ones(1).double()}


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
def test_cutting_loses_and_repeats_no_example(num_support, num_query, num_parts):
    task = Task(
        Batch.of(torch.arange(num_support) * 10), Batch.of(torch.arange(num_query) + 1000), 0
    )
    shards = [cut(task, part, num_parts) for part in range(num_parts)]
    for name in ("support", "query"):
        full = getattr(task, name)
        batches = [getattr(shard, name) for shard in shards]
        joined = torch.cat([batch.index for batch in batches])
        assert torch.equal(joined, full.index)
        assert torch.equal(torch.cat([batch.tensors[0] for batch in batches]), full.tensors[0])
        sizes = [len(batch.index) for batch in batches]
        assert max(sizes) - min(sizes) <= 1


def test_a_shard_has_memory_of_its_own():
    task = cleaning_task()
    shard = cut(task, 0, 2)
    shard.support.tensors[0].zero_()
    assert task.support.tensors[0][0].any()


def test_what_stays_on_the_host_is_cut_without_a_copy():
    rows = stay_on_host(torch.arange(22).view(11, 2))
    source = torch.arange(11)
    task = Task(Batch.named(ids=rows, source=source), Batch.named(ids=rows), 0)
    ids, sources = cut(task, 1, 2).support.tensors
    assert torch.equal(ids, rows[5:]) and ids.data_ptr() == rows[5:].data_ptr()
    assert stays_on_host(ids) and sources.data_ptr() != source[5:].data_ptr()


partitions = st.lists(st.integers(0, 3), min_size=11, max_size=11)


@settings(deadline=None)
@given(partitions, partitions, st.sampled_from([None, 1, 3, 11]), st.integers(0, 3), st.booleans())
def test_shares_times_derivatives_of_any_shards_add_up(of_support, of_query, size, step, by_part):
    task = cleaning_task(11, 11)

    def shard(part):
        owned = [(torch.tensor(owner) == part).nonzero()[:, 0] for owner in (of_support, of_query)]
        return Task(task.support.take(owned[0]), task.query.take(owned[1]), 0)

    options = {"batch_size": size, "seed": 5, "step": step}
    whole = AutogradOracle(PROBLEM, task, **options, eager=True)
    shards = [ShardOracle(PROBLEM, shard(part), (11, 11), **options) for part in range(4)]
    sources: list[tuple[Source, str]] = [("support", "inner_grads"), ("query", "outer_grads")]
    for source, method in sources:
        draw = whole.parts(source)[-1] if by_part else Draw(source, 7)
        chosen = whole.batch(draw).index.tolist()
        found = [index for s in shards for index in s.batch(draw).index.tolist()]
        assert sorted(found) == sorted(chosen)
        assert sum(s.share(draw) for s in shards) == pytest.approx(1)
        totals: list[Params] = []
        for s in shards:
            if s.share(draw):
                trees = [scale(t, s.share(draw)) for t in getattr(s, method)(OUTER, INNER, draw)]
                totals = (
                    [add(a, b) for a, b in zip(totals, trees, strict=True)] if totals else trees
                )
        for actual, expected in zip(
            totals, getattr(whole, method)(OUTER, INNER, draw), strict=True
        ):
            assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize("by_part", [False, True])
def test_shards_of_large_sets_agree_on_a_draw(by_part):
    task = cleaning_task(5_003, 1_500)
    whole = AutogradOracle(PROBLEM, task, 700, seed=5, eager=True)
    draw = whole.parts("support")[-1] if by_part else Draw("support", 7)
    places = torch.randperm(5_003, generator=torch.Generator().manual_seed(0))
    shards = [task._replace(support=task.support.take(owned)) for owned in places.split(2_000)]
    held = [ShardOracle(PROBLEM, shard, (5_003, 1_500), 700, seed=5) for shard in shards]
    found = torch.cat([oracle.batch(draw).index for oracle in held])
    assert sorted(found.tolist()) == sorted(whole.batch(draw).index.tolist())
    assert len(found) == (5_003 % 700 if by_part else 700)
    assert all(oracle.share(draw) == len(oracle.batch(draw).index) / len(found) for oracle in held)


def test_a_sampler_may_cut_by_itself():
    shards = [sample_shard(Unequal(), part, 3) for part in range(3)]
    assert [shard.support.index.tolist() for shard in shards] == [
        [0, 3, 4, 7, 8], [1, 5, 9], [2, 6, 10]
    ]  # fmt: skip
    check_partition([shard.support.index for shard in shards], "support")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[0, 1], []], r"shard 1 must hold at least one query example, got none: num_workers must"),
        ([[0, 1], [1, 2]], r"shards must hold every position .* once, from 0 on, got 1 where 2"),
        ([[0, 1], [3]], r"got 3 where 2 was due: see `shard` of the sampler"),
        ([[1, 2], [3]], r"got 1 where 0 was due"),
    ],
)  # fmt: skip
def test_what_is_no_partition_is_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        check_partition([torch.tensor(index, dtype=torch.int64) for index in indices], "query")


class Labelled(Unequal):
    num_classes = 3


def test_labels_are_those_of_samplers_with_classes():
    inputs, labels = torch.zeros(4, 2), torch.tensor([2, 0, 2, 0])
    assert class_labels(Labelled(), Batch.of(inputs, labels)) == {0, 2}
    assert class_labels(Labelled(), Batch.of(labels, inputs)) is None
    assert class_labels(Labelled(), Batch.of(inputs, labels.float())) is None
    assert class_labels(Unequal(), Batch.of(inputs, labels)) is None
    batch = Batch.named(targets=labels, columns=labels, values=inputs)
    assert class_labels(Labelled(), batch) == {0, 2}
    with pytest.raises(
        ValueError, match="must be named in a batch of more than two tensors, got 3"
    ):
        class_labels(Labelled(), Batch.of(*batch.tensors))


def test_a_class_that_a_shard_lacks_is_told():
    check_classes([{0, 2}, {2, 0}], "query")
    with pytest.raises(ValueError, match=r"the query .* all 3 classes, got none of class 1, 2 in"):
        check_classes([{0, 1, 2}, {0}], "query")


def test_rows_are_spread_among_zeros():
    full = spread(torch.tensor([[1.0], [2.0]]), torch.tensor([3, 1]), 4)
    assert full.tolist() == [[0.0], [2.0], [0.0], [1.0]]


class Sum(Cleaning):
    def inner_loss(self, context, inner, batch):
        return super().inner_loss(context, inner, batch) * len(batch.index)


class Centred(Cleaning):
    def outer_loss(self, context, inner, batch):
        residuals = self._residuals(inner, batch)
        return (residuals - residuals.mean()).square().mean()


class Encoded(Cleaning):
    def encode(self, outer, task):
        return {"weights": outer["weights"], "ridge": outer["ridge"] * 1.0}


class Normalised(Cleaning):
    def inner_loss(self, context, inner, batch):
        context = {**context, "weights": context["weights"].softmax(0)}
        return super().inner_loss(context, inner, batch)


class Penalised(Cleaning):
    def outer_loss(self, context, inner, batch):
        return super().outer_loss(context, inner, batch) + context["weights"].square().mean()


def fault(problem: Problem, task: Task | None = None, part: int = 1, num_parts: int = 2):
    outer = problem.init_outer(generator(0))
    task = task or cleaning_task()
    shard = cut(task, part, num_parts)
    start = problem.init_inner(outer, shard)
    return shard_fault(problem, shard, outer, start, len(task.support.index))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Sum(), "inner_loss must be a mean over examples (plus terms without data), but on 6"),
        (Centred(), "outer_loss must be a mean over examples"),
        (Encoded(), "encode must return outer variables as they are, got another ridge: what"),
        (Normalised(), "per_example variables (weights) must enter inner_loss as context[name]"),
        (Penalised(), "per_example variables (weights) must enter outer_loss as context[name]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_does_not_add_up_is_found(problem, message):
    found = fault(problem)
    assert found is not None and found.startswith(message)


def test_a_sum_over_a_single_example_is_found_too():
    assert "on 1 examples" in str(fault(Sum(), part=10, num_parts=11))


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_means_pass(num_parts):
    assert fault(Cleaning(), part=num_parts - 1, num_parts=num_parts) is None
    assert (
        fault(Quadratic(2, 4), quadratic_task(0, num_support=7, num_query=7), 0, num_parts) is None
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("source", ["support", "query"])
def test_data_that_is_not_finite_is_found_by_its_position(source, bad):
    task = cleaning_task()
    getattr(task, source).tensors[1][5] = bad
    assert fault(Cleaning(), task) == (
        f"the {source} set must be finite, got NaN or Inf in its tensor 1 at example 5"
    )


def test_single_precision_passes():
    class Single(Cleaning):
        def init_outer(self, generator):
            return {name: leaf.float() for name, leaf in super().init_outer(generator).items()}

        def init_inner(self, outer, task):
            return {name: leaf.float() for name, leaf in super().init_inner(outer, task).items()}

    task = cleaning_task(200, 200)
    support, query = (
        Batch.of(*(t.float() for t in batch.tensors)) for batch in (task.support, task.query)
    )
    assert fault(Single(200), Task(support, query, 0)) is None
