"""Short names: by one rule from what the packages export."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from metadist.algorithms import ALGORITHMS
from metadist.cli import classes, names
from metadist.cli.names import (
    KINDS,
    class_path,
    expand,
    expand_names,
    expand_tree,
    named,
    short_name,
)
from metadist.cli.suggestions import plain
from tests.cli.helpers import flat

KNOWN = {
    "algorithms": "itd aid noloopaid metasgd stocbio",
    "problems": "few_shot hyper_cleaning language_model lancbio_synthetic text_regularisation",
    "models": "conv4 resnet12 mlp linear",
    "samplers": "glyphs sinusoid omniglot fc100 image_folder lancbio_data no_data",
    "executors": "local ray data_parallel",
    "policies": "bsp ssp asp buffered",
    "step_rules": "adam adamw sgd",
    "loggers": "csv mlflow tensor_board wandb",
    "weights": "example_weights rater source_weights",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_its_classes_by_one_name_each(kind):
    found = named(kind)
    assert set(KNOWN[kind].split()) <= set(found)
    assert len(set(found.values())) == len(found)
    assert len({plain(name) for name in found}) == len(found)
    assert list(found) == sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_sources_tell_what_the_classes_themselves_tell(kind):
    for name, cls in named(kind).items():
        module, _, own = str(class_path(kind, name)).rpartition(".")
        real = getattr(import_module(module), own)
        assert cls.doc == inspect.getdoc(real) and not inspect.isabstract(real)
        assert all(callable(getattr(real, method)) for method in KINDS[kind].methods)
        parameters = inspect.signature(real).parameters.values()
        # Without an __init__ of its own, a class has *args and **kwargs.
        variadic = ("args", "kwargs")
        required = {p.name: p.default is p.empty for p in parameters if p.name not in variadic}
        assert {p.name: p.is_required for p in cls.parameters()} == required
    if kind == "algorithms":
        assert list(named(kind)) == sorted(ALGORITHMS)


def test_the_rule():
    for cls, name in {
        "HyperCleaning": "hyper_cleaning",
        "LancBiOData": "lancbio_data",
        "PBGDToy": "pbgd_toy",
        "ResNet12": "resnet12",
        "NoLoopAID": "noloopaid",
        "AmIGO": "amigo",
    }.items():
        assert short_name(cls) == name
    assert short_name("FewShotProblem", "Problem") == "few_shot"
    assert short_name("Problem", "Problem") == "problem"


def test_case_and_underscores_do_not_matter():
    for name in ("cifar_fs", "cifarfs", "CIFARFS", "cifar-fs"):
        assert class_path("samplers", name) == "metadist.tasks.CIFARFS"
    assert class_path("executors", "RayExecutor") == "metadist.cluster.RayExecutor"
    assert class_path("samplers", "itd") is None


def test_what_text_cannot_make_has_no_name():
    for name in ("episode_sampler", "fixed_tasks", "few_shot_dataset", "example_weighting"):
        assert name not in named("samplers") | named("problems")


def test_an_exported_class_is_named_without_a_table(monkeypatch, tmp_path, cli):
    """As CONTRIBUTING says: one new file, and one line of the package."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text(
        "if TYPE_CHECKING:\n    from metadist.tasks.moon import MoonPhases as MoonPhases\n"
    )
    (tmp_path / "tasks" / "moon.py").write_text(
        'class MoonPhases:\n    """Tasks of the moon."""\n\n    def sample(self, index): ...\n'
    )
    caches = (names._named_in, classes._tree, classes._definitions, classes._imported)
    for cached in caches:
        cached.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(classes, "ROOT", tmp_path)
            assert expand("--sampler", "moon_phases") == "metadist.tasks.MoonPhases"
            assert "moon_phases Tasks of the moon." in flat(cli.good("list", "samplers"))
    finally:
        for cached in caches:
            cached.cache_clear()


def test_names_are_expanded_where_a_class_is_meant():
    flags = ["--sampler", "glyphs", "--algorithm=itd", "--seed", "3", "--quiet", "true"]
    expanded = ["--sampler", "metadist.tasks.Glyphs", "--algorithm=metadist.algorithms.ITD"]
    assert expand_names(flags) == expanded + flags[3:]
    tree = {"problem": {"class_path": "few_shot", "init_args": {"model": "mlp", "adapt": "head"}}}
    assert expand_tree(tree) == {
        "problem": {
            "class_path": "metadist.tasks.FewShotProblem",
            "init_args": {"model": "metadist.models.MLP", "adapt": "head"},
        }
    }
    for text in ("null", "mine.Sampler", "no_such", '{"class_path": "glyphs"}'):
        assert expand("--sampler", text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("csv", "[metadist.loggers.CSVLogger]"),
        ("[csv, tensorboard]", "[metadist.loggers.CSVLogger, metadist.loggers.TensorBoardLogger]"),
        ("[csv,mine.Own]", "[metadist.loggers.CSVLogger, mine.Own]"),
        ("null", "null"),
        ('[{"class_path": "csv"}]', '[{"class_path": "csv"}]'),
    ],
)
def test_loggers_are_a_list_of_names(text, expected):
    assert expand_names(["--loggers", text]) == ["--loggers", expected]
    assert expand_names([f"--loggers={text}"]) == [f"--loggers={expected}"]


def test_loggers_in_a_file_are_names_or_classes_with_options():
    tree = {"loggers": ["csv", {"class_path": "wandb", "init_args": {"project": "csv"}}]}
    assert expand_tree(tree) == {
        "loggers": [
            "metadist.loggers.CSVLogger",
            {"class_path": "metadist.loggers.WandbLogger", "init_args": {"project": "csv"}},
        ]
    }
