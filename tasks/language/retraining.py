"""Training on mixtures of sources from scratch: what learned shares are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.checks.values import check, require_integer
from metadist.factory import ModelFactory
from metadist.intervals import Interval, mean_interval
from metadist.step_rules import AdamW, StepRule
from metadist.task import Batch, to_device
from metadist.tasks.data.random import Random
from metadist.tasks.fixed import metrics_on
from metadist.tasks.language.problem import LanguageModelProblem
from metadist.tasks.language.sources import TokenSources
from metadist.tasks.language.weights import ExampleWeights
from metadist.trees import detach, gradients, leaves

UNIFORM, VALIDATION_ONLY = "uniform", "validation only"
CLEAN_ONLY, RANDOM_CHOICE = "clean only", "random choice"
OURS = (UNIFORM, VALIDATION_ONLY, CLEAN_ONLY, RANDOM_CHOICE)
"""The mixtures that `retrain` adds."""


@dataclass(frozen=True)
class Retrained:
    """Losses on the test text of models that were trained from scratch.

    Args:
        losses: Of each mixture by its name, the loss of each seed, in nats per token.
        accuracies: Likewise, the share of the tokens that are predicted right.
        num_tokens: Tokens that each model was trained on.
    """

    losses: dict[str, list[float]]
    accuracies: dict[str, list[float]]
    num_tokens: int

    def mean(self, name: str) -> float:
        """The mean over seeds of a mixture."""
        return float(np.mean(self.losses[name]))

    def interval(self, name: str) -> Interval:
        """The mean over seeds of a mixture with its 95 % interval; infinite with one seed."""
        losses = self.losses[name]
        return mean_interval(losses) if len(losses) > 1 else Interval(losses[0], math.inf)

    def gain(self, name: str, over: str) -> tuple[float, float]:
        """(mean, standard error) over seeds of how much lower the loss of `name` is."""
        gains = np.subtract(self.losses[over], self.losses[name])
        error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        return float(gains.mean()), float(error)

    def to_json(self) -> dict[str, Any]:
        """All of it, and the means, for a file."""
        means = {name: self.mean(name) for name in self.losses}
        return {
            "num_tokens": self.num_tokens,
            "losses": self.losses,
            "means": means,
            "accuracies": self.accuracies,
        }

    def __str__(self) -> str:
        width = max(map(len, self.losses))
        lines = [f"{'mixture':{width}}  test loss            perplexity  accuracy"]
        for name in sorted(self.losses, key=self.mean):
            perplexity = math.exp(self.mean(name))
            has_interval = len(self.losses[name]) > 1
            loss = str(self.interval(name)) if has_interval else f"{self.mean(name):.4f}"
            accuracy = float(np.mean(self.accuracies[name]))
            lines.append(f"{name:{width}}  {loss:19}  {perplexity:10.2f}  {accuracy:8.4f}")
        return "\n".join(lines)


def retrain(
    model: ModelFactory,
    data: TokenSources,
    learned: Mapping[str, Mapping[str, float]],
    clean: Sequence[str] = (),
    *,
    num_steps: int = 1000,
    batch_size: int = 64,
    steps: StepRule | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    device: str | torch.device = "cpu",
) -> Retrained:
    """Train the model from scratch on mixtures of the sources, each on equally many tokens.

    Mixtures: those of `learned`; "uniform", all rows alike; "validation only", the rows of the
    validation text; with `clean` also "clean only", the rows of these sources alike, and "random
    choice", those of as many sources drawn at random, others for each seed.

        learned = {"F2SA": problem.source_weights(trainer.outer)}
        print(retrain(model, data, learned, clean=["news"], num_steps=2000))

    A mini-batch holds rows of each source in proportion to its share; nothing is chosen by the test
    text, and the weights after the last step count. A seed is that of the initial weights (with
    LoRA, of the adapter), of the rows and of the random choice, the same for all mixtures.

    Args:
        model: The factory; its seed is replaced.
        data: The rows, with a test text.
        learned: Shares of the sources by their names, as of `source_weights`, by name of the
            mixture.
        clean: The sources known to be good, if any.
        num_steps: Steps of each training, >= 1.
        batch_size: Rows of a step, >= 1.
        steps: The rule of the steps; None: `AdamW(lr=1e-3, clip_norm=1.0)` with a cosine to 0.
        seeds: Seeds of the trainings.
        device: Where to train.

    Raises:
        ValueError: No test text, shares without the name of a mixture, a source that there is not,
            shares whose sum is 0, a mixture with the name of one that is added here, an argument
            out of its range.

    Cost: one gradient of a mini-batch for each step, mixture and seed.
    """
    if not isinstance(model, ModelFactory):
        raise ValueError(
            f"model must be a ModelFactory or HuggingFace, got {type(model).__name__}: every seed "
            "has initial weights of its own; pass what builds it"
        )
    require_integer("num_steps", num_steps, 1)
    require_integer("batch_size", batch_size, 1)
    if not isinstance(learned, Mapping) or not all(
        isinstance(shares, Mapping) for shares in learned.values()
    ):
        raise ValueError(
            "learned must hold the shares of each mixture by its name, such as {'F2SA': "
            f"problem.source_weights(trainer.outer)}}, got {learned!r:.80}: give it a name"
        )
    if taken := [name for name in learned if name in OURS]:
        raise ValueError(
            f"learned must have other names than {', '.join(OURS)}, which are added, got "
            f"{', '.join(taken)}: rename them"
        )
    if data.test is None:
        raise ValueError(
            "data must have a test text, got none: pass test= to TokenSources.from_..."
        )
    if not seeds:
        raise ValueError("seeds must name at least one seed, got none")
    if steps is None:
        steps = AdamW(lr=1e-3, clip_norm=1.0, schedule="cosine", num_steps=num_steps)
    known = list(data.sources)
    unknown = sorted(set(clean).union(*learned.values()) - set(known))
    if unknown:
        raise ValueError(f"sources must be among {', '.join(known)}, got {', '.join(unknown)}")
    losses: dict[str, list[float]] = {}
    accuracies: dict[str, list[float]] = {}
    for seed in seeds:
        for name, shares in _mixtures(data, learned, clean, seed).items():
            found = _train(model, data, shares, num_steps, batch_size, steps, seed, device)
            losses.setdefault(name, []).append(found["test_loss"])
            accuracies.setdefault(name, []).append(found["test_token_accuracy"])
    return Retrained(losses, accuracies, num_steps * batch_size * data.length)


def _mixtures(
    data: TokenSources,
    learned: Mapping[str, Mapping[str, float]],
    clean: Sequence[str],
    seed: int,
) -> dict[str, Mapping[str, float] | None]:
    """The shares of the sources of each mixture; None: the validation text."""
    mixtures: dict[str, Mapping[str, float] | None] = {
        **learned,
        UNIFORM: data.sources,
        VALIDATION_ONLY: None,
    }
    if clean:
        names = list(data.sources)
        chosen = Random(seed, "choice of sources", 0).choose(len(names), len(clean))
        mixtures[CLEAN_ONLY] = {name: data.sources[name] for name in clean}
        mixtures[RANDOM_CHOICE] = {names[i]: data.sources[names[i]] for i in chosen}
    for name, shares in mixtures.items():
        if shares is not None:
            for source, share in shares.items():
                check(f"share of {source!r} in {name!r}", share, ge=0)
            if not sum(shares.values()) > 0:
                raise ValueError(
                    f"shares of {name!r} must have a sum > 0, got {dict(shares)}: name a source to "
                    "train on"
                )
    return mixtures


def _train(
    model: ModelFactory,
    data: TokenSources,
    shares: Mapping[str, float] | None,
    num_steps: int,
    batch_size: int,
    steps: StepRule,
    seed: int,
    device: str | torch.device,
) -> dict[str, float]:
    """The metrics on the test text after a training on one mixture."""
    # The weights of examples are not used: the mixture is in what is drawn.
    problem = LanguageModelProblem(model.with_seed(seed), ExampleWeights(1))
    task = to_device(data.sample(0), device)
    rows = task.query if shares is None else task.support
    outer = {"logits": torch.zeros(1, device=device)}
    y = problem.init_inner(outer, task)
    memory = steps.start(y)
    for step in range(num_steps):
        batch = rows.take(_drawn(data, rows, shares, batch_size, seed, step).to(device))
        at = leaves(y)
        with torch.enable_grad():
            loss = problem.outer_loss({}, at, batch)
        (slope,) = gradients([loss], [None], at)
        y, memory = steps.step(y, memory, detach(slope), steps.lr_at(step))
    assert data.test is not None
    return metrics_on(problem, outer, y, data.test)


def _drawn(
    data: TokenSources,
    rows: Batch,
    shares: Mapping[str, float] | None,
    batch_size: int,
    seed: int,
    step: int,
) -> Tensor:
    """The positions of the rows of a step, int64 (batch_size,)."""
    draws = Random(seed, "rows", step)
    unit = draws.uniform(0, 1, batch_size)
    if shares is None:
        return torch.from_numpy((unit * len(rows.index)).astype(np.int64))
    sizes = np.array(list(data.sources.values()))
    weights = np.array([shares.get(name, 0.0) for name in data.sources])
    cuts = np.cumsum(weights / weights.sum())
    source = np.minimum(
        np.searchsorted(cuts, draws.uniform(0, 1, batch_size), "right"), len(cuts) - 1
    )
    first: NDArray[np.int64] = np.cumsum(sizes) - sizes
    return torch.from_numpy(first[source] + (unit * sizes[source]).astype(np.int64))
