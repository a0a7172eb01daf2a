"""Losses whose examples go through a model part by part: the same derivatives, and less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from metadist import sum_of_micro_batches
from metadist.rematerialise import _warn_transformed
from metadist.task import Batch, Task
from metadist.tasks.network import call, trainable, without_parameters
from metadist.trees import Params, dot
from tests.core.test_rematerialise import METHODS, Weighted, hypergradient, peak_bytes
from tests.problems import assert_close, generator, oracle_of, randn

DOUBLE = torch.float64
EXAMPLES, LENGTH, WORDS = 7, 5, 6


class Tagger(nn.Module):
    """Logits (R, T, V) of tokens (R, T)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.hidden, self.head = nn.Linear(2 * width, width), nn.Linear(width, WORDS)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.embed(ids)
        context = embedded.cumsum(1)
        hidden = self.hidden(torch.cat([embedded, context], -1)).tanh()
        found: Tensor = self.gain * self.head(hidden)
        return found


class PerToken(Weighted):
    """A mean over the tokens of all examples, weighted and normalised over the whole draw."""

    def __init__(self, micro_batch: int | None, width: int = 4) -> None:
        torch.manual_seed(0)
        model = Tagger(width).double()
        self._start, self._num_examples = trainable(model), EXAMPLES
        self._model, self._micro_batch = without_parameters(model), micro_batch

    def _sum(self, inner: Params, ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logits = call(self._model, inner, ids)
        losses = F.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        return (weights[:, None] * losses).sum()

    def _mean(self, inner: Params, batch: Batch, weights: Tensor) -> Tensor:
        ids, labels = batch.tensors
        each = weights / (weights * (labels != -100).sum(1)).sum()
        return sum_of_micro_batches(self._sum, (inner,), (ids, labels, each), self._micro_batch)

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        weights = context["logits"][batch.index].softmax(0)
        decay = context["decay"].exp() * dot(inner, inner)
        return self._mean(inner, batch, weights) + decay

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._mean(inner, batch, context["logits"].new_ones(len(batch.index)))


def sentences(num_examples: int = EXAMPLES, length: int = LENGTH) -> Task:
    """Texts of other lengths, so that no two parts have as many tokens."""

    def batch(seed: int) -> Batch:
        random = generator(seed)
        ids = torch.randint(WORDS, (num_examples, length), generator=random)
        size = torch.randint(1, length + 1, (num_examples, 1), generator=random)
        labels = torch.where(torch.arange(length) < size, ids.roll(-1, 1), -100)
        return Batch.of(ids, labels)

    return Task(batch(1), batch(2), 0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_hypergradient_of_whole_draws(name):
    expected, found = (
        hypergradient(PerToken(micro_batch), METHODS[name], sentences())
        for micro_batch in (None, 3)
    )
    assert_close(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 2, 6, 7, 100])
def test_all_sizes_of_parts_give_the_same(micro_batch):
    expected, found = (
        hypergradient(PerToken(size), METHODS["itd"], sentences(), batch_size=6)
        for size in (None, micro_batch)
    )
    assert_close(found, expected, tolerance=1e-12)


def test_in_rematerialised_blocks_as_well():
    from metadist.models import rematerialise

    def problem(micro_batch: int | None) -> PerToken:
        made = PerToken(micro_batch)
        if micro_batch:
            rematerialise(made._model, ["hidden", "head"])
        return made

    expected, found = (
        hypergradient(problem(size), METHODS["itd, adam"], sentences()) for size in (None, 3)
    )
    assert_close(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("asked", ["inner_grads", "second_order", "outer_grads"])
def test_memory_is_that_of_one_part(asked):
    task = sentences(64, 40)

    def peak(micro_batch: int | None) -> int:
        problem = PerToken(micro_batch, width=16)
        problem._num_examples = 64
        oracle, x, y = oracle_of(problem, problem.init_outer(generator(0)), task, eager=True)
        draw = oracle.draw_outer() if asked == "outer_grads" else oracle.draw_inner()
        trees = (x, y, y) if asked == "second_order" else (x, y)
        return peak_bytes(lambda: oracle.derive(asked, draw, *trees))

    assert peak(4) < peak(None) / 5


def square(variables: Params, x: Tensor, weights: Tensor) -> Tensor:
    return (weights * (x @ variables["w"]).exp()).sum()


@pytest.mark.parametrize("of", ["variables", "examples", "nothing"])
def test_what_needs_no_gradient_has_none(of):
    variables = {"w": randn(1, 3).requires_grad_(of == "variables")}
    x, weights = randn(2, 5, 3), randn(3, 5).requires_grad_(of == "examples")
    whole = square(variables, x, weights)
    found = sum_of_micro_batches(square, (variables,), (x, weights), 2)
    torch.testing.assert_close(found, whole, rtol=1e-14, atol=0)
    leaf = {"variables": variables["w"], "examples": weights}.get(of)
    assert found.requires_grad == (leaf is not None)
    if leaf is not None:
        # Twice through the same graph, along another vector.
        for scale in (1.0, -2.0):
            expected = torch.autograd.grad(scale * whole, leaf, retain_graph=True)[0]
            actual = torch.autograd.grad(scale * found, leaf, retain_graph=True)[0]
            torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


def test_a_third_derivative_is_refused():
    variables = {"w": randn(1, 3).requires_grad_()}
    value = sum_of_micro_batches(square, (variables,), (randn(2, 5, 3), randn(3, 5)), 2)
    (slope,) = torch.autograd.grad(value, [variables["w"]], create_graph=True)
    with pytest.raises(RuntimeError, match=r"have first and second derivatives.*micro_batch"):
        torch.autograd.grad(slope.square().sum(), [variables["w"]], create_graph=True)


def test_a_gradient_under_autocast_is_that_of_whole_draws():
    w, x = randn(1, 8, 4).float().requires_grad_(), randn(2, 6, 8).float()

    def loss(variables: Params, x: Tensor) -> Tensor:
        return (x @ variables["w"]).float().square().sum()

    found = []
    for micro_batch in (None, 6, 1):
        with torch.autocast("cpu", torch.bfloat16):
            value = sum_of_micro_batches(loss, ({"w": w},), (x,), micro_batch)
        found.append(torch.autograd.grad(value, [w])[0])
    assert torch.equal(found[0], found[1])
    exact = torch.autograd.grad(loss({"w": w}, x), [w])[0]
    for rounded in found:
        assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.filterwarnings("ignore:rematerialised blocks and micro-batches")
def test_under_vmap_it_is_the_plain_sum_with_a_warning():
    w, x, weights = randn(1, 4, 3), randn(2, 4, 5, 3), randn(3, 4, 5)

    def value(w: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        return sum_of_micro_batches(square, ({"w": w},), (x, weights), 2)

    _warn_transformed.cache_clear()
    with pytest.warns(RuntimeWarning, match="micro-batches save no memory under vmap"):
        found = vmap(torch.func.grad(value))(w, x, weights)
    expected = [torch.func.grad(value)(*each) for each in zip(w, x, weights, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))


ELSEWHERE = torch.ones(3, requires_grad=True)


def random(variables: Params, x: Tensor) -> Tensor:
    return F.dropout(x @ variables["w"], 0.5).sum()


def writing(variables: Params, x: Tensor) -> Tensor:
    x += 1
    return (x @ variables["w"]).sum()


def elsewhere(variables: Params, x: Tensor) -> Tensor:
    return (x @ (variables["w"] * ELSEWHERE.exp())).sum()


def per_example(variables: Params, x: Tensor) -> Tensor:
    return x @ variables["w"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (random, r"function of micro-batches must not draw random numbers"),
        (writing, r"function of micro-batches must not change its inputs or buffers"),
        (per_example, r"must return a tensor of shape \(\), got shape \(2,\)"),
        (elsewhere, r"it also takes one of shape \(3,\) from elsewhere.*pass it in variables"),
    ],
)
def test_functions_that_are_refused(function: Any, message):
    variables = {"w": randn(1, 3).requires_grad_()}
    with pytest.raises(ValueError, match=message):
        sum_of_micro_batches(function, (variables,), (randn(2, 5, 3),), 2)


def test_arguments_that_are_refused():
    variables = {"w": randn(1, 3)}
    with pytest.raises(ValueError, match=r"micro_batch must be an integer >= 1, got 0"):
        sum_of_micro_batches(square, (variables,), (randn(2, 5, 3), randn(3, 5)), 0)
    with pytest.raises(ValueError, match=r"tensors of one length >= 1.*\(5, 3\), \(4,\)"):
        sum_of_micro_batches(square, (variables,), (randn(2, 5, 3), randn(3, 4)), 2)


def test_parts_may_have_parts():
    """As a decoder's examples have tokens: first and second derivatives, in examples as well."""
    w, x, weights = (randn(1, 3), randn(2, 6, 3), randn(3, 6))

    def nested(variables: Params, x: Tensor, weights: Tensor) -> Tensor:
        hidden = (x * variables["w"]).tanh()
        return sum_of_micro_batches(square, (variables,), (hidden, weights), 2)

    def derivatives(size: int | None) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in (w, x, weights)]
        value = sum_of_micro_batches(nested, ({"w": leaves[0]},), leaves[1:], size)
        slopes = torch.autograd.grad(value, leaves, create_graph=True)
        curved = torch.stack([slope.sin().sum() for slope in slopes]).sum()
        return [value.detach(), *slopes, *torch.autograd.grad(curved, leaves)]

    def plain() -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in (w, x, weights)]
        value = square({"w": leaves[0]}, (leaves[1] * leaves[0]).tanh(), leaves[2])
        slopes = torch.autograd.grad(value, leaves, create_graph=True)
        curved = torch.stack([slope.sin().sum() for slope in slopes]).sum()
        return [value.detach(), *slopes, *torch.autograd.grad(curved, leaves)]

    for size in (None, 4):
        for found, expected in zip(derivatives(size), plain(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
