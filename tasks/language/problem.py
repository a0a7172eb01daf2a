"""`LanguageModelProblem`: a causal language model whose training data is weighted by x.

Shape letters: n examples, L tokens of a row, V tokens of the vocabulary, D features of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.checks.values import check, require_integer
from metadist.factory import ModelFactory
from metadist.problem import Problem
from metadist.task import Batch, Task, TaskSampler
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
        micro_batch: Examples whose derivatives are computed together; None: a whole mini-batch.
        mean: "example": as above. "token": every token of a mini-batch counts alike, so that long
            examples count more: l_i is the sum over tokens by their mean number in an example of
            the mini-batch.
        weight_decay: >= 0.

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
    ) -> None:
        if not isinstance(weights, Weights):
            raise ValueError(
                "weights must be SourceWeights, ExampleWeights, Rater or another Weights, got "
                f"{type(weights).__name__}"
            )
        if micro_batch is not None:
            require_integer("micro_batch", micro_batch, 1)
            if not weights.sums_over_parts:
                raise ValueError(
                    f"micro_batch must be None with weights {weights.describe()}, which compare "
                    f"the examples of a mini-batch, got {micro_batch}: use kind='sigmoid'"
                )
            if mean == "token":
                raise ValueError(
                    "micro_batch must be None with mean='token', which divides by the tokens of "
                    f"the whole mini-batch, got {micro_batch}: use mean='example'"
                )
        if mean not in ("example", "token"):
            raise ValueError(f"mean must be 'example' or 'token', got {mean!r}")
        check("weight_decay", weight_decay, ge=0)
        self.model, self.weights, self.micro_batch = model, weights, micro_batch
        self.mean, self.weight_decay = mean, weight_decay
        found = opened(model)
        _check_config(found.module)
        self._start, self._module = found.start, found.module
        self._autocast = getattr(model, "precision", "float32") == "bf16"
        if not self._start:
            raise ValueError(
                "model must have a trainable parameter, got none with requires_grad=True"
            )

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

        Cost: the rows are read once.
        """
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
        return self._logits(inner, fields_of(batch))

    def _logits(self, inner: Params, fields: Mapping[str, Tensor]) -> Tensor:
        leaf = next(iter(inner.values()))
        ids = fields["ids"].to(leaf.device).long()
        named = {}
        if "mask" in fields:
            named["attention_mask"] = fields["mask"].to(leaf.device).long()
        with torch.autocast(
            leaf.device.type, torch.bfloat16, enabled=self._autocast, cache_enabled=False
        ):
            output: Any = call(self._module_in(leaf.dtype), inner, ids, **named)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits if logits.dtype == leaf.dtype else logits.to(leaf.dtype)

    def _module_in(self, dtype: torch.dtype) -> nn.Module:
        """The model, its constants in float64 where y is."""
        if dtype != torch.float64 or _is_double(self._module):
            return self._module
        if self._module not in _doubled:
            _doubled[self._module] = _in_double(self._module)
        return _doubled[self._module]

    def losses(self, inner: Params, batch: Batch) -> Tensor:
        """The loss of each example, shape (n,), see `mean`."""
        found = self._entropies(inner, batch)
        return self._mean(found.sums, found.counts)

    def _mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        return sums / (counts.to(sums.dtype).mean() if self.mean == "token" else counts)

    def _entropies(self, inner: Params, batch: Batch, is_judged: bool = False) -> _Entropies:
        """What the loss is made of, computed a few examples at a time if nothing needs a graph.

        `is_judged`: with the hits, which cost another pass over the logits.
        """
        size = len(batch.index)
        if torch.is_grad_enabled() or size <= AT_ONCE:
            return self._entropies_at_once(inner, batch, is_judged)
        places = torch.arange(size, device=batch.index.device).split(AT_ONCE)
        parts = [self._entropies_at_once(inner, batch.take(some), is_judged) for some in places]
        return _Entropies(*map(torch.cat, zip(*parts, strict=True)))

    def _entropies_at_once(self, inner: Params, batch: Batch, is_judged: bool) -> _Entropies:
        fields = fields_of(batch)
        logits = self._logits(inner, fields)[:, :-1]
        labels = labels_of(fields).to(logits.device)[:, 1:]
        entropies = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        counts = (labels != IGNORED).sum(1)
        hits = (logits.detach().argmax(-1) == labels).sum(1) if is_judged else counts
        return _Entropies(entropies.view(labels.shape).sum(1), counts, hits)

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        losses = self.losses(inner, batch)
        weights = self.weights.of(context, fields_of(batch), batch)
        loss = (weights * losses).mean()
        return loss + self.weight_decay / 2 * dot(inner, inner) if self.weight_decay else loss

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self.losses(inner, batch).mean()

    def metrics(self, context: Params, inner: Params, batch: Batch) -> dict[str, Tensor]:
        return self.loss_and_metrics(context, inner, batch)[1]

    def loss_and_metrics(
        self, context: Params, inner: Params, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """f, and `token_accuracy` and `perplexity`, exp of the loss of the examples at hand."""
        found = self._entropies(inner, batch, is_judged=True)
        loss = self._mean(found.sums, found.counts).mean()
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
