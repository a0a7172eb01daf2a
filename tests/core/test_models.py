"""The shipped models, and batch norm per task: exact, and of the policy that it says."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from metadist.models import MLP, Conv4, ResNet12, TaskBatchNorm, norm_layer, with_task_batch_norm
from metadist.rows import Rows, rows
from tests.problems import assert_close, randn, random_like

B, S, Q = 3, 4, 5


def conv4(batch_norm):
    torch.manual_seed(0)
    return Conv4(n_way=3, width=3, image_size=16, batch_norm=batch_norm).double()


def resnet12(batch_norm):
    torch.manual_seed(0)
    return ResNet12(3, 1, (2, 3, 2, 3), image_size=16, batch_norm=batch_norm).double()


def mlp(batch_norm):
    torch.manual_seed(0)
    return MLP(16, 3, (5, 4)).double()


MODELS = {"Conv4": conv4, "ResNet12": resnet12, "MLP": mlp}


def inputs(name, seed, *leading):
    return randn(seed, *leading, 16) if name == "MLP" else randn(seed, *leading, 1, 16, 16)


@pytest.mark.parametrize(
    ("model", "shape", "features"),
    [
        (Conv4(), (2, 1, 28, 28), 64),
        (Conv4(n_way=7, in_channels=3, width=2, image_size=84), (2, 3, 84, 84), 2 * 25),
        (Conv4(width=3, image_size=16), (2, 1, 16, 16), 3),
        (ResNet12(widths=(2, 3, 4, 5)), (2, 3, 84, 84), 5),
        (ResNet12(7, 1, (2, 3, 4, 5), image_size=16), (2, 1, 16, 16), 5),
        (MLP(), (2, 1), 40),
        (MLP(3, 4, (5,)), (2, 3), 5),
    ],
)
def test_shapes(model, shape, features):
    assert model.features(torch.zeros(shape)).shape == (2, features)
    assert model(torch.zeros(shape)).shape == (2, model.head.out_features)


def test_parameter_counts_are_those_of_the_literature():
    def count(model):
        return sum(leaf.numel() for leaf in model.features.parameters())

    assert count(Conv4(in_channels=1)) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 3 * 64
    assert 12.4e6 < count(ResNet12()) < 12.5e6


@pytest.mark.parametrize("name", ["Conv4", "ResNet12"])
def test_batch_norm_none_is_no_batch_norm(name):
    assert not any(isinstance(module, TaskBatchNorm) for module in MODELS[name]("none").modules())
    assert isinstance(norm_layer(3, "none"), nn.Identity)


def test_own_statistics_are_those_of_torch_in_training():
    x = randn(0, 6, 3, 4, 4)
    reference = nn.BatchNorm2d(3, eps=1e-3).double()
    layer = TaskBatchNorm(3, eps=1e-3).double()
    random = random_like(dict(layer.named_parameters()), 1)
    with torch.no_grad():
        for module in (reference, layer):
            module.weight.copy_(random["weight"])
            module.bias.copy_(random["bias"])
    assert torch.allclose(layer(x), reference(x), rtol=0, atol=1e-13)


def one_by_one(layer, params, x_BRx, policy):
    """Every task alone, by the formula."""

    def normalized(x, statistics_of):
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean = statistics_of.mean(axes, keepdim=True)
        variance = (statistics_of - mean).square().mean(axes, keepdim=True)
        z = (x - mean) / (variance + layer.eps).sqrt()
        return z * params["weight"].view(shape) + params["bias"].view(shape)

    outs = []
    for x in x_BRx:
        support, query = x[:S], x[S:]
        seen_by_query = query if policy == "transductive" else support
        outs.append(torch.cat([normalized(support, support), normalized(query, seen_by_query)]))
    return torch.stack(outs)


def together(layer, params, x_BRx):
    """All tasks in one call, example-major and task-minor."""
    x = x_BRx.transpose(0, 1).flatten(0, 1)
    with rows(len(x_BRx), (S, Q)):
        out = functional_call(layer, params, (x,))
    return out.unflatten(0, (-1, len(x_BRx))).transpose(0, 1)


@pytest.mark.parametrize("trailing", [(), (2,), (3, 2)], ids=["vectors", "series", "images"])
@pytest.mark.parametrize("policy", ["transductive", "inductive"])
def test_tasks_in_one_call_are_tasks_one_by_one(policy, trailing):
    layer = TaskBatchNorm(2, policy).double()
    x_BRx = randn(0, B, S + Q, 2, *trailing) * randn(1, B, 1, 2, *(1 for _ in trailing))
    params = random_like(dict(layer.named_parameters()), 2)
    weights = randn(3, *x_BRx.shape)

    def loss(function, arguments):
        return (function(layer, arguments["p"], arguments["x"]).sin() * weights).sum()

    def formula(layer, params, x):
        return one_by_one(layer, params, x, policy)

    assert torch.allclose(together(layer, params, x_BRx), formula(layer, params, x_BRx), atol=1e-12)
    at = {"p": params, "x": x_BRx}
    direction = {"p": random_like(params, 4), "x": randn(5, *x_BRx.shape)}
    results = []
    for function in (together, formula):
        gradient = grad(lambda arguments, function=function: loss(function, arguments))
        results.append((gradient(at), jvp(gradient, (at,), (direction,))[1]))
    for actual, expected in zip(*results, strict=True):  # first, then second derivatives
        assert_close(actual["p"], expected["p"])
        assert_close({"x": actual["x"]}, {"x": expected["x"]})


@pytest.mark.parametrize("policy", ["transductive", "inductive"])
@pytest.mark.parametrize("name", ["Conv4", "ResNet12"])
def test_a_model_takes_tasks_in_one_call_as_one_by_one(name, policy):
    model = MODELS[name](policy)
    params = {n: leaf.detach() for n, leaf in model.named_parameters()}
    x_BRx = inputs(name, 0, B, S + Q)
    direction = random_like(params, 1)

    def all_at_once(params):
        return together(model, params, x_BRx)

    def in_a_loop(params):
        with rows(sets=(S, Q)):
            return torch.stack([functional_call(model, params, (x,)) for x in x_BRx])

    results = []
    for function in (all_at_once, in_a_loop):
        gradient = grad(lambda p, function=function: function(p).square().sum())
        results.append((function(params), *jvp(gradient, (params,), (direction,))))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    assert_close(results[0][1], results[1][1])
    assert_close(results[0][2], results[1][2])


@pytest.mark.parametrize("policy", ["transductive", "inductive", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_under_vmap_a_model_is_a_loop_with_second_derivatives(name, policy):
    model = MODELS[name](policy)
    shape = {n: leaf.detach() for n, leaf in model.named_parameters()}
    params = {n: leaf.unsqueeze(0).repeat(B, *[1] * leaf.ndim) for n, leaf in shape.items()}
    params = {n: leaf + 0.1 * randn(i, *leaf.shape) for i, (n, leaf) in enumerate(params.items())}
    x_BRx = inputs(name, 0, B, S + Q)
    direction = random_like(params, 1)

    def products(params, direction, x):
        def loss(params):
            with rows(sets=(S, Q)):
                return functional_call(model, params, (x,)).pow(3).mean()

        return jvp(grad(loss), (params,), (direction,))

    vectorized = vmap(products)(params, direction, x_BRx)
    for b in range(B):
        single = products(
            {n: leaf[b] for n, leaf in params.items()},
            {n: leaf[b] for n, leaf in direction.items()},
            x_BRx[b],
        )
        for many, one in zip(vectorized, single, strict=True):
            assert_close({n: leaf[b] for n, leaf in many.items()}, one)


@pytest.mark.parametrize("policy", ["transductive", "inductive"])
def test_a_query_example_sees_the_others_only_if_transductive(policy):
    model = conv4(policy)
    support, query = inputs("Conv4", 0, S), inputs("Conv4", 1, Q)

    def logits(query):
        with rows(sets=(S, len(query))):
            return model(torch.cat([support, query]))

    changed = query.clone()
    changed[1:] += 3
    assert torch.equal(logits(query)[:S], logits(changed)[:S])  # support never sees the query
    same = torch.allclose(logits(query)[S], logits(changed)[S], atol=1e-12)
    assert same == (policy == "inductive")
    assert torch.allclose(logits(query)[S], logits(query[:1])[S], atol=1e-12) == (
        policy == "inductive"
    )


def test_rows_hold_within_their_block_only():
    x = randn(0, 4, 2)
    layer = TaskBatchNorm(2).double()
    alone = layer(x)
    with rows(2):
        nested = layer(x)
        with rows():
            assert torch.equal(layer(x), alone)
        assert torch.equal(layer(x), nested)
    assert not torch.equal(nested, alone)
    with pytest.raises(KeyError), rows(2, (1, 1)):
        raise KeyError
    assert torch.equal(layer(x), alone)
    assert Rows() == (1, ())


@pytest.mark.parametrize("policy", ["transductive", "inductive"])
def test_conversion_replaces_every_batch_norm_and_keeps_names_and_weights(policy):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, eps=1e-3),
        nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2)),
    )
    nn.init.normal_(model.get_parameter("1.weight"))
    expected = model(torch.arange(64.0).view(4, 1, 4, 4).sin())
    before = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    converted = with_task_batch_norm(model, policy)
    assert converted is model
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    norms = [module for module in model.modules() if isinstance(module, TaskBatchNorm)]
    assert [(norm.policy, norm.eps) for norm in norms] == [(policy, 1e-3), (policy, 1e-5)]
    assert list(model.buffers()) == []
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.allclose(model(torch.arange(64.0).view(4, 1, 4, 4).sin()), expected, atol=1e-5)


def test_conversion_of_a_layer_without_weights_gives_it_constant_ones():
    model = with_task_batch_norm(nn.Sequential(nn.BatchNorm1d(3, affine=False)).double())
    assert not any(leaf.requires_grad for leaf in model.parameters())
    x = randn(0, 5, 3)
    assert torch.allclose(
        model.double()(x), nn.BatchNorm1d(3, affine=False).double()(x), atol=1e-12
    )


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.BatchNorm1d(3)
    layer.register_forward_hook(lambda layer, args, output: output.relu())
    return layer


def test_a_batch_norm_that_does_more_is_not_replaced():
    for layer, message in (
        (Doubled(3), r"torch's own classes, layer '1' is a Doubled: "),
        (hooked(), r"must do nothing besides, layer '1' does \(a hook, .* outputs are \d+% from"),
    ):
        model = nn.Sequential(nn.BatchNorm1d(3), layer)
        with pytest.raises(ValueError, match=message):
            with_task_batch_norm(model)
        assert type(model[0]) is nn.BatchNorm1d and model[1] is layer


def test_a_layer_is_replaced_under_each_of_its_names_and_a_model_may_be_one():
    layer = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"first": layer, "again": layer, "more": nn.ModuleList([layer])})
    with_task_batch_norm(model)
    assert [type(module) for module in model.modules()] == [
        nn.ModuleDict,
        TaskBatchNorm,
        nn.ModuleList,
    ]
    assert model["first"] is model["again"]
    assert type(with_task_batch_norm(nn.BatchNorm2d(2))) is TaskBatchNorm


class Reads(nn.Module):
    """Uses more of its batch norm than what it returns."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        scale = 1 if isinstance(self.norm, nn.BatchNorm1d) else 3
        return scale * self.norm(x)


def test_the_whole_model_is_compared_on_an_example():
    x = randn(0, 8, 3).float()
    model = Reads()
    with pytest.raises(ValueError, match=r"compute the same with TaskBatchNorm, .* by 200% on the"):
        with_task_batch_norm(model, example=x)
    assert type(model.norm) is nn.BatchNorm1d
    assert not dict(model.named_buffers())["norm.running_mean"].any()
    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    with_task_batch_norm(plain, example=x)
    assert type(plain[1]) is TaskBatchNorm


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv4(n_way=0), r"n_way must be >= 1, got 0"),
        (lambda: Conv4(in_channels=0), r"in_channels must be >= 1, got 0"),
        (lambda: Conv4(width=-1), r"width must be >= 1, got -1"),
        (lambda: Conv4(image_size=15), r"image_size must be >= 16 for four poolings, got 15"),
        (lambda: ResNet12(widths=(1, 0, 1, 1)), r"widths must be >= 1, got 0"),
        (lambda: ResNet12(image_size=8), r"image_size must be >= 16 for four poolings, got 8"),
        (lambda: MLP(hidden=(3, 0)), r"hidden must be >= 1, got 0"),
        (lambda: MLP(out_features=0), r"out_features must be >= 1, got 0"),
        (
            lambda: TaskBatchNorm(3, "train"),  # type: ignore[arg-type]
            r"policy must be 'transductive' or 'inductive', got 'train'",
        ),
        (
            lambda: Conv4(batch_norm="running"),  # type: ignore[arg-type]
            r"batch_norm must be 'transductive', 'inductive' or 'none', got 'running'",
        ),
    ],
)
def test_messages_of_the_models(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_perceptron_without_hidden_layers():
    assert MLP(3, 2, ())(torch.zeros(4, 3)).shape == (4, 2)


def error_of(model, images, labels, num_steps=5):
    """The relative error of MAML's hypergradient in float32, against float64."""
    found = []
    for dtype in (torch.float64, torch.float32):
        x = images.to(dtype)
        y = {n: p.detach().to(dtype).requires_grad_() for n, p in model.named_parameters()}
        start = list(y.values())
        for _ in range(num_steps):
            loss = F.cross_entropy(functional_call(model, y, x), labels)
            slopes = torch.autograd.grad(loss, list(y.values()), create_graph=True)
            y = {n: p - 0.4 * g for (n, p), g in zip(y.items(), slopes, strict=True)}
        loss = F.cross_entropy(functional_call(model, y, x.flip(0)), labels.flip(0))
        found.append(torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, start)]))
    exact, rounded = found
    return float((rounded - exact).norm() / exact.norm())


def pooled(norm: nn.Module) -> nn.Module:
    head = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(3 * 16, 5)
    return nn.Sequential(norm, nn.Tanh(), *head)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: pooled(TaskBatchNorm(3)), 1e-6),
        (lambda: Conv4(width=8, in_channels=3, image_size=48), 3e-2),  # ReLUs switch
    ],
    ids=["one layer", "conv4"],
)
def test_channels_last_on_a_cpu_is_as_accurate_as_contiguous(make, most):
    torch.manual_seed(0)
    model, images, labels = make(), 1 + torch.randn(25, 3, 48, 48), torch.arange(25) % 5
    plain = error_of(model, images, labels)
    last = error_of(model, images.to(memory_format=torch.channels_last), labels)
    assert last < 3 * plain < 3 * most, (last, plain)


@pytest.mark.parametrize("policy", ["transductive", "inductive"])
def test_tasks_in_one_call_may_be_channels_last(policy):
    layer = TaskBatchNorm(2, policy).double()
    x = torch.randn(12, 2, 5, 4, dtype=torch.float64)
    with rows(3, (2, 2)):
        out = layer(x.to(memory_format=torch.channels_last))
        assert torch.equal(out, layer(x))
