"""Baselines of the comparisons of data cleaning, text regularisation and sparse regression.

    .venv/bin/python scripts/experiments/baselines.py scripts/experiments/cleaning_mnist.yaml
    .venv/bin/python scripts/experiments/baselines.py scripts/experiments/text_regularisation.yaml
    .venv/bin/python scripts/experiments/baselines.py scripts/experiments/meha_group_lasso.yaml

The data is that of the config, drawn with `--seed`.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from metadist import Batch, Params
from metadist.checks.exact import lbfgs
from metadist.checks.values import require_integer
from metadist.task import to_device
from metadist.tasks import (
    CorruptedImages,
    HyperCleaning,
    LinearClassifier,
    SparseRegression,
    SparseRegressionData,
    TextFeatures,
    TextRegularisation,
)
from metadist.tasks.fixed import metrics_on
from metadist.tasks.image_sets import Images
from metadist.trees import dot

DECAYS = (0.01, 0.02, 0.04)
STRENGTHS = tuple(10 ** (k / 4) for k in range(-28, -3))
"""Four per decade, from 1e-7 to 0.1."""
SPARSE_STRENGTHS = tuple(10 ** (k / 4) for k in range(-16, 5))
"""Four per decade, from 1e-4 to 10."""


def cleaning_baselines(
    data: CorruptedImages,
    model: nn.Module | None = None,
    weight_decays: Sequence[float] = (2e-3,),
    max_iter: int = 100,
) -> dict[str, float]:
    """The test accuracy of a model fitted to five training sets, by name.

    Hyper-cleaning has to beat "val only" (training without the noisy images), and cannot beat
    "wrong dropped + val" (knowing which labels are wrong).

    Args:
        data: The images.
        model: Its weights are the start; None: logistic regression.
        weight_decays: Each adds weight_decay / 2 * |y|^2 to the mean cross entropy, >= 0. The
            noisier the labels, the larger the best one is: of several, every training set gets the
            one with the highest accuracy on the images for selection.
        max_iter: Iterations of L-BFGS, >= 1.
    """
    require_integer("max_iter", max_iter, 1)
    if len(weight_decays) != 1 and (not weight_decays or data.selection is None):
        raise ValueError(
            f"weight_decays must be one number without images for selection, got {weight_decays}: "
            "give the sampler num_selection"
        )
    if model is None:
        model = LinearClassifier(math.prod(data.train.pixels.shape[1:]), data.num_classes)
    train, val = data.scaling.batch(data.train), data.scaling.batch(data.val)
    clean = data.scaling.batch(Images(data.train.pixels, data.clean_labels))
    right = train.take((~data.wrong).nonzero()[:, 0])
    training_sets = {
        "corrupted train": [train],
        "corrupted train + val": [train, val],
        "val only": [val],
        "wrong dropped + val": [right, val],
        "all clean": [clean, val],
    }
    found = {}
    for name, parts in training_sets.items():
        columns = zip(*(part.tensors for part in parts), strict=True)
        batch = Batch.of(*map(torch.cat, columns))
        best = -1.0
        for decay in weight_decays:
            selection, test = _fitted_accuracy(data, model, decay, batch, max_iter)
            if selection > best:
                best, found[name] = selection, test
    return found


def _fitted_accuracy(
    data: CorruptedImages, model: nn.Module, weight_decay: float, batch: Batch, max_iter: int
) -> tuple[float, float]:
    """The accuracies on the images for selection (0 without any) and on the test images."""
    problem = HyperCleaning(len(data.wrong), model, weight_decay)
    outer = problem.init_outer(torch.Generator())

    def loss(y: Params) -> Tensor:
        return problem.outer_loss({}, y, batch) + weight_decay / 2 * dot(y, y)

    fitted = lbfgs(loss, problem.init_inner(outer, data.sample(0)), max_iter)
    accuracies = [
        0.0
        if images is None
        else metrics_on(problem, outer, fitted, data.scaling.batch(images))["test_accuracy"]
        for images in (data.selection, data.test)
    ]
    return accuracies[0], accuracies[1]


def text_baselines(
    data: TextFeatures, strengths: Sequence[float] = STRENGTHS, max_iter: int = 100
) -> dict[str, dict[str, float]]:
    """Metrics of the best single strength for all features, found by a grid search in float64.

    A learned strength for each feature has to beat "one strength": y fitted to the training texts,
    with the strength of the least `val_loss`, the loss on validation texts and those for selection
    together. In "one strength, all texts" y is fitted to all three.

    Args:
        data: The texts.
        strengths: The grid, at least one, all > 0.
        max_iter: Iterations of L-BFGS for each strength, >= 1; it starts from the solution of the
            next larger strength.

    Returns:
        For both names `strength` and the metrics on the test texts; for the first also `val_loss`
        and the metrics on the texts for selection.
    """
    require_integer("max_iter", max_iter, 1)
    if not strengths or not min(strengths) > 0:
        raise ValueError(f"strengths must be numbers > 0, at least one, got {strengths}")
    problem = TextRegularisation(data.num_features, data.num_classes, per_feature=False)
    # In float32 L-BFGS stalls while the loss on other texts still changes in its fourth digit.
    train, val, _ = to_device(data.sample(0), "cpu", torch.float64)
    held_out = [val]
    if data.selection is not None:
        selection = data.sample(0)._replace(query=data.selection)
        held_out.append(to_device(selection, "cpu", torch.float64).query)

    def outer_of(strength: float) -> Params:
        return {"log_strengths": torch.tensor([math.log(strength)], dtype=torch.float64)}

    def mean_loss(y: Params, parts: list[Batch]) -> Tensor:
        sizes = torch.tensor([len(part.index) for part in parts], dtype=torch.float64)
        losses = torch.stack([problem.outer_loss({}, y, part) for part in parts])
        return losses @ sizes / sizes.sum()

    def fitted(strength: float, parts: list[Batch], start: Params) -> Params:
        x = outer_of(strength)
        return lbfgs(lambda y: mean_loss(y, parts) + problem.penalty(x, y), start, max_iter)

    inner = problem.init_inner(outer_of(1.0), data.sample(0))
    val_loss, best, solution = math.inf, math.nan, inner
    for strength in sorted(strengths, reverse=True):
        inner = fitted(strength, [train], inner)
        loss = float(mean_loss(inner, held_out))
        if loss < val_loss:
            val_loss, best, solution = loss, strength, inner
    of_all = fitted(best, [train, *held_out], solution)
    return {
        "one strength": {
            "strength": best,
            "val_loss": val_loss,
            **data.solution_metrics(problem, outer_of(best), solution),
        },
        "one strength, all texts": {
            "strength": best,
            **metrics_on(problem, outer_of(best), of_all, data.test),
        },
    }


def sparse_baselines(
    data: SparseRegressionData,
    problem: SparseRegression,
    strengths: Sequence[float] = SPARSE_STRENGTHS,
    max_iter: int = 1000,
) -> dict[str, dict[str, float]]:
    """The best strengths by validation loss, one for each term of `problem`, by grid search.

    Learned strengths of groups have to beat this.

    Args:
        data: The examples.
        problem: Its terms.
        strengths: The grid of every term, at least one, all > 0.
        max_iter: Iterations for each point, >= 1; it starts from the solution of the last one.

    Returns:
        Under "tied strengths": the strengths, and the metrics of the data.
    """
    require_integer("max_iter", max_iter, 1)
    if not strengths or not min(strengths) > 0:
        raise ValueError(f"strengths must be numbers > 0, at least one, got {strengths}")
    tied = SparseRegression(problem.num_features, problem.num_groups, problem.terms, tied=True)
    start = tied.init_outer(torch.Generator())
    inner = tied.init_inner(start, data.sample(0))
    val_loss, best, solution = math.inf, start, inner
    for point in itertools.product(sorted(strengths, reverse=True), repeat=len(start)):
        outer = {
            n: torch.full_like(start[n], math.log(s)) for n, s in zip(start, point, strict=True)
        }
        inner = tied.solve(outer, inner, data.support, max_iter)
        loss = float(tied.outer_loss(outer, inner, data.query))
        if loss < val_loss:
            val_loss, best, solution = loss, outer, inner
    found = {name.removeprefix("log_"): float(leaf.exp()) for name, leaf in best.items()}
    return {"tied strengths": {**found, **data.solution_metrics(tied, best, solution)}}


def main() -> None:
    """Print the baselines of a config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a comparison of scripts/experiments")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampler (0)")
    parser.add_argument(
        "--weight_decays",
        type=float,
        nargs="+",
        default=DECAYS,
        help="of data cleaning, chosen by the images for selection (%(default)s)",
    )
    parser.add_argument("--terms", nargs="+", help="of sparse regression (those of the config)")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    sampler, problem = config["sampler"], config["problem"]
    if isinstance(sampler, str):
        sampler = {"class_path": sampler}
    arguments = {**sampler.get("init_args", {}), "seed": options.seed}
    found: Mapping[str, object]
    if sampler["class_path"] == "metadist.tasks.CorruptedImages":
        found = cleaning_baselines(
            CorruptedImages(**arguments), weight_decays=options.weight_decays
        )
    elif sampler["class_path"] == "metadist.tasks.TextFeatures":
        found = text_baselines(TextFeatures(**arguments))
    elif sampler["class_path"] == "metadist.tasks.SparseRegressionData":
        settings = dict(problem["init_args"])
        settings["terms"] = options.terms or settings["terms"]
        found = sparse_baselines(SparseRegressionData(**arguments), SparseRegression(**settings))
    else:
        parser.error(
            "the sampler of config must be CorruptedImages, TextFeatures or SparseRegressionData "
            f"of metadist.tasks, got {sampler['class_path']}"
        )
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
