"""Problems that are not functions of their arguments are refused, by what they do."""

from __future__ import annotations

import gc
import random
from contextlib import suppress
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from metadist import check_hypergradient, evaluate, task_hypergradients
from metadist.algorithms import ITD
from metadist.checks import purity
from metadist.checks.losses import check_losses
from metadist.checks.purity import SHARED, Impure, check_pure, is_known_pure, remember
from metadist.compute import Compute
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks import FewShotProblem
from metadist.trees import Params, add, detach
from tests.helpers import curves, make_trainer, regression
from tests.problems import Smooth, generator, smooth_task


class Layers(nn.Module):
    """A network with one more layer, and one more function, of choice."""

    def __init__(self, layer=None, function=torch.tanh):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(1, 8), nn.Identity() if layer is None else layer)
            self.head = nn.Linear(8, 1)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.body(x)))


class Counts(nn.Module):
    """Scales by how often it was called."""

    def __init__(self):
        super().__init__()
        self.calls = count(1)

    def forward(self, x):
        return x / next(self.calls)


class EveryThird(nn.Module):
    """Scales in one of three calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x if self.calls % 3 else 1.001 * x


def alternating():
    """A function that subtracts something at every other call, and keeps count in a closure."""
    calls = 0

    def step(x):
        nonlocal calls
        calls += 1
        return x - 1e-3 * (calls % 2)

    return step


def centring():
    """A function that keeps a mean in an array which only its closure holds."""
    mean = np.zeros(8, dtype=np.float32)

    def centre(x):
        mean[:] += x.detach().mean(0).numpy()
        return torch.tanh(x)

    return centre


class Centred(nn.Module):
    """Keeps a mean under a name of its own, which is no buffer."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(8)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Rescaled(nn.Module):
    """Writes to its own weight."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(2 * torch.ones(8))

    def forward(self, x):
        with torch.no_grad():
            self.gain.clamp_(max=1)
        return x * self.gain


class NoisyBackward(Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 0.1 * torch.randn_like(gradient)


def with_numpy(x):
    return x + float(np.random.rand())  # noqa: NPY002  # it is refused


def with_random(x):
    return x * (1 + random.random())


def rarely(x):
    return 2 * x if torch.rand(()) < 0.15 else x


RANDOM = [
    (Layers(nn.RReLU()), r"layer 'body\.1' \(RReLU\) draws random numbers"),
    (Layers(nn.Sequential(nn.Tanh(), nn.RReLU())), r"layer 'body\.1\.1'"),
    (Layers(function=with_numpy), r"the model itself \(Layers\) draws random numbers"),
    (Layers(function=with_random), r"the model itself \(Layers\) draws random numbers"),
    (Layers(function=rarely), r"another global seed"),
    (Layers(function=NoisyBackward.apply), r"another global seed"),
]


@pytest.mark.parametrize(("model", "message"), RANDOM)
def test_random_numbers_in_a_loss_are_refused(model, message):
    with pytest.raises(Impure, match=r"inner_loss must give the same bytes .*" + message):
        check(regression(model))
    with pytest.raises(Impure):
        make_trainer(problem=regression(model), vectorize=False)


def test_global_generators_are_left_where_they_were():
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(Impure):
        check(regression(Layers(function=with_random)))
    with pytest.raises(Impure):
        check(regression(Layers(nn.RReLU())))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()


KEEPS = [
    (Layers(EveryThird()), r"others at a later call: layer 'body\.1' \(EveryThird\) does"),
    (Layers(function=alternating()), r"at a later call: the model itself \(Layers\) does"),
    (Layers(function=centring()), r"'function\.mean' of the model itself \(Layers\) changed"),
    (Layers(Counts()), r"others at a later call: layer 'body\.1' \(Counts\) does"),
    (Layers(Centred()), r"'mean' of layer 'body\.1' \(Centred\) changed by a call"),
    (Layers(Rescaled()), r"inner_loss .* got 'body\.1\.gain' changed in place by layer 'body\.1'"),
    (
        Layers(parametrizations.spectral_norm(nn.Linear(8, 8))),
        r"'_u' of layer 'body\.1\.parametrizations\.weight\.0' \(_SpectralNorm\) changed",
    ),
]


@pytest.mark.parametrize(("model", "message"), KEEPS)
def test_what_is_kept_from_call_to_call_is_refused(model, message):
    with pytest.raises(Impure, match=message):
        make_trainer(problem=regression(model), vectorize=False)


def test_the_same_layers_are_accepted_where_they_do_nothing_of_the_kind():
    frozen = parametrizations.spectral_norm(nn.Linear(8, 8)).eval()
    for layer in (nn.RReLU().eval(), frozen, nn.Dropout(0.5).eval(), nn.BatchNorm1d(8).eval()):
        check(regression(Layers(layer)))


class Other(Smooth):
    """`Smooth` with one method that does something before."""

    def __init__(self, method, act):
        self.held = torch.zeros(3)
        vars(self)[method] = lambda *arguments: self._after(method, act, arguments)

    def _after(self, method, act, arguments):
        found = getattr(Smooth, method)(self, *arguments)
        return act(self, found, *arguments)


def scaled(problem, found, *arguments):
    return {name: leaf * (1 + torch.rand(())) for name, leaf in found.items()}


def drops_a_name(problem, found, outer, *rest):
    outer.pop(next(iter(outer)))
    return found


def centres(problem, found, context, inner, batch):
    batch.tensors[0].sub_(1)
    return found


def remembers(problem, found, *arguments):
    problem.held += 1
    return found


def measures(problem, found, *arguments):
    return {"luck": torch.rand(())}


OTHERS = [
    ("encode", scaled, r"encode must give the same bytes"),
    ("init_inner", scaled, r"init_inner must give the same bytes"),
    ("metrics", measures, r"metrics must give the same bytes"),
    ("inner_loss", drops_a_name, r"inner_loss .* got the names of a dictionary changed"),
    ("outer_loss", centres, r"outer_loss must leave .* got a tensor of the task changed in place"),
    ("outer_loss", remembers, r"got its tensor 'held' changed by a call"),
]


def check(problem):
    sampler = curves() if isinstance(problem, FewShotProblem) else None
    task = smooth_task(0) if sampler is None else sampler.sample(0)
    outer = problem.init_outer(torch.Generator().manual_seed(0))
    check_pure(problem, outer, task, Compute())


@pytest.mark.parametrize(("method", "act", "message"), OTHERS)
def test_every_method_is_looked_at(method, act, message):
    check(Smooth())
    with pytest.raises(Impure, match=message):
        check(Other(method, act))


def test_random_numbers_without_effect_are_said_and_accepted():
    class Builds(Smooth):
        """Makes a module whose weights it then replaces."""

        def outer_loss(self, context, inner, batch):
            unused = nn.Linear(1, 1, bias=False).double()
            one = functional_call(
                unused, {"weight": torch.ones(1, 1).double()}, torch.ones(1, 1).double()
            )
            return super().outer_loss(context, inner, batch) * one.sum()

    with pytest.warns(RuntimeWarning, match=r"outer_loss draws random numbers .* in 15 calls"):
        check(Builds())


def test_x_is_left_as_it_was():
    problem = regression(Layers(Rescaled()))
    outer = problem.init_outer(torch.Generator())
    with pytest.raises(Impure):
        check_losses(problem, curves(), outer)
    assert torch.equal(outer["body.1.gain"], 2 * torch.ones(8))


def test_the_check_of_a_hypergradient_asks_too():
    with pytest.raises(Impure, match="RReLU"):
        check_hypergradient(regression(Layers(nn.RReLU())), curves(), ITD(inner_steps=1))


def weights(model):
    return {name: leaf.detach().clone() for name, leaf in model.named_parameters()}


class Again(Layers):
    """Computes its body again in the backward pass."""

    def forward(self, x):
        return self.head(torch.tanh(checkpoint(self.body, x, use_reentrant=False)))


def test_layers_that_are_computed_again_are_refused_with_the_way_out():
    def again(x):
        return checkpoint(nn.Tanh(), x, use_reentrant=False)

    check(regression(Layers(function=again)))  # no parameter is computed from again
    with pytest.raises(ValueError, match=r"must be differentiable, got .*checkpoint.*leave it out"):
        check(regression(Again(nn.Sequential(nn.Tanh(), nn.Linear(8, 8)))))


def test_a_derivative_with_other_parameters_than_those_of_the_call_is_refused():
    class Own(Problem):
        """Keeps the weights in the model, where the backward pass finds them again."""

        def __init__(self, model):
            self.model = model

        def init_outer(self, generator):
            return weights(self.model)

        def init_inner(self, outer, task):
            return outer

        def encode(self, outer, task):
            return {}

        def inner_loss(self, context, inner, batch):
            inputs, targets = batch.tensors
            return (functional_call(self.model, inner, inputs) - targets).square().mean()

        outer_loss = inner_loss

    def check_own(model):
        problem, task = Own(model), curves().sample(0)
        check_pure(problem, problem.init_outer(torch.Generator()), task, Compute())

    deep = nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    check_own(Layers(deep))
    with pytest.raises(Impure, match="inner_loss must have the derivative of its value"):
        check_own(Again(deep))


def test_numbers_that_are_kept_without_effect_are_said():
    class Counting(Smooth):
        calls = 0

        def outer_loss(self, context, inner, batch):
            self.calls += 1
            return super().outer_loss(context, inner, batch)

    with pytest.warns(RuntimeWarning, match=r"Counting keeps 'calls', which every call changes"):
        check(Counting())


class Scaled(nn.Module):
    """Divides by a scale of the first data it sees, which it keeps in one of four ways."""

    def __init__(self, place):
        super().__init__()
        self.place = place
        self.by_width = {}
        self.own = None
        self.register_buffer("buffer", torch.zeros(()))
        self.parameter = nn.Parameter(torch.zeros(()))
        self.is_set = False

    def forward(self, x):
        scale = 1 + x.detach().square().mean()
        if self.place == "dictionary":
            return x / self.by_width.setdefault(x.shape, scale)
        if self.place == "attribute":
            self.own = scale if self.own is None else self.own
            return x / self.own
        kept = getattr(self, self.place)
        if not self.is_set:
            kept.data.copy_(scale)
            self.is_set = True
        return x / kept


@pytest.mark.parametrize("place", ["dictionary", "attribute", "buffer", "parameter"])
def test_what_the_first_data_leaves_behind_is_refused(place):
    problem = regression(Layers(Scaled(place)))
    said = "must leave its arguments" if place == "parameter" else r"first call.*each worker"
    for _ in range(2):  # also of a problem that has computed by now
        with pytest.raises(Impure, match=said):
            make_trainer(problem=problem)
    if place != "parameter":
        with pytest.raises(Impure, match=r"'body\.1' \(Scaled\) does"):
            make_trainer(problem=problem)


def test_what_is_kept_of_the_first_x_for_each_task_is_refused():
    class Kept(Smooth):
        def __init__(self):
            super().__init__()
            self.of_task = {}

        def encode(self, outer, task):
            first = self.of_task.setdefault(int(task.id), detach(outer))
            return super().encode(add(outer, first), task)

    with pytest.raises(Impure, match=r"encode must be a function of .* first call"):
        check(Kept())


def test_what_is_kept_of_shapes_alone_is_accepted():
    class Ramp(nn.Module):
        def __init__(self):
            super().__init__()
            self.known = {}

        def forward(self, x):
            return x + self.known.setdefault(x.shape, torch.arange(x.shape[-1]) / 8)

    make_trainer(problem=regression(Layers(Ramp())))


def test_a_direct_call_asks_once():
    problem = regression(Layers(nn.RReLU()))
    outer, tasks = problem.init_outer(torch.Generator()), [curves().sample(0)]
    algorithm = ITD(inner_steps=1)
    with pytest.raises(Impure, match="RReLU"):
        task_hypergradients(problem, algorithm, outer, tasks)
    task_hypergradients(problem, algorithm, outer, tasks, is_checked=True)

    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes"):
        task_hypergradients(regression(nn.Linear(2, 1)), algorithm, weights(nn.Linear(2, 1)), tasks)

    problem = regression(Layers())
    task_hypergradients(problem, algorithm, outer, tasks)
    assert is_known_pure(problem)


def test_an_evaluation_asks_too():
    problem = regression(Layers(nn.RReLU()))
    with pytest.raises(Impure, match="RReLU"):
        evaluate(problem, curves(), ITD(inner_steps=1), problem.init_outer(torch.Generator()), 2)


def test_a_problem_that_acts_at_its_end_is_not_copied(tmp_path):
    class Folder:
        def __init__(self):
            tmp_path.joinpath("own").mkdir()

        def __del__(self):
            tmp_path.joinpath("own").rmdir()

    class Holds(list[Folder]):
        """Has a field that is no item."""

        def __init__(self):
            super().__init__()
            self.folder = Folder()

    class Own(Smooth):
        def __init__(self):
            super().__init__()
            self.held = Holds()

    problem = Own()
    remember(problem)
    check(problem)
    gc.collect()
    assert tmp_path.joinpath("own").is_dir()
    assert is_known_pure(problem)


def test_views_of_large_memory_are_not_copied():
    rows, small = list(torch.zeros(SHARED // 4, 2).split(8))[:3], torch.zeros(3)
    problem = Smooth()
    vars(problem).update(rows=rows, small=small)
    copied = vars(purity._copy(problem))
    assert all(a is b for a, b in zip(copied["rows"], rows, strict=True))
    assert copied["small"] is not small


def by_closure():
    first = []

    def centred(ridge, inputs):
        first.append(inputs.mean(0))
        return inputs - first[0]

    return centred


class LastStart(Problem):
    """Starts y from the last y that a loss was computed at."""

    last: Params | None = None

    def __init__(self, centred=None):
        self.centred = centred
        self.by_shape = {}

    def init_outer(self, generator):
        return {"log_penalty": torch.zeros(3)}

    def init_inner(self, outer, task):
        zero = torch.zeros_like(outer["log_penalty"])
        return {"w": zero if self.last is None or self.centred else self.last["w"]}

    def outer_loss(self, context, inner, batch):
        inputs, targets = batch.tensors
        self.last = detach(inner)
        inputs = inputs if self.centred is None else self.centred(self, inputs)
        return (inputs @ inner["w"] - targets).square().mean()

    def inner_loss(self, context, inner, batch):
        return self.outer_loss(context, inner, batch) + (
            context["log_penalty"].exp() @ inner["w"].square()
        )


def by_shape(ridge, inputs):
    return inputs - ridge.by_shape.setdefault(inputs.shape, inputs.mean(0))


def by_itself(ridge, inputs):
    return inputs - inputs.mean(0)


class Lines:
    """Three inputs, another mean in each task."""

    def sample(self, index):
        inputs = torch.randn(12, 3, generator=generator(index)) + index
        targets = inputs.sum(1)
        return Task(Batch.of(inputs[:4], targets[:4]), Batch.of(inputs[4:], targets[4:]), index)


KEPT_BESIDE = [by_closure, lambda: by_shape, lambda: None]


@pytest.mark.parametrize("make", KEPT_BESIDE)
def test_what_is_kept_is_seen_where_y_starts_at_0(make):
    algorithm = ITD(inner_steps=1, inner_lr=0.01)
    with pytest.raises(Impure, match="must be a function of its arguments"):
        make_trainer(problem=LastStart(make()), sampler=Lines(), vectorize=False)
    with pytest.raises(Impure, match="must be a function of its arguments"):
        evaluate(LastStart(make()), Lines(), algorithm, {"log_penalty": torch.zeros(3)}, 2)

    problem, outer = LastStart(make()), {"log_penalty": torch.zeros(3)}
    first, second = ([Lines().sample(index)] for index in range(2))
    for _ in range(2):
        with suppress(Impure):  # of what the first call left, before another task comes
            task_hypergradients(problem, algorithm, outer, first)
    for _ in range(2):
        with pytest.raises(Impure, match="must be a function of its arguments"):
            task_hypergradients(problem, algorithm, outer, second)


def test_what_is_kept_and_not_used_is_accepted_everywhere():
    outer, algorithm = {"log_penalty": torch.zeros(3)}, ITD(inner_steps=1, inner_lr=0.01)
    make_trainer(problem=LastStart(by_itself), sampler=Lines(), vectorize=False)
    evaluate(LastStart(by_itself), Lines(), algorithm, outer, 2)
    problem = LastStart(by_itself)
    for index in range(3):
        task_hypergradients(problem, algorithm, outer, [Lines().sample(index)])


def test_a_metric_of_what_another_method_left_is_refused():
    class Stale(LastStart):
        def metrics(self, context, inner, batch):
            return {"mean": self.seen.mean()}

        def outer_loss(self, context, inner, batch):
            self.seen = batch.tensors[0]
            return super().outer_loss(context, inner, batch)

    with pytest.raises(Impure, match="metrics must give the same bytes"):
        make_trainer(problem=Stale(by_itself), sampler=Lines(), vectorize=False)


def test_plain_values_in_containers_are_compared_one_by_one():
    problem: Any = Smooth()
    problem.table = {"calls": [0, 1.5], "names": {"a": 1, "b": float("nan")}}
    act = problem.metrics

    def metrics(*arguments):
        problem.table["calls"][0] += 1
        problem.table["calls"].append(3)
        return act(*arguments)

    problem.metrics = metrics
    with pytest.warns(RuntimeWarning, match=r"keeps 'table\.calls\.0', which every call changes"):
        check(problem)


@pytest.mark.parametrize("kind", [list, tuple, set, dict.fromkeys])
def test_containers_of_plain_values_are_copied_with_a_problem(kind):
    problem: Any = Smooth()
    problem.values = kind(range(3))
    remember(problem)
    copied: Any = purity._untouched[problem]
    assert copied.values == problem.values
    assert (copied.values is problem.values) == isinstance(problem.values, tuple)


def test_many_objects_are_told_of(monkeypatch):
    monkeypatch.setattr(purity, "MANY", 100)
    problem: Any = Smooth()
    problem.values = list(range(1000))
    check(problem)  # one container is one object
    problem = Smooth()
    problem.values = [[number] for number in range(2000)]
    with pytest.warns(RuntimeWarning, match="Smooth holds 2,0.. objects, which take long"):
        check(problem)
