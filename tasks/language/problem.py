"""`LanguageModelProblem`: a causal language model whose training data is weighted by x.

Shape letters: n examples, L tokens of a row, V tokens of the vocabulary, D features of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.checks.values import check, require_integer
from metadist.factory import ModelFactory
from metadist.micro_batches import sum_of_micro_batches
from metadist.problem import Problem
from metadist.sampler import TaskSampler
from metadist.task import Batch, Task
from metadist.tasks.language.token_files import IGNORED
from metadist.tasks.language.weights import SourceWeights, Weights
from metadist.tasks.network import call, constants, plain_module
from metadist.tasks.opened import SentAsText, opened
from metadist.trees import Params, dot

_doubled: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""A cache for the process of models in float64, for checks of derivatives."""

AT_ONCE = 8
"""Examples whose logits are in memory together where nothing is differentiated."""


class _Entropies(NamedTuple):
    """Of each example, (n,): the sum of its cross entropies, its tokens, those predicted right."""

    sums: Tensor
    counts: Tensor
    hits: Tensor


class LanguageModelProblem(SentAsText, Problem):
    """A causal language model, trained on weighted examples, judged on a validation text.

        g = mean_i w_i(x) l_i(y) + weight_decay/2 |y|^2,    f = mean over validation of l_i(y)

    l_i is the mean over the tokens of example i of the cross entropy of the next one. y are the
    trainable parameters of the model, from where they are; all others are constants.

        data = TokenSources.from_text({"news": "news.txt", "web": "web.txt"}, "target.txt",
                                      tokenizer="gpt2", folder="tokens")
        model = HuggingFace("gpt2", lora={"r": 8})
        problem = LanguageModelProblem(model, SourceWeights(data.sources, floor=0.01))

    Examples have `ids` (n, L), integers, and what else is at hand of `mask` (n, L), False where a
    row is padded; `labels` (n, L), the tokens to predict where they are others, -100 where none is;
    `source` (n,), see `SourceWeights`. The loss shifts: token t is predicted from those before it.

    Args:
        model: A factory, which is sent to workers as text, or a module that returns logits
            (n, L, V), or something with an attribute `logits`, for `ids` and, where examples have
            a mask, `attention_mask=mask`.
        weights: w: `SourceWeights`, `ExampleWeights` or `Rater`.
        micro_batch: Examples that go through the model together, see
            `metadist.sum_of_micro_batches`; None: a whole mini-batch.
        mean: "example": as above. "token": every token of a mini-batch counts alike, so that long
            examples count more: l_i is the sum over tokens by their mean number in an example of
            the mini-batch.
        weight_decay: >= 0.
        logits_chunk: Tokens whose logits are in memory together; None: those of all examples that
            go through the model together, which for a large vocabulary take more than all else.

    Raises:
        ValueError: A model that cannot be differentiated twice or replayed: dropout, a cache of
            keys and values, attention of its own kernels.
    """

    def __init__(
        self,
        model: nn.Module | ModelFactory,
        weights: Weights,
        micro_batch: int | None = None,
        mean: Literal["example", "token"] = "example",
        weight_decay: float = 0.0,
        logits_chunk: int | None = None,
    ) -> None:
        if not isinstance(weights, Weights):
            raise ValueError(
                "weights must be SourceWeights, ExampleWeights, Rater or another Weights, got "
                f"{type(weights).__name__}"
            )
        for field, size in (("micro_batch", micro_batch), ("logits_chunk", logits_chunk)):
            if size is not None:
                require_integer(field, size, 1)
        if mean not in ("example", "token"):
            raise ValueError(f"mean must be 'example' or 'token', got {mean!r}")
        check("weight_decay", weight_decay, ge=0)
        self.model, self.weights, self.micro_batch = model, weights, micro_batch
        self.mean, self.weight_decay, self.logits_chunk = mean, weight_decay, logits_chunk
        found = opened(model)
        _check_config(found.module)
        self._start, self._module = found.start, found.module
        self._is_bf16 = getattr(model, "precision", "float32") == "bf16"
        if not self._start:
            raise ValueError(
                "model must have a trainable parameter, got none with requires_grad=True"
            )
        self._split = None if logits_chunk is None else HeadOfLogits(self._module, self._start)

    def init_outer(self, generator: torch.Generator) -> Params:
        return self.weights.init(generator)

    def per_example(self, outer: Params) -> set[str]:
        return self.weights.per_example()

    def init_inner(self, outer: Params, task: Task) -> Params:
        like = next(iter(outer.values()))
        # x in float64, for checks, means y in it too; y is never less precise than it was built.
        return {
            name: leaf.to(like.device, torch.promote_types(leaf.dtype, like.dtype))
            for name, leaf in self._start.items()
        }

    def check_sampler(self, sampler: TaskSampler) -> None:
        """Raise ValueError if tokens of task 0 are outside the vocabulary, or an example has none.

        Also if the sampler names its sources, and `SourceWeights` names others or in another order.

        Cost: the rows are read once.
        """
        if isinstance(self.weights, SourceWeights):
            self.weights.check_sources(getattr(sampler, "sources", None))
        task = sampler.sample(0)
        size = self.vocabulary
        told = getattr(sampler, "vocabulary", None)
        if size is not None and told is not None and told > size:
            raise ValueError(
                f"the tokenizer's vocabulary must be <= the {size} embeddings of the model, got "
                f"{told}: use the tokenizer of this model, or a model with more embeddings"
            )
        for field, batch in (("support", task.support), ("query", task.query)):
            _check_rows(field, batch, size)

    @property
    def vocabulary(self) -> int | None:
        """The number of embeddings; None: the model does not tell."""
        get = getattr(self._module, "get_input_embeddings", None)
        return None if get is None else int(get().weight.shape[0])

    def logits(self, inner: Params, batch: Batch) -> Tensor:
        """The outputs of the model for a batch, shape (n, L, V)."""
        fields = fields_of(batch)
        return self._call(self._module, inner, fields["ids"], fields.get("mask"))

    def _call(self, module: nn.Module, inner: Params, ids: Tensor, mask: Tensor | None) -> Tensor:
        leaf = next(iter(inner.values()))
        named = {} if mask is None else {"attention_mask": mask.to(leaf.device).long()}
        with self._autocast(leaf.device):
            output: Any = call(
                _in_dtype(module, leaf.dtype), inner, ids.to(leaf.device).long(), **named
            )
        found: Tensor = output if isinstance(output, Tensor) else output.logits
        return found if found.dtype == leaf.dtype else found.to(leaf.dtype)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if not self._is_bf16:
            return nullcontext()
        # Without its cache, which would hold weights that a derivative has replaced since.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    def losses(self, inner: Params, batch: Batch) -> Tensor:
        """The loss of each example, shape (n,), see `mean`."""
        found = self._entropies(inner, batch)
        return found.sums / self._divisors(found.counts)

    def _divisors(self, counts: Tensor) -> Tensor:
        """What sums over the tokens of examples, of these numbers, are divided by."""
        return counts.float().mean() if self.mean == "token" else counts

    def _weighted(self, inner: Params, batch: Batch, weights: Tensor | None) -> Tensor:
        """The mean over examples of their weighted losses, shape ()."""
        fields, labels = fields_of(batch), labels_of(fields_of(batch))
        leaf = next(iter(inner.values()))
        # What depends on the whole mini-batch is computed here, so that it may go in parts.
        divisors = len(labels) * self._divisors((labels[:, 1:] != IGNORED).sum(1)).to(leaf.device)
        shares = (leaf.new_ones(len(labels)) if weights is None else weights) / divisors
        examples = [fields["ids"], labels, shares]
        if "mask" in fields:
            examples.append(fields["mask"])
        size = self.micro_batch if torch.is_grad_enabled() else self.micro_batch or AT_ONCE
        return sum_of_micro_batches(self._part, (inner,), examples, size)

    def _part(
        self,
        inner: Params,
        ids: Tensor,
        labels: Tensor,
        shares: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        labels = labels[:, 1:].to(shares.device)
        if self._split is None:
            outputs = self._call(self._module, inner, ids, mask)[:, :-1]
            return (shares * _cross_entropies(outputs, labels).sum(1)).sum()
        features = self._call(self._split.body, inner, ids, mask)[:, :-1]
        tokens = (
            features.flatten(0, 1),
            labels.flatten(),
            shares[:, None].expand(labels.shape).flatten(),
        )
        head = self._split.to_head(inner)
        return sum_of_micro_batches(self._tokens, (head,), tokens, self.logits_chunk)

    def _tokens(self, head: Params, features: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        assert self._split is not None
        with self._autocast(features.device):
            logits = call(_in_dtype(self._split.head, features.dtype), head, features)
        return (shares * _cross_entropies(logits.to(features.dtype), labels)).sum()

    def _entropies(self, inner: Params, batch: Batch) -> _Entropies:
        """What the losses are made of; a few examples at a time where nothing needs a graph."""
        size = len(batch.index)
        if torch.is_grad_enabled() or size <= AT_ONCE:
            return self._entropies_at_once(inner, batch)
        places = torch.arange(size, device=batch.index.device).split(AT_ONCE)
        parts = [self._entropies_at_once(inner, batch.take(some)) for some in places]
        return _Entropies(*map(torch.cat, zip(*parts, strict=True)))

    def _entropies_at_once(self, inner: Params, batch: Batch) -> _Entropies:
        logits = self.logits(inner, batch)[:, :-1]
        labels = labels_of(fields_of(batch)).to(logits.device)[:, 1:]
        return _Entropies(
            sums=_cross_entropies(logits, labels).sum(1),
            counts=(labels != IGNORED).sum(1),
            hits=(logits.detach().argmax(-1) == labels).sum(1),
        )

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        weights = self.weights.of(context, fields_of(batch), batch)
        loss = self._weighted(inner, batch, weights)
        return loss + self.weight_decay / 2 * dot(inner, inner) if self.weight_decay else loss

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._weighted(inner, batch, None)

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        return self.loss_and_metrics(context, inner, batch)[1]

    def loss_and_metrics(
        self, context: Params, inner: Params, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """f, and `token_accuracy` and `perplexity`, exp of the loss of the examples at hand."""
        found = self._entropies(inner, batch)
        loss = (found.sums / self._divisors(found.counts)).mean()
        accuracy = found.hits.sum().double() / found.counts.sum()
        return loss, {"token_accuracy": accuracy, "perplexity": loss.exp()}

    def predict(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        """The model's outputs on `batch`, shape (n, L, V)."""
        return self.logits(inner, batch)

    def module(self, outer: Params, inner: Params, task: Task) -> nn.Module:
        """The model with the weights `inner`, see `metadist.export`."""
        return plain_module(self._module, inner, fields_of(task.support)["ids"][:1].long())

    def source_weights(self, outer: Params) -> dict[str, float]:
        """The share of each source in the training loss, by its name.

        Raises:
            ValueError: The weights are not those of sources.
        """
        if not isinstance(self.weights, SourceWeights):
            raise ValueError(
                "weights must be SourceWeights for the shares of sources, got weights "
                f"{self.weights.describe()}"
            )
        return self.weights.by_name(outer)

    def scores(self, outer: Params, task: Task) -> Iterator[dict[str, Any]]:
        """The share and weight of each source, or the weight or rating of each support row."""
        places = torch.arange(len(task.support.index)).split(AT_A_TIME)
        some = (task.support.take(part) for part in places)
        with torch.no_grad():
            yield from self.weights.scores(outer, ((fields_of(part), part) for part in some))

    def save_pretrained(self, inner: Params, folder: str | Path) -> None:
        """Save the model with the weights `inner` as transformers and peft do.

        With LoRA that is the adapter alone.

        Raises:
            ValueError: The model has no `save_pretrained`.
        """
        ids = torch.zeros(1, 2, dtype=torch.int64)
        model: Any = plain_module(self._module, {n: t.cpu() for n, t in inner.items()}, ids)
        if not hasattr(model, "save_pretrained"):
            raise ValueError(
                f"model must be one of transformers or peft, got {type(model).__name__}: use "
                "metadist.export"
            )
        model.save_pretrained(str(folder))

    def describe(self) -> dict[str, str]:
        name = (
            repr(self.model) if isinstance(self.model, ModelFactory) else type(self.model).__name__
        )
        described = {"model": name, "weights": self.weights.describe(), "mean": f"per {self.mean}"}
        if self.weight_decay:
            described["weight_decay"] = str(self.weight_decay)
        return described


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each token, in the shape of `labels`; 0 where the label is -100."""
    found = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return found.view(labels.shape)


FIELDS = frozenset({"ids", "mask", "labels", "source"})


def fields_of(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch by name.

    Raises:
        ValueError: It has no `ids`, or tensors of other names.
    """
    fields = dict(zip(batch.names, batch.tensors, strict=False))
    if "ids" not in fields or not fields.keys() <= FIELDS:
        found = ", ".join(fields) or f"{len(batch.tensors)} without names"
        raise ValueError(
            f"the tensors of a batch must be ids and any of mask, labels, source, got {found}: "
            "build it with Batch.named(ids=..., source=...)"
        )
    return fields


def labels_of(fields: Mapping[str, Tensor]) -> Tensor:
    """The tokens to predict, int64 (n, L), -100 where none is; not yet shifted."""
    labels = fields.get("labels", fields["ids"]).long()
    if "mask" in fields:
        labels = torch.where(fields["mask"].bool(), labels, IGNORED)
    return labels


AT_A_TIME = 4096
"""Rows that are looked at together."""


def _check_rows(field: str, batch: Batch, vocabulary: int | None) -> None:
    fields = fields_of(batch)
    ids = fields["ids"]
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2:
        raise ValueError(
            f"ids of the {field} set must be integers of shape (n, L), L >= 2, got {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    for name in fields.keys() & {"mask", "labels"}:
        if fields[name].shape != ids.shape:
            raise ValueError(
                f"{name} of the {field} set must have the shape of ids, {tuple(ids.shape)}, got "
                f"{tuple(fields[name].shape)}"
            )
    for first in range(0, len(ids), AT_A_TIME):
        some = {name: tensor[first : first + AT_A_TIME] for name, tensor in fields.items()}
        rows = some["ids"].long()
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise ValueError(
                f"ids of the {field} set must be 0 .. {(vocabulary or 0) - 1}, the embeddings of "
                f"the model, got {low} .. {high} in the rows from {first}: use the tokenizer of "
                "this model, or a model with more embeddings"
            )
        is_told = (labels_of(some)[:, 1:] != IGNORED).any(1)
        if not bool(is_told.all()):
            row = first + int((~is_told).nonzero()[0])
            raise ValueError(
                f"every example must have a token to predict, got none in row {row} of the {field} "
                f"set (all labels after the first are {IGNORED}, or masked): leave it out"
            )


def _check_config(module: nn.Module) -> None:
    """Raise ValueError for what a model of transformers does and an inner loop cannot."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "use_cache", False) is True:
        raise ValueError(
            "use_cache must be off, got a model whose config has use_cache=True: keys and values "
            "of one call must not enter the next. Set model.config.use_cache = False"
        )
    kernels = getattr(config, "_attn_implementation", None)
    if kernels not in (None, "sdpa", "eager"):
        raise ValueError(
            f"attention must be 'sdpa' or 'eager', got {kernels!r}: such fused kernels have no "
            "second derivative. With 'sdpa' first-order methods run fused kernels of torch, and "
            "second-order ones plain operators"
        )


class HeadOfLogits:
    """The layer that makes logits of the features of tokens, and the model without it.

    Args:
        module: As of `without_parameters`, with a method `get_output_embeddings`.
        start: Its trainable parameters.

    Raises:
        ValueError: The model has no such layer, or does something with what comes out of it.
    """

    def __init__(self, module: nn.Module, start: Params) -> None:
        get: Any = getattr(module, "get_output_embeddings", None)
        head = None if get is None else get()
        if not isinstance(head, nn.Module):
            raise ValueError(
                f"logits_chunk must be None for a {type(module).__name__}, which does not tell the "
                "layer of its logits (get_output_embeddings)"
            )
        self.head = head
        names = {id(leaf): name for name, leaf in module.named_parameters()}
        self._names = {
            names[id(leaf)]: local for local, leaf in head.named_parameters() if leaf.requires_grad
        }
        memo: dict[int, Any] = {id(leaf): leaf for leaf in module.parameters()}
        memo |= {id(leaf): leaf for leaf in module.buffers()}
        memo[id(head)] = nn.Identity()
        self.body = copy.deepcopy(module, memo)
        ids = torch.arange(8)[None]
        with torch.no_grad():
            whole: Any = call(module, start, ids)
            features: Any = call(self.body, start, ids)
            logits = call(head, self.to_head(start), features.logits)
        if not torch.allclose(whole.logits, logits, rtol=1e-3, atol=1e-5):
            raise ValueError(
                f"logits_chunk must be None for a {type(module).__name__}, whose logits are not "
                "what its last layer makes of its features (it scales or caps them): use "
                "micro_batch"
            )

    def to_head(self, inner: Params) -> Params:
        """The parameters of the head, by the names that it has for them."""
        return {local: inner[name] for name, local in self._names.items()}


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, its constants in float64 where y is."""
    if dtype != torch.float64 or _is_double(module):
        return module
    if module not in _doubled:
        _doubled[module] = _in_double(module)
    return _doubled[module]


def _is_double(module: nn.Module) -> bool:
    found = (leaf.dtype for leaf in constants(module) if leaf.is_floating_point())
    return all(dtype == torch.float64 for dtype in found)


def _in_double(module: nn.Module) -> nn.Module:
    """A copy of `module` whose constants are in float64."""
    # Not by module.double(), which torch.func refuses within its transforms.
    copied = copy.deepcopy(module)
    for child in copied.modules():
        for name, leaf in child.named_buffers(recurse=False):
            child._buffers[name] = leaf.double() if leaf.is_floating_point() else leaf
        for name, leaf in child.named_parameters(recurse=False):
            if not leaf.requires_grad:
                child._parameters[name] = nn.Parameter(leaf.double(), requires_grad=False)
    return copied
