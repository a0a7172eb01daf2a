"""Small trainings, calls of the command line, and looks at folders and processes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from metadist import (
    CheckpointStore,
    LocalExecutor,
    OuterOptimizer,
    StepReport,
    Task,
    Trainer,
    trees,
)
from metadist.algorithm import Algorithm
from metadist.algorithms import ITD
from metadist.cli import main
from metadist.compute import Compute
from metadist.models import MLP, Conv4
from metadist.run.reading import Scalar, find_events, find_scalars
from metadist.run.storage import Folder
from metadist.task import to_device
from metadist.tasks import FewShotProblem, Sinusoid
from metadist.trees import Params, as_bytes
from tests.problems import generator, image_task

PLUGIN = Path(__file__).resolve().parent / "plugin"

SGD = OuterOptimizer("sgd", lr=0.05, options={"momentum": 0.9})
ADAM = OuterOptimizer("adam", lr=0.01, clip_norm=1.0, schedule="cosine", schedule_steps=30)


class Images:
    """Random tasks of classification of 16 x 16 pictures."""

    def __init__(self, n_way: int = 3, channels: int = 1) -> None:
        self.n_way = n_way
        self.channels = channels

    def sample(self, index: int) -> Task:
        return image_task(index, n_way=self.n_way, channels=self.channels)


class Spoiled:
    """The tasks of another sampler, those of `broken` with NaN in the support set."""

    def __init__(self, sampler: Any, broken: Sequence[int]) -> None:
        self.sampler = sampler
        self.broken = broken

    def sample(self, index: int) -> Task:
        task: Task = self.sampler.sample(index)
        if index in self.broken:
            task.support.tensors[-1].fill_(torch.nan)
        return task


class Recording(LocalExecutor):
    """Keeps the reports it gave; calls `after` with each before it is given."""

    def __init__(self, after: Callable[[StepReport], None] = lambda report: None) -> None:
        super().__init__()
        self.reports: list[StepReport] = []
        self._after = after

    def run(self, until_version: int) -> Iterator[StepReport]:
        for report in super().run(until_version):
            self.reports.append(report)
            self._after(report)
            yield report


def interrupt_at(step: int) -> Callable[[StepReport], None]:
    """For `Recording`: Ctrl-C after this outer step."""

    def after(report: StepReport) -> None:
        if report.step.version == step:
            raise KeyboardInterrupt

    return after


def curves(split: str = "train", **options: Any) -> Sinusoid:
    """Small regression tasks."""
    return Sinusoid(**{"k_shot": 5, "k_query": 5, "split": split, **options})


def small_mlp(seed: int = 0) -> MLP:
    """A network for `curves`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(hidden=(8,))


def small_conv4(seed: int = 0) -> Conv4:
    """A network for `Images`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Conv4(n_way=3, width=4, image_size=16)


def images_of_conv4(adapt: str = "head") -> dict[str, Any]:
    """For `make_trainer`: `Images` and their network."""
    return {"problem": FewShotProblem(small_conv4(), adapt=adapt), "sampler": Images()}


def regression(
    model: torch.nn.Module | None = None, adapt: str | Sequence[str] = "all"
) -> FewShotProblem:
    """A problem on `curves`."""
    return FewShotProblem(model or small_mlp(), adapt=adapt, loss="mse")


def exact_regression(
    algorithm: Algorithm, k: int = 8, num_tasks: int = 2, device: str = "cpu"
) -> tuple[FewShotProblem, Params, list[Task]]:
    """(problem, x, tasks) of a small network in float64, adapted as the algorithm can train it."""
    torch.manual_seed(0)
    adapt = "all" if algorithm.trains == "start" else "head"
    problem = FewShotProblem(MLP(1, 1, (4,)).double(), adapt, loss="mse", weight_decay=0.1)
    sampler = Sinusoid(k_shot=k, k_query=k)
    tasks = [to_device(sampler.sample(index), device, torch.float64) for index in range(num_tasks)]
    outer = {n: leaf.to(device) for n, leaf in problem.init_outer(generator(0)).items()}
    return problem, outer | algorithm.init_own(problem.init_inner(outer, tasks[0])), tasks


def make_trainer(**options: Any) -> Trainer:
    """A quiet trainer that takes milliseconds a step."""
    chosen: dict[str, Any] = {
        "problem": regression(),
        "sampler": curves(),
        "algorithm": ITD(inner_steps=2, inner_lr=0.05),
        "meta_batch_size": 4,
        "outer_optimizer": ADAM,
        "quiet": True,
        "seed": 3,
    }
    return Trainer(**with_compute(chosen | options, front=("batch_size", "seed")))


def with_compute(options: dict[str, Any], front: tuple[str, ...] = ()) -> dict[str, Any]:
    """`options` with the fields of `Compute` among them as one, but for those in `front`."""
    names = {each.name for each in fields(Compute)} - set(front)
    ours = {name: value for name, value in options.items() if name in names}
    rest = {name: value for name, value in options.items() if name not in names}
    return {"compute": Compute(**{"device": "cpu", **ours}), **rest}


@contextmanager
def fused() -> Iterator[None]:
    """Within the block a CPU asks for as few operations as a GPU is asked for."""
    trees.FUSED.add("cpu")
    try:
        yield
    finally:
        trees.FUSED.remove("cpu")


def fresh(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Standard normal float32 numbers."""
    return torch.randn(tuple(shape), generator=generator(seed))


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any dtype, NaN included."""
    return as_bytes(tensor).numpy().tobytes()


def exact(tree: Params) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Everything that can differ between two trees, order included."""
    return [(n, str(leaf.dtype), tuple(leaf.shape), raw(leaf)) for n, leaf in tree.items()]


def exact_state(trainer: Trainer) -> Any:
    """Everything in the state of a trainer that training goes on from."""
    state = trainer._state
    return exact(state.outer), exact(state.optimizer), state[2:]


def assert_undisturbed(trainer: Trainer, num_steps: int, **options: Any) -> None:
    """It has the bytes of a training of so many steps in one go."""
    whole = make_trainer(**options)
    whole.fit(num_steps)
    assert exact_state(trainer) == exact_state(whole)


def store_of(run_dir: Path) -> CheckpointStore:
    """The checkpoints of a run."""
    return CheckpointStore(str(run_dir / "checkpoints"))


def last_state(run_dir: Path) -> Any:
    """The same of the newest checkpoint of a run."""
    _, checkpoint = store_of(run_dir).load()
    state = checkpoint.state
    return exact(state.outer), exact(state.optimizer), state[2:]


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file below `folder` by its path; folders too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def read_events(folder: Folder) -> list[dict[str, Any]]:
    """The events of a run, oldest first."""
    return find_events(folder)[0]


def latest_scalars(folder: Folder) -> dict[str, Scalar]:
    """The newest value of every scalar in a folder of TensorBoard, by tag."""
    return find_scalars(folder)[0]


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def command(*arguments: str | Path | int) -> int:
    """The exit code of a command, called in this process."""
    path = list(sys.path)  # to which a command adds the current folder
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.path[:] = path


class CommandLine:
    """Calls the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path | int) -> Outcome:
        self._capsys.readouterr()
        code = command(*arguments)
        return Outcome(code, *self._capsys.readouterr())

    def good(self, *arguments: str | Path | int) -> str:
        """What a call prints that must end well."""
        code, out, err = self(*arguments)
        assert code == 0, out + err
        return out


def words(text: str) -> list[str]:
    """Arguments of a command."""
    return text.split()


CURVES = words(
    "--sampler sinusoid --sampler.k_shot 5 --sampler.k_query 5 --problem.model mlp "
    "--problem.model.hidden [8] --problem.loss mse --algorithm.inner_steps 2 "
    "--algorithm.inner_lr 0.05 --meta_batch_size 4 --outer_optimizer.lr 0.01 --quiet true"
)
"""Flags of a training that takes milliseconds a step."""


def environment(home: Path, **variables: str) -> dict[str, str]:
    """For a process with its own home and, if it starts one, its own Ray."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **known,
        "HOME": str(home),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def start(arguments: Sequence[str | Path], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """A Python process in a folder of its own; `variables` go into its environment."""
    home = cwd / ".home"
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(home, **variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 90) -> Outcome:
    """The end of a process that was started by `start`; kills it if it hangs."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"hangs after {timeout_s:g} s:\n{out}\n{err}") from None
    return Outcome(process.returncode, out, err)


def processes_with(variable: str) -> list[str]:
    """The command lines of the processes that have this `name=value` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            if variable.encode() in variables and folder.name != str(os.getpid()):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if line:  # a zombie has none
                    found.append(line)
        except OSError:  # it has ended
            continue
    return found


def becomes(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    """Whether `condition` comes true in time; asks again and again."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
