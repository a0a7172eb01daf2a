"""Sparse rows against dense ones, and regularisation strengths learned on texts made here."""

import csv
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
import torch
from sklearn.utils import Bunch

from metadist import OuterOptimizer, Trainer, check_hypergradient
from metadist.algorithms import AID, ITD, SOBA
from metadist.task import Batch, Task
from metadist.tasks import FetchError, TextFeatures, TextRegularisation, check_sampler
from metadist.tasks.data.sources import NEWS_ARTICLES
from metadist.tasks.text import corpora
from metadist.tasks.text.sparse import KEPT, _kept, sparse_matmul
from tests.problems import (
    DOUBLE,
    assert_close,
    central_difference,
    generator,
    oracle_of,
    randn,
    random_like,
)
from tests.tasks.helpers import assert_shards_add_up, equal, refusal

NUM_FEATURES, NUM_CLASSES = 7, 3


def sparse_rows(size, seed=0, width=4):
    """(columns, values, the same dense): padded rows, one of them empty."""
    random = generator(seed, 5)
    columns = torch.stack(
        [torch.randperm(NUM_FEATURES, generator=random)[:width] for _ in range(size)]
    )
    values = torch.rand(size, width, generator=random, dtype=DOUBLE) + 0.1
    values = values * (torch.rand(size, width, generator=random) < 0.7)
    values[0] = 0
    dense = torch.zeros(size, NUM_FEATURES, dtype=DOUBLE).scatter(1, columns, values)
    return columns.int(), values, dense


def sparse_task(seed=0):
    """(task of `TextRegularisation`, the inputs of both sets as dense matrices)."""
    parts = [sparse_rows(size, seed + i) for i, size in enumerate((9, 6))]
    support, query = (
        Batch.of(columns, values, torch.arange(len(columns)) % NUM_CLASSES)
        for columns, values, _ in parts
    )
    return Task(support, query, 0), [dense for _, _, dense in parts]


def test_products_and_their_derivatives_are_those_of_dense_matrices():
    columns, values, dense = sparse_rows(5)
    matrix, direction = randn(1, NUM_FEATURES, 2), randn(2, NUM_FEATURES, 2)
    target = randn(3, 5, 2)

    def results(product):
        def loss(w):
            return (product(w) - target).sin().square().sum()

        gradient = torch.func.grad(loss)
        hvp = torch.func.grad(lambda w: (gradient(w) * direction).sum())
        leaf = matrix.clone().requires_grad_()
        (eager,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (eager_hvp,) = torch.autograd.grad((eager * direction).sum(), leaf, create_graph=True)
        (third,) = torch.autograd.grad((eager_hvp * direction).sum(), leaf)
        both = torch.stack([matrix, direction])
        mapped = torch.func.vmap(hvp)(both)
        return loss(matrix), gradient(matrix), hvp(matrix), eager, eager_hvp, third, mapped

    found = results(lambda w: sparse_matmul(columns, values, w))
    for one, two in zip(found, results(lambda w: dense @ w), strict=True):
        assert torch.allclose(one, two, atol=1e-12)
    w = matrix.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: sparse_matmul(columns, values, w), w)
    assert torch.autograd.gradgradcheck(lambda w: sparse_matmul(columns, values, w), w)


def test_rows_are_compressed_once_and_few_are_kept():
    columns, values, dense = sparse_rows(5)
    matrix = randn(1, NUM_FEATURES, 2)
    _kept.clear()
    for _ in range(3):
        sparse_matmul(columns, values, matrix)
    assert len(_kept) == 1
    for seed in range(3 * KEPT):
        other_columns, other, other_dense = sparse_rows(5, seed)
        product = sparse_matmul(other_columns, other, matrix)
        assert torch.allclose(product, other_dense @ matrix)
    assert len(_kept) == KEPT
    assert torch.allclose(sparse_matmul(columns, values, matrix), dense @ matrix)


def test_a_column_beyond_the_matrix_is_refused():
    columns, values, _ = sparse_rows(5)
    message = refusal(lambda: sparse_matmul(columns, values, randn(0, NUM_FEATURES - 1, 2)))
    assert message == (
        "columns must be < 6, the rows of the dense matrix, got 6: a model of these rows needs "
        "num_features >= 7"
    )


@pytest.mark.parametrize("per_feature", [True, False])
def test_the_derivatives_are_those_of_the_formula(per_feature):
    problem = TextRegularisation(NUM_FEATURES, NUM_CLASSES, per_feature)
    task, (train, val) = sparse_task()
    outer = random_like(problem.init_outer(generator(0)), 1)
    oracle, context, start = oracle_of(problem, outer, task)
    inner, v = random_like(start, 2), random_like(start, 3)
    x, y = outer["log_strengths"], inner["weight"]

    def residual(inputs, labels):
        one_hot = torch.nn.functional.one_hot(labels, NUM_CLASSES)
        return inputs.T @ ((inputs @ y).softmax(1) - one_hot) / len(labels)

    along_x, along_y = oracle.inner_grads(context, inner, oracle.draw_inner())
    strengths = x.exp().expand(NUM_FEATURES)
    expected = residual(train, task.support.tensors[-1]) + strengths[:, None] * y
    assert torch.allclose(along_y["weight"], expected)
    per_term = 0.5 * strengths * y.square().sum(1)
    assert torch.allclose(along_x["log_strengths"], per_term if per_feature else per_term.sum())
    _, along_y = oracle.outer_grads(context, inner, oracle.draw_outer())
    assert torch.allclose(along_y["weight"], residual(val, task.query.tensors[-1]))
    j_v, h_v = oracle.second_order(context, inner, v, oracle.draw_inner())

    def slope(tree):
        found = oracle.inner_grad(context, tree, oracle.draw_inner())["weight"]
        return (found * v["weight"]).sum()

    assert_close(h_v, central_difference(slope, inner), 1e-6)
    per_term = (strengths[:, None] * y * v["weight"]).sum(1)
    assert torch.allclose(j_v["log_strengths"], per_term if per_feature else per_term.sum())


def test_shards_and_mini_batches_are_parts_of_the_whole():
    problem = TextRegularisation(NUM_FEATURES, NUM_CLASSES)
    task, _ = sparse_task()
    outer = random_like(problem.init_outer(generator(0)), 1)
    _, _, start = oracle_of(problem, outer, task)
    inner, v = random_like(start, 2), random_like(start, 3)
    assert len(task.support.index) == 9
    assert_shards_add_up(problem, task, outer, inner, v, first=4)


def test_check_hypergradient_finds_methods_exact():
    problem = TextRegularisation(NUM_FEATURES, NUM_CLASSES, strength=0.3, max_strength=1.0)
    task, _ = sparse_task()
    unrolled = ITD(inner_steps=5, inner_lr=1.0)
    assert check_hypergradient(problem, task, unrolled, repeats=[]).error < 1e-5
    solved = AID(inner_steps=60, inner_lr=1.0, adjoint_steps=30)
    assert check_hypergradient(problem, task, solved, repeats=[]).error < 1e-4


def test_strengths_are_kept_where_gradient_steps_are_stable():
    problem = TextRegularisation(2, 2, strength=0.01, max_strength=0.02)
    outer = {"log_strengths": torch.tensor([-9.0, 3.0])}
    low, high = problem.project_outer(outer)["log_strengths"]
    assert float(low) == -9.0 and float(high.exp()) == pytest.approx(0.02)


def corpus(size=150, seed=0):
    """(texts, labels): words that tell the class, and more words that tell nothing."""
    random = np.random.default_rng(seed)
    texts, labels = [], []
    for i in range(size):
        label = i % NUM_CLASSES
        telling = [f"topic{label}word{random.integers(12)}" for _ in range(3)]
        telling += [f"topic{random.integers(NUM_CLASSES)}word{random.integers(12)}"]
        noise = [f"noise{random.integers(60)}" for _ in range(12)]
        texts.append(" ".join(random.permutation(telling + noise)))
        labels.append("abc"[label])
    return texts, labels


def features(**options):
    sizes = {"num_train": 60, "num_val": 45, "num_test": 45, **options}
    return TextFeatures(corpus(), **sizes)


@pytest.mark.parametrize(
    ("algorithm", "batch_size"),
    [(SOBA(inner_lr=5.0, adjoint_lr=5.0), None), (ITD(10, 5.0), None), (ITD(5, 5.0), 30)],
)
def test_training_learns_which_words_to_distrust(algorithm, batch_size):
    data = features()
    problem = TextRegularisation(data.num_features, data.num_classes, strength=0.01)
    trainer = Trainer(
        problem,
        data,
        algorithm,
        outer_optimizer=OuterOptimizer("adam", lr=0.1),
        quiet=True,
        batch_size=batch_size,
    )
    trainer.fit(40)
    is_noise = torch.tensor([term.startswith("noise") for term in data.terms])
    strengths = trainer.outer["log_strengths"]
    assert strengths[is_noise].mean() > strengths[~is_noise].mean() + 0.2
    metrics = data.solution_metrics(problem, trainer.outer, trainer.inner(0))
    assert metrics["test_accuracy"] > 0.75
    assert set(metrics) == {"test_accuracy", "test_loss"}


def dense(part):
    """(inputs, labels) of the texts of a batch: (data, batch)."""
    data, batch = part
    columns, values, labels = batch.tensors
    empty = torch.zeros(len(columns), data.num_features)
    return empty.scatter_add(1, columns.long(), values).numpy(), labels.numpy()


def test_a_problem_of_too_few_features_is_refused_before_training():
    data = features()
    problem = TextRegularisation(data.num_features - 1, data.num_classes)
    message = refusal(lambda: Trainer(problem, data, SOBA(), quiet=True))
    assert f"a model of these rows needs num_features >= {data.num_features}" in message


def test_texts_for_selection_change_no_other_texts_and_judge_alike():
    without, data = features(num_val=25), features(num_val=25, num_selection=20)
    assert equal(without.sample(0), data.sample(0))
    assert torch.equal(without.test.tensors[1], data.test.tensors[1])
    assert without.selection is None
    parts = [dense((data, part))[0] for part in (data.support, data.query, data.selection)]
    assert len(np.unique(np.concatenate(parts).round(6), axis=0)) == 60 + 25 + 20
    problem = TextRegularisation(data.num_features, data.num_classes)
    outer = problem.init_outer(generator(0))
    inner = {"weight": randn(1, data.num_features, data.num_classes).float()}
    inputs, labels = dense((data, data.selection))
    hits = (torch.from_numpy(inputs) @ inner["weight"]).argmax(1).numpy() == labels
    metrics = data.solution_metrics(problem, outer, inner)
    assert metrics["selection_accuracy"] == pytest.approx(hits.mean())
    assert set(metrics) == {
        f"{part}_{name}" for part in ("selection", "test") for name in ("loss", "accuracy")
    }
    assert set(without.solution_metrics(problem, outer, inner)) == {"test_loss", "test_accuracy"}


def test_rows_are_those_of_scikit_learn_and_the_vocabulary_that_of_training_texts():
    from sklearn.feature_extraction.text import TfidfVectorizer

    data, again = features(), features()
    assert equal(data.sample(0), again.sample(0))
    assert not equal(data.sample(0), features(seed=1).sample(0))
    check_sampler(data, 2, processes=False)
    columns, values, _ = data.support.tensors
    counts = (values > 0).sum(1)
    words = [
        {data.terms[c] for c in row[:n].tolist()}
        for row, n in zip(columns, counts.tolist(), strict=True)
    ]
    training = [text for text in corpus()[0] if set(text.split()) & set(data.terms) in words]
    reference = TfidfVectorizer(min_df=2).fit(training)
    assert reference.get_feature_names_out().tolist() == data.terms
    assert torch.allclose(values.norm(dim=1), torch.ones(60))
    short = features(max_terms=3, max_features=20)
    assert short.num_features == 20 and short.support.tensors[0].shape == (60, 3)
    assert torch.allclose(short.support.tensors[1].norm(dim=1), torch.ones(60))


def test_equal_texts_are_taken_once():
    texts, labels = corpus(90)
    doubled = TextFeatures((texts + [text.upper() for text in texts], labels * 2), None, 40, 20, 30)
    check_sampler(doubled, 2, processes=False)
    message = refusal(lambda: TextFeatures((texts * 2, labels * 2), None, 60, 20, 20))
    assert message == (
        "num_train + num_val + num_selection must be <= 70, the different texts, got 80"
    )


def test_a_folder_of_files_is_a_source(tmp_path):
    for i, (text, label) in enumerate(zip(*corpus(), strict=True)):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / f"{i}.txt").write_text(text)
    data = TextFeatures(tmp_path, num_train=60, num_val=45, num_test=45)
    assert data.class_names.tolist() == ["a", "b", "c"]


def test_news_articles_lose_the_names_of_their_publishers(tmp_path, monkeypatch):
    file = tmp_path / NEWS_ARTICLES
    file.parent.mkdir()
    texts, _ = corpus(40)
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["article_source_link", "title", "text"])
        writer.writeheader()
        for i, text in enumerate(texts):
            host, name = (("www.bbc.co.uk", "BBC"), ("tass.com", "TASS"))[i % 2]
            link = f"http://{host}/{i}"
            writer.writerow(
                {"article_source_link": link, "title": f"{name} news", "text": f"{text} {name}"}
            )
    monkeypatch.setattr(corpora, "fetch", lambda name, root: root)
    data = TextFeatures("news_articles", tmp_path, 20, 10, 10)
    assert data.class_names.tolist() == ["tass.com", "www.bbc.co.uk"]
    assert "news" in data.terms and not {"bbc", "tass"} & set(data.terms)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: features(num_train=0), "num_train must be an integer >= 1, got 0"),
        (lambda: features(max_terms=0), "max_terms must be an integer >= 1, got 0"),
        (lambda: features(num_selection=-1), "num_selection must be an integer >= 0, got -1"),
        (
            lambda: features(num_val=100),
            "num_train + num_val + num_selection must be <= 105, the different texts, got 160",
        ),
        (
            lambda: features(num_val=1),
            "num_val must hold a text of every class, got none of ",
        ),
        (lambda: TextFeatures((["a"], [])), "source must hold a label for each text, got 1 texts"),
        (lambda: TextFeatures("20news"), "source must be one of 'news_articles', '20newsgroups', "),
        (
            lambda: TextRegularisation(0, 2),
            "num_features must be an integer >= 1, got 0",
        ),
        (lambda: TextRegularisation(5, 1), "num_classes must be an integer >= 2, got 1"),
        (
            lambda: TextRegularisation(5, 2, strength=0.0),
            "strength must be > 0 and finite, got 0.0",
        ),
        (
            lambda: TextRegularisation(5, 2, strength=0.5),
            "max_strength must be >= strength (0.5) and finite, got 0.1",
        ),
    ],
)
def test_bad_input(call, message):
    assert refusal(call).startswith(message)


def fake_newsgroups(data_home, subset):
    """What scikit-learn returns, without the internet."""
    texts, labels = corpus(60, seed=int(subset == "test"))
    names = ["a", "b", "c"]
    return Bunch(data=texts, target=[names.index(label) for label in labels], target_names=names)


def test_newsgroups_are_tested_on_their_test_part(tmp_path, monkeypatch):
    monkeypatch.setattr(sklearn.datasets, "fetch_20newsgroups", fake_newsgroups)
    data = TextFeatures("20newsgroups", tmp_path, 30, 20, 60)
    assert len(data.test.index) == 60 and data.class_names.tolist() == ["a", "b", "c"]

    def offline(data_home, subset):
        raise URLError("no route to host")

    monkeypatch.setattr(sklearn.datasets, "fetch_20newsgroups", offline)
    message = refusal(lambda: TextFeatures("20newsgroups", tmp_path), FetchError)
    assert message.startswith(
        "data set '20newsgroups' must be fetched by scikit-learn, got <urlopen error no route"
    )
