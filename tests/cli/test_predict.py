"""`metadist predict` and `metadist export`: own images through a trained run."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from metadist import Batch, CheckpointStore, predict
from metadist.algorithms import ITD
from metadist.models import Conv4
from metadist.tasks import FewShotProblem, ImageFolder
from tests.helpers import command, store_of, words

ITD_FLAGS = "--algorithm.inner_steps 3 --algorithm.inner_lr 0.2 --compute.device cpu"
MODEL = "--problem.model.width 4 --problem.model.image_size 16 --problem.model.n_way 3"


def draw(folder, level, count, seed=0):
    """Bright bars on a dark ground, at a height that is that of the class."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed + level)
    for number in range(count):
        pixels = random.integers(0, 60, (20, 20))
        pixels[3 * level : 3 * level + 3] += 180
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for level in range(6):
        draw(root / "data" / f"class{level}", level, 8)
    for name, level in (("high", 0), ("low", 5), ("middle", 3)):
        draw(root / "support" / name, level, 2, seed=50)
        draw(root / "query" / name, level, 4, seed=90)
    return root


@pytest.fixture(scope="module")
def few_shot(images, tmp_path_factory):
    """A short run on the folder, at 16 x 16 pixels, white on black turned round."""
    run = tmp_path_factory.mktemp("run") / "run"
    flags = (
        f"train --sampler image_folder --sampler.root {images / 'data'} --sampler.split all "
        "--sampler.n_way 3 --sampler.k_query 3 --sampler.image_size 16 --sampler.invert true "
        f"{MODEL} {ITD_FLAGS} --problem.adapt head --outer_optimizer.lr 0.01 "
        f"--num_steps 25 --meta_batch_size 4 --eval_inner_steps 6 --quiet true --run_dir {run}"
    )
    assert command(*words(flags)) == 0
    return run


def found():
    return list(csv.DictReader(Path("found.csv").read_text().splitlines()))


def refused(cli, *arguments):
    code, _, err = cli(*arguments)
    assert code == 2, err
    return err


def test_images_are_predicted_as_by_hand_and_mostly_right(cli, few_shot, images):
    flags = ("--support", images / "support", "--query", images / "query", "--device", "cpu")
    out = cli.good("predict", few_shot, *flags, "--output", "found.csv")
    rows = found()
    assert [row["file"] for row in rows] == [str(path) for path in sorted(images.glob("query/*/*"))]

    sampler = ImageFolder(
        images / "data", n_way=3, k_query=3, split="all", image_size=16, invert=True
    )
    sets = {}
    for part in ("support", "query"):
        own = ImageFolder(
            images / part, n_way=3, k_query=1, split="all", image_size=16, invert=True
        )
        pixels = torch.from_numpy(own.classes.images).float() / 255
        files = sorted(images.glob(f"{part}/*/*"))
        assert torch.equal(sampler.read_images(files), pixels)
        sets[part] = pixels, torch.arange(3).repeat_interleave(len(pixels) // 3)
    outer = store_of(few_shot).load()[1].state.outer
    problem = FewShotProblem(Conv4(3, 1, 4, 16), adapt="head")
    logits = predict(problem, ITD(6, 0.2), outer, Batch.of(*sets["support"]), sets["query"][0])
    shares, numbers = logits.softmax(1).max(1)
    names = ["high", "low", "middle"]
    assert [row["class"] for row in rows] == [names[number] for number in numbers]
    np.testing.assert_allclose(
        [float(row["probability"]) for row in rows], shares.numpy(), atol=1e-5
    )
    hits = int((numbers == sets["query"][1]).sum())
    assert hits >= 8
    assert f"accuracy {hits / 12:.4f} ({hits} of 12)" in out
    assert f"{rows[0]['file']}  {rows[0]['class']}  " in out


@pytest.mark.slow
def test_an_exported_program_needs_no_metadist(cli, few_shot, images):
    flags = ("--support", images / "support", "--device", "cpu")
    cli.good("export", few_shot, *flags, "--output", "model.pt2")
    program = (
        "import sys, torch; sys.modules['metadist'] = None\n"
        "notes = {'classes': ''}\n"
        "module = torch.export.load('model.pt2', extra_files=notes).module()\n"
        'assert notes[\'classes\'] == \'["high", "low", "middle"]\', notes\n'
        "x = torch.load('x.pt')\n"
        "torch.save(module(x), 'y.pt')"
    )
    sampler = ImageFolder(
        images / "data", n_way=3, k_query=3, split="all", image_size=16, invert=True
    )
    x = sampler.read_images(sorted(images.glob("query/*/*")))
    torch.save(x, "x.pt")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert not done.returncode, done.stderr.decode()
    cli.good(
        *("predict", few_shot, "--support", images / "support", "--query", images / "query"),
        *("--device", "cpu", "--output", "found.csv"),
    )
    rows = found()
    shares, numbers = torch.load("y.pt").detach().softmax(1).max(1)
    assert [row["class"] for row in rows] == [["high", "low", "middle"][n] for n in numbers]
    np.testing.assert_allclose(
        [float(row["probability"]) for row in rows], shares.numpy(), atol=1e-5
    )


def test_weights_are_exported_with_the_names_of_the_classes(cli, few_shot, images):
    flags = ("--support", images / "support", "--device", "cpu")
    out = cli.good("export", few_shot, *flags, "--output", "model.safetensors")
    assert f"adapted to high, low, middle of {images / 'support'}\n" in out
    with safe_open("model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["high", "low", "middle"]
        assert file.get_tensor("head.weight").shape == (3, 4)
    flags = ("--output", "model.safetensors", "--device", "cpu")
    out = cli.good("export", few_shot, *flags)
    assert "adapted to task 0 of the training; --task, --split or --support choose another" in out
    out = cli.good("export", few_shot, "--task", 4, "--split", "all", *flags)
    assert "adapted to task 4 of split 'all'\n" in out
    with safe_open("model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--query {}/nowhere --support {}/support", "query must be a folder"),
        ("--query {}/query", "support must be a folder with a folder of images for each class"),
        (
            "--query {}/query --support {}/data",
            "as many classes as the model has outputs, 3, got 6",
        ),
        ("--query {}/query --support {}/support/low", "support must hold a folder for each class"),
        ("--query {} --support {}/support", "query must hold images, got none in"),
    ],
)
def test_what_cannot_be_predicted_is_refused(cli, few_shot, images, flags, message):
    assert message in refused(cli, "predict", few_shot, *flags.replace("{}", str(images)).split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task 4 --support pictures", "task must not be given beside support, got 4"),
        ("--split test --support pictures", "split must not be given beside support, got 'test'"),
        ("--task -1", "task must be >= 0, got -1"),
    ],
)
def test_a_task_that_cannot_be_meant_is_refused(cli, few_shot, flags, message):
    assert message in refused(cli, "export", few_shot, *flags.split(), "--output", "model.pt2")


def test_other_outputs_and_other_runs_are_refused(cli, few_shot, run, images):
    assert "output must end in .pt2" in refused(cli, "export", few_shot, "--output", "model.onnx")
    message = refused(cli, "export", few_shot, "--output", "nowhere/model.pt2")
    assert "a folder that exists" in message
    message = refused(cli, "predict", run, "--query", images / "query")
    assert "sampler must read images" in message
    flags = ("--query", images / "query", "--output", "nowhere/found.csv")
    assert "a folder that exists" in refused(cli, "predict", few_shot, *flags)


def test_folders_that_are_no_classes_give_no_accuracy_and_say_so(cli, few_shot, images):
    flags = ("--support", images / "support", "--query", images / "data", "--device", "cpu")
    done = cli.good("predict", few_shot, *flags)
    assert "no accuracy: folders of --query that are no class: " in done


def test_a_run_on_one_task_predicts_with_what_it_has_kept(cli, images):
    flags = (
        "train --sampler corrupted_images --sampler.dataset digits --sampler.num_train 60 "
        "--sampler.num_val 60 --sampler.num_test 60 --problem hyper_cleaning "
        "--problem.num_examples 60 --problem.model linear_classifier "
        "--problem.model.in_features 64 --algorithm lancbio --algorithm.inner_steps 2 "
        "--algorithm.inner_lr 0.5 --num_steps 15 --run_dir run --compute.device cpu --quiet true"
    )
    cli.good(*words(flags))
    out = cli.good("export", "run", "--output", "model.safetensors", "--device", "cpu")
    assert out.endswith("adapted to task 0 of the training\n")
    export = ("export", "run", "--output", "x.pt2", "--task", 1)
    assert "task must be >= 0 and < the 1 tasks of the run's data, got 1" in refused(cli, *export)
    state = CheckpointStore("run/checkpoints").load()[1].state
    with safe_open("model.safetensors", "pt") as file:
        bias = file.get_tensor("head.bias")
    assert any(torch.equal(bias, part) for part in state.states[0].unfold(0, 10, 1))
    out = cli.good("predict", "run", "--query", images / "query" / "high", "--device", "cpu")
    assert len([line for line in out.splitlines() if ".png  " in line]) == 4
    message = refused(cli, "predict", "run", "--query", images / "query", "--support", images / "s")
    assert "support must not be given for HyperCleaning" in message
