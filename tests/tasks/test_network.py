"""Names of parameters, the last layer, and models that torch alone would not let through."""

from __future__ import annotations

import inspect
import pickle
import warnings
import weakref
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray import cloudpickle
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from metadist import Batch, Task, task_hypergradients
from metadist.algorithms import ITD
from metadist.checks.purity import Impure
from metadist.models import TaskBatchNorm
from metadist.tasks import ClassWeights, FewShotProblem
from metadist.tasks.network import names_of
from tests.helpers import make_trainer


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


class Tied(nn.Module):
    """The weight of the last layer is that of the one before."""

    def __init__(self):
        super().__init__()
        self.body, self.middle, self.out = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out.weight = self.middle.weight

    def forward(self, x):
        return self.out(self.middle(self.body(x).tanh()).tanh())


class HeadFirst(nn.Module):
    def __init__(self, head=None):
        super().__init__()
        self.classify = nn.Linear(4, 3) if head is None else head
        self.body = nn.Linear(6, 4)

    def forward(self, x):
        return self.classify(self.body(x).tanh())


class TwoNames(nn.Module):
    """Layers that are registered twice, and an encoder that runs twice."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.last = nn.Linear(4, 3)
        self.left, self.right = self.encoder, self.encoder
        self.net = nn.Sequential(nn.Tanh(), self.last)

    def forward(self, x):
        return self.net(self.left(x[:, :3]) - self.right(x[:, 3:]))


class Recurring(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.again = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.again(self.again(self.body(x)).tanh())


def task(index=0, num_query=9):
    random = torch.Generator().manual_seed(index)

    def batch(size):
        return Batch.of(torch.randn(size, 6, generator=random), torch.arange(size) % 3)

    return Task(batch(6), batch(num_query), index)


def hypergradient(problem):
    algorithm = ITD(inner_steps=2, inner_lr=0.1)
    outer = problem.init_outer(torch.Generator())
    return task_hypergradients(problem, algorithm, outer, [task(0), task(1)]).total


def test_every_name_of_a_parameter_is_known():
    assert names_of(seeded(Tied))["out.weight"] == ("middle.weight",)
    model = nn.Sequential(nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(2, 2)))
    parts = ("1.parametrizations.weight.original0", "1.parametrizations.weight.original1")
    assert names_of(model)["1.weight"] == parts
    assert names_of(seeded(TwoNames))["net.1.bias"] == ("last.bias",)


@pytest.mark.parametrize(
    ("make", "adapt", "adapted"),
    [
        (Tied, "out.*", ["middle.weight", "out.bias"]),
        (Tied, ["middle.weight"], ["middle.weight"]),
        (TwoNames, "net.*", ["last.weight", "last.bias"]),
        (TwoNames, "right.bias", ["encoder.bias"]),
        (TwoNames, "head", ["last.weight", "last.bias"]),
        (HeadFirst, "head", ["classify.weight", "classify.bias"]),
        (
            lambda: HeadFirst(parametrizations.orthogonal(nn.Linear(4, 3))),
            "head",
            ["classify.bias", "classify.parametrizations.weight.original"],
        ),
        (
            lambda: HeadFirst(parametrizations.weight_norm(nn.Linear(4, 3))),
            "*.weight",
            [
                "classify.parametrizations.weight.original0",
                "classify.parametrizations.weight.original1",
                "body.weight",
            ],
        ),
    ],
)
def test_what_a_name_stands_for_is_adapted(make, adapt, adapted):
    model = seeded(make)
    problem = FewShotProblem(model, adapt=adapt)
    outer = problem.init_outer(torch.Generator())
    context, inner = problem.encode(outer, task()), problem.init_inner(outer, task())
    assert list(inner) == adapted
    torch.testing.assert_close(
        problem.predict(context, inner, task().query), model(task().query.tensors[0])
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Tied, r"whose last layer 'out' shares a parameter with .*'middle\.weight'"),
        (Recurring, r"whose last layer 'again' runs 2 times in a forward pass"),
        (
            lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.LogSoftmax(1)),
            r"returns something else than the output of its last layer '1', .* adapt='1\.\*'",
        ),
        (
            lambda: nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True)),
            r"that is not its last layer '0' after everything else, got 'head' \(the outputs dif",
        ),
    ],
)
def test_a_model_without_a_last_layer_of_its_own_is_refused(make, message):
    def encode():
        problem = FewShotProblem(seeded(make), adapt="head")
        problem.encode(problem.init_outer(torch.Generator()), task())

    with pytest.raises(ValueError, match=r"adapt must not be 'head' .*" + message):
        encode()


def test_random_numbers_are_not_taken_for_layers_after_the_head():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), nn.RReLU(), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"encode must give the same bytes .* layer '1' \(RReLU\)"):
        make_trainer(problem=FewShotProblem(model, "head"), sampler=SimpleNamespace(sample=task))


MODELS = {
    "two names": TwoNames,
    "tied": Tied,
    "weight norm": lambda: HeadFirst(parametrizations.weight_norm(nn.Linear(4, 3))),
    "spectral norm": lambda: HeadFirst(parametrizations.spectral_norm(nn.Linear(4, 3)).eval()),
    "orthogonal body": lambda: nn.Sequential(
        parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("adapt", ["all", "head"])
def test_a_problem_can_be_sent_before_and_after_it_was_used(make, adapt):
    if (make, adapt) == (Tied, "head"):
        adapt = "out.*"
    problem = FewShotProblem(seeded(make), adapt=adapt)
    early = cloudpickle.loads(cloudpickle.dumps(problem))
    found = hypergradient(problem)
    late = pickle.loads(cloudpickle.dumps(problem))
    for sent in (early, late, cloudpickle.loads(cloudpickle.dumps(early))):
        again = hypergradient(sent)
        assert all(torch.equal(found[name], again[name]) for name in found)
        assert all(leaf.is_meta for leaf in sent._model.parameters())


def test_other_problems_with_a_model_can_be_sent_too():
    problem = ClassWeights(3, seeded(MODELS["weight norm"]))
    sent = cloudpickle.loads(cloudpickle.dumps(problem))
    inner = problem.init_inner(problem.init_outer(torch.Generator()), task())
    inputs = task().query.tensors[0]
    assert torch.equal(problem.logits(inner, inputs), sent.logits(inner, inputs))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:.*torch.jit")
def test_models_that_torch_cannot_copy_or_differentiate_are_refused_with_the_way_out():
    compiled = nn.Sequential(nn.Linear(6, 3))
    compiled.compile()
    old = nn.Sequential(nn.Linear(6, 4), nn.utils.weight_norm(nn.Linear(4, 3)))
    masked, stepping = nn.Linear(6, 3), nn.Linear(6, 3)
    masked.weight.register_hook(torch.zeros_like)
    stepping.bias.register_post_accumulate_grad_hook(lambda leaf: None)
    for model, message in (
        (compiled, r"model must not be compiled by torch\.compile, the model is: .*\._orig_mod"),
        (nn.Sequential(nn.LazyLinear(3)), r"layer '0' is a LazyLinear that has seen no inputs"),
        (old, r"copy\.deepcopy .* Layer '1' keeps a tensor .* 'weight': .*parametrizations"),
        (
            nn.Sequential(masked),
            r"no hooks on their gradients, '0\.weight' has one: it would never run, .* mask",
        ),
        (stepping, r"no hooks on their gradients, 'bias' has one"),
        (torch.jit.script(nn.Linear(6, 3)), r"model must be a plain nn\.Module, the model is a R"),
    ):
        with pytest.raises(ValueError, match="(?s)" + message):
            FewShotProblem(model)


# Models that refer to themselves


class SelfMade(nn.Module):
    """Its outputs are multiplied by its own last weight, which `way` leads to; None: forward's."""

    def __init__(self, way=None):
        super().__init__()
        self.body, self.out = nn.Linear(6, 4), nn.Linear(4, 3)
        self.way = way
        if way is not None:
            way(self)

    def scaled(self, module, args, output):
        return output * self.out.weight.norm()

    def forward(self, x):
        output = self.out(self.body(x).tanh())
        return self.scaled(None, None, output) if self.way is None else output


def by_closure(model):
    model.register_forward_hook(lambda *given: model.scaled(*given))


def by_closure_of_closure(model):
    def scale(*given):
        return model.scaled(*given)

    model.register_forward_hook(lambda *given: scale(*given))


def by_layer(model):
    out = model.out
    out.register_forward_hook(lambda layer, args, output: output * out.weight.norm())


def by_method(model):
    model.register_forward_hook(model.scaled)


def by_partial(model):
    model.register_forward_hook(partial(lambda own, *given: own.scaled(*given), model))


def by_attribute(model):
    forward = model.forward
    model.forward = lambda x: model.scaled(None, None, forward(x))


@pytest.mark.parametrize(
    "way", [by_closure, by_closure_of_closure, by_layer, by_method, by_partial, by_attribute]
)
def test_what_a_model_refers_to_within_itself_is_the_same_in_its_copy(way):
    plain, hooked = (FewShotProblem(seeded(partial(SelfMade, w))) for w in (None, way))
    found = hypergradient(plain)
    for problem in (hooked, cloudpickle.loads(cloudpickle.dumps(hooked))):
        again = hypergradient(problem)
        for name, leaf in found.items():
            torch.testing.assert_close(again[name], leaf)
    outer = {name: 2 * leaf for name, leaf in plain.init_outer(torch.Generator()).items()}
    inputs = task().query.tensors[0]
    module = hooked.module(outer, outer, task())
    torch.testing.assert_close(module(inputs), plain.module(outer, outer, task())(inputs))


def test_other_modules_that_a_closure_holds_are_not_copied():
    teacher, model = nn.Linear(6, 3), nn.Linear(6, 3)
    model.register_forward_hook(lambda layer, args, output: output + teacher(args[0]))
    (hook,) = FewShotProblem(model)._model._forward_hooks.values()
    assert inspect.getclosurevars(hook).nonlocals == {"teacher": teacher}


KNOWN: dict[str, SelfMade] = {}


def by_global(model):
    KNOWN["model"] = model
    model.register_forward_hook(lambda *given: KNOWN["model"].scaled(*given))


def by_weak_reference(model):
    known = weakref.proxy(model)
    model.register_forward_hook(lambda *given: known.scaled(*given))


@pytest.mark.parametrize("way", [by_global, by_weak_reference])
def test_a_copy_that_reads_the_weights_of_the_original_is_refused(way):
    model = seeded(partial(SelfMade, way))
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    with pytest.raises(Impure, match="follow the weights of the model that FewShotProblem was ma"):
        hypergradient(FewShotProblem(model))
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())


def test_weights_in_a_read_only_file_and_weights_that_share_memory_are_checked(tmp_path):
    np.save(tmp_path / "w.npy", np.ones((4, 6), np.float32))
    model = seeded(SelfMade)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: the array is not writable
        stored = torch.from_numpy(np.load(tmp_path / "w.npy", mmap_mode="r"))
    model.body.weight = nn.Parameter(stored)
    model.body.bias = nn.Parameter(torch.ones(1).expand(4))
    hypergradient(FewShotProblem(model))
    assert torch.equal(model.body.weight, torch.ones(4, 6))
    assert model.body.weight.data_ptr() == stored.data_ptr()


def test_an_error_of_the_model_is_not_taken_for_one_about_its_weights():
    def fail(*given):
        raise RuntimeError("metadata of the meta-batch are missing")

    model = seeded(SelfMade)
    model.register_forward_hook(fail)
    with pytest.raises(Exception, match="metadata of the meta-batch") as caught:
        hypergradient(FewShotProblem(model))
    assert "must read its weights" not in str(caught.value)


def test_a_loss_may_ask_the_model_as_it_was():
    model = seeded(SelfMade)
    inputs = task().support.tensors[0]

    def distilled(output, target):
        return F.cross_entropy(output, target) + model(inputs).detach().norm()

    hypergradient(FewShotProblem(model, loss=distilled))


def test_a_weight_that_is_held_without_its_layer_is_refused_with_the_way_out():
    def hold(model):
        weight = model.out.weight
        model.register_forward_hook(lambda layer, args, output: output * weight.norm())

    with pytest.raises(ValueError, match=r"must read its weights from its layers.* hold the layer"):
        hypergradient(FewShotProblem(seeded(partial(SelfMade, hold))))


def test_a_body_that_reads_the_head_is_refused_with_the_way_out():
    def read(model):
        model.body.register_forward_hook(lambda layer, args, out: out * model.out.weight.norm())

    problem = FewShotProblem(seeded(partial(SelfMade, read)), adapt="head")
    with pytest.raises(ValueError, match=r"does not run without the rest, .* adapt='out\.\*'"):
        hypergradient(problem)


# Sets of other lengths


class Sentences(nn.Module):
    """Reads up to the last word that is not 0, and averages over the longest of the batch."""

    def __init__(self):
        super().__init__()
        self.words, self.read = nn.Embedding(20, 4), nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens):
        lengths = (tokens != 0).sum(1)
        packed = pack_padded_sequence(
            self.words(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        read, _ = pad_packed_sequence(self.read(packed)[0], batch_first=True)
        return self.head(read.mean(1))


def sentences(support_length, query_length):
    random = torch.Generator().manual_seed(1)

    def batch(size, length):
        tokens = torch.randint(1, 20, (size, length), generator=random)
        lengths = torch.randint(2, length, (size, 1), generator=random)
        tokens[torch.arange(length) >= lengths] = 0
        return Batch.of(tokens, torch.arange(size) % 3)

    return Task(batch(6, support_length), batch(6, query_length), 0)


@pytest.mark.parametrize("lengths", [(9, 9), (4, 9)])
def test_sets_whose_examples_are_no_rows_of_one_tensor_pass_one_by_one(lengths):
    model, given = seeded(Sentences), sentences(*lengths)
    whole, head = (FewShotProblem(model, adapt=adapt) for adapt in ("all", "head"))
    outer = whole.init_outer(torch.Generator())
    for source, batch in (("features.support", given.support), ("features.query", given.query)):
        expected = whole.predict(whole.encode(outer, given), outer, batch, source)
        context, inner = head.encode(outer, given), head.init_inner(outer, given)
        torch.testing.assert_close(head.predict(context, inner, batch, source), expected)
    two = [given, given._replace(id=1)]
    assert task_hypergradients(head, ITD(inner_steps=1), outer, two).num_tasks == 2


def test_batch_norm_of_torch_judges_each_set_by_its_own_statistics():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 4), norm, nn.Linear(4, 3)))
    given = task()
    given.query.tensors[0].mul_(3).add_(1)
    whole, head = (FewShotProblem(model, adapt=adapt) for adapt in ("all", "head"))
    outer = whole.init_outer(torch.Generator())
    expected = whole.predict(whole.encode(outer, given), outer, given.query)
    context, inner = head.encode(outer, given), head.init_inner(outer, given)
    torch.testing.assert_close(head.predict(context, inner, given.query), expected)


def test_inductive_batch_norm_needs_sets_of_one_shape():
    model = seeded(
        lambda: nn.Sequential(nn.Linear(6, 4), TaskBatchNorm(4, "inductive"), nn.Linear(4, 3))
    )
    problem = FewShotProblem(model, adapt="head")
    other = task()._replace(query=Batch.of(torch.ones(9, 7), torch.arange(9) % 3))
    with pytest.raises(ValueError, match=r"one shape where batch norm is 'inductive', got \(6, 6"):
        problem.encode(problem.init_outer(torch.Generator()), other)
