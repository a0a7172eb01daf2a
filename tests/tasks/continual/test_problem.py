"""The contextual network and the problem on it, against formulas written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist import Trainer, check_hypergradient
from metadist.algorithms import ITD
from metadist.hypergradient import task_hypergradients
from metadist.task import Batch
from metadist.tasks import ContextualNetwork, ContinualLearning, PermutedImages
from metadist.trees import Params, leaves
from tests.problems import DOUBLE, assert_close, generator

STREAM = PermutedImages(
    "digits", num_tasks=3, per_task=40, num_test=30, batch=5, memory=12, semantic=4, replay=10
)
ROWS = ("inputs", "stages", "is_new", "slots", "targets")


def small(heads: int = 1, num_classes: int = 10, **options: Any) -> ContinualLearning:
    torch.manual_seed(0)
    network = ContextualNetwork(
        64, width=8, num_classes=num_classes, num_tasks=3, embedding=4, heads=heads
    )
    return ContinualLearning(network, **options)


def started(problem: ContinualLearning) -> tuple[Params, Params]:
    """(x, y) at the start in float64, x moved away from biases of 0."""
    x = {
        name: leaf.double() + 0.1 * torch.randn(leaf.shape, generator=generator(1), dtype=DOUBLE)
        for name, leaf in problem.init_outer(generator(0)).items()
    }
    return x, problem.init_inner(x, STREAM.sample(0))


def double(batch: Batch) -> Batch:
    return batch.map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf)


def by_hand(x: Params, y: Params, batch: Batch) -> Tensor:
    inputs, stages, *_ = batch.fields(*ROWS)
    h = inputs.flatten(1)
    for k in (0, 1):
        e = x["embedding.weight"][stages]
        film = e @ x[f"controllers.{k}.weight"].T + x[f"controllers.{k}.bias"]
        s, b = film[:, :8], film[:, 8:]
        s, b = s / s.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        z = h @ y[f"base.{k}.weight"].T + y[f"base.{k}.bias"]
        h = z.clamp(min=0) + (s * z + b).clamp(min=0)
    return h @ y["base.2.weight"].T + y["base.2.bias"]


def test_the_network_is_the_formula():
    problem = small()
    x, y = started(problem)
    batch = double(STREAM.sample_at(0, 40).support)
    torch.testing.assert_close(problem.logits(x, y, batch), by_hand(x, y, batch))


@pytest.mark.parametrize("distillation", [0.0, 1.0])
def test_a_network_for_fewer_tasks_than_the_stream_has_is_refused_at_once(distillation):
    problem = ContinualLearning(
        ContextualNetwork(64, width=8, num_tasks=2), distillation, num_slots=STREAM.num_slots
    )
    with pytest.raises(ValueError, match=rf"at outer step {STREAM.num_steps - 1} must be comput"):
        Trainer(problem, STREAM, ITD(inner_steps=1, first_order=True), quiet=True)


def test_every_task_may_have_a_head_of_its_own():
    problem = small(heads=3, num_classes=2)
    x, y = started(problem)
    batch = double(STREAM.sample_at(0, 40).query)
    stages = batch.fields(*ROWS)[1]
    everything = by_hand(x, y, batch)
    own = torch.stack(
        [row[2 * stage : 2 * stage + 2] for row, stage in zip(everything, stages, strict=True)]
    )
    torch.testing.assert_close(problem.logits(x, y, batch), own)


@pytest.mark.parametrize("step", [3, 40])
def test_the_losses_are_the_formulas(step):
    problem = small(distillation=1.5, temperature=2.0, num_slots=STREAM.num_slots)
    x, y = started(problem)
    task = STREAM.sample_at(0, step)
    support, query = double(task.support), double(task.query)
    targets = torch.randn(STREAM.num_slots + 1, 10, generator=generator(2), dtype=DOUBLE)
    _, stages, is_new, slots, labels = support.fields(*ROWS)
    logits = by_hand(x, y, support)
    expected = F.cross_entropy(logits[is_new], labels[is_new])
    if step == 40:
        expected = expected + F.cross_entropy(logits[~is_new], labels[~is_new])
        old = ~is_new & (stages < 2)
        theirs, ours = targets[slots[old] + 1] / 2, logits[old] / 2
        divergence = F.kl_div(
            ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean"
        )
        expected = expected + 1.5 * 4 * divergence
    context = {**x, "targets": targets}
    torch.testing.assert_close(problem.inner_loss(context, y, support), expected)
    judged = F.cross_entropy(by_hand(x, y, query), query.fields(*ROWS)[4])
    torch.testing.assert_close(problem.outer_loss(context, y, query), judged)


def test_targets_are_the_logits_of_the_moment_an_example_is_stored():
    problem = small(distillation=1.0, num_slots=STREAM.num_slots)
    x, y = started(problem)
    first = STREAM.sample(0)
    carried = problem.init_carried(x, first._replace(support=double(first.support)))
    assert carried["targets"].shape == (25, 10)
    expected = torch.zeros(25, 10, dtype=DOUBLE)
    for step in (0, 7, 20, 41):
        task = STREAM.sample_at(0, step)
        support = double(task.support)
        carried = problem.carry(x, y, task._replace(support=support), carried)
        _, _, is_new, slots, _ = support.fields(*ROWS)
        logits = problem.logits(x, y, support)
        for row in (is_new & (slots >= 0)).nonzero()[:, 0].tolist():
            expected[slots[row] + 1] = logits[row]
        y = {name: leaf + 0.1 for name, leaf in y.items()}
    torch.testing.assert_close(carried["targets"], expected)
    assert not small().init_carried(x, STREAM.sample(0))
    fewer = small(distillation=1.0, num_slots=STREAM.num_slots - 1)
    short = {"targets": carried["targets"][:-1]}
    tasks = [STREAM.sample_at(0, step) for step in range(STREAM.num_steps)]
    last = max(tasks, key=lambda task: int(task.support.fields(*ROWS)[3].max()))
    with pytest.raises(IndexError):
        fewer.carry(x, y, last._replace(support=double(last.support)), short)


def test_hypergradients_are_right():
    algorithm = ITD(inner_steps=2, inner_lr=0.1)
    task = STREAM.sample_at(0, 40)
    problem = small(distillation=1.0, num_slots=STREAM.num_slots)
    assert check_hypergradient(problem, task, algorithm, repeats=[]).error < 1e-6


def test_the_rule_of_ctn_in_plain_torch():
    """One inner step, then the gradient of f in x at the y that came out, and y goes on."""
    problem = small()
    x, y = started(problem)
    rate, outer_rate = 0.1, 0.2
    expected_x, expected_y = x, y
    algorithm = ITD(inner_steps=1, inner_lr=rate, first_order=True)
    states: dict[int, Tensor] = {}
    for step in (0, 1, 18, 19, 45):
        task = STREAM.sample_at(0, step)
        task = task._replace(support=double(task.support), query=double(task.query))
        found = task_hypergradients(problem, algorithm, x, [task], step=step, states=states)
        states = found.states
        x = {name: leaf - outer_rate * found.total[name] for name, leaf in x.items()}

        at_x, at_y = leaves(expected_x), leaves(expected_y)
        inner = problem.inner_loss(at_x, at_y, task.support)
        slopes = torch.autograd.grad(inner, list(at_y.values()))
        expected_y = {
            name: (leaf - rate * slope).detach()
            for (name, leaf), slope in zip(at_y.items(), slopes, strict=True)
        }
        outer = problem.outer_loss(at_x, expected_y, task.query)
        slopes = torch.autograd.grad(outer, list(at_x.values()))
        expected_x = {
            name: (leaf - outer_rate * slope).detach()
            for (name, leaf), slope in zip(at_x.items(), slopes, strict=True)
        }
    assert_close(x, expected_x, 1e-12)
    kept = states[0][-sum(leaf.numel() for leaf in y.values()) :]
    assert_close({"y": kept}, {"y": torch.cat([v.reshape(-1) for v in expected_y.values()])}, 1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextualNetwork(heads=3), r"heads must be 1 or num_tasks \(20\), got 3"),
        (lambda: ContinualLearning(nn.Linear(2, 2)), r"in a submodule `base` and others beside it"),
        (lambda: small(distillation=1.0), r"num_slots must be an integer >= 1, got 0"),
        (lambda: small(temperature=0.0), r"temperature must be > 0"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()
