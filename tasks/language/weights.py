"""What the outer variable of a language model weights: sources, examples, or what a net sees.

Shape letters: n examples, L tokens of a row, k sources.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal
from warnings import warn

import torch
from torch import Tensor

from metadist.checks.values import check, require_integer
from metadist.task import Batch
from metadist.trees import Params


class Weights(ABC):
    """Weights of the training examples, a function of the outer variable x."""

    @abstractmethod
    def init(self, generator: torch.Generator) -> Params:
        """x at the start."""

    @abstractmethod
    def of(self, outer: Params, fields: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The weights >= 0 of the examples of a batch, about 1 on average; (n,).

        `fields` are the tensors of the batch by name.
        """

    def per_example(self) -> set[str]:
        """The outer variables with a row for each support example."""
        return set()

    def scores(
        self, outer: Params, parts: Iterator[tuple[Mapping[str, Tensor], Batch]]
    ) -> Iterator[dict[str, Any]]:
        """What was learned of each example, given all of them part by part."""
        for fields, batch in parts:
            found = self.of(outer, fields, batch).tolist()
            for row, weight in zip(batch.index.tolist(), found, strict=True):
                yield {"row": row, "weight": weight}

    @abstractmethod
    def describe(self) -> str:
        """What it is, in a line."""


class SourceWeights(Weights):
    """A weight for each source: x are the logits of its share of the training loss.

        p = floor + (1 - k floor) softmax(x + log q),    w_i = p_s / q_s,   s the source of row i

    q are the shares of the rows, so that training starts from equal weights of all rows (up to
    the floor), and a mini-batch drawn uniformly has the loss sum_s p_s L_s on average.

    Args:
        sources: The rows of each source by its name, in the order of their numbers, as
            `TokenSources.sources`; names alone: q = 1/k, for sources of as many rows each.
        floor: The least p of a source, 0 <= floor < 1/k: a source of which nothing is drawn has no
            gradient to come back by.
    """

    def __init__(self, sources: Sequence[str] | Mapping[str, int], floor: float = 0.0) -> None:
        if (
            not isinstance(sources, Sequence | Mapping)
            or isinstance(sources, str)
            or not all(isinstance(name, str) for name in sources)
            or len(sources) < 2
        ):
            raise ValueError(
                f"sources must name at least two sources, got {sources!r}: one has no weight; pass "
                "TokenSources.sources, or a list of names"
            )
        check("floor", floor, ge=0, lt=1 / len(sources))
        rows = dict(sources) if isinstance(sources, Mapping) else dict.fromkeys(sources, 1)
        if len(rows) < len(sources):
            raise ValueError(f"sources must have different names, got {list(sources)}")
        for name, count in rows.items():
            require_integer(f"sources[{name!r}]", count, 1)
        self.sources, self.floor = rows, floor

    def check_sources(self, given: object) -> None:
        """Compare the sources with those of a sampler, which are names or rows by name.

        Anything else tells nothing.

        Raises:
            ValueError: The names, or their order, are others. Warns where the rows are in another
                proportion: p is then no share of the loss.
        """
        if not isinstance(given, Mapping | list | tuple):
            return
        if not all(isinstance(name, str) for name in given):
            return
        if list(given) != list(self.sources):
            raise ValueError(
                "sources of SourceWeights must be those of the sampler in its order, "
                f"{list(given)}, got {list(self.sources)}: weights would belong to other sources; "
                "pass sampler.sources"
            )
        if not isinstance(given, Mapping):
            return
        total, ours = sum(given.values()), sum(self.sources.values())
        if any(
            abs(self.sources[s] * total / (rows * ours) - 1) > 0.01 for s, rows in given.items()
        ):
            warn(
                "sources of SourceWeights should be in the proportion of the rows, "
                f"{dict(given)}, got {self.sources}: what is learned are then weights relative to "
                "the rows, no shares of the loss; pass sampler.sources",
                RuntimeWarning,
                stacklevel=3,
            )

    def init(self, generator: torch.Generator) -> Params:
        return {"logits": torch.zeros(len(self.sources))}

    def shares(self, outer: Params) -> Tensor:
        """p, shape (k,), which sums to 1."""
        q = self._drawn(outer)
        part = 1 - len(self.sources) * self.floor
        return self.floor + part * (outer["logits"] + q.log()).softmax(0)

    def by_name(self, outer: Params) -> dict[str, float]:
        """p of each source by its name."""
        return dict(zip(self.sources, self.shares(outer).tolist(), strict=True))

    def scores(
        self, outer: Params, parts: Iterator[tuple[Mapping[str, Tensor], Batch]]
    ) -> Iterator[dict[str, Any]]:
        total = sum(self.sources.values())
        for name, share in self.by_name(outer).items():
            weight = share * total / self.sources[name]
            yield {"source": name, "share": share, "weight": weight}

    def of(self, outer: Params, fields: Mapping[str, Tensor], batch: Batch) -> Tensor:
        source = _field(fields, "source", "TokenSources gives it")
        return (self.shares(outer) / self._drawn(outer))[source]

    def _drawn(self, outer: Params) -> Tensor:
        rows = outer["logits"].new_tensor(list(self.sources.values()))
        return rows / rows.sum()

    def describe(self) -> str:
        return f"of {len(self.sources)} sources, floor {self.floor}"


class ExampleWeights(Weights):
    """A weight for each example: w_i = 2 sigmoid(x_i), 1 at the start.

    Args:
        num_examples: The number of rows of the support set.
    """

    def __init__(self, num_examples: int) -> None:
        require_integer("num_examples", num_examples, 1)
        self.num_examples = num_examples

    def init(self, generator: torch.Generator) -> Params:
        return {"logits": torch.zeros(self.num_examples)}

    def per_example(self) -> set[str]:
        return {"logits"}

    def of(self, outer: Params, fields: Mapping[str, Tensor], batch: Batch) -> Tensor:
        return 2 * outer["logits"][batch.index].sigmoid()

    def describe(self) -> str:
        return f"of {self.num_examples} examples"


class Rater(Weights):
    """A small net that rates an example by its tokens, also examples that it has not seen.

        h = mean over the tokens of their learned embeddings,    r = a' tanh(W h) + b
        kind "sigmoid": w = 2 sigmoid(r),    kind "softmax": w = n softmax of r in the mini-batch

    Args:
        vocabulary: Tokens are 0 .. vocabulary-1.
        width: The size of h, >= 1.
        kind: "softmax" compares the examples of a mini-batch with one another.
    """

    def __init__(
        self, vocabulary: int, width: int = 16, kind: Literal["sigmoid", "softmax"] = "sigmoid"
    ) -> None:
        require_integer("vocabulary", vocabulary, 1)
        require_integer("width", width, 1)
        if kind not in ("sigmoid", "softmax"):
            raise ValueError(f"kind must be 'sigmoid' or 'softmax', got {kind!r}")
        self.vocabulary, self.width, self.kind = vocabulary, width, kind

    def init(self, generator: torch.Generator) -> Params:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return {
            "embeddings": drawn(self.vocabulary, self.width),
            "hidden": drawn(self.width, self.width) / self.width**0.5,
            "rating": 0.1 * drawn(self.width),
            "bias": torch.zeros(1),
        }

    def scores(
        self, outer: Params, parts: Iterator[tuple[Mapping[str, Tensor], Batch]]
    ) -> Iterator[dict[str, Any]]:
        """The rating of each example, which "softmax" weighs against those of a mini-batch."""
        for fields, batch in parts:
            found = self.ratings(outer, fields)
            for row, rating in zip(batch.index.tolist(), found.tolist(), strict=True):
                yield {"row": row, "rating": rating}

    def of(self, outer: Params, fields: Mapping[str, Tensor], batch: Batch) -> Tensor:
        ratings = self.ratings(outer, fields)
        if self.kind == "softmax":
            return len(ratings) * ratings.softmax(0)
        return 2 * ratings.sigmoid()

    def ratings(self, outer: Params, fields: Mapping[str, Tensor]) -> Tensor:
        """r of each example, shape (n,)."""
        ids = _field(fields, "ids", "it holds the tokens")
        rows = outer["embeddings"][ids.long()]
        if (mask := fields.get("mask")) is None:
            mean = rows.mean(1)
        else:
            kept = mask.to(rows.dtype)
            mean = (rows * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
        return (mean @ outer["hidden"]).tanh() @ outer["rating"] + outer["bias"]

    def describe(self) -> str:
        return f"by a net of width {self.width}, {self.kind}"


def _field(fields: Mapping[str, Tensor], name: str, why: str) -> Tensor:
    if name not in fields:
        raise ValueError(
            f"the tensors of a batch must have {name}, got {', '.join(fields)}: {why}; or build it "
            f"with Batch.named({name}=...)"
        )
    return fields[name]
