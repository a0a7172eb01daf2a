"""Short names: by one rule from what the packages export."""

from __future__ import annotations

import pytest

import metadist.cluster
import metadist.tasks
from metadist.algorithms import ALGORITHMS
from metadist.cli import names
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
    "problems": "few_shot hyper_cleaning lancbio_synthetic pbgd_toy text_regularisation",
    "models": "conv4 resnet12 mlp linear",
    "samplers": "glyphs sinusoid omniglot fc100 image_folder lancbio_data no_data",
    "executors": "local ray data_parallel",
    "policies": "bsp ssp asp buffered",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_its_classes_by_one_name_each(kind):
    found = named(kind)
    assert set(KNOWN[kind].split()) <= set(found)
    assert len(set(found.values())) == len(found)
    assert len({plain(name) for name in found}) == len(found)
    assert list(found) == sorted(found)


def test_algorithms_have_the_names_of_their_package():
    assert named("algorithms") == dict(sorted(ALGORITHMS.items()))


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


def test_an_exported_class_is_named_without_a_table(monkeypatch, cli):
    class MoonPhases:
        """Tasks of the moon."""

        def sample(self, index: int) -> None: ...

    monkeypatch.setattr(metadist.tasks, "MoonPhases", MoonPhases, raising=False)
    monkeypatch.setattr(metadist.tasks, "__all__", [*metadist.tasks.__all__, "MoonPhases"])
    names._named_in.cache_clear()
    try:
        assert expand("--sampler", "moon_phases") == "metadist.tasks.MoonPhases"
        assert "moon_phases Tasks of the moon." in flat(cli.good("list", "samplers"))
    finally:
        monkeypatch.undo()
        names._named_in.cache_clear()


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
