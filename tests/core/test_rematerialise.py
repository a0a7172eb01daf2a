"""Blocks that keep their inputs alone: the same derivatives of every order, and less memory."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import accumulate
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from metadist import SGD, Adam, Problem, task_hypergradients
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, ALGORITHMS, F2SA, ITD
from metadist.checks.purity import check_pure
from metadist.compute import Compute
from metadist.models import MLP, Conv4, ResNet12, rematerialise
from metadist.rematerialise import _warn_transformed, as_plain, is_rematerialised
from metadist.task import Batch, Task
from metadist.tasks import FewShotProblem
from metadist.tasks.network import call, check_model, trainable, without_parameters
from metadist.trees import Params, dot, flatten
from tests.problems import assert_close, generator, image_task, oracle_of, randn

DOUBLE = torch.float64
WIDTH, LENGTH, LABELS = 6, 4, 3


class Attention(nn.Module):
    """A block as of a decoder, which is given and returns much besides hidden states."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.tensor(0.7))
        self.kernels: list[bool] = []

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        *,
        positions: tuple[Tensor, Tensor],
        mode: str = "plain",
        options: dict[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        self.kernels.append(torch.backends.cuda.flash_sdp_enabled())
        cos, sin = positions
        q, k, v = self.qkv(self.norm(hidden)).chunk(3, -1)
        q = q * cos + k * sin
        found = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)
        hidden = hidden + self.scale * self.out(found[:, 0])
        return hidden, {"norm": hidden.square().mean(), "long": hidden.argmax(-1), "none": None}


class Decoder(nn.Module):
    def __init__(self, layers: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(Attention(width) for _ in range(layers))
        self.head = nn.Linear(width, LABELS)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        angle = torch.arange(length, dtype=x.dtype)[:, None] / (1 + torch.arange(x.shape[2]))
        # Differentiable too: what several blocks share.
        positions = (angle.cos() + 0.1 * self.embed.bias, angle.sin())
        hidden, extra = self.embed(x), x.new_zeros(())
        for layer in self.layers:
            hidden, found = layer(hidden, mask, positions=positions, options={"a": 1, "b": None})
            assert found["none"] is None and not found["long"].is_floating_point()
            extra = extra + found["norm"]
        return self.head(hidden.mean(1)) + 0.01 * extra


def decoder(layers: int = 3, width: int = WIDTH, frozen: bool = True) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(layers, width).double()
    if frozen:
        model.layers[0].requires_grad_(False)
    return model


class Weighted(Problem):
    """Weights of examples and a decay; the inner variable is a model's."""

    def __init__(self, model: nn.Module, num_examples: int = 5) -> None:
        check_model(model)
        self._start, self._num_examples = trainable(model), num_examples
        self._model = without_parameters(model)

    def init_outer(self, generator: torch.Generator) -> Params:
        return {
            "logits": torch.randn(self._num_examples, generator=generator, dtype=DOUBLE),
            "decay": torch.tensor(-3.0, dtype=DOUBLE),
        }

    def init_inner(self, outer: Params, task: Task) -> Params:
        return self._start

    def _losses(self, inner: Params, batch: Batch) -> Tensor:
        inputs, targets = batch.tensors
        return F.cross_entropy(call(self._model, inner, inputs), targets, reduction="none")

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        weights = context["logits"][batch.index].sigmoid()
        decay = context["decay"].exp() * dot(inner, inner)
        return (weights * self._losses(inner, batch)).mean() + decay

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._losses(inner, batch).mean()


def task(length: int = LENGTH, width: int = WIDTH, num_examples: int = 5) -> Task:
    def batch(seed: int) -> Batch:
        inputs = randn(seed, num_examples, length, width)
        return Batch.of(inputs, torch.arange(num_examples) % LABELS)

    return Task(batch(1), batch(2), 0)


def hypergradient(problem: Problem, algorithm: Algorithm, data: Task, **compute: Any) -> Params:
    outer = problem.init_outer(generator(0))
    outer |= algorithm.init_own(problem.init_inner(outer, data))
    found = task_hypergradients(
        problem,
        algorithm,
        outer,
        [data],
        compute=Compute(**compute),
        states={} if algorithm.needs_kept_state else None,
        is_checked=True,
    )
    assert not found.dropped
    return found.total


METHODS: dict[str, Algorithm] = {
    **{name: cast(Any, cls)(inner_steps=3, inner_lr=0.05) for name, cls in ALGORITHMS.items()},
    "itd, no graphs": ITD(3, 0.05),
    "itd, momentum": ITD(3, inner_optimizer=SGD(0.05, momentum=0.9)),
    "itd, adam": ITD(3, inner_optimizer=Adam(0.01)),
    "fomaml": ITD(3, 0.05, first_order=True),
    "aid, adam": AID(3, inner_optimizer=Adam(0.01)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_hypergradient_of_the_plain_model(name):
    expected, found = (
        hypergradient(
            Weighted(model),
            METHODS[name],
            task(),
            graph_budget=0 if name == "itd, no graphs" else 10**9,
        )
        for model in (decoder(), rematerialise(decoder()))
    )
    assert_close(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("engine", ["unrolled", "higher"])
@pytest.mark.filterwarnings("ignore:rematerialised blocks and micro-batches")
def test_the_engines_that_unroll_agree_with_the_adjoint(engine):
    problem = Weighted(rematerialise(decoder()))
    expected = hypergradient(Weighted(decoder()), ITD(3, 0.05), task())
    found = hypergradient(problem, ITD(3, 0.05, engine=engine), task())
    assert_close(found, expected, tolerance=1e-12)


def derivatives(model: nn.Module, inputs: Tensor, order: int) -> list[Tensor]:
    """The derivatives of a function of inputs and weights up to this order, each along a vector."""
    weights = [leaf for leaf in model.parameters() if leaf.requires_grad]
    inputs = inputs.detach().requires_grad_()
    value = model(inputs).sin().sum()
    found = []
    for number in range(order):
        last = number == order - 1
        leaves = [inputs, *weights]
        gradients = torch.autograd.grad(
            value, leaves, create_graph=not last, allow_unused=True, materialize_grads=True
        )
        found += [leaf.detach() for leaf in gradients]
        # Of size 1, so that what is rounded off does not grow with the order.
        scales = [(n + 1.0) / (1 + leaf.detach().norm()) for n, leaf in enumerate(gradients)]
        slopes = zip(scales, gradients, strict=True)
        value = torch.stack([(scale * leaf).sin().sum() for scale, leaf in slopes]).sum()
    return found


class Fourier(nn.Module):
    """A block whose output is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.fft.fft(self.layers(x.real))
        return found


def test_complex_outputs_of_blocks_have_their_derivatives():
    torch.manual_seed(0)
    plain = nn.Sequential(Fourier(), Fourier()).double()
    model, x = rematerialise(copy.deepcopy(plain), "*"), torch.randn(3, 4, dtype=torch.float64)

    def derivatives_of(model: nn.Module) -> Any:
        leaves = list(model.parameters())
        first = torch.autograd.grad(model(x).abs().square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)
        return first, second

    torch.testing.assert_close(derivatives_of(model), derivatives_of(plain))


@pytest.mark.parametrize("frozen", [True, False])
def test_derivatives_of_the_first_four_orders(frozen):
    plain = decoder(frozen=frozen)
    inputs = randn(3, 2, LENGTH, WIDTH)
    with sdpa_kernel(SDPBackend.MATH):
        expected = derivatives(plain, inputs, 4)
        found = derivatives(rematerialise(copy.deepcopy(plain)), inputs, 4)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm()) <= 1e-12 * (1 + float(other.norm()))


@pytest.mark.parametrize("batch_norm", ["transductive", "inductive"])
@pytest.mark.parametrize("make", [Conv4, ResNet12])
def test_backbones_of_few_shot_tasks(make, batch_norm):
    def model(**options: bool) -> nn.Module:
        torch.manual_seed(0)
        size: Any = {"width": 4} if make is Conv4 else {"widths": (2, 3, 3, 4)}
        return make(3, 1, image_size=16, batch_norm=batch_norm, **size, **options).double()

    data = image_task(0)
    changed = model(rematerialise=True)
    assert [name for name, layer in changed.named_modules() if is_rematerialised(layer)] == [
        f"features.{number}" for number in range(4)
    ]
    for algorithm in (ITD(2, 0.05), ITD(2, 0.05, first_order=True)):
        expected = hypergradient(FewShotProblem(model()), algorithm, data)
        found = hypergradient(FewShotProblem(changed), algorithm, data)
        assert_close(found, expected, tolerance=1e-11)
    problem = FewShotProblem(changed)
    outer = problem.init_outer(generator(0))
    check_pure(problem, outer, data, Compute())
    module = problem.module(outer, problem.init_inner(outer, data), data)
    assert not any(map(is_rematerialised, module.modules()))


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that were allocated within a call and not freed yet."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes))


@pytest.mark.parametrize("asked", ["inner_grads", "second_order"])
def test_memory_grows_by_the_inputs_of_blocks(asked):
    data = task(length=16, num_examples=32)

    def peak(layers: int, again: bool) -> int:
        model = decoder(layers, frozen=False)
        problem = Weighted(rematerialise(model) if again else model, 32)
        oracle, x, y = oracle_of(problem, problem.init_outer(generator(0)), data, eager=True)
        trees = (x, y) if asked == "inner_grads" else (x, y, y)
        draw = oracle.draw_inner()
        with sdpa_kernel(SDPBackend.MATH):
            return peak_bytes(lambda: oracle.derive(asked, draw, *trees))

    plain = [peak(layers, False) for layers in (3, 9)]
    again = [peak(layers, True) for layers in (3, 9)]
    assert again[1] < plain[1] / 2
    assert again[1] - again[0] < (plain[1] - plain[0]) / 4


@pytest.mark.parametrize("order", [1, 2])
def test_autocast_and_kernels_of_the_forward_pass_hold_when_it_is_computed_again(order):
    torch.manual_seed(0)
    plain = Decoder()
    again = rematerialise(copy.deepcopy(plain))
    inputs = torch.randn(2, LENGTH, WIDTH)
    found = []
    for model in (plain, again):
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            value = model(inputs).sin().sum()
        leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
        for _ in range(order):
            gradients = torch.autograd.grad(
                value, leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
            value = sum(leaf.sin().sum() for leaf in gradients)
        found.append([leaf.detach() for leaf in gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert any(leaf.any() for leaf in found[1])
    seen = [kernel for layer in again.layers for kernel in cast(Any, layer).kernels]
    assert len(seen) > 3 and not any(seen)
    # Without it the two are the same to float32, so the tolerance above tells them apart.
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_gradient_under_autocast_is_the_same_to_the_bit():
    torch.manual_seed(0)
    plain = Decoder()
    found = []
    for model in (plain, rematerialise(copy.deepcopy(plain))):
        with torch.autocast("cpu", torch.bfloat16):
            value = model(torch.ones(2, LENGTH, WIDTH)).sin().sum()
        leaves = [leaf for leaf in model.parameters() if leaf.requires_grad]
        found.append(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
    assert all(map(torch.equal, *found))


def test_names_states_copies_and_pickles_are_as_before():
    plain = decoder()
    inputs = randn(3, 2, LENGTH, WIDTH)
    expected = plain(inputs)
    model = rematerialise(copy.deepcopy(plain))
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in plain.named_modules()
    ]
    assert isinstance(model.layers[1], Attention) and is_rematerialised(model.layers[1])
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert sum(map(is_rematerialised, other.modules())) == 3
        assert torch.equal(other(inputs), expected)
        others = set(map(id, other.parameters()))
        assert not others & set(map(id, model.parameters()))
        other.load_state_dict(plain.state_dict())
    doubled = {name: 2 * leaf for name, leaf in model.named_parameters()}
    expected = functional_call(plain, doubled, (inputs,))
    assert torch.equal(functional_call(model, doubled, (inputs,)), expected)
    assert as_plain(model) is model and type(model.layers[1]) is Attention


def test_it_is_not_computed_again_where_nothing_is_differentiated():
    model = rematerialise(decoder())
    with torch.no_grad():
        model(randn(3, 2, LENGTH, WIDTH))
    model.requires_grad_(False)
    assert not model(randn(3, 2, LENGTH, WIDTH)).requires_grad
    assert [len(cast(Any, layer).kernels) for layer in model.layers] == [2, 2, 2]


def test_under_vmap_blocks_are_plain_with_one_warning():
    model = rematerialise(decoder())
    inputs = randn(3, 2, 2, LENGTH, WIDTH)
    _warn_transformed.cache_clear()
    with (
        sdpa_kernel(SDPBackend.MATH),
        pytest.warns(
            RuntimeWarning, match=r"blocks and micro-batches save no memory under vmap"
        ) as caught,
    ):
        first, found = (vmap(model)(inputs) for _ in range(2))
    assert torch.equal(first, found)
    assert len(caught) == 1
    torch.testing.assert_close(found, torch.stack([model(part) for part in inputs]))


class Blocks(nn.Module):
    """Blocks of one class within blocks of another, and lists of leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"inner": nn.Sequential(*(MLP() for _ in range(4))), "other": MLP()})
            for _ in range(3)
        )
        self.decoder = nn.Sequential(*(nn.ModuleDict({"a": MLP()}) for _ in range(2)), nn.Flatten())
        self.leaves = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))


def test_auto_finds_the_longest_list_that_is_not_within_a_block():
    model = rematerialise(Blocks())
    found = [name for name, module in model.named_modules() if is_rematerialised(module)]
    assert found == ["stages.0", "stages.1", "stages.2", "decoder.0", "decoder.1"]


def test_patterns_stand_for_one_part_of_a_name_each():
    model = rematerialise(Blocks(), ["stages.*.inner.[01]", "leaves.8"])
    found = [name for name, module in model.named_modules() if is_rematerialised(module)]
    inner = [f"stages.{n}.inner.{m}" for n in range(3) for m in range(2)]
    assert found == [*inner, "leaves.8"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("layers.*.nothing", r"blocks must match names of modules, got 'layers.\*.nothing'.*embed"),
        (["layers.1.out", "layers.*"], r"within one another .*got 'layers.1.out' and 'layers.1'"),
        (5, r"blocks must be 'auto', or patterns of names of modules, got 5"),
        ([], r"got \[\]: name at least one"),
    ],
)
def test_blocks_that_are_refused(blocks, message):
    model = decoder()
    with pytest.raises(ValueError, match=message):
        rematerialise(model, blocks)
    assert not any(map(is_rematerialised, model.modules()))


def test_a_model_without_blocks_and_one_that_has_them_already():
    with pytest.raises(ValueError, match=r"blocks must be named for MLP.*got 'auto'"):
        rematerialise(MLP())
    model = rematerialise(decoder())
    for blocks in ("auto", "layers.0.out"):
        with pytest.raises(ValueError, match=r"nor be rematerialised already, got 'layers.0"):
            rematerialise(model, blocks)
    changed = decoder()
    changed.layers[1].forward = changed.layers[1].forward
    with pytest.raises(ValueError, match=r"blocks must be plain modules, got 'layers.1'"):
        rematerialise(changed)


class Bad(nn.Module):
    """A block that cannot be computed again from its inputs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))
        self.hidden = [torch.ones(2, requires_grad=True)]

    def forward(self, x: Tensor, past: Any = None) -> Tensor:
        x = self.linear(x)
        if self.how == "random":
            x = F.dropout(x, 0.5)
        if self.how == "buffer":
            cast(Tensor, self.count).add_(1)
        if self.how == "variable":
            x = x * self.hidden[0]
        return x


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("random", r"block \(Bad\) must not draw random numbers.*model.eval\(\)"),
        ("buffer", r"block \(Bad\) must not change its inputs or buffers.*with_task_batch_norm"),
        (
            "variable",
            r"\(Bad\) must depend on variables through its inputs and weights.*from elsewhere",
        ),
        (
            "cache",
            r"block \(Bad\) must be given tensors and plain values, got a set: .*use_cache=False",
        ),
    ],
)
def test_what_cannot_be_computed_again_is_refused_when_it_is_called(how, message):
    model = rematerialise(nn.Sequential(Bad("none"), Bad(how)))
    with pytest.raises(ValueError, match=message):
        model[1](model[0](torch.ones(3, 2)), {1} if how == "cache" else None)


def transformer(name: str, layers: int = 2) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_layer=layers, n_embd=16, n_head=2, vocab_size=11, n_positions=LENGTH,
            bos_token_id=0, eos_token_id=0, use_cache=False,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        bos_token_id=0, eos_token_id=0,
        num_hidden_layers=layers, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=11, max_position_embeddings=LENGTH, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Tokens(nn.Module):
    """Logits of the last token, of ids with padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        ids = x[..., 0].abs().mul(5).long().clamp(0, 10)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        return self.model(input_ids=ids, attention_mask=mask).logits[:, -1, :LABELS]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_of_transformers(name):
    # Llama normalises in float32, whatever it is.
    tolerance = 1e-11 if name == "gpt2" else 1e-6
    for algorithm in (ITD(2, 0.05), AID(2, 0.05), F2SA(2, 0.05)):
        expected, found = (
            hypergradient(Weighted(Tokens(change(transformer(name)).double())), algorithm, task())
            for change in (lambda model: model, rematerialise)
        )
        assert_close(found, expected, tolerance)
        assert flatten(expected).norm() > 1e-6


def test_checkpoints_of_transformers_are_refused_with_this_way_out():
    model = transformer("gpt2")
    for layer in cast(Any, model).transformer.h:
        layer.gradient_checkpointing = True  # as gradient_checkpointing_enable() does
    for function in (rematerialise, check_model):
        with pytest.raises(
            ValueError,
            match=r"gradient_checkpointing must be off, layer .*metadist.models.rematerialise",
        ):
            function(model)
