"""scripts/experiments/baselines.py against scikit-learn and the literature."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadist.tasks import CorruptedImages, SparseRegression, SparseRegressionData, TextFeatures
from tests.tasks.helpers import refusal
from tests.tasks.reweighting.test_reweighting import cleaning
from tests.tasks.text.test_text import dense, features

FILE = Path(__file__).resolve().parents[2] / "scripts" / "experiments" / "baselines.py"
SCRIPT: dict[str, Any] = runpy.run_path(str(FILE))
cleaning_baselines, text_baselines = SCRIPT["cleaning_baselines"], SCRIPT["text_baselines"]
sparse_baselines = SCRIPT["sparse_baselines"]


def test_baselines_have_the_decay_that_the_images_for_selection_choose():
    data = cleaning(num_train=90, num_test=60, num_val=12, num_selection=30)
    decays = (1e-3, 100.0)
    best, small_decay, large_decay = (
        cleaning_baselines(data, weight_decays=tried) for tried in (decays, decays[:1], decays[1:])
    )
    assert small_decay != large_decay
    assert all(best[name] in (small_decay[name], large_decay[name]) for name in best)
    assert best["all clean"] == small_decay["all clean"]
    message = refusal(lambda: cleaning_baselines(cleaning(), weight_decays=decays))
    assert message.startswith("weight_decays must be one number without images for selection, got ")


def test_the_baselines_are_ordered_and_logistic_regression_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    data = cleaning(num_train=120, num_val=12, num_test=100)
    metrics = cleaning_baselines(data)
    assert list(metrics) == [
        *("corrupted train", "corrupted train + val", "val only", "wrong dropped + val"),
        "all clean",
    ]
    assert metrics["corrupted train"] <= metrics["wrong dropped + val"] + 0.02
    (inputs, labels), (test, truth) = (
        data.scaling.batch(images).tensors for images in (data.train, data.test)
    )
    reference = LogisticRegression(C=1 / (2e-3 * 120), max_iter=1000, tol=1e-8)
    # Its intercept is not regularised; the difference is far below one test image here.
    reference.fit(inputs.flatten(1).numpy(), labels.numpy())
    accuracy = reference.score(test.flatten(1).numpy(), truth.numpy())
    assert metrics["corrupted train"] == pytest.approx(accuracy, abs=0.03)


@pytest.mark.parametrize("num_selection", [0, 30])
def test_one_strength_is_that_of_a_grid_search_with_scikit_learn(num_selection):
    from sklearn.linear_model import LogisticRegression

    sizes = {"num_train": 40, "num_val": 55 - num_selection, "num_selection": num_selection}
    data = features(**sizes)
    train, val, test = (
        tuple(np.concatenate(arrays) for arrays in zip(*map(dense, parts), strict=True))
        for parts in (
            [(data, data.support)],
            [(data, data.query), *([(data, data.selection)] if num_selection else [])],
            [(data, data.test)],
        )
    )

    def fitted(strength, inputs, labels):
        # In float64: its solver stops when the loss in float32 no longer falls.
        return LogisticRegression(
            C=1 / (strength * len(labels)), fit_intercept=False, tol=1e-9, max_iter=10_000
        ).fit(inputs.astype(np.float64), labels)

    def judged(model, inputs, labels):
        chances = model.predict_proba(inputs)
        own = chances[np.arange(len(labels)), labels]
        return -np.log(own).mean(), (chances.argmax(1) == labels).mean()

    strengths = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    models = {strength: fitted(strength, *train) for strength in strengths}
    best = min(strengths, key=lambda strength: judged(models[strength], *val)[0])
    assert strengths[0] < best < strengths[-1]
    both = tuple(np.concatenate(arrays) for arrays in zip(train, val, strict=True))
    found = text_baselines(data, strengths)
    for name, model in (
        ("one strength", models[best]),
        ("one strength, all texts", fitted(best, *both)),
    ):
        loss, accuracy = judged(model, *test)
        assert found[name]["strength"] == best
        assert found[name]["test_loss"] == pytest.approx(loss, abs=1e-5)
        assert found[name]["test_accuracy"] == pytest.approx(accuracy)
    one = found["one strength"]
    assert one["val_loss"] == pytest.approx(judged(models[best], *val)[0], abs=1e-5)
    assert ("selection_loss" in one) == bool(num_selection)


@pytest.mark.parametrize("strengths", [[], [1, 0]])
def test_strengths_are_checked(strengths):
    message = refusal(lambda: text_baselines(features(), strengths))
    assert message.startswith("strengths must be numbers > 0, at least one, got ")


def test_tied_strengths_are_those_of_a_grid_search_with_scikit_learn():
    from sklearn.linear_model import ElasticNet

    data = SparseRegressionData(12, 3, 1, (1, -2), num_train=20, num_val=30, num_test=50)
    (inputs, targets), val, test = (
        tuple(tensor.numpy() for tensor in part.tensors)
        for part in (data.support, data.query, data.test)
    )
    strengths = (1e-3, 1e-2, 1e-1, 1.0)

    def losses(lasso, ridge):
        total = lasso + ridge
        model = ElasticNet(
            alpha=total, l1_ratio=lasso / total, fit_intercept=False, tol=1e-10, max_iter=100_000
        ).fit(inputs, targets)
        return [float(((model.predict(a) - b) ** 2).mean() / 2) for a, b in (val, test)]

    grid = {(one, two): losses(one, two) for one in strengths for two in strengths}
    best = min(grid, key=lambda point: grid[point][0])
    found = sparse_baselines(data, SparseRegression(12, 3, ("lasso", "ridge")), strengths)
    tied = found["tied strengths"]
    assert (tied["lasso"], tied["ridge"]) == pytest.approx(best)
    assert tied["solved_val_loss"] == pytest.approx(grid[best][0], abs=1e-6)
    assert tied["solved_test_loss"] == pytest.approx(grid[best][1], abs=1e-6)
    message = refusal(lambda: sparse_baselines(data, SparseRegression(12, 3), ()))
    assert message.startswith("strengths must be numbers > 0, at least one, got ")


@pytest.mark.slow
def test_the_baselines_on_mnist_are_those_of_the_literature():
    """Needs a package index, unless METADIST_DATA has the files; some minutes."""
    metrics = cleaning_baselines(CorruptedImages("mnist"), max_iter=60)
    for name, expected in {
        "corrupted train + val": 0.889,
        "val only": 0.907,
        "wrong dropped + val": 0.910,
        "all clean": 0.915,
    }.items():
        assert metrics[name] == pytest.approx(expected, abs=0.005)


@pytest.mark.slow
def test_real_news_articles_are_classified(tmp_path):
    """Needs a package index, unless METADIST_DATA has the files."""
    data = TextFeatures("news_articles")
    assert data.num_classes == 9 and data.num_features > 15_000
    found = text_baselines(data, [1e-5, 1e-4], max_iter=50)
    assert 0.65 < found["one strength"]["test_accuracy"] < 0.8
