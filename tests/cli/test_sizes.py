"""Sizes of models that are not given on the command line are those of the tasks."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
import yaml

from metadist import Batch, Task
from metadist.cli import train
from metadist.cli.sizes import sizes_of
from metadist.cli.workload import instantiate
from metadist.tasks import Glyphs
from tests.helpers import last_state
from tests.tasks.helpers import write_tree


def problem_of(options: str):
    parser = train.parser()
    config = parser.parse_args(shlex.split(options))
    return instantiate(config, parser).problem, config


@pytest.fixture
def images(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_tree(Path("images"), [f"class{i}" for i in range(15)], 4, "RGB", side=20)


def test_a_model_has_the_sizes_of_the_files(images):
    options = "--sampler image_folder --sampler.root images --sampler.n_way 3 --sampler.k_query 3"
    problem, config = problem_of(options)
    assert config.problem.init_args.model.init_args.as_dict() == {
        "n_way": 3,
        "in_channels": 3,
        "image_size": 20,
        "width": 64,
        "rematerialise": False,
        "batch_norm": "transductive",
    }
    assert problem._model.head.out_features == 3
    assert train.parser().dump(config, skip_unset=False)  # what a run folder keeps


def test_what_is_given_stays(images, tmp_path):
    Path("some.yaml").write_text("problem: {init_args: {model: {init_args: {in_channels: 3}}}}")
    options = "--config some.yaml --problem.model.n_way 7 --sampler image_folder "
    _, config = problem_of(options + "--sampler.root images --sampler.n_way 3 --sampler.k_query 3")
    sizes = config.problem.init_args.model.init_args
    assert (sizes.n_way, sizes.in_channels, sizes.image_size) == (7, 3, 20)


def test_sizes_have_their_defaults_on_a_stream_whose_classes_come_later():
    _, config = problem_of("--sampler split_glyphs --problem hyper_cleaning --problem.model linear")
    assert config.problem.init_args.num_examples == 5000
    assert config.problem.init_args.model.init_args.out_features == 10


@pytest.mark.parametrize(
    ("inputs", "targets", "expected"),
    [
        (torch.zeros(4, 1, 8, 6), torch.tensor([0, 1, 2, 1]), {"in_channels": 1, "n_way": 4}),
        (torch.zeros(4, 6), torch.zeros(4, 2), {"in_features": 6, "out_features": 2}),
        (torch.zeros(4), torch.zeros(4), {"num_examples": 4}),
    ],
)
def test_sizes_are_read_from_the_tensors(inputs, targets, expected):
    query = Batch.of(inputs[:1], targets[:1] + 3)
    found = sizes_of(Task(Batch.of(inputs, targets), query, 0))
    assert expected.items() <= found.items()
    assert ("image_size" in found) is False
    assert ("n_way" in found) is ("n_way" in expected)


def test_a_table_is_cleaned_from_the_command_line(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    rows = [f"{number % 7},{number % 5},{'ab'[number % 2]}\n" for number in range(20)]
    Path("noisy.csv").write_text("x,y,kind\n" + "".join(rows))
    Path("checked.csv").write_text("x,y,kind\n0.5,1,a\n1.5,3,b\n")
    options = "--sampler table --sampler.train noisy.csv --sampler.val checked.csv "
    options += "--sampler.label kind --problem hyper_cleaning --problem.model linear "
    options += "--algorithm lancbio --algorithm.inner_lr 0.5 --num_steps 2 --run_dir run"
    code, _, err = cli("train", *shlex.split(options))
    assert code == 0, err
    assert "HyperCleaning of LinearClassifier, by LancBiO: 20 numbers in x, 6 in y" in err
    written = Path("run/artifacts/step-00000002/weights.csv").read_text().splitlines()
    assert len(written) == 21


FOLDER = "--sampler image_folder --sampler.root images --sampler.n_way 3 --sampler.k_query 3"


def test_a_printed_config_has_the_sizes_of_the_tasks(cli, images):
    Path("mine.yaml").write_text(cli.good("train", *shlex.split(FOLDER), "--print_config"))
    printed = yaml.safe_load(Path("mine.yaml").read_text())["problem"]["init_args"]["model"]
    sizes = printed["init_args"]
    assert (sizes["n_way"], sizes["in_channels"], sizes["image_size"]) == (3, 3, 20)
    problem, _ = problem_of("--config mine.yaml")
    assert problem._model.head.out_features == 3
    short = yaml.safe_load(cli.good("train", *FOLDER.split(), "--print_config=skip_default"))
    assert short["problem"]["init_args"]["model"]["init_args"]["in_channels"] == 3
    assert "num_steps" not in short
    code, _, err = cli("train", *FOLDER.split(), "--print_config=everything")
    assert code == 2 and "print_config must be one of skip_default, skip_unset, got every" in err


def test_a_printed_config_leaves_sizes_out_where_the_data_is_elsewhere(cli, images):
    options = FOLDER.replace("images", "/nowhere/images") + " --problem.model.n_way 3"
    code, out, err = cli("train", *options.split(), "--print_config")
    assert code == 0
    sizes = yaml.safe_load(out)["problem"]["init_args"]["model"]["init_args"]
    assert sizes["n_way"] == 3 and not {"in_channels", "image_size"} & sizes.keys()
    left_out = "left out, since they follow from the tasks: problem.model.in_channels, "
    assert left_out + "problem.model.image_size (root must be" in err
    Path("mine.yaml").write_text(out.replace("/nowhere/images", "images"))
    _, config = problem_of("--config mine.yaml")
    assert config.problem.init_args.model.init_args.in_channels == 3


class CountedGlyphs:
    """Counts how often it is made."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self._glyphs = Glyphs(n_way=3, k_query=3)

    def sample(self, index: int) -> Task:
        return self._glyphs.sample(index)


def test_a_sampler_is_made_once(cli, here):
    options = "--sampler tests.cli.test_sizes.CountedGlyphs --problem.model.width 4 "
    options += "--algorithm.inner_steps 1 --meta_batch_size 2 --num_steps 1 "
    for command, times in (
        (f"train {options} --run_dir open", 1),
        (f"train {options} --problem.model.n_way 3 --problem.model.in_channels 1 "
         "--problem.model.image_size 28 --run_dir given", 1),
        ("resume open --num_steps 2", 1),
        ("evaluate open --num_tasks 2 --sampler glyphs --sampler.n_way 3", 0),
    ):  # fmt: skip
        CountedGlyphs.made = 0
        cli.good(*command.split())
        assert CountedGlyphs.made == times, command
        if command.startswith("train") and "given" in command:
            assert last_state(Path("given")) == last_state(Path("open"))


class Offline:
    """A sampler whose data is not at hand."""

    def __init__(self) -> None:
        raise ConnectionError("no network")

    def sample(self, index: int) -> Task:
        raise NotImplementedError


def test_a_config_is_printed_without_a_network(cli):
    code, out, err = cli("train", "--sampler", "tests.cli.test_sizes.Offline", "--print_config")
    assert code == 0 and "in_channels" not in out
    assert "left out, since they follow from the tasks: " in err and "(no network)" in err
