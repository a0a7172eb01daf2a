"""The correction of recursive momentum at both ends of its weight."""

from metadist.algorithms.parts.recursion import recursion
from tests.algorithms.toys import point
from tests.problems import assert_close


def test_a_weight_of_1_forgets_and_one_of_0_adds_the_difference():
    new, old, direction = ({"y": point(value)} for value in (3.0, 2.0, 10.0))
    assert_close(recursion(new, old, direction, 1.0), new)
    assert_close(recursion(new, old, direction, 0.0), {"y": point(11.0)})
