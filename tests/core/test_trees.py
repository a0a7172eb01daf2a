"""Arithmetic on trees against the same arithmetic on their flat vectors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metadist import trees
from tests.problems import assert_same_bytes, random_like

SHAPES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    min_size=1,
    max_size=4,
)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def tree_of(shapes, seed):
    return random_like({name: torch.empty(shape) for name, shape in shapes.items()}, seed)


@quick
@given(SHAPES)
def test_unflatten_is_the_inverse_of_flatten(shapes):
    tree = tree_of(shapes, 0)
    flat = trees.flatten(tree)
    assert flat.shape == (trees.num_elements(tree),)
    assert_same_bytes(trees.unflatten(flat, tree), tree)
    assert torch.equal(trees.flatten(trees.unflatten(flat, tree)), flat)


@quick
@given(SHAPES, st.floats(-3, 3))
def test_algebra_is_that_of_the_flat_vectors(shapes, factor):
    first, second = tree_of(shapes, 1), tree_of(shapes, 2)
    a, b = trees.flatten(first), trees.flatten(second)
    for tree, flat in (
        (trees.add(first, second), a + b),
        (trees.add(first, second, factor), a + factor * b),
        (trees.sub(first, second), a - b),
        (trees.scale(first, factor), factor * a),
        (trees.multiply(first, second), a * b),
        (trees.zeros_like(first), torch.zeros_like(a)),
    ):
        assert list(tree) == list(first)
        assert torch.equal(trees.flatten(tree), flat)
    assert trees.dot(first, second).shape == ()
    assert torch.allclose(trees.dot(first, second), a @ b, rtol=1e-12, atol=1e-12)
    assert torch.allclose(trees.norm(first), a.norm(), rtol=1e-12, atol=1e-12)


def test_trees_are_joined_by_name_not_by_order():
    first = {"a": torch.tensor(1.0), "b": torch.tensor(10.0)}
    second = {"b": torch.tensor(2.0), "a": torch.tensor(3.0)}
    assert trees.sub(first, second) == {"a": torch.tensor(-2.0), "b": torch.tensor(8.0)}
    assert list(trees.add(second, first)) == ["b", "a"]


@pytest.mark.parametrize(
    "function", [trees.add, trees.sub, trees.multiply, trees.dot, lambda a, b: trees.stack([a, b])]
)
def test_trees_of_different_names_are_refused(function):
    first, second = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)}
    with pytest.raises(
        ValueError, match=r"same names, got \['b'\] only in the first and \[\] only"
    ):
        function(first, second)
    with pytest.raises(ValueError, match=r"got \[\] only in the first and \['b'\] only in another"):
        function(second, first)


def test_stack_and_select_are_inverses():
    parts = [random_like({"a": torch.empty(2), "b": torch.empty(())}, seed) for seed in range(3)]
    stacked = trees.stack(parts)
    assert {name: leaf.shape for name, leaf in stacked.items()} == {"a": (3, 2), "b": (3,)}
    for index, part in enumerate(parts):
        assert_same_bytes(trees.select(stacked, index), part)


def test_detach_cuts_the_graph_and_keeps_the_values():
    tree = {"a": torch.ones(2, requires_grad=True) * 3}
    assert not trees.detach(tree)["a"].requires_grad
    assert_same_bytes(trees.detach(tree), {"a": torch.full((2,), 3.0)})


def test_dot_of_empty_trees_is_zero():
    assert trees.dot({}, {}) == 0 and trees.norm({}) == 0


def test_unflatten_refuses_a_vector_of_another_length():
    with pytest.raises(
        ValueError, match=r"flat must have shape \(3,\) to fill the tree, got \(4,\)"
    ):
        trees.unflatten(torch.zeros(4), {"a": torch.zeros(3)})


def test_check_flattenable_gives_the_dtype():
    assert trees.check_flattenable({"a": torch.zeros(1).double()}, "outer") == torch.float64


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"a": torch.zeros(1, dtype=torch.int64)},
        {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float64)},
    ],
)
def test_check_flattenable_refuses_all_but_one_floating_dtype(tree):
    with pytest.raises(
        ValueError, match=r"outer must hold tensors of one floating dtype, got .*cast"
    ):
        trees.check_flattenable(tree, "outer")


@pytest.mark.parametrize("size", [0, 1, 2])
def test_tensors_of_any_stride_have_bytes(size):
    expanded = torch.ones(1).expand(size)
    assert trees.as_bytes(expanded).numel() == 4 * size
    assert trees.as_bytes(torch.ones(3, 0)[:, :1].sum(1)[:size]).numel() == 4 * size


def test_same_bytes_sees_dtype_shape_and_signs_of_zero_and_takes_nan_as_itself():
    one = torch.tensor([[1.0, torch.nan, 0.0]])
    assert trees.same_bytes(one, one.expand(2, 3)[:1])
    assert trees.same_bytes(one.T.contiguous().T, one)
    others = (one.double(), one[0], one * torch.tensor([1.0, 1.0, -1.0]))
    assert not any(trees.same_bytes(one, other) for other in others)
