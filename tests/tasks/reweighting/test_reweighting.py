"""Problems that weight their examples, on small images made here, on digits, and on real MNIST."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from metadist import OuterOptimizer, Trainer, check_hypergradient
from metadist.algorithms import AID, ITD, SOBA, LancBiO
from metadist.models import Conv4
from metadist.task import to_device
from metadist.tasks import (
    ClassWeights,
    CorruptedImages,
    HyperCleaning,
    LinearClassifier,
    LongTail,
    LossWeighting,
    check_sampler,
)
from metadist.tasks.data.datasets import ArrayDataset
from metadist.tasks.data.sources import FetchError
from metadist.tasks.image_sets import Drawing
from metadist.trees import add, scale
from tests.problems import DOUBLE, assert_close, central_difference, oracle_of, random_like
from tests.tasks.helpers import assert_shards_add_up, equal, refusal

SIDE = 4


def blobs(count, num_classes=3, seed=0, noise=25):
    """Noisy images around one picture per class; easy for a linear model."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).integers(60, 190, (num_classes, SIDE, SIDE))
    labels = np.arange(count) % num_classes
    images = centres[labels] + random.normal(0, noise, (count, SIDE, SIDE))
    return ArrayDataset(np.clip(images, 0, 255).astype(np.uint8), labels)


def cleaning(**options):
    sizes = {"num_train": 60, "num_val": 45, "num_test": 90, **options}
    return CorruptedImages(blobs(240), **sizes)


def small(kind, weight_decay=0.02, **options):
    model = LinearClassifier(SIDE * SIDE, 3)
    return kind(model=model, weight_decay=weight_decay, **options)


PROBLEMS = {
    "hyper-cleaning": small(HyperCleaning, num_examples=60),
    "class weights": small(ClassWeights, num_classes=3),
    "loss weighting": small(LossWeighting, num_sigmoids=4),
}
each = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def at(problem, seed=0):
    """(oracle, context, y, v) in float64 at random points."""
    start = problem.init_outer(torch.Generator().manual_seed(seed))
    outer = random_like(start, seed)
    task = to_device(cleaning().sample(0), "cpu", DOUBLE)
    oracle, context, inner = oracle_of(problem, outer, task)
    return oracle, context, random_like(inner, seed + 1), random_like(inner, seed + 2), task


def test_a_head_that_is_replaced_or_has_hooks_is_asked():
    model, x = LinearClassifier(4, 3), torch.ones(2, 2, 2)
    model.head.register_forward_hook(lambda layer, args, output: output + 1)
    assert torch.equal(model(x), torch.ones(2, 3))
    model.head = torch.nn.Linear(4, 3, bias=False)
    assert torch.equal(model(x), model.head(x.flatten(1)))


@each
def test_its_derivatives_are_those_of_central_differences(problem):
    oracle, outer, inner, v, task = at(problem)
    along_x, along_y = oracle.inner_grads(outer, inner, oracle.draw_inner())
    for found, at_point, function in (
        (along_x, outer, lambda x: problem.inner_loss(x, inner, task.support)),
        (along_y, inner, lambda y: problem.inner_loss(outer, y, task.support)),
    ):
        assert_close(found, central_difference(function, at_point), 1e-7)
    j_v, h_v = oracle.second_order(outer, inner, v, oracle.draw_inner())
    eps = 1e-5
    above, below = (
        oracle.inner_grads(outer, add(inner, v, sign * eps), oracle.draw_inner())
        for sign in (1, -1)
    )
    for found, one, two in zip((j_v, h_v), above, below, strict=True):
        assert_close(found, scale(add(one, two, -1.0), 1 / (2 * eps)), 1e-6)


def test_logits_and_losses_are_those_of_torch_layers():
    problem = PROBLEMS["hyper-cleaning"]
    task = to_device(cleaning().sample(0), torch.device("cpu"), DOUBLE)
    y = random_like(problem.init_inner({"logits": torch.zeros(60, dtype=DOUBLE)}, task), 3)
    inputs, labels = task.support.fields("inputs", "targets")
    logits = F.linear(inputs.flatten(1), y["head.weight"], y["head.bias"])
    losses = F.cross_entropy(logits, labels, reduction="none")
    assert_close({"": problem.logits(y, inputs)}, {"": logits}, 1e-14)
    assert_close({"": problem.losses(y, task.support)}, {"": losses}, 1e-14)


def test_the_inner_gradient_of_hyper_cleaning_has_a_closed_form():
    problem = PROBLEMS["hyper-cleaning"]
    oracle, outer, inner, _, task = at(problem)
    inputs, labels = task.support.tensors
    probabilities = problem.logits(inner, inputs).softmax(1)
    residual = probabilities - torch.nn.functional.one_hot(labels, 3)
    weights = outer["logits"].sigmoid() / 60
    expected = (weights[:, None] * residual).T @ inputs.flatten(1) + 0.02 * inner["head.weight"]
    along_x, along_y = oracle.inner_grads(outer, inner, oracle.draw_inner())
    assert torch.allclose(along_y["head.weight"], expected)
    slope = weights * (1 - outer["logits"].sigmoid())
    assert torch.allclose(along_x["logits"], slope * problem.losses(inner, task.support))


@each
def test_shards_add_up_to_the_whole(problem):
    _, outer, inner, v, task = at(problem)
    assert len(task.support.index) == 60
    assert_shards_add_up(problem, task, outer, inner, v, first=20)


@each
def test_check_hypergradient_finds_unrolling_exact(problem):
    data = cleaning()
    unrolled = check_hypergradient(problem, data, ITD(inner_steps=3, inner_lr=0.5), repeats=[])
    assert unrolled.error < 1e-5


@pytest.mark.parametrize(
    "problem", [small(HyperCleaning, num_examples=15), small(ClassWeights, num_classes=3)]
)
def test_check_hypergradient_finds_an_implicit_method_exact(problem):
    solved = AID(inner_steps=100, inner_lr=1.0, adjoint_steps=60)
    report = check_hypergradient(problem, cleaning(num_train=15), solved, repeats=[])
    assert report.error < 0.05, report


@each
def test_problem_and_sampler_travel(problem):
    data = cleaning()
    copies = pickle.loads(pickle.dumps((problem, data)))
    outer = problem.init_outer(torch.Generator().manual_seed(0))
    losses = [
        one.inner_loss(outer, one.init_inner(outer, task), task.support)
        for one, task in ((problem, data.sample(0)), (copies[0], copies[1].sample(0)))
    ]
    assert torch.equal(*losses)


def test_per_example_names_what_has_an_entry_for_each_example():
    problem = PROBLEMS["hyper-cleaning"]
    outer = problem.init_outer(torch.Generator())
    assert problem.per_example(outer) == {"logits"}
    assert {name: len(leaf) for name, leaf in outer.items()} == {"logits": 60}


def test_learned_weights_are_a_file_of_the_run():
    found = HyperCleaning(3).artifacts({"logits": torch.tensor([0.0, 2.0, -30.0])}, None)
    assert found == {"weights.csv": b"position,weight\n0,0.5\n1,0.880797\n2,9.35762e-14\n"}


def train(problem, data, algorithm, num_steps, optimizer, **options):
    trainer = Trainer(
        problem,
        data,
        algorithm,
        outer_optimizer=optimizer,
        quiet=True,
        **options,
    )
    trainer.fit(num_steps)
    return data.solution_metrics(problem, trainer.outer, trainer.inner(0))


@pytest.mark.parametrize(
    "algorithm",
    [SOBA(inner_lr=1.0), LancBiO(inner_steps=5, inner_lr=1.0), ITD(inner_steps=10, inner_lr=1.0)],
)
def test_hyper_cleaning_finds_wrong_labels(algorithm):
    data = cleaning(corruption=0.4)
    assert 12 <= int(data.wrong.sum()) <= 24
    problem = small(HyperCleaning, 2e-3, num_examples=60)
    metrics = train(problem, data, algorithm, 60, OuterOptimizer("adam", lr=0.3))
    assert set(metrics) == {"test_accuracy", "test_loss", "precision", "recall"}
    assert metrics["precision"] > 0.8 and metrics["recall"] > 0.5
    assert metrics["test_accuracy"] > 0.95


def test_it_cleans_with_a_network_and_mini_batches():
    whole = blobs(90)
    data = ArrayDataset(whole.images.repeat(4, 1).repeat(4, 2), whole.targets)  # 16 pixels
    sampler = CorruptedImages(data, num_train=30, num_val=30, num_test=30)
    model = Conv4(n_way=3, in_channels=1, width=2, image_size=16, batch_norm="none")
    problem = HyperCleaning(30, model, weight_decay=0.01)
    metrics = train(problem, sampler, ITD(2, 0.1), 2, OuterOptimizer(), batch_size=10)
    assert metrics["recall"] <= 1 and 0 <= metrics["test_accuracy"] <= 1


def test_digits_need_no_file():
    data = CorruptedImages("digits", num_train=200, num_val=100, num_test=100)
    inputs, labels = data.sample(0).support.tensors
    assert inputs.shape == (200, 1, 8, 8) and float(inputs.max()) == 1.0
    assert sorted(set(labels.tolist())) == list(range(10))


@pytest.mark.parametrize("algorithm", [AID(10, 0.5), ITD(10, 0.5)])
def test_class_weights_favour_rare_classes(algorithm):
    data = LongTail(
        blobs(600, noise=60), imbalance=30, num_largest=120, val_per_class=20, num_test=90
    )
    assert data.counts == (120, 22, 4)
    problem = small(ClassWeights, num_classes=3)
    trainer = Trainer(
        problem,
        data,
        algorithm,
        outer_optimizer=OuterOptimizer("adam", lr=0.1),
        quiet=True,
    )
    trainer.fit(40)
    weights = trainer.outer["log_weights"]
    assert weights[0] < weights[1] < weights[2]
    metrics = data.solution_metrics(problem, trainer.outer, trainer.inner(0))
    assert metrics["test_accuracy_rarest_class"] > 0.5


@pytest.mark.parametrize("algorithm", [AID(20, 1.0, damping=0.01), ITD(20, 1.0)])
def test_loss_weighting_learns_to_distrust_large_losses(algorithm):
    data = cleaning(corruption=0.4)
    problem = small(LossWeighting, 2e-3, num_sigmoids=8)
    metrics = train(problem, data, algorithm, 30, OuterOptimizer("adam", lr=0.2))
    assert metrics["test_accuracy"] > 0.95
    assert metrics["precision"] > 0.9 and metrics["recall"] > 0.9


def test_the_weight_of_a_loss_is_the_slope_of_its_share():
    problem = LossWeighting(5)
    outer = {name: leaf.double() for name, leaf in problem.init_outer(torch.Generator()).items()}
    batch = cleaning().sample(0).support  # which neither of the two looks at
    losses = torch.linspace(0, 6, 13, dtype=DOUBLE)
    shares = [problem.weighted(outer, losses + eps, batch) for eps in (1e-5, -1e-5)]
    weights = problem.weights(outer, losses, batch)
    assert torch.allclose((shares[0] - shares[1]) / 2e-5, weights, atol=1e-8)
    assert weights.min() > 0 and weights.max() < 1 and weights.std() > 0.01
    assert problem.weighted(outer, torch.zeros(1, dtype=DOUBLE), batch).abs() < 1e-12


def test_labels_are_corrupted_once_and_as_asked_for():
    data, again, other = cleaning(), cleaning(), cleaning(seed=1)
    assert equal(data.sample(0), again.sample(0))
    assert not equal(data.sample(0), other.sample(0))
    clean = cleaning(corruption=0.0)
    assert not clean.wrong.any()
    assert np.array_equal(clean.train.labels, data.clean_labels)
    for name in ("val", "test"):
        one, two = getattr(clean, name), getattr(data, name)
        assert np.array_equal(one.pixels, two.pixels) and np.array_equal(one.labels, two.labels)
    flipped = cleaning(corruption=0.5, redraw="other")
    assert int(flipped.wrong.sum()) == 30
    many = CorruptedImages(
        blobs(3000, seed=2), num_train=2000, num_val=30, num_test=10, corruption=0.6
    )
    assert float(many.wrong.double().mean()) == pytest.approx(0.4, abs=0.03)


def test_images_for_selection_change_no_other_training_data_and_judge_alike():
    without, data = cleaning(num_test=30), cleaning(num_test=30, num_selection=50)
    assert equal(without.sample(0), data.sample(0))
    assert np.array_equal(without.wrong, data.wrong)
    sets = [data.train, data.val, data.selection, data.test]
    assert len({image.tobytes() for part in sets for image in part.pixels}) == 60 + 45 + 50 + 30
    problem = small(HyperCleaning, num_examples=60)
    outer = problem.init_outer(torch.Generator())
    inner = random_like(problem.init_inner(outer, data.sample(0)), 0)
    metrics = data.solution_metrics(problem, outer, inner)
    inputs, labels = data.scaling.batch(data.selection).tensors
    logits = inputs.flatten(1) @ inner["head.weight"].float().T + inner["head.bias"].float()
    accuracy = float((logits.argmax(-1) == labels).double().mean())
    assert metrics["selection_accuracy"] == pytest.approx(accuracy)
    assert set(without.solution_metrics(problem, outer, inner)) == {
        *("test_accuracy", "test_loss", "precision", "recall")
    }


def test_no_image_is_in_two_sets_even_if_the_data_set_repeats_it():
    one = blobs(100)
    doubled = ArrayDataset(
        np.concatenate([one.images] * 2), np.concatenate([one.targets, one.targets])
    )
    data = CorruptedImages(doubled, num_train=40, num_val=30, num_test=30)
    pixels = np.concatenate([data.train.pixels, data.val.pixels, data.test.pixels])
    assert len({image.tobytes() for image in pixels}) == 100


def test_samplers_keep_their_contract():
    for data in (cleaning(), LongTail(blobs(600), None, 10, 60, 10, 30)):
        check_sampler(data, 2, processes=False)
    data = cleaning()
    data.sample(0)
    assert data.__getstate__()["_sets"] is None


def test_inputs_are_scaled():
    data = cleaning(mean=0.5, std=0.25)
    inputs, _ = data.sample(0).support.tensors
    expected = (torch.from_numpy(data.train.pixels).float() / 255 - 0.5) / 0.25
    assert torch.allclose(inputs, expected)


class Torchvision:
    """Called like the data sets of torchvision."""

    def __init__(self, root, train=True):
        whole = blobs(120 if train else 60, seed=int(train))
        self.images, self.targets = whole.images, whole.targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, position):
        return torch.from_numpy(self.images[position])[None], int(self.targets[position])


def test_a_data_set_is_named_by_its_import_path(tmp_path):
    path = f"{__name__}.Torchvision"
    data = CorruptedImages(path, tmp_path, num_train=30, num_val=30, num_test=60)
    held_out = {image.tobytes() for image in Torchvision(tmp_path, train=False).images}
    assert {image.tobytes() for image in data.test.pixels} == held_out


class Missing(Torchvision):
    """A data set of torchvision without its files."""

    def __init__(self, root, train=True):
        raise RuntimeError("Dataset not found. You can use download=True to download it.")


def test_a_data_set_whose_files_are_missing_is_refused_with_a_way_out(tmp_path):
    path = f"{__name__}.Missing"
    message = refusal(lambda: CorruptedImages(path, tmp_path), FetchError)
    assert message.startswith(f"root must hold the files of dataset {path!r}, got {tmp_path} (Data")
    assert f"run {path}({str(tmp_path)!r}, download=True) where" in message
    assert "set root or METADIST_DATA to a folder that has them" in message


def broken(value):
    def change(dataset):
        images = dataset.images / 255
        images[7, 0, 0] = value
        return ArrayDataset(images, dataset.targets)

    return change(blobs(240))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cleaning(num_train=0), "num_train must be an integer >= 1, got 0"),
        (lambda: cleaning(num_selection=-1), "num_selection must be an integer >= 0, got -1"),
        (
            lambda: cleaning(num_selection=136),
            "num_selection (beside num_train and num_val) must be <= 135, the different images "
            "that are left in the data set, got 136",
        ),
        (lambda: cleaning(corruption=1.5), "corruption must be in [0, 1], got 1.5"),
        (lambda: cleaning(redraw="all"), "redraw must be 'any' or 'other', got 'all'"),
        (lambda: cleaning(std=0.0), "std must be > 0 and finite, got 0.0"),
        (lambda: cleaning(mean=float("nan")), "mean must be a finite number, got nan"),
        (
            lambda: CorruptedImages("torchvision.datasets.NMIST"),
            "dataset must be an import path, got 'torchvision.datasets.NMIST': module ",
        ),
        (
            lambda: cleaning(num_test=200),
            "num_test must be <= 135, the different images that are left in the data set, got 200",
        ),
        (
            lambda: cleaning(num_val=200),
            "num_val (beside num_train) must be <= 180, the different images that are left in "
            "the data set, got 200",
        ),
        (
            lambda: CorruptedImages(blobs(240), num_train=60, num_val=1, num_test=10),
            "num_val must hold an image of every class, got none of class ",
        ),
        (lambda: CorruptedImages("mnits"), "dataset must be one of 'mnist', 'fashion_mnist', "),
        (
            lambda: CorruptedImages(broken(np.nan), num_train=100, num_val=100, num_test=40),
            "picture 7 of the data set must be uint8 or floating in [0, 1], got float64 from nan",
        ),
        (lambda: LongTail(blobs(90), imbalance=0.5), "imbalance must be >= 1 and finite, got 0.5"),
        (
            lambda: LongTail(blobs(90), num_largest=100),
            "images of class 0 in num_largest must be <= 30, the different images that are left "
            "in the data set, got 100",
        ),
        (
            lambda: LongTail(blobs(90), imbalance=30, num_largest=10, val_per_class=5),
            "num_largest with this imbalance must hold an image of every class, got none of class "
            "2 among 12 images: draw more, or use another seed",
        ),
        (lambda: HyperCleaning(0), "num_examples must be an integer >= 1, got 0"),
        (lambda: ClassWeights(1), "num_classes must be an integer >= 2, got 1"),
        (lambda: LossWeighting(1), "num_sigmoids must be an integer >= 2, got 1"),
        (
            lambda: HyperCleaning(weight_decay=-1.0),
            "weight_decay must be >= 0 and finite, got -1.0",
        ),
    ],
)
def test_bad_input(call, message):
    assert refusal(call).startswith(message)


@pytest.mark.parametrize("num_examples", [50, 5000])
def test_too_few_or_too_many_weights_are_refused_before_training(num_examples):
    problem = small(HyperCleaning, num_examples=num_examples)
    message = refusal(lambda: train(problem, cleaning(), ITD(), 1, None))
    size = len(cleaning().sample(0).support.index)
    assert message.startswith(
        f"per_example variable logits must have a row for each of {size} support examples, got "
        f"shape ({num_examples},): give HyperCleaning the number"
    )


def test_a_data_set_with_other_classes_in_its_test_part_is_refused():
    message = refusal(lambda: Drawing(blobs(9, 3)).of(blobs(8, 2)))
    assert message == (
        "both parts of a data set must have the same classes, got [0, 1, 2] for training and "
        "[0, 1] for the test"
    )
