"""`FewShotProblem`: what is adapted, what is encoded how often, and which models it takes."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metadist.algorithms import ITD
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.models import MLP, Conv4, ResNet12, TaskBatchNorm, with_task_batch_norm
from metadist.task import Batch, Task, stack_tasks, to_device
from metadist.tasks.few_shot.problem import LOSSES, FewShotProblem
from metadist.tasks.network import last_registered
from metadist.trees import add, select
from tests.helpers import with_compute
from tests.problems import (
    assert_close,
    assert_same_bytes,
    assert_slopes,
    generator,
    image_task,
    plain_gradient,
    plain_objective,
    randn,
    vector_task,
)

LOOP, VMAP = False, True


def conv4(batch_norm="transductive"):
    torch.manual_seed(0)
    return Conv4(n_way=3, width=3, image_size=16, batch_norm=batch_norm).double()


def resnet12(batch_norm="transductive"):
    torch.manual_seed(0)
    return ResNet12(3, 1, (2, 3, 2, 3), image_size=16, batch_norm=batch_norm).double()


def mlp(*hidden):
    torch.manual_seed(0)
    return MLP(3, 2, hidden or (4,)).double()


def hypergradient(problem, tasks, outer=None, **options):
    outer = problem.init_outer(generator(0)) if outer is None else outer
    return task_hypergradients(
        problem, ITD(inner_steps=2), outer, tasks, **with_compute(options)
    ).total


def assert_hypergradient_is_true(problem, tasks, engines=("adjoint", "unrolled")):
    """Against central differences and plain autograd, in a loop and under vmap."""
    outer = problem.init_outer(generator(0))

    def objective(x):
        return torch.stack([plain_objective(problem, x, task, 2, 0.1) for task in tasks]).sum()

    for vectorize in (LOOP, VMAP):
        for engine in engines:
            total = task_hypergradients(
                problem,
                ITD(2, 0.1, engine=engine),
                outer,
                tasks,
                compute=Compute(vectorize=vectorize),
            ).total
            assert_slopes(total, objective, outer)


# What is adapted


@pytest.mark.parametrize(
    ("adapt", "adapted"),
    [
        ("all", ["features.0.weight", "features.0.bias", "head.weight", "head.bias"]),
        ("head", ["head.weight", "head.bias"]),
        ("features.*", ["features.0.weight", "features.0.bias"]),
        ("*.bias", ["features.0.bias", "head.bias"]),
        (["head.bias", "features.*.weight"], ["features.0.weight", "head.bias"]),
        (("head.bias",), ["head.bias"]),
    ],
    ids=str,
)
def test_which_parameters_are_adapted(adapt, adapted):
    problem = FewShotProblem(mlp(), adapt=adapt, loss="mse")
    outer, task = problem.init_outer(generator(0)), vector_task(0)
    assert list(outer) == ["features.0.weight", "features.0.bias", "head.weight", "head.bias"]
    inner, context = problem.init_inner(outer, task), problem.encode(outer, task)
    assert list(inner) == adapted
    assert not inner.keys() & context.keys()
    shared = (
        {"features.support", "features.query"} if adapt == "head" else outer.keys() - set(adapted)
    )
    assert context.keys() == shared
    assert_hypergradient_is_true(problem, [vector_task(0), vector_task(1)])


def test_the_outer_variable_starts_as_the_weights_of_the_model_and_stays_apart_from_it():
    model = mlp()
    problem = FewShotProblem(model, loss="mse")
    expected = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    problem.init_outer(generator(0))["head.bias"].zero_()
    with torch.no_grad():
        model.head.weight.zero_()
    assert_same_bytes(problem.init_outer(generator(1)), expected)


@pytest.mark.parametrize("adapt", ["all", "head", "features.*"])
def test_predictions_before_adaptation_are_those_of_the_model(adapt):
    model, task = conv4(), image_task(0)
    problem = FewShotProblem(model, adapt=adapt)
    outer = problem.init_outer(generator(0))
    context, inner = problem.encode(outer, task), problem.init_inner(outer, task)
    for source, batch in (("features.support", task.support), ("features.query", task.query)):
        logits = model(batch.tensors[0]).detach()
        predicted = problem.predict(context, inner, batch, source)
        assert torch.allclose(predicted, logits, rtol=1e-12, atol=1e-12)
        loss = problem.inner_loss if batch is task.support else problem.outer_loss
        expected = F.cross_entropy(logits, batch.tensors[1])
        assert torch.allclose(loss(context, inner, batch), expected, rtol=1e-12)
    hits = model(task.query.tensors[0]).argmax(1) == task.query.tensors[1]
    accuracy = problem.metrics(context, inner, task.query)["accuracy"]
    assert float(accuracy) == pytest.approx(float(hits.double().mean()))


def test_mini_batches_of_features_are_the_features_of_the_mini_batch():
    problem, task = FewShotProblem(conv4(), adapt="head"), image_task(0)
    outer = problem.init_outer(generator(0))
    context, inner = problem.encode(outer, task), problem.init_inner(outer, task)
    whole = problem.predict(context, inner, task.query)
    positions = torch.tensor([4, 0, 2])
    part = problem.predict(context, inner, task.query.take(positions))
    assert torch.allclose(part, whole[positions], rtol=1e-14)


@pytest.mark.parametrize("adapt", ["all", "features.*"])
def test_an_inductive_model_shows_the_query_set_the_statistics_of_the_support_set(adapt):
    problem, task = FewShotProblem(conv4("inductive"), adapt=adapt), image_task(0)
    outer = problem.init_outer(generator(0))
    context, inner = problem.encode(outer, task), problem.init_inner(outer, task)
    whole = problem.predict(context, inner, task.query)
    alone = problem.predict(context, inner, task.query.take(torch.tensor([1])))
    assert torch.allclose(alone, whole[[1]], rtol=0, atol=1e-12)
    assert_hypergradient_is_true(problem, [task, image_task(1)], ["adjoint"])


# How often the backbone runs

CALLS: list[tuple[str, int]] = []


class CountRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        CALLS.append(("forward", len(x)))
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        CALLS.append(("backward", len(gradient)))
        return gradient.clone()


class Counting(nn.Module):
    """Passes rows on and notes in `CALLS` how many, forward and backward."""

    def forward(self, x):
        return CountRows.apply(x)


@pytest.mark.parametrize("vectorize", [LOOP, VMAP])
@pytest.mark.parametrize("batch_norm", ["transductive", "inductive"])
@pytest.mark.parametrize("batch_encode", [True, False])
def test_anil_passes_each_image_through_the_backbone_once(batch_encode, batch_norm, vectorize):
    model = conv4(batch_norm)
    model.features.add_module("counting", Counting())
    problem = FewShotProblem(model, adapt="head", batch_encode=batch_encode)
    tasks = [image_task(index, k_shot=2, k_query=3) for index in range(3)]
    rows_per_task = 3 * (2 + 3)
    hypergradient(problem, tasks)  # the first call also checks the model
    CALLS.clear()
    total = task_hypergradients(
        problem,
        ITD(inner_steps=4),
        problem.init_outer(generator(0)),
        tasks,
        compute=Compute(vectorize=vectorize),
    ).total
    assert bool(total["features.0.0.weight"].any())
    once = batch_encode and vectorize
    sizes = [3 * rows_per_task] if once else [rows_per_task] * 3
    assert [size for kind, size in CALLS if kind == "forward"] == sizes
    assert [size for kind, size in CALLS if kind == "backward"] == sizes


@pytest.mark.parametrize("model", [conv4, resnet12])
@pytest.mark.parametrize("batch_norm", ["transductive", "inductive", "none"])
def test_encoding_together_is_encoding_one_by_one(model, batch_norm):
    tasks = [image_task(index, k_query=3) for index in range(3)]
    one, two = (
        FewShotProblem(model(batch_norm), adapt="head", batch_encode=batch_encode)
        for batch_encode in (True, False)
    )
    outer = one.init_outer(generator(0))
    context = one.encode_tasks(outer, stack_tasks(tasks))
    for b, task in enumerate(tasks):
        assert_close(select(context, b), two.encode(outer, task), 1e-12)
    results = [hypergradient(problem, tasks, outer, vectorize=VMAP) for problem in (one, two)]
    assert_close(results[0], results[1])
    assert_close(results[0], hypergradient(two, tasks, outer, vectorize=LOOP))


def test_per_task_statistics_depend_on_no_other_task():
    problem = FewShotProblem(conv4(), adapt="head", batch_encode=True)
    outer = problem.init_outer(generator(0))
    tasks = [image_task(index) for index in range(3)]
    before = problem.encode_tasks(outer, stack_tasks(tasks))
    tasks[1].query.tensors[0].mul_(5).add_(1)
    after = problem.encode_tasks(outer, stack_tasks(tasks))
    for b in (0, 2):
        assert_close(select(after, b), select(before, b), 1e-13)
    assert not torch.allclose(
        select(after, 1)["features.query"], select(before, 1)["features.query"]
    )


def test_batch_encode_auto_runs_one_by_one_on_a_cpu():
    model = conv4()
    model.features.add_module("counting", Counting())
    problem = FewShotProblem(model, adapt="head")
    tasks = [image_task(index) for index in range(2)]
    hypergradient(problem, tasks)
    CALLS.clear()
    hypergradient(problem, tasks, vectorize=VMAP)
    assert [size for kind, size in CALLS if kind == "forward"] == [12, 12]


# Which parameters are trained


@pytest.mark.parametrize("vectorize", [LOOP, VMAP])
@pytest.mark.parametrize("adapt", ["all", "head", "features.1.*"])
def test_frozen_parameters_are_constants(adapt, vectorize):
    model = conv4()
    model.features[0].requires_grad_(False)
    problem = FewShotProblem(model, adapt=adapt)
    outer = problem.init_outer(generator(0))
    assert not any(name.startswith("features.0.") for name in outer)
    tasks = [image_task(0), image_task(1)]
    total = hypergradient(problem, tasks, outer, vectorize=vectorize)
    whole = FewShotProblem(conv4(), adapt=adapt)
    if adapt != "all":
        full = hypergradient(whole, tasks, vectorize=vectorize)
        assert_close(total, {name: full[name] for name in outer})
    else:
        fixed = FewShotProblem(conv4(), adapt=["features.[123].*", "head.*"])
        full = hypergradient(fixed, tasks, vectorize=vectorize)
        assert_close(total, {name: full[name] for name in outer})
    for name, leaf in model.named_parameters():
        assert torch.equal(leaf, dict(conv4().named_parameters())[name])


def test_a_frozen_head_moves_the_head_to_the_last_trainable_module():
    model = mlp(5, 4)
    assert last_registered(model) == "head"
    model.head.requires_grad_(False)
    assert last_registered(model) == "features.2"


@pytest.mark.parametrize("vectorize", [LOOP, VMAP])
@pytest.mark.parametrize("adapt", ["all", "head", "features.*"])
def test_a_parameter_that_the_loss_does_not_depend_on_has_a_zero_gradient(adapt, vectorize):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Linear(3, 4)
            self.idle = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.features(x).tanh())

    problem = FewShotProblem(Idle().double(), adapt=adapt, loss="mse")
    total = hypergradient(problem, [vector_task(0), vector_task(1)], vectorize=vectorize)
    assert list(total) == list(problem.init_outer(generator(0)))
    assert not total["idle.weight"].any() and not total["idle.bias"].any()
    assert total["features.weight"].all() and total["head.bias"].all()


def test_tied_weights_are_one_outer_variable():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.two(self.one(x).tanh()).tanh())

    torch.manual_seed(0)
    for adapt in ("all", "head"):
        problem = FewShotProblem(Tied().double(), adapt=adapt, loss="mse")
        assert "two.weight" not in problem.init_outer(generator(0))
        assert_hypergradient_is_true(problem, [vector_task(0), vector_task(1)])


# Which layers are taken


class Net(nn.Module):
    """A body of any kind over inputs of shape (rows, length, 4), and a linear head."""

    def __init__(self, body, width):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.body(x))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True, **options)

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


class ScaledDotProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.key = nn.Linear(4, 4)

    def forward(self, x):
        query, key = self.query(x)[:, None], self.key(x)[:, None]
        return F.scaled_dot_product_attention(query, key, x[:, None])[:, 0].mean(1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x).mean(1)


SEQUENCE_MODELS = {
    "LSTM": lambda: Net(Recurrent(nn.LSTM), 3),
    "GRU": lambda: Net(Recurrent(nn.GRU), 3),
    "RNN": lambda: Net(Recurrent(nn.RNN), 3),
    "two-way LSTM of two layers": lambda: Net(
        Recurrent(nn.LSTM, num_layers=2, bidirectional=True), 6
    ),
    "attention": lambda: Net(Attention(), 4),
    "attention in eval mode": lambda: Net(Attention(dropout=0.3), 4).eval(),
    "scaled dot product": lambda: Net(ScaledDotProduct(), 4),
    "transformer": lambda: Net(Encoder(), 4),
    "transformer in eval mode": lambda: Net(Encoder(), 4).eval(),
}


@pytest.mark.parametrize("adapt", ["all", "head"])
@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_second_order_through_sequence_models(name, adapt):
    torch.manual_seed(0)
    problem = FewShotProblem(SEQUENCE_MODELS[name]().double(), adapt=adapt, loss="mse")
    tasks = [vector_task(index, (3, 4)) for index in range(2)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_hypergradient_is_true(problem, tasks)


KERNELS = {
    "attention": lambda: Net(ScaledDotProduct(), 4),
    "LSTM": lambda: Net(Recurrent(nn.LSTM), 3),
    "GRU": lambda: Net(Recurrent(nn.GRU), 3),
    "RNN": lambda: Net(Recurrent(nn.RNN), 3),
}


@pytest.mark.parametrize("adapt", ["all", "head"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_user_sets_nothing_to_avoid_kernels_that_are_not_differentiable_twice(name, adapt):
    """In float32, where torch would choose fused kernels, with values as well as derivatives."""
    torch.manual_seed(0)
    problem = FewShotProblem(KERNELS[name](), adapt=adapt, loss="mse")
    tasks = [to_device(vector_task(index, (3, 4)), "cpu", torch.float32) for index in range(2)]
    outer = problem.init_outer(generator(0))
    enabled = torch.backends.mkldnn.enabled
    for algorithm in (ITD(2), ITD(2, engine="unrolled")):
        one, two = (
            task_hypergradients(
                problem, algorithm, outer, tasks, compute=Compute(vectorize=vectorize), report=True
            )
            for vectorize in (LOOP, VMAP)
        )
        assert one.num_tasks == two.num_tasks == 2
        assert_close(one.total, two.total, 1e-5)
        assert one.metrics == pytest.approx(two.metrics, rel=1e-5)
    assert torch.backends.mkldnn.enabled == enabled


def frozen_statistics():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
    model = Net(body, 4).double()
    for _ in range(3):
        model(randn(5, 6, 3))
    body[1].eval()
    return model


@pytest.mark.parametrize("adapt", ["all", "head", "body.*"])
def test_running_statistics_in_eval_mode_are_constants(adapt):
    model = frozen_statistics()
    problem = FewShotProblem(model, adapt=adapt, loss="mse")
    outer = problem.init_outer(generator(0))
    assert not any("running" in name for name in outer)
    task = vector_task(0)
    context, inner = problem.encode(outer, task), problem.init_inner(outer, task)
    expected = model(task.query.tensors[0])
    assert torch.allclose(problem.predict(context, inner, task.query), expected, rtol=1e-12)
    before = {name: leaf.clone() for name, leaf in model.named_buffers()}
    assert_hypergradient_is_true(problem, [vector_task(0), vector_task(1)])
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.named_buffers())
    copied = problem._model.named_buffers()
    assert all(torch.equal(leaf, before[name]) for name, leaf in copied)


def test_batch_norm_without_running_statistics_is_taken_in_train_mode():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh())
    for adapt in ("all", "head"):
        problem = FewShotProblem(Net(body, 4).double(), adapt=adapt, loss="mse")
        assert_hypergradient_is_true(problem, [vector_task(0), vector_task(1)])


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4)], ids=lambda layer: type(layer).__name__
)
def test_batch_norm_that_updates_running_statistics_is_refused(layer):
    model = Net(nn.Sequential(nn.Linear(3, 4), layer), 4)
    with pytest.raises(
        ValueError,
        match=r"batch norm must not update running statistics, layer 'body\.1' does: "
        r".*with_task_batch_norm\(model\), or .*get_submodule\('body\.1'\)\.eval\(\)",
    ):
        FewShotProblem(model)
    FewShotProblem(with_task_batch_norm(model))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.3),
        nn.Dropout2d(0.3),
        nn.AlphaDropout(0.3),
        nn.MultiheadAttention(4, 2, dropout=0.3),
        nn.LSTM(4, 3, num_layers=2, dropout=0.3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_dropout_is_refused_in_train_mode_and_taken_in_eval_mode(layer):
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2))
    with pytest.raises(
        ValueError,
        match=r"dropout must be off in the inner loop, layer '1' has p=0\.3: .*; set it to 0, or "
        r"model\.get_submodule\('1'\)\.eval\(\)",
    ):
        FewShotProblem(model)
    model.get_submodule("1").eval()
    FewShotProblem(model)


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_dropout_in_eval_mode_is_the_identity(adapt):
    torch.manual_seed(0)
    plain = Net(nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Tanh()), 4).double()
    torch.manual_seed(0)
    dropping = Net(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5).eval(), nn.Tanh()), 4).double()
    tasks = [vector_task(0), vector_task(1)]
    for vectorize in (LOOP, VMAP):
        results = [
            hypergradient(FewShotProblem(m, adapt, loss="mse"), tasks, vectorize=vectorize)
            for m in (plain, dropping)
        ]
        assert_close(results[0], results[1], 0.0)


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_inputs_may_be_integers(adapt):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, words):
            return self.head(self.embedding(words).mean(1).tanh())

    def task(index):
        support, query = (
            Batch.of(torch.randint(7, (4, 5), generator=generator(index, part)), randn(index, 4, 2))
            for part in range(2)
        )
        return Task(support, query, index)

    torch.manual_seed(0)
    problem = FewShotProblem(Words().double(), adapt=adapt, loss="mse")
    assert_hypergradient_is_true(problem, [task(0), task(1)])


def test_a_model_that_computes_after_its_head_is_refused_with_adapt_head():
    class After(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return 2 * self.head(self.body(x).tanh())

    torch.manual_seed(0)
    tasks = [vector_task(0), vector_task(1)]
    for vectorize in (LOOP, VMAP):
        problem = FewShotProblem(After().double(), adapt="head", loss="mse")
        with pytest.raises(
            ValueError,
            match=r"adapt must not be 'head' for a model that returns something else than the "
            r"output of its last layer .head., got .head.: name .*, adapt=.head\.\*.",
        ):
            hypergradient(problem, tasks, vectorize=vectorize)
    # The way out that the message names.
    assert_hypergradient_is_true(FewShotProblem(After().double(), "head.*", loss="mse"), tasks)


# Losses and metrics


@pytest.mark.parametrize("name", ["mse_loss", "huber_loss", "smooth_l1_loss"])
def test_a_loss_of_the_user(name):
    loss = getattr(F, name)
    problem = FewShotProblem(mlp(), adapt="head", loss=loss)
    assert problem.describe()["loss"] == name
    assert_hypergradient_is_true(problem, [vector_task(0), vector_task(1)])


def test_a_module_is_a_loss_too():
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    problem = FewShotProblem(conv4(), adapt="head", loss=loss)
    assert problem.describe()["loss"] == "CrossEntropyLoss"
    assert_hypergradient_is_true(problem, [image_task(0), image_task(1)], ["adjoint"])


def test_mse_is_that_of_torch_and_reports_no_accuracy():
    tasks = [vector_task(0), vector_task(1)]
    problems = [FewShotProblem(mlp(), loss=loss) for loss in ("mse", F.mse_loss)]
    outer = problems[0].init_outer(generator(0))
    results = [
        task_hypergradients(problem, ITD(), outer, tasks, report=True) for problem in problems
    ]
    for result in results:
        assert set(result.metrics) == {"support_loss", "query_loss", "query_loss_before"}
    assert_close(results[0].total, results[1].total, 1e-12)
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=1e-12)


def test_weight_decay_is_in_the_inner_loss_alone():
    model = MLP(3, 2, (4,)).double()
    task = vector_task(0)
    plain, decayed = (FewShotProblem(model, "head", "mse", weight_decay=w) for w in (0.0, 0.3))
    outer = plain.init_outer(generator(0))
    context, inner = plain.encode(outer, task), plain.init_inner(outer, task)
    loss = [p.inner_loss(context, inner, task.support) for p in (plain, decayed)]
    square = sum(leaf.square().sum() for leaf in inner.values())
    torch.testing.assert_close(loss[1], loss[0] + 0.15 * square)
    outer_loss = [p.outer_loss(context, inner, task.query) for p in (plain, decayed)]
    assert torch.equal(outer_loss[0], outer_loss[1])
    assert decayed.describe()["weight_decay"] == "0.3"
    with pytest.raises(ValueError, match=r"weight_decay must be >= 0, got -1"):
        FewShotProblem(model, weight_decay=-1)


def test_cross_entropy_refuses_real_numbers_which_torch_takes_for_probabilities():
    loss = LOSSES["cross_entropy"]
    labels = torch.tensor([0, 2])
    output = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    assert float(loss(output, labels)) == float(F.cross_entropy(output, labels))
    with pytest.raises(ValueError, match=r"targets must be integers .* got torch.float32: pass"):
        loss(output, torch.ones(2, 3))


def test_mse_refuses_targets_that_would_be_broadcast():
    task = vector_task(0, outputs=1)
    flat = Batch.of(task.support.tensors[0], task.support.tensors[1][:, 0])
    problem = FewShotProblem(MLP(3, 1, (4,)).double(), loss="mse")
    with pytest.raises(
        ValueError, match=r"targets must have the shape of .*, which is \(4, 1\), got \(4,\)"
    ):
        hypergradient(problem, [task._replace(support=flat)])


def test_accuracy_before_and_after_adaptation_is_in_the_report():
    problem, task = FewShotProblem(conv4(), adapt="head"), image_task(0)
    outer = problem.init_outer(generator(0))
    metrics = task_hypergradients(problem, ITD(20, 0.5), outer, [task], report=True).metrics
    context, start = problem.encode(outer, task), problem.init_inner(outer, task)
    adapted = start
    for _ in range(20):
        gradient = plain_gradient(lambda y: problem.inner_loss(context, y, task.support), adapted)
        adapted = add(adapted, gradient, -0.5)
    for suffix, inner in (("", adapted), ("_before", start)):
        hits = problem.predict(context, inner, task.query).argmax(1) == task.query.tensors[1]
        assert metrics["query_accuracy" + suffix] == pytest.approx(float(hits.double().mean()))


# Errors, pickling, description


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": "l1"},
            r"loss must be one of \['cross_entropy', 'mse'\] or a function, got 'l1'",
        ),
        (
            {"adapt": "backbone.*"},
            r"adapt must be 'all', 'head' or patterns .*, 'backbone\.\*' matches none of feat",
        ),
        ({"adapt": ["head.*", "nothing"]}, r"'nothing' matches none of features\.1\.0\.weight"),
        (
            {"adapt": "features.0.*"},
            r"adapt must match trainable parameters, 'features\.0\.\*' matches frozen ones only: "
            r"set requires_grad_\(True\)",
        ),
        ({"adapt": []}, r"adapt must name at least one parameter, got an empty list"),
        (
            {"adapt": "all", "batch_encode": True},
            r"batch_encode must be 'auto' or False unless exactly the head .* adapt='all'",
        ),
    ],
    ids=str,
)
def test_messages(options, message):
    model = conv4()
    model.features[0].requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        FewShotProblem(model, **options)


def test_a_model_without_a_trainable_parameter_is_refused():
    for model in (mlp().requires_grad_(False), nn.Flatten()):
        for adapt in ("all", "head"):
            with pytest.raises(
                ValueError, match=r"model must have a trainable parameter, got none"
            ):
                FewShotProblem(model, adapt=adapt)


def test_a_model_without_a_last_module_has_no_head():
    with pytest.raises(
        ValueError, match=r"whose last parameter 'bias' is in no submodule, got 'he"
    ):
        FewShotProblem(nn.Linear(3, 2), adapt="head")


def test_batch_encode_is_refused_with_batch_norm_that_mixes_tasks():
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(
        ValueError,
        match=r"batch norm that mixes tasks \(body\.1\), got True: .*with_task_batch_norm",
    ):
        FewShotProblem(Net(body, 4), adapt="head", batch_encode=True)


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_a_pickled_problem_is_the_same_problem(adapt):
    problem, tasks = FewShotProblem(conv4(), adapt=adapt), [image_task(0), image_task(1)]
    before = hypergradient(problem, tasks)
    copied = pickle.loads(pickle.dumps(problem))
    assert_same_bytes(hypergradient(copied, tasks), before)
    assert copied.describe() == problem.describe()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("adapt", ["all", "head"])
def test_a_pickled_problem_holds_every_weight_once(adapt, frozen):
    model = nn.Sequential(nn.Linear(200, 200).requires_grad_(not frozen), nn.Linear(200, 2))
    size = sum(leaf.numel() * leaf.element_size() for leaf in model.parameters())
    assert size < len(pickle.dumps(FewShotProblem(model, adapt=adapt))) < 1.1 * size


def test_describe_says_what_is_needed_to_repeat_a_result():
    assert FewShotProblem(conv4(), adapt="head").describe() == {
        "model": "Conv4",
        "adapt": "head (2 of 18 tensors)",
        "batch norm": "transductive",
        "loss": "cross_entropy",
    }
    problem = FewShotProblem(mlp(), adapt=["head.*", "features.0.bias"], loss="mse")
    assert problem.describe() == {
        "model": "MLP",
        "adapt": "head.*, features.0.bias (3 of 4 tensors)",
        "batch norm": "none",
        "loss": "mse",
    }


@pytest.mark.parametrize(
    ("layer", "policy"),
    [
        (TaskBatchNorm(4, "inductive"), "inductive"),
        (nn.BatchNorm1d(4, track_running_stats=False), "transductive"),
        (nn.BatchNorm1d(4).eval(), "running statistics, frozen"),
        (nn.Sequential(TaskBatchNorm(4), TaskBatchNorm(4, "inductive")), "inductive, transductive"),
    ],
)
def test_describe_says_the_policy_of_batch_norm(layer, policy):
    problem = FewShotProblem(Net(nn.Sequential(nn.Linear(3, 4), layer), 4))
    assert problem.describe()["batch norm"] == policy


def dense_task(classes, width, ignored=False):
    def batch(seed):
        x = randn(seed, 4, 1, 3, width)
        labels = (x[:, 0] * 50).long().abs() % classes
        if ignored:
            labels[:, 0] = -100
        return Batch.of(x, labels)

    return Task(batch(1), batch(2), 0)


@pytest.mark.parametrize(("classes", "width"), [(3, 5), (5, 5)], ids=["other width", "same width"])
@pytest.mark.parametrize("ignored", [False, True])
def test_accuracy_of_dense_labels_is_that_of_the_classes(classes, width, ignored):
    torch.manual_seed(0)
    model = nn.Conv2d(1, classes, 1).double()
    problem, task = FewShotProblem(model), dense_task(classes, width, ignored)
    outer = problem.init_outer(generator(0))
    inputs, labels = task.query.tensors
    hits = model(inputs).argmax(1) == labels
    expected = hits[labels != -100].double().mean()
    assert 0 < expected < 1
    found = problem.metrics(problem.encode(outer, task), outer, task.query)["accuracy"]
    assert float(found) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_the_target_is_the_same_tensor_everywhere(adapt):
    task = vector_task(3)
    mask = torch.ones(len(task.support.index))
    support, query = (Batch.named(targets=b.tensors[1], inputs=b.tensors[0]) for b in task[:2])
    reordered = Task(support, query, task.id)
    problem = FewShotProblem(mlp(5), adapt=adapt, loss="mse")
    first, second = (hypergradient(problem, [t]) for t in (task, reordered))
    assert_same_bytes(first, second)
    for tensors in ({"mask": mask}, {"weights": mask, "ids": mask}):
        x, y = task.support.tensors
        three = task._replace(support=Batch.named(inputs=x, **tensors, targets=y))
        with pytest.raises(
            ValueError, match=r"must be inputs, targets, got inputs, .*targets: buil"
        ):
            hypergradient(problem, [three])
    with pytest.raises(ValueError, match="must be inputs, targets, got 3 without names"):
        hypergradient(problem, [task._replace(support=Batch.of(x, y, mask))])
