"""Bad input: refused with field, rule, value and way out; nothing is left behind."""

from __future__ import annotations

import re
import shutil
import sys
import uuid
from typing import Any

import pytest

from metadist.models import MLP
from tests.helpers import (
    CURVES,
    becomes,
    command,
    contents,
    finish,
    make_trainer,
    processes_with,
    regression,
    start,
    words,
)
from tests.tasks.helpers import write_tree

MINE = """
import torch
from metadist import Batch, Task
from metadist.tasks import Sinusoid

class Silent:
    pass

class Leaking(Sinusoid):
    def sample(self, index):
        task = super().sample(index)
        return Task(task.support, task.support, index)

class Labelled:
    def __init__(self, first: int = 0, query: int = 0):
        self.first, self.query = first, query
    def sample(self, index):
        random = torch.Generator().manual_seed(index)
        def batch(first):
            return Batch.of(torch.randn(4, 2, generator=random), torch.arange(4) % 2 + first)
        return Task(batch(self.first), batch(self.first + self.query), index)
"""

CLASSES = "train --problem.model mlp --problem.model.in_features 2 --problem.model.out_features 2"
PICTURES = "train --sampler image_folder --sampler.root pictures --sampler.image_size 16 "
RUN = "--run_dir run --num_steps 2"


def train(flags: str) -> list[str]:
    """`metadist train` on curves, changed by `flags`."""
    return ["train", *CURVES, *words(RUN), *words(flags)]


# What is typed, and what must be said: field, rule, value, way out.
REFUSED: dict[str, tuple[list[str], str]] = {
    "class path of no module": (
        words(f"train --sampler my_missing.Sampler {RUN}"),
        r"sampler must be a class path that can be imported, got my_missing.Sampler: No module "
        r"named 'my_missing'; put the module into /.* or PYTHONPATH\n`metadist train --help` shows",
    ),
    "class path of no class": (
        words(f"train --sampler mine.Sampler {RUN}"),
        r"sampler must be a class path that can be imported, got mine.Sampler: module",
    ),
    "sampler without sample": (
        words(f"train --sampler mine.Silent {RUN}"),
        r"sampler must name a class that has sample, got mine.Silent",
    ),
    "algorithm that is none": (
        train("--algorithm mine.Silent"),
        r"algorithm must name a subclass of Algorithm, got mine.Silent",
    ),
    "support and query overlap": (
        ["train", "--sampler", "mine.Leaking", *CURVES[2:], *words(RUN)],
        r"support and query must be disjoint, got 5 query examples that are in the support set, "
        r"such as 0 \(task 0\): draw both sets in one go without replacement, or pass",
    ),
    "labels do not begin at 0": (
        words(f"{CLASSES} --sampler mine.Labelled --sampler.first 1 {RUN}"),
        r"labels of support must be 0 .. N-1 with each present, got \[1, 2\] \(task 0\): number "
        r"the classes of each task anew",
    ),
    "labels of query unknown to support": (
        words(f"{CLASSES} --sampler mine.Labelled --sampler.query 5 {RUN}"),
        r"labels of query must occur in support, got \[5, 6\] besides \(task 0\)",
    ),
    "labels beyond the outputs": (
        words(f"{CLASSES[:-1]}1 --sampler mine.Labelled {RUN}"),
        r"inner_loss must be computable on task 0 of sampler, whose tensors have shapes .*, got "
        r"IndexError: Target 1 is out of bounds: the model has 1 outputs, and there are labels up ",
    ),
    "more ways than classes": (
        words(f"{PICTURES} --sampler.n_way 7 --sampler.k_query 1 {RUN}"),
        r"n_way must be <= the 6 classes of split 'train', got 7: lower n_way or give the split",
    ),
    "more ways than glyphs": (
        words(f"train --sampler glyphs --sampler.n_way 9999 {RUN}"),
        r"n_way must be <= .*, got 9999 .*: lower k_query, k_shot or n_way",
    ),
    "negative inner rate": (
        train("--algorithm.inner_lr -0.1"),
        r"inner_lr must be > 0 and finite, got -0.1",
    ),
    "negative outer rate": (
        train("--outer_optimizer.lr -0.5"),
        r"lr .*must be > 0.*, got -0.5",
    ),
    "unknown optimiser": (
        train("--outer_optimizer.name adem"),
        r"outer_optimizer.name must be one of 'sgd', 'adam', .*, got 'adem': did you mean 'adam'\?",
    ),
    "a test of one task": (
        train("--test_split test --test_tasks 1"),
        r"test_tasks must be >= 2 for an interval, got 1",
    ),
    "a test that does not fit": (
        words(f"{CLASSES} --sampler mine.Labelled {RUN} --test_sampler sinusoid"),
        r"inner_loss must be computable on task 0 of test_sampler",
    ),
    "two tests": (
        train("--test_split test --test_sampler sinusoid"),
        r"test_split must not be given beside test_sampler, got 'test'",
    ),
    "staleness with bsp": (
        train("--executor ray --executor.policy bsp --executor.policy.staleness 2"),
        r"executor.policy.staleness is no option of BSP, but of ssp",
    ),
    "more workers than leases": (
        train("--executor ray --executor.workers.num_workers 9"),
        r"num_workers must be <= 4 with policy='bsp', .*, got 9: .* lower num_workers",
    ),
    "no run folder": (
        ["train", *CURVES],
        r"run_dir must name a new folder, got none: pass --run_dir runs/NAME",
    ),
    "run folder that holds files": (
        train("--run_dir pictures"),
        r"run_dir must be a new or empty folder, got 'pictures', which holds files: choose another",
    ),
    "run folder below a file": (
        train("--run_dir mine.py/run"),
        r"run_dir must be a folder that can be written to, got 'mine.py/run': .*; choose another",
    ),
    "run that is none": (
        ["resume", "pictures"],
        r"run_dir must be a folder with a config.yaml, got 'pictures': give the run_dir",
    ),
    "no good checkpoint to resume": (
        ["resume", "damaged"],
        r"no good checkpoint in damaged/checkpoints\n  checkpoint .*step-00000002 is damaged: "
        r"tensors.safetensors must have \(bytes, SHA-256\) .*, got \(3, ",
    ),
    "damaged checkpoint by name": (
        ["evaluate", "damaged", "--checkpoint", "step-00000002"],
        r"checkpoint .*damaged/checkpoints/step-00000002 is damaged: tensors.safetensors must",
    ),
    "checkpoint of another model to resume": (
        ["resume", "other"],
        r"checkpoint other/checkpoints/step-00000002 is of another model: "
        r"'features.0.weight' must be float32 of shape \(8, 1\) as in the problem, got float32 of "
        r"shape \(5, 1\); give the problem and algorithm it was trained with",
    ),
    "checkpoint of another model to judge": (
        ["evaluate", "other"],
        r"checkpoint other/checkpoints/step-00000002 is of another model: 'features.0.weight'",
    ),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a module, pictures, a run without a good checkpoint and a mixed-up run."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "mine.py").write_text(MINE)
    write_tree(folder / "pictures", [f"class{i}" for i in range(9)], num_images=3)
    assert command("train", *CURVES, "--run_dir", folder / "damaged", "--num_steps", 2) == 0
    shutil.copytree(folder / "damaged", folder / "other")
    for tensors in (folder / "damaged").glob("checkpoints/*/tensors.safetensors"):
        tensors.write_text("???")
    shutil.rmtree(folder / "other" / "checkpoints")
    make_trainer(problem=regression(MLP(hidden=(5,))), run_dir=folder / "elsewhere").fit(2)
    (folder / "elsewhere" / "checkpoints").rename(folder / "other" / "checkpoints")
    shutil.rmtree(folder / "elsewhere")
    return folder


@pytest.fixture
def here(prepared, monkeypatch):
    """That folder, with the process in it."""
    monkeypatch.chdir(prepared)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield prepared
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_message_and_nothing_is_left(cli, here, name):
    arguments, message = REFUSED[name]
    before = contents(here)
    code, out, err = cli(*arguments)
    assert code == 2, out + err
    assert re.search(message, err), err
    assert err.startswith(f"metadist {arguments[0]}: error: ")
    assert "Traceback" not in out + err
    assert contents(here) == before


SCARCE = """
import sys, ray
from metadist.cli import main
arguments = sys.argv[1:]
while arguments:
    end = arguments.index("END")
    code = main(arguments[:end])
    print(f"code {code}", file=sys.stderr, flush=True)
    arguments = arguments[end + 1:]
    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False,
            object_store_memory=100 << 20, logging_level="ERROR",
        )
"""

UNAVAILABLE: dict[str, str] = {
    "--executor.address 127.0.0.1:1": (
        r"address must name a running Ray cluster, got '127.0.0.1:1': (.|\n)*Is it up(.|\n)*"
        r"RAY_AUTH_MODE=token"
    ),
    "--executor.workers.num_workers 2": (
        r"num_workers=2 must be free within start_timeout_s=1, got CPU: 2 needed "
        r"\(1 each\), 1 in the cluster, 1 free: lower num_workers, cpus_per_worker or"
    ),
    "--executor.workers.num_workers 2 --executor.workers.cpus_per_worker 999": (
        r"num_workers=2 must have nodes with CPU: 999 and GPU: 0 each, got nodes with CPU: 1 and "
        r"GPU: 0 .*lower cpus_per_worker or gpus_per_worker"
    ),
    "--executor.workers.num_workers 1 --executor.workers.gpus_per_worker 1": (
        r"num_workers=1 must have nodes with CPU: 1 and GPU: 1 each, got nodes with CPU: 1 and "
        r"GPU: 0 .*lower cpus_per_worker or gpus_per_worker"
    ),
    "--executor.workers.num_workers 1 --compute.device cuda": (
        r".*GPU: 1 each, got nodes with CPU: 1 and GPU: 0"
    ),
}


def test_workers_that_a_cluster_has_no_room_for_are_refused_in_time(tmp_path):
    """In one process: no cluster at first, then one with a single CPU."""
    arguments: list[Any] = []
    for flags in UNAVAILABLE:
        scarce = "--executor ray --executor.workers.start_timeout_s 1 " + flags
        arguments += [*train(scarce), "END"]
    mark = uuid.uuid4().hex
    process = start(["-c", SCARCE, *arguments], tmp_path, METADIST_TEST=mark)
    outcome = finish(process, timeout_s=400)
    assert outcome.code == 0, outcome.err
    said = outcome.err.split("code 1\n")
    assert len(said) == len(UNAVAILABLE) + 1 and "code" not in said[-1], outcome.err
    for message, text in zip(UNAVAILABLE.values(), said[:-1], strict=True):
        assert re.search("metadist train: failed: " + message, text), text
        assert "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir()] == [".home"]
    assert becomes(lambda: not processes_with(f"METADIST_TEST={mark}"))
