"""Mini-batches by number: which examples they are, alone and for a stack of tasks."""

import itertools

import pytest
import torch
from scipy.stats import chi2
from torch.func import vmap

from metadist.autograd import AutogradOracle
from metadist.draws import Draw, permuted, random_keys
from metadist.task import stack_tasks
from tests.problems import DOUBLE, Quadratic, Smooth, quadratic_task, smooth_task


def test_without_batch_size_every_draw_is_the_whole_set():
    task = quadratic_task(0)
    for batch_size in (None, 3, 99):
        oracle = AutogradOracle(Quadratic(2, 4), task, batch_size)
        assert torch.equal(oracle.batch(oracle.draw_inner()).index, torch.arange(3))
        assert torch.equal(oracle.batch(oracle.draw_outer()).index, torch.arange(2))


def test_a_draw_is_replayable_and_a_fresh_one_is_another_batch():
    task = smooth_task(4, num_support=40)
    oracle = AutogradOracle(Smooth(), task, batch_size=5, seed=3)
    draws = [oracle.draw_inner() for _ in range(8)]
    batches = [oracle.batch(draw).index.tolist() for draw in draws]
    assert [oracle.batch(draw).index.tolist() for draw in draws] == batches
    again = AutogradOracle(Smooth(), task, batch_size=5, seed=3)
    assert [again.batch(again.draw_inner()).index.tolist() for _ in range(8)] == batches
    assert len({tuple(sorted(batch)) for batch in batches}) == 8


def test_a_draw_takes_its_examples_without_replacement_and_keeps_their_rows():
    task = smooth_task(4, num_support=9, num_query=7)
    oracle = AutogradOracle(Smooth(), task, batch_size=4)
    for draw, full in ((oracle.draw_inner(), task.support), (oracle.draw_outer(), task.query)):
        batch = oracle.batch(draw)
        assert len(set(batch.index.tolist())) == 4
        for part, whole in zip(batch.tensors, full.tensors, strict=True):
            assert torch.equal(part, whole[batch.index])


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"index": 5}, {"counter": 1}, {"seed": -1}],
    ids=["seed", "task", "counter", "negative seed"],
)
def test_another_seed_task_or_counter_is_another_batch(other):
    def batch(seed=0, index=4, counter=0):
        oracle = AutogradOracle(Smooth(), smooth_task(index, num_support=60), 6, seed)
        return oracle.batch(Draw("support", counter)).index.tolist()

    assert sorted(batch(**other)) != sorted(batch())


def is_uniform(counts):
    """Whether these counts may be those of classes that are equally likely."""
    counts = torch.as_tensor(counts, dtype=DOUBLE)
    expected = counts.mean()
    return chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1) > 1e-3


CPU = torch.device("cpu")


@pytest.mark.parametrize("over", ["counter", "seed", "task"])
def test_draws_are_uniform_over_subsets(over):
    frequency = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for number in range(1500):
        seeds = {"seed": (number, 0, 0), "task": (0, number, 0), "counter": (0, 0, number)}[over]
        chosen = permuted(range(2), 5, *seeds, device=CPU).tolist()
        frequency[tuple(sorted(chosen))] += 1
    assert is_uniform(list(frequency.values()))


@pytest.mark.parametrize("size", [1031, 1250, 2500])
def test_draws_of_large_sets_are_uniform(size):
    """Where a place goes, and how far from its neighbours in a row and in a column."""
    drawn = torch.stack([permuted(range(51), size, seed, 3, device=CPU) for seed in range(4000)])
    first, classes = drawn[:, 0], 25
    assert is_uniform((first * classes // size).bincount(minlength=classes))
    for place in (1, 24, 25, 50):
        distance = (drawn[:, place] - first) % size - 1  # never the same place
        assert is_uniform((distance * classes // (size - 1)).bincount(minlength=classes))


@pytest.mark.parametrize(
    "size", [1, 2, 3, 7, 64, 97, 1023, 1024, 1025, 1031, 2048, 4096, 4999, 5003, 65536, 65537]
)
def test_a_permutation_has_every_place_once_and_is_a_function_of_the_seeds(size):
    seeds = (7, -2, 10**12)
    whole = permuted(range(size), size, *seeds, device=CPU)
    assert whole.dtype == torch.int64
    assert torch.equal(whole.sort().values, torch.arange(size))
    middle = range(size // 3, size // 2 + 1)
    assert torch.equal(
        permuted(middle, size, *seeds, device=CPU), whole[middle.start : middle.stop]
    )
    on_tensors = permuted(range(size), size, 7, torch.tensor(-2), 10**12, device=CPU)
    assert torch.equal(on_tensors, whole)
    if size > 50:
        other = permuted(range(size), size, 7, -1, 10**12, device=CPU)
        assert int((other == whole).sum()) < 10


def test_draws_are_the_same_for_ever():
    drawn = [permuted(range(3), size, 1, 2, 3, 4, device=CPU).tolist() for size in (10, 5003)]
    assert drawn == [[7, 2, 0], [3990, 4871, 927]]


def test_mini_batches_of_large_sets_are_those_of_a_stack_of_tasks():
    tasks = [smooth_task(index, num_support=1100, num_query=1531) for index in (3, 70)]

    def indices(task):
        oracle = AutogradOracle(Smooth(), task, batch_size=200, seed=2, step=5)
        drawn = [oracle.batch(oracle.draw_inner()), oracle.batch(oracle.draw_outer())]
        return tuple(batch.index for batch in (*drawn, *map(oracle.batch, oracle.parts("query"))))

    together = vmap(indices)(stack_tasks(tasks))
    for b, task in enumerate(tasks):
        inner, outer, *parts = indices(task)
        assert len(set(inner.tolist())) == len(set(outer.tolist())) == 200
        assert sorted(torch.cat(parts).tolist()) == list(range(1531))
        for many, one in zip(together, indices(task), strict=True):
            assert torch.equal(many[b], one)


def test_random_keys_are_those_of_splitmix64():
    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    def expected(*seeds):
        key = 0
        for seed in seeds:
            key = mix((key + seed + 0x9E3779B97F4A7C15) % 2**64)
        return key

    index = torch.tensor([0, 1, 2, 10**12])
    keys = random_keys(index, 7, 123456789, torch.tensor(3))
    assert [key % 2**64 for key in keys.tolist()] == [
        expected(7, 123456789, 3, entry) for entry in index.tolist()
    ]


def test_draws_of_a_stack_of_tasks_are_those_of_its_tasks():
    tasks = [smooth_task(index, num_support=11, num_query=8) for index in (3, 70, 5)]

    def indices(task):
        oracle = AutogradOracle(Smooth(), task, batch_size=4, seed=2)
        inner, outer = oracle.draw_inner(), oracle.draw_outer()
        return oracle.batch(inner).index, oracle.batch(outer).index

    together = vmap(indices)(stack_tasks(tasks))
    for b, task in enumerate(tasks):
        for many, one in zip(together, indices(task), strict=True):
            assert torch.equal(many[b], one)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must be >= 1 or None .*, got {batch_size}"):
        AutogradOracle(Smooth(), smooth_task(0), batch_size)
