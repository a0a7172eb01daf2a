"""Language models as lower problems: losses, weights, and hypergradients against autograd."""

from __future__ import annotations

import math
import pickle
import sys
import warnings
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist import Trainer
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, BOME, F2SA, ITD, MEHA, SAMA
from metadist.hypergradient import task_hypergradients
from metadist.models import ModelFactory
from metadist.task import Batch, Task
from metadist.tasks import (
    ExampleWeights,
    FixedTasks,
    HuggingFace,
    LanguageModelProblem,
    Rater,
    SourceWeights,
)
from metadist.tasks.language.problem import fields_of, labels_of
from metadist.tasks.language.weights import Weights
from metadist.tasks.opened import opened
from metadist.trees import Params
from tests.problems import assert_close
from tests.tasks.helpers import refusal
from tests.tasks.language.helpers import LLAMA, Bigram, gpt2, llama, rows, task, token_sources

pytest.importorskip("transformers")
pytest.importorskip("peft")

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
BIGRAM = ModelFactory("tests.tasks.language.helpers.bigram")


def plain_losses(model: Any, batch: Batch) -> Tensor:
    """The mean over tokens of each example's cross entropy, row by row, as transformers has it."""
    fields = fields_of(batch)
    labels, found = labels_of(fields), []
    for i, ids in enumerate(fields["ids"].long()):
        mask = fields["mask"][i][None].long() if "mask" in fields else None
        logits = model(input_ids=ids[None], attention_mask=mask, use_cache=False).logits[0]
        found.append(F.cross_entropy(logits[:-1], labels[i, 1:], ignore_index=-100))
    return torch.stack(found)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("factory", [llama(dtype="float64"), gpt2(dtype="float64")])
def test_losses_are_those_of_transformers(factory: HuggingFace, is_padded: bool) -> None:
    problem = LanguageModelProblem(factory, SourceWeights(["a", "b"]))
    data = task(is_padded=is_padded)
    outer = {"logits": torch.tensor([0.3, -0.2], dtype=torch.float64)}
    inner = problem.init_inner(outer, data)
    expected = plain_losses(factory(), data.support)
    torch.testing.assert_close(problem.losses(inner, data.support), expected, rtol=1e-10, atol=0)
    shares = outer["logits"].softmax(0)
    weighted = (2 * shares[fields_of(data.support)["source"]] * expected).mean()
    torch.testing.assert_close(problem.inner_loss(outer, inner, data.support), weighted)
    loss, metrics = problem.loss_and_metrics(outer, inner, data.query)
    torch.testing.assert_close(loss, problem.outer_loss(outer, inner, data.query))
    assert float(metrics["perplexity"]) == pytest.approx(math.exp(float(loss)))


def test_a_mean_over_tokens_counts_long_examples_more() -> None:
    data = task(is_padded=True)
    problem = LanguageModelProblem(BIGRAM, SourceWeights(["a", "b"]), mean="token")
    outer = {"logits": torch.zeros(2)}
    inner = problem.init_inner(outer, data)
    fields = fields_of(data.support)
    logits, labels = problem.logits(inner, data.support), labels_of(fields)
    whole = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(problem.inner_loss(outer, inner, data.support), whole)
    accuracy = problem.metrics(outer, inner, data.support)["token_accuracy"]
    told = labels[:, 1:] != -100
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:])[told]
    assert float(accuracy) == pytest.approx(float(hits.double().mean()))


def test_many_examples_are_judged_a_few_at_a_time() -> None:
    problem = LanguageModelProblem(BIGRAM, SourceWeights(["a", "b"]))
    data = task(num=21)
    inner = problem.init_inner({"logits": torch.zeros(2)}, data)
    with torch.no_grad():
        found = problem.losses(inner, data.support)
    torch.testing.assert_close(found, problem.losses(inner, data.support).detach())


def unrolled(
    problem: LanguageModelProblem, outer: Params, data: Task, steps: int, lr: float
) -> Params:
    """d f / d x through gradient steps, by plain autograd."""
    # With the fused kernels attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        return _unrolled(problem, outer, data, steps, lr)


def _unrolled(
    problem: LanguageModelProblem, outer: Params, data: Task, steps: int, lr: float
) -> Params:
    x = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}
    y = {n: leaf.clone().requires_grad_() for n, leaf in problem.init_inner(outer, data).items()}
    for _ in range(steps):
        loss = problem.inner_loss(x, y, data.support)
        slopes = torch.autograd.grad(loss, list(y.values()), create_graph=True)
        y = {n: leaf - lr * slope for (n, leaf), slope in zip(y.items(), slopes, strict=True)}
    loss = problem.outer_loss(x, y, data.query)
    return dict(zip(x, torch.autograd.grad(loss, list(x.values())), strict=True))


MODELS = {
    "llama": llama(dtype="float64"),
    "tied": llama(dtype="float64", config={"tie_word_embeddings": True}),
    "gpt2": gpt2(dtype="float64"),
    "lora": llama(dtype="float64", lora=LORA),
    "head": llama(dtype="float64", trainable="lm_head.*"),
}
WEIGHTS: dict[str, Weights] = {
    "sources": SourceWeights({"a": 3, "b": 3}, floor=0.1),
    "examples": ExampleWeights(6),
    "rater": Rater(32, width=3),
    "softmax": Rater(32, width=3, kind="softmax"),
}


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_itd_is_the_derivative_through_the_steps(name: str, is_padded: bool) -> None:
    problem = LanguageModelProblem(MODELS[name], WEIGHTS["sources"])
    _check_itd(problem, task(is_padded=is_padded))


@pytest.mark.parametrize("weights", ["examples", "rater", "softmax"])
def test_itd_is_that_for_all_kinds_of_weights(weights: str) -> None:
    _check_itd(LanguageModelProblem(MODELS["llama"], WEIGHTS[weights]), task(is_padded=True))


def _check_itd(problem: LanguageModelProblem, data: Task) -> None:
    outer = _outer(problem)
    found = task_hypergradients(problem, ITD(inner_steps=2, inner_lr=0.5), outer, [data]).total
    expected = unrolled(problem, outer, data, steps=2, lr=0.5)
    assert all(leaf.abs().max() > 0 for leaf in found.values())
    assert_close(found, expected, 1e-8)


def _outer(problem: LanguageModelProblem) -> Params:
    random = torch.Generator().manual_seed(3)
    outer = problem.init_outer(random)
    return {
        n: leaf.double() + 0.3 * torch.randn(leaf.shape, generator=random)
        for n, leaf in outer.items()
    }


def test_aid_solves_the_linear_system_of_the_dense_hessian() -> None:
    problem = LanguageModelProblem(
        ModelFactory("tests.tasks.language.helpers.bigram", {"vocabulary": 6}),
        WEIGHTS["sources"],
        weight_decay=0.5,
    )
    ids = rows(0, 6, vocabulary=6)
    support = Batch.named(ids=ids, source=torch.arange(6) % 2)
    data = Task(support, Batch.named(ids=rows(1, 4, vocabulary=6)), 0)
    outer = _outer(problem)
    start = problem.init_inner(outer, data)
    sizes = [leaf.numel() for leaf in start.values()]

    def tree(flat: Tensor) -> Params:
        pieces = flat.split(sizes)
        return {n: p.view_as(start[n]) for n, p in zip(start, pieces, strict=True)}

    def g(x: Tensor, y: Tensor) -> Tensor:
        return problem.inner_loss({"logits": x}, tree(y), support)

    y = torch.cat([leaf.flatten() for leaf in start.values()]).detach()
    slope = torch.func.grad(g, argnums=1)
    for _ in range(400):
        y = y - 0.5 * slope(outer["logits"], y)
    hessian = torch.func.hessian(g, argnums=1)(outer["logits"], y)
    cross = torch.func.jacfwd(torch.func.grad(g, argnums=1), argnums=0)(outer["logits"], y)
    f_y = torch.func.grad(lambda y: problem.outer_loss({}, tree(y), data.query))(y)
    expected = -cross.T @ torch.linalg.solve(hessian, f_y)
    algorithm = AID(inner_steps=400, inner_lr=0.5, adjoint_steps=60)
    found = task_hypergradients(problem, algorithm, outer, [data]).total
    torch.testing.assert_close(found["logits"], expected, rtol=1e-7, atol=1e-9)


PARTS = {
    "lora": gpt2(
        dtype="float64", lora={"r": 1, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    ),
    "projection": gpt2(dtype="float64", trainable="*.h.0.attn.c_proj.*"),
}
"""Transformers with few enough weights for a dense Hessian; Llama's norms round to float32."""


@pytest.mark.parametrize(
    "solver",
    [
        {"solver": "cg", "adjoint_steps": 60},
        {"solver": "neumann", "adjoint_steps": 100, "adjoint_lr": 0.6},
    ],
)
@pytest.mark.parametrize("name", PARTS)
def test_aid_solves_with_the_dense_hessian_of_a_transformer(
    name: str, solver: dict[str, Any]
) -> None:
    problem = LanguageModelProblem(PARTS[name], WEIGHTS["sources"], weight_decay=1.0)
    data = task(is_padded=True)
    outer = _outer(problem)
    algorithm = AID(inner_steps=2, inner_lr=0.3, **solver)
    found = task_hypergradients(problem, algorithm, outer, [data]).total["logits"]
    with sdpa_kernel(SDPBackend.MATH):
        expected = _implicit(problem, outer, data, steps=2, lr=0.3)
    assert found.abs().min() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def _implicit(
    problem: LanguageModelProblem, outer: Params, data: Task, steps: int, lr: float
) -> Tensor:
    """-J H^-1 f_y after gradient steps, the Hessian row by row from plain autograd."""
    x = outer["logits"].clone().requires_grad_()
    y = problem.init_inner(outer, data)

    def slope_at(y: Params) -> Tensor:
        loss = problem.inner_loss({"logits": x}, y, data.support)
        return _flat(torch.autograd.grad(loss, list(y.values()), create_graph=True))

    for _ in range(steps):
        y = {n: leaf.detach().requires_grad_() for n, leaf in y.items()}
        slopes = slope_at(y).detach().split([leaf.numel() for leaf in y.values()])
        y = {n: y[n] - lr * slope.view_as(y[n]) for n, slope in zip(y, slopes, strict=True)}
    y = {n: leaf.detach().requires_grad_() for n, leaf in y.items()}
    slope, leaves = slope_at(y), list(y.values())
    hessian = torch.stack(
        [_flat(torch.autograd.grad(one, leaves, retain_graph=True)) for one in slope]
    )
    f_y = _flat(torch.autograd.grad(problem.outer_loss({}, y, data.query), leaves))
    (found,) = torch.autograd.grad(slope @ torch.linalg.solve(hessian, f_y), x)
    return -found


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in leaves])


FIRST_ORDER: list[Algorithm] = [
    F2SA(inner_steps=1, inner_lr=0.1),
    BOME(inner_steps=1, inner_lr=0.1),
    SAMA(inner_steps=1, inner_lr=0.1),
    MEHA(inner_steps=1, inner_lr=0.1),
]


@cache
def _plain_model(key: str) -> nn.Module:
    return next(factory() for factory in MODELS.values() if factory.key() == key)


class Plain(LanguageModelProblem):
    """The same losses, written with transformers' own module and functional_call."""

    def losses(self, inner: Params, batch: Batch) -> Tensor:
        fields = fields_of(batch)
        named = {"attention_mask": fields["mask"].long()} if "mask" in fields else {}
        assert isinstance(self.model, HuggingFace)
        model = _plain_model(self.model.key())
        output = torch.func.functional_call(
            model, inner, (), {"input_ids": fields["ids"].long(), "use_cache": False, **named}
        )
        labels = labels_of(fields)[:, 1:]
        ce = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels, reduction="none")
        return ce.sum(1) / (labels != -100).sum(1)


@pytest.mark.parametrize("algorithm", FIRST_ORDER, ids=lambda found: type(found).__name__)
@pytest.mark.parametrize("name", ["gpt2", "lora"])
def test_first_order_methods_see_the_same_losses(algorithm: Algorithm, name: str) -> None:
    data = task(is_padded=True)
    totals = []
    for cls in (LanguageModelProblem, Plain):
        problem = cls(MODELS[name], WEIGHTS["sources"])
        found = task_hypergradients(problem, algorithm, _outer(problem), [data], states={})
        totals.append(found.total)
    assert totals[0]["logits"].abs().max() > 0
    assert_close(totals[0], totals[1], 1e-8)


def test_shares_of_sources_start_at_those_of_the_rows_and_keep_the_floor() -> None:
    weights = SourceWeights({"a": 30, "b": 10}, floor=0.1)
    outer = {"logits": torch.tensor([0.0, 0.0])}
    torch.testing.assert_close(weights.shares(outer), torch.tensor([0.7, 0.3]))
    outer = {"logits": torch.tensor([50.0, 0.0])}
    torch.testing.assert_close(weights.shares(outer), torch.tensor([0.9, 0.1]))
    source = torch.tensor([0] * 30 + [1] * 10)
    batch = Batch.named(ids=rows(0, 40), source=source)
    found = weights.of(outer, fields_of(batch), batch)
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))
    torch.testing.assert_close(found[-1], torch.tensor(0.4))


def test_a_factory_travels_as_text_and_is_built_once() -> None:
    factory = llama(config={"hidden_size": 384, "vocab_size": 20_000}, lora=LORA)
    problem = LanguageModelProblem(factory, SourceWeights(["a", "b"]))
    payload = pickle.dumps(problem)
    frozen = sum(leaf.numel() for leaf in problem._module.parameters())
    assert frozen > 8_000_000 and len(payload) < 2_000
    again = pickle.loads(payload)
    assert again._module is problem._module
    digest = opened(factory).digest.encode()
    message = refusal(lambda: pickle.loads(payload.replace(digest, b"0" * 64)))
    assert "must give the same weights on every machine" in message and "on host" in message


def test_the_random_state_of_torch_is_left_alone() -> None:
    before = torch.get_rng_state()
    first, second = llama(seed=5, lora=LORA)(), llama(seed=5, lora=LORA)()
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_adapter_is_saved_as_peft_reads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    llama()().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    factory = HuggingFace(tmp_path / "base", lora=LORA)
    problem = LanguageModelProblem(factory, SourceWeights(["a", "b"]))
    data = task()
    inner = problem.init_inner({"logits": torch.zeros(2)}, data)
    inner = {name: leaf + 0.1 for name, leaf in inner.items()}
    problem.save_pretrained(inner, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():  # of names that peft asks transformers for
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(plain_losses(loaded, data.query), problem.losses(inner, data.query))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    message = refusal(
        lambda: LanguageModelProblem(BIGRAM, SourceWeights(["a", "b"])).save_pretrained(
            {}, tmp_path
        )
    )
    assert "metadist.export" in message


def _trainer(problem: LanguageModelProblem, data: Task, algorithm: Any = None) -> Trainer:
    return Trainer(
        problem, FixedTasks([data]), algorithm or F2SA(inner_steps=1, inner_lr=0.1), quiet=True
    )


def test_what_cannot_be_trained_is_refused_before_any_work(tmp_path: Path) -> None:
    weights = SourceWeights(["a", "b"])
    cases = {
        "ids of the support set must be 0 .. 31": task()._replace(
            support=Batch.named(ids=rows(0, 6, vocabulary=40), source=torch.arange(6) % 2)
        ),
        "got none in row 2 of the query set": task()._replace(
            query=Batch.named(
                ids=rows(0, 4), labels=rows(0, 4).where(torch.arange(4)[:, None] != 2, -100)
            )
        ),
        "must be ids and any of mask, labels, source": Task(Batch.of(rows(0, 6)), task().query, 0),
        "must have the shape of ids": task()._replace(
            query=Batch.named(ids=rows(0, 4), mask=torch.ones(4, 3))
        ),
    }
    for expected, data in cases.items():
        problem = LanguageModelProblem(llama(), weights)
        assert expected in refusal(partial(_trainer, problem, data))
    module: Any = llama()()
    module.config.use_cache = True
    assert "use_cache must be off" in refusal(lambda: LanguageModelProblem(module, weights))
    module.config.use_cache = False
    module.config._attn_implementation = "flash_attention_2"
    assert "attention must be 'sdpa' or 'eager'" in refusal(
        lambda: LanguageModelProblem(module, weights)
    )
    training = gpt2()().train()
    assert "dropout must be off" in refusal(lambda: LanguageModelProblem(training, weights))
    assert "lora_dropout=0.1" in refusal(lambda: llama(lora={**LORA, "lora_dropout": 0.1}))
    assert "trust_remote_code must be False" in refusal(lambda: llama(trust_remote_code=True))
    no_flag: Any = "false"
    assert "rematerialise must be True or False, got 'false'" in refusal(
        lambda: llama(rematerialise=no_flag)
    )
    for wrong in (5, None, nn.Linear(2, 2)):
        assert "model must be a name, a folder or a config" in refusal(partial(HuggingFace, wrong))
    assert "'bf16'" in refusal(lambda: llama(dtype="bfloat16"))
    assert "matches none of" in refusal(lambda: llama(trainable="nothing.*")())
    message = refusal(lambda: HuggingFace("no/such-model", local_files_only=True)())
    assert "not whole in" in message and "hub" in message and "hf download no/such-model" in message
    assert "logits_chunk must be None" in refusal(
        lambda: LanguageModelProblem(BIGRAM, weights, logits_chunk=2)
    )
    assert "floor must be" in refusal(lambda: SourceWeights(["a", "b"], floor=0.5))


def test_without_its_packages_a_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
        message = refusal(lambda: llama(lora=LORA)())
        assert f"{package} must be installed" in message and "metadist[hf]" in message


def test_the_vocabulary_of_the_tokenizer_must_fit(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    problem = LanguageModelProblem(llama(), SourceWeights(data.sources))
    message = refusal(lambda: problem.check_sampler(data))
    assert "vocabulary must be <= the 32 embeddings of the model, got 256" in message


def test_sources_must_be_those_of_the_data(tmp_path: Path) -> None:
    data = token_sources(tmp_path)
    for names in (["bad", "good"], ["good", "bad", "more"]):
        problem = LanguageModelProblem(BIGRAM, SourceWeights(names))
        message = refusal(partial(problem.check_sampler, data))
        assert "its order, ['good', 'bad'], got" in message and str(names) in message
    problem = LanguageModelProblem(Bigram(256), SourceWeights(["good", "bad"]))
    with pytest.warns(RuntimeWarning, match="should be in the proportion of the rows"):
        problem.check_sampler(data)
    wrong: Any = 5
    assert "sources must name at least two" in refusal(lambda: SourceWeights(wrong))


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora"])
def test_parts_of_a_mini_batch_and_of_the_logits_give_the_same(name: str) -> None:
    data = task(is_padded=True)
    weights = WEIGHTS["softmax" if name == "llama" else "sources"]
    for mean in ("example", "token"):
        totals = []
        for sizes in ({}, {"micro_batch": 4, "logits_chunk": 5}):
            problem = LanguageModelProblem(MODELS[name], weights, mean=mean, **sizes)
            algorithm = ITD(inner_steps=2, inner_lr=0.5)
            totals.append(task_hypergradients(problem, algorithm, _outer(problem), [data]).total)
        assert_close(totals[0], totals[1], 1e-12)


def test_logits_that_are_capped_are_not_computed_in_chunks() -> None:
    factory = HuggingFace(
        {**LLAMA, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 1.0}
    )
    message = refusal(lambda: LanguageModelProblem(factory, WEIGHTS["sources"], logits_chunk=4))
    assert "scales or caps them" in message


def test_bfloat16_is_near_and_is_refused_for_differences() -> None:
    data = task()
    totals = []
    for precision in ("float32", "bf16"):
        problem = LanguageModelProblem(llama(precision=precision), WEIGHTS["sources"])
        outer = {"logits": torch.tensor([0.3, -0.2])}
        found = task_hypergradients(problem, ITD(inner_steps=2, inner_lr=0.5), outer, [data])
        totals.append(found.total["logits"])
    assert not torch.equal(*totals)
    assert F.cosine_similarity(totals[0], totals[1], dim=0) > 0.99
    torch.testing.assert_close(totals[1], totals[0], rtol=0.1, atol=0)
    assert "must be in float32 or float64 with SAMA" in refusal(
        lambda: _trainer(problem, data, SAMA(inner_steps=1, inner_lr=0.1))
    )


def test_rematerialised_blocks_give_the_same_hypergradient() -> None:
    data = task(is_padded=True)
    totals = []
    for is_saved in (False, True):
        factory = llama(dtype="float64", rematerialise=is_saved, lora=LORA)
        problem = LanguageModelProblem(factory, WEIGHTS["sources"])
        algorithm = ITD(inner_steps=2, inner_lr=0.5)
        totals.append(task_hypergradients(problem, algorithm, _outer(problem), [data]).total)
    assert_close(totals[0], totals[1], 1e-8)
