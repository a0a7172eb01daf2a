"""Meta-SGD: it is ITD with one learned rate per number."""

from metadist.algorithms.itd import ITD
from metadist.algorithms.meta_sgd import MetaSGD
from metadist.hypergradient import task_hypergradients
from tests.problems import Smooth, assert_same_bytes, generator, smooth_task


def test_it_is_itd_with_a_learned_rate_per_number():
    problem, tasks = Smooth(), [smooth_task(index) for index in range(2)]
    outer = problem.init_outer(generator(0))
    start = problem.init_inner(outer, tasks[0])
    meta_sgd, itd = MetaSGD(3, 0.1), ITD(3, 0.1, learn_lr="per_element")
    own = meta_sgd.init_own(start)
    assert {leaf.shape for leaf in own.values()} == {leaf.shape for leaf in start.values()}
    assert_same_bytes(own, itd.init_own(start))
    one, other = (
        task_hypergradients(problem, algorithm, {**outer, **own}, tasks).total
        for algorithm in (meta_sgd, itd)
    )
    assert_same_bytes(one, other)
    assert all(bool((leaf != 0).all()) for name, leaf in one.items() if name in own)
