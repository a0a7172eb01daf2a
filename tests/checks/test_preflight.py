"""What cannot be trained is refused before any work, with the reason and a way out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metadist import Trainer, check_hypergradient
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, ALGORITHMS, BDA, DARTS, ITD, UFOM, Reptile
from metadist.checks.derivatives import NoSecondDerivative
from metadist.checks.preflight import initial_outer, preflight
from metadist.compute import Compute, warn_once
from metadist.evaluation import evaluate
from metadist.step_rules import Adam
from metadist.task import Batch, Task
from metadist.tasks import FewShotProblem
from metadist.trees import Params, tree_map
from metadist.workload import Workload
from tests.helpers import (
    Images,
    Spoiled,
    curves,
    make_trainer,
    regression,
    small_conv4,
    with_compute,
)
from tests.problems import Quadratic, QuadraticSampler, Smooth, smooth_task


class OnceNew(torch.autograd.Function):
    """tanh as a function for torch.func, differentiable once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return (1 - y * y) * gradient


class OnceOld(torch.autograd.Function):
    """The same as it was written before torch.func."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return (1 - y * y) * gradient


class Twice(OnceNew):
    """The same, differentiable any number of times, with a forward derivative too."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return (1 - y * y) * gradient

    @staticmethod
    def jvp(ctx, tangent):
        (y,) = ctx.saved_tensors
        return (1 - y * y) * tangent


class Net(nn.Module):
    """One hidden layer with a function of choice."""

    def __init__(self, function=torch.tanh):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.head = nn.Linear(1, 4), nn.Linear(4, 1)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.first(x)))


class Wrapped(Net):
    """Returns something else than a tensor."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return self.kind(out=super().forward(x))


def raises(x):
    raise NotImplementedError


def branch(x):
    return x if x.sum() > 0 else 2 * x


class Lossy(Smooth):
    """`Smooth` with another inner or outer loss."""

    def __init__(self, inner_loss=None, outer_loss=None):
        self.replaced = {"inner_loss": inner_loss, "outer_loss": outer_loss}

    def inner_loss(self, context, inner, batch):
        loss = super().inner_loss(context, inner, batch)
        change = self.replaced["inner_loss"]
        return change(loss) if change else loss

    def outer_loss(self, context, inner, batch):
        loss = super().outer_loss(context, inner, batch)
        change = self.replaced["outer_loss"]
        return change(loss) if change else loss


SMOOTH = SimpleNamespace(sample=smooth_task)


class Dead(Smooth):
    """Nothing depends on the outer variable."""

    def encode(self, outer, task):
        return {name: 0 * leaf for name, leaf in super().encode(outer, task).items()}

    def init_inner(self, outer, task):
        return {name: 0 * leaf for name, leaf in super().init_inner(outer, task).items()}


class Halved(Smooth):
    """Has an outer variable that nothing depends on."""

    def init_outer(self, generator):
        return {**super().init_outer(generator), "unused": torch.ones(2, dtype=torch.float64)}


REFUSED = [
    (
        {"problem": FewShotProblem(small_conv4()), "sampler": Images(n_way=5)},
        r"inner_loss must be computable on task 0 of sampler, whose tensors have shapes "
        r"\(10, 1, 16, 16\), \(10,\), .*, got IndexError: .*: the model has 3 outputs, and there "
        r"are labels up to 4\. Give it one for each class \(n_way\)$",
    ),
    (
        {"problem": FewShotProblem(small_conv4()), "sampler": Images(channels=3)},
        r"inner_loss must be computable on task 0 .* got RuntimeError: .*, in layer "
        r"'features\.0\.0' \(Conv2d\), which takes 1 channels and is given 3: do the channels",
    ),
    (
        {"problem": FewShotProblem(small_conv4(), adapt="head"), "sampler": Images(channels=3)},
        r"init_inner must be computable on task 0 .* got RuntimeError: .*channels",
    ),
    (
        {"problem": FewShotProblem(small_conv4()), "sampler": curves()},
        r"inner_loss must be computable on task 0.* in layer 'features\.0\.0' \(Conv2d\)",
    ),
    (
        {"problem": regression(Net(lambda x: x[:, :2])), "sampler": curves()},
        r"in layer 'head' \(Linear\), which takes 4 features and is given 2: does the size of",
    ),
    (
        {"problem": regression(Net(lambda x: x.reshape(7, 7))), "sampler": curves()},
        r"got RuntimeError: shape '\[7, 7\]' is invalid .*, in the model itself \(Net\)$",
    ),
    (
        {"problem": regression(Wrapped(dict)), "sampler": curves()},
        r"got AttributeError: .*: the model returns a dict\. Let it return the tensor",
    ),
    (
        {"problem": regression(Net(raises)), "sampler": curves()},
        r"got NotImplementedError: no reason, in the model itself \(Net\)$",
    ),
    (
        {"problem": Lossy(lambda loss: {"one": loss}["scale"])},
        r"inner_loss must be computable on task 0 .*, got KeyError: 'scale'$",
    ),
    (
        {
            "problem": FewShotProblem(small_conv4(), adapt="head"),
            "sampler": Images(),
            "algorithm": Reptile(),
        },
        r"algorithm Reptile trains the start of adaptation only",
    ),
    ({"problem": Lossy(lambda loss: loss[None])}, r"inner_loss must return a tensor of shape \(\)"),
    (
        {"problem": Lossy(outer_loss=float)},
        r"outer_loss must return a tensor of shape \(\), got float",
    ),
    (
        {"problem": Lossy(lambda loss: loss / 0)},
        r"inner_loss must be finite on task 0 of sampler at the start, got -?inf",
    ),
    (
        {"problem": Lossy(outer_loss=lambda loss: loss * torch.nan)},
        r"outer_loss must be finite on task 0 of sampler at the start, got nan: look for NaN",
    ),
    (
        {"problem": Smooth(), "algorithm": ITD(inner_steps=60, inner_lr=1e5)},
        r"the hypergradient of task 0 must be finite, got NaN or Inf: .* try a smaller inner_lr",
    ),
    (
        {"problem": Dead()},
        r"the hypergradient of task 0 is zero in every outer variable \(a, b\): neither",
    ),
    (
        {"sampler": SimpleNamespace(sample=lambda index: (index, index))},
        r"sampler.sample\(index\) must return a metadist.Task, got tuple from SimpleNamespace",
    ),
    (
        {"problem": regression(Net(branch)), "sampler": curves(), "vectorize": True},
        r"vectorize must be False or 'auto' for a problem that vmap cannot run, got True: vmap: ",
    ),
    (
        {"vectorize": True, "algorithm": ITD(engine="higher")},
        r"vectorize must be False or 'auto' with ITD\(.*engine does not run under vmap, got True",
    ),
    (
        {
            "vectorize": True,
            "sampler": SimpleNamespace(sample=lambda i: smooth_task(i, num_support=5 + i)),
        },
        r"vectorize=True needs tasks of equal shapes, got",
    ),
]


def check(**options: Any) -> None:
    usual: dict[str, Any] = {"problem": Smooth(), "sampler": SMOOTH}
    workload = Workload(**with_compute({**usual, "algorithm": ITD(inner_steps=2), **options}))
    preflight(workload, initial_outer(workload))


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=[re.sub(r"\W+", " ", m)[:60] for _, m in REFUSED]
)
def test_what_cannot_be_trained_is_refused(options, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        check(**options)


def test_what_can_be_trained_is_accepted_without_a_word():
    check()
    check(problem=regression(Net(branch)), sampler=curves(), vectorize=False)
    check(sampler=Spoiled(SMOOTH, broken=(1,)))  # a single bad task is dropped in training too


def test_outer_variables_without_a_hypergradient_are_named():
    with pytest.warns(
        RuntimeWarning,
        match=r"these outer variables got no hypergradient from task 0 .*: unused; freeze them",
    ):
        check(problem=Halved())


def test_the_first_five_of_many_are_named():
    class Many(Smooth):
        def init_outer(self, generator):
            more = {f"u{i}": torch.ones(1, dtype=torch.float64) for i in range(8)}
            return {**super().init_outer(generator), **more}

    with pytest.warns(RuntimeWarning, match=r"trained: u0, u1, u2, u3, u4 and 3 more; freeze"):
        check(problem=Many())


SECOND = [
    ITD(inner_steps=2),
    ITD(inner_steps=2, engine="unrolled"),
    ITD(inner_steps=2, engine="higher"),
    ITD(inner_steps=2, learn_lr="per_tensor"),
]


@pytest.mark.parametrize("function", [OnceNew, OnceOld])
@pytest.mark.parametrize("algorithm", SECOND, ids=lambda a: f"{a.engine}-{a.learn_lr}")
def test_an_operator_without_a_second_derivative_is_refused(function, algorithm):
    with pytest.raises(
        NoSecondDerivative,
        match=r"the problem must be differentiable twice for ITD, got: .*(once_differentiable|"
        r"setup_context|forward mode).*\. Replace that operator .* or use a first-order algorithm",
    ):
        check(problem=regression(Net(function.apply)), sampler=curves(), algorithm=algorithm)


def test_an_outer_loss_without_a_second_derivative_is_refused_where_it_is_taken():
    problem = Lossy(outer_loss=lambda loss: OnceNew.apply(loss).square())
    with pytest.raises(NoSecondDerivative, match=r"must be differentiable twice for BDA, got: .*"):
        check(problem=problem, sampler=SMOOTH, algorithm=BDA(inner_steps=2))
    for algorithm in (BDA(inner_steps=2, alpha=0.0), ITD(inner_steps=2)):
        check(problem=problem, sampler=SMOOTH, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", [ITD(inner_steps=2, first_order=True), Reptile()])
def test_it_is_accepted_by_algorithms_of_first_order(algorithm):
    for function in (OnceNew, OnceOld):
        problem = regression(Net(function.apply))
        check(problem=problem, sampler=curves(), algorithm=algorithm, vectorize=False)
    check(problem=regression(Net(OnceNew.apply)), sampler=curves(), algorithm=algorithm)


@pytest.mark.parametrize("algorithm", SECOND, ids=lambda a: f"{a.engine}-{a.learn_lr}")
def test_a_function_of_a_user_with_all_derivatives_is_accepted(algorithm):
    check(problem=regression(Net(Twice.apply)), sampler=curves(), algorithm=algorithm)


class Attentive(nn.Module):
    """Attention and a recurrent layer, whose fused kernels have no double backward."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(1, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        sequence, _ = self.recurrent(x.expand(-1, 3)[:, :, None])
        mixed = nn.functional.scaled_dot_product_attention(sequence, sequence, sequence)
        return self.head(mixed.mean(1))


@pytest.mark.parametrize("algorithm", [ITD(inner_steps=1), AID()])
def test_an_inner_loss_that_nothing_adapted_enters_is_refused(algorithm):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare, self.head = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    for adapt in (["spare.*"], ["spare.weight"]):
        with pytest.raises(ValueError, match=r"inner_loss must depend on .* spare\.weight"):
            check(problem=regression(Spare(), adapt), sampler=curves(), algorithm=algorithm)
    with pytest.raises(ValueError, match=r"inner_loss must depend on"):
        check_hypergradient(regression(Spare(), "spare.*"), curves(), algorithm)


def test_fused_kernels_are_not_taken():
    check(problem=regression(Attentive()), sampler=curves(), vectorize=False)


def test_the_trainer_asks_before_it_makes_anything(tmp_path):
    with pytest.raises(NoSecondDerivative):
        make_trainer(problem=regression(Net(OnceNew.apply)), run_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_initial_outer_variable_holds_the_algorithms_own():
    workload = Workload(Smooth(), SMOOTH, ITD(inner_lr=0.3, learn_lr="per_tensor"))
    outer = initial_outer(workload)
    assert list(outer) == ["a", "b", "algorithm.inner_lr.w", "algorithm.inner_lr.m"]
    assert float(outer["algorithm.inner_lr.w"]) == 0.3
    same = initial_outer(workload)
    other = initial_outer(replace(workload, compute=Compute(seed=1)))
    assert torch.equal(outer["a"], same["a"]) and not torch.equal(outer["a"], other["a"])


class Judged(Smooth):
    """A problem with metrics of one's own."""

    def __init__(self, metrics):
        super().__init__()
        self._metrics = metrics

    def metrics(self, context, inner, batch):
        return self._metrics(batch.tensors[0])


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (lambda u: {"rank": u.sum(5)}, r"^metrics must be computable on task 0 of sampler, whose "),
        (lambda u: {"rank": u.sum(0)}, r"^metrics\['rank'\] must return a tensor of shape \(\), "),
        (
            lambda u: {"rank": 0.5},
            r"^metrics\['rank'\] must return a tensor of shape \(\), got flo",
        ),
        (lambda u: u.sum(), r"^metrics must return a dict by name, got Tensor$"),
    ],
)
def test_metrics_are_computed_before_training(metrics, message):
    with pytest.raises(ValueError, match=message):
        check(problem=Judged(metrics))


def test_metrics_run_under_vmap_too():
    def of_numbers(u):
        return {"rank": torch.tensor(float(u.sum()))}

    check(problem=Judged(of_numbers), vectorize=False)
    with pytest.raises(ValueError, match="vectorize must be False"):
        check(problem=Judged(of_numbers), vectorize=True)


def test_what_vmap_cannot_run_is_run_one_by_one_with_a_warning():
    workload = Workload(regression(Net(branch)), curves(), ITD(inner_steps=2))
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"one by one, .* vectorize=False .* Runtime") as given:
        compute = preflight(workload, initial_outer(workload))
    assert len(given) == 1 and compute == replace(workload.compute, vectorize=False)


def test_one_warning_is_enough_wherever_it_is_found_out(recwarn):
    workload = Workload(regression(Net(branch)), curves(), ITD(inner_steps=2))
    outer = initial_outer(workload)
    warn_once.cache_clear()
    evaluate(workload.problem, curves(), workload.algorithm, outer, 60)
    tasks = [curves().sample(index) for index in range(2)]
    assert workload.hypergradients(outer, tasks).num_tasks == 2
    assert ["one by one" in str(warning.message) for warning in recwarn] == [True]


def test_what_fails_for_another_reason_fails_as_it_does_alone():
    def broken(x):
        if (x > 9).any():
            raise AttributeError("of the user")
        return x

    problem = regression(Net(broken))
    outer = problem.init_outer(torch.Generator())
    outer["first.bias"] += 100
    with pytest.raises(AttributeError, match="of the user"):
        evaluate(problem, curves(), ITD(inner_steps=1), outer, 2)


class Decayed(Smooth):
    """The outer variables are weight decays only."""

    def encode(self, outer, task):
        return {name: leaf.square() for name, leaf in outer.items()}

    def init_inner(self, outer, task):
        return {"w": torch.zeros(3, dtype=torch.float64)}

    def outer_loss(self, context, inner, batch):
        inputs, targets = batch.tensors
        return (inputs @ inner["w"] - targets).square().mean()

    def metrics(self, context, inner, batch):
        return {}

    def inner_loss(self, context, inner, batch):
        decay = sum(leaf.sum() for leaf in context.values())
        return self.outer_loss(context, inner, batch) + decay * inner["w"].square().sum()


@dataclass(frozen=True)
class Rarely(ITD):
    """Has a hypergradient once in a thousand times."""

    probability: float = 1e-3

    def estimate(self, oracle, context, state):
        found = super().estimate(oracle, context, state)
        weight = float(oracle.uniform() < self.probability) / self.probability
        return replace_hypergradient(found, weight)


def replace_hypergradient(found, weight):
    return found._replace(hypergradient=tree_map(lambda leaf: weight * leaf, found.hypergradient))


def test_a_rare_hypergradient_is_no_reason_to_refuse():
    for seed in range(4):
        check(problem=Decayed(), algorithm=UFOM(inner_steps=2, inner_lr=0.01), seed=seed)
    with pytest.warns(RuntimeWarning, match="these outer variables got no hypergradient"):
        check(problem=Decayed(), algorithm=Rarely(inner_steps=2, inner_lr=0.01))


def test_an_algorithm_that_never_trains_what_is_there_is_refused():
    with pytest.raises(ValueError, match=r"zero in every .* though the losses or the start depend"):
        check(problem=Decayed(), algorithm=ITD(inner_steps=2, inner_lr=0.01, first_order=True))


class Rough(Quadratic):
    """It computes in another dtype than that of x: in the start, in the loss, or under autocast."""

    def __init__(self, where: str, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(2, 4)
        self.where, self.dtype = where, dtype

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": super().init_outer(generator)["x"].float()}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": self.start.to(self.dtype if self.where == "start" else torch.float32)}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        y = inner["y"].to(context["x"].dtype)
        if self.where == "loss":
            y = y.to(self.dtype).to(y.dtype)
        with torch.autocast("cpu", self.dtype, enabled=self.where == "autocast"):
            return super().inner_loss(context, {"y": y}, batch).to(context["x"].dtype)

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return super().outer_loss(context, {"y": inner["y"].to(context["x"].dtype)}, batch)


DIFFERENCES = ["bvfsm", "darts", "pzobo", "sama"]
LOSSES_ALONE = ["f2sa", "freepbgd", "lancbio", "reptile", "subbio"]


def test_which_algorithms_take_differences():
    borne = {
        name: cls(inner_steps=3).bears_rounding  # type: ignore[call-arg]
        for name, cls in ALGORITHMS.items()
    }
    assert [name for name in borne if borne[name] == "float32"] == DIFFERENCES
    assert [name for name in borne if borne[name] == "autocast"] == LOSSES_ALONE


@pytest.mark.parametrize("where", ["start", "loss", "autocast"])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_below_float32_are_refused(name, where):
    algorithm = ALGORITHMS[name](inner_steps=3)  # type: ignore[call-arg]
    words = "the inner variable" if where == "start" else "inner_loss"
    message = rf"{words} must be in float32 or float64 with .*, got torch.bfloat16: it takes diff"
    with pytest.raises(ValueError, match=message):
        Trainer(Rough(where), QuadraticSampler(), algorithm, quiet=True)
    with pytest.raises(ValueError, match=message):
        check_hypergradient(Rough(where), QuadraticSampler().sample(0), algorithm)


@pytest.mark.parametrize(
    ("where", "dtype"), [("start", torch.bfloat16), ("autocast", torch.float16)]
)
@pytest.mark.parametrize("name", ["f2sa", "lancbio"])
def test_what_was_not_measured_is_refused(name, where, dtype):
    algorithm = ALGORITHMS[name](inner_steps=3)  # type: ignore[call-arg]
    message = rf"must be in float32 or float64 with .*, got {dtype}: .*under autocast in bfloat16"
    with pytest.raises(ValueError, match=message):
        Trainer(Rough(where, dtype), QuadraticSampler(), algorithm, quiet=True)


@pytest.mark.parametrize("name", ["itd", "bda", "fg2u", "iaptt", "ufom"])
def test_derivatives_of_adam_bear_rounding_if_its_eps_is_not_small(name):
    def method(eps: float) -> Algorithm:
        rule = Adam(1e-3, eps=eps)
        return ALGORITHMS[name](inner_steps=3, inner_optimizer=rule)  # type: ignore[call-arg]

    with pytest.raises(ValueError, match=r"got torch.bfloat16: .*through steps of Adam with eps"):
        Trainer(Rough("autocast"), QuadraticSampler(), method(1e-8), quiet=True)
    assert method(1e-3).bears_rounding == "bfloat16"


@pytest.mark.parametrize("name", ["f2sa", "meha", "bome", "vpbgd"])
def test_differences_of_points_that_lie_apart_bear_losses_under_autocast(name):
    algorithm = ALGORITHMS[name](inner_steps=3)  # type: ignore[call-arg]
    Trainer(Rough("autocast"), QuadraticSampler(), algorithm, quiet=True)


@pytest.mark.parametrize("where", ["start", "loss", "nowhere"])
def test_other_algorithms_and_other_dtypes_are_not(where):
    Trainer(Rough(where), QuadraticSampler(), AID(inner_steps=3), quiet=True)
    single = Rough(where, torch.float32)
    Trainer(single, QuadraticSampler(), DARTS(inner_steps=3), quiet=True)
