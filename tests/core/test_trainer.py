"""`Trainer`: the loop one would write by hand, exact after every kind of interruption."""

from __future__ import annotations

import errno
import inspect
import re
import signal
import textwrap
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import metadist
from metadist import (
    CheckpointError,
    CheckpointStore,
    LocalExecutor,
    OuterOptimizer,
    Trainer,
    TrainingDiverged,
    evaluate,
    task_hypergradients,
)
from metadist.algorithms import ITD, Reptile
from metadist.compute import Compute
from metadist.executor import StepReport
from metadist.run import lock
from metadist.run.storage import Folder
from metadist.workload import default_tasks_per_lease
from tests.helpers import (
    ADAM,
    SGD,
    Images,
    Recording,
    Spoiled,
    assert_undisturbed,
    contents,
    curves,
    exact,
    exact_state,
    finish,
    images_of_conv4,
    interrupt_at,
    last_state,
    make_trainer,
    read_events,
    regression,
    start,
    store_of,
)

FAST = ITD(inner_steps=2, inner_lr=0.05)


RUNS: dict[str, dict[str, Any]] = {
    "MAML, SGD with momentum": {"outer_optimizer": SGD},
    "MAML, Adam": {"outer_optimizer": ADAM, "batch_size": 3},
    "Adam with a tuple": {"outer_optimizer": OuterOptimizer("adam", 0.01, {"betas": (0.8, 0.9)})},
    "learned rates": {"algorithm": ITD(inner_steps=2, inner_lr=0.05, learn_lr="per_tensor")},
    "Meta-SGD": {"algorithm": ITD(inner_steps=2, inner_lr=0.05, learn_lr="per_element")},
    "Reptile": {"algorithm": Reptile(inner_steps=2, inner_lr=0.05), "outer_optimizer": SGD},
    "MAML, Conv4": {**images_of_conv4("all"), "meta_batch_size": 2},
    "ANIL, Conv4": {**images_of_conv4("head"), "meta_batch_size": 2},
    "two tasks a lease": {"tasks_per_lease": 2},
}


@pytest.mark.parametrize("name", ["MAML, SGD with momentum", "Reptile", "ANIL, Conv4"])
def test_training_is_the_loop_that_one_would_write_by_hand(name):
    options = {"outer_optimizer": SGD, **RUNS[name], "tasks_per_lease": 1}
    trainer = make_trainer(**options)
    start = trainer.outer
    trainer.fit(3)

    x = torch.cat([leaf.flatten() for leaf in start.values()])
    optimizer = torch.optim.SGD([x], lr=SGD.lr, momentum=0.9)
    size = options.get("meta_batch_size", 4)
    for step in range(3):
        parts = x.split([leaf.numel() for leaf in start.values()])
        outer = {
            name: part.view(leaf.shape)
            for (name, leaf), part in zip(start.items(), parts, strict=True)
        }
        total = torch.zeros_like(x)
        for index in range(size * step, size * step + size):
            task = trainer.sampler.sample(index)
            images = task.support.tensors[0].dtype == torch.float64  # as a network wants them
            if images:
                task = metadist.task.to_device(task, "cpu", torch.float32)
            found = task_hypergradients(trainer.problem, trainer.algorithm, outer, [task])
            total += torch.cat([leaf.flatten() for leaf in found.total.values()])
        x.grad = total / size
        optimizer.step()
    flat = torch.cat([leaf.flatten() for leaf in trainer.outer.values()])
    assert torch.equal(flat, x)
    assert trainer.version == 3


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_training_in_parts_gives_the_bytes_of_training_in_one_go(options, tmp_path):
    whole = make_trainer(**options)
    assert whole.fit(6).num_steps == 6
    assert exact(whole.outer) != exact(make_trainer(**options).outer)

    parts = make_trainer(**options)
    size = options.get("meta_batch_size", 4)
    assert (parts.fit(2).num_tasks, parts.fit(6).num_tasks) == (2 * size, 4 * size)
    assert exact_state(parts) == exact_state(whole)

    make_trainer(**options, run_dir=tmp_path / "run").fit(4)
    resumed = make_trainer(**options, run_dir=tmp_path / "run")
    assert resumed.restore() == "step-00000004"
    resumed.fit(6)
    assert exact_state(resumed) == exact_state(whole)
    assert last_state(tmp_path / "run") == exact_state(whole)


class Dead(Recording):
    """Fails after a step, and has lost what it knew."""

    def last_state(self):
        raise OSError("and the state is gone")


def test_a_run_that_dies_before_its_first_steps_are_saved_goes_on_from_the_start(tmp_path, capsys):
    def die(report: StepReport) -> None:
        raise OSError(f"at step {report.step.version}")

    with pytest.raises(OSError, match="at step 1"):
        make_trainer(run_dir=tmp_path, executor=Dead(die), quiet=False).fit(4)
    assert "error, and no checkpoint could be written: and the state is gone" in (
        capsys.readouterr().err
    )
    resumed = make_trainer(run_dir=tmp_path, keep_checkpoints=1)
    assert resumed.restore() == "step-00000000"
    assert exact_state(resumed) == exact_state(make_trainer())
    resumed.fit(4)
    assert_undisturbed(resumed, 4)
    names = store_of(tmp_path).names()
    assert names == ["step-00000004"], "the start is removed like any other"
    written = [
        e["step"] for e in read_events(Folder(tmp_path)) if e["event"] == "checkpoint_written"
    ]
    assert written == [0, 4]


def test_a_run_folder_and_validation_change_no_byte_of_the_result(tmp_path):
    plain = make_trainer()
    plain.fit(5)
    watched = make_trainer(
        run_dir=tmp_path, val_sampler=curves("val"), val_every=2, val_tasks=2, log_every=1
    )
    watched.fit(5)
    assert exact_state(watched) == exact_state(plain)


def test_training_that_is_done_is_not_repeated():
    trainer = make_trainer()
    trainer.fit(3)
    before = exact_state(trainer)
    assert trainer.fit(3).num_tasks == 0
    assert exact_state(trainer) == before


SCRIPT = """
import sys
from tests.helpers import make_trainer
trainer = make_trainer(run_dir=sys.argv[1], checkpoint_every=5, log_every=1, quiet=False)
trainer.fit(60)
"""


def test_a_run_that_was_killed_is_resumed_to_the_bytes_of_an_undisturbed_one(tmp_path):
    folder = tmp_path / "run"
    root = Path(__file__).resolve().parents[2]
    process = start(["-c", SCRIPT, folder], tmp_path, PYTHONPATH=str(root))
    assert process.stderr is not None
    while not process.stderr.readline().startswith("step 12/"):
        assert process.poll() is None
    process.kill()
    assert finish(process).code == -signal.SIGKILL

    resumed = make_trainer(run_dir=folder)
    resumed.restore()
    # The checkpoint of step 5 was complete before that of step 10 began; this one may not be.
    assert 5 <= resumed.version < 60
    resumed.fit(60)
    assert_undisturbed(resumed, 60)


@pytest.mark.parametrize("step", [1, 3])
def test_an_interruption_is_raised_again_after_a_checkpoint_was_written(tmp_path, capsys, step):
    trainer = make_trainer(run_dir=tmp_path, executor=Recording(interrupt_at(step)), quiet=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(5)
    name = f"step-{step:08d}"
    assert f"interrupted at step {step}, saved {name}" in capsys.readouterr().err
    assert (trainer.version, store_of(tmp_path).names()) == (
        step,
        ["step-00000000", name],
    )
    resumed = make_trainer(run_dir=tmp_path)
    resumed.restore()
    resumed.fit(5)
    assert_undisturbed(resumed, 5)


def test_without_a_run_folder_the_interrupted_trainer_goes_on_by_itself(capsys):
    trainer = make_trainer(executor=Recording(interrupt_at(2)), quiet=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(5)
    assert "interrupted at step 2\n" in capsys.readouterr().err
    trainer.fit(5)
    assert_undisturbed(trainer, 5)


def test_an_interruption_has_no_score_of_an_earlier_validation(tmp_path):
    trainer = make_trainer(
        run_dir=tmp_path,
        executor=Recording(interrupt_at(3)),
        val_sampler=curves("val"),
        val_every=2,
        val_tasks=2,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(5)
    store = store_of(tmp_path)
    assert store.load("step-00000002")[1].score is not None
    assert store.load("step-00000003")[1].score is None
    assert store.best() == "step-00000002"


class Slow(LocalExecutor):
    """Is interrupted before it is ready."""

    def start(self, *arguments):
        raise KeyboardInterrupt


def test_an_interruption_before_the_first_step_leaves_nothing(tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", executor=Slow())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(5)
    assert not list(tmp_path.iterdir()) and not trainer.has_started


def test_too_many_tasks_without_a_hypergradient_end_the_run_with_their_ids(tmp_path):
    trainer = make_trainer(
        sampler=Spoiled(curves(), broken=range(6, 99)),
        max_dropped=5,
        run_dir=tmp_path,
        checkpoint_every=1,
    )
    with pytest.raises(
        TrainingDiverged,
        match=r"the last 6 tasks in a row had no finite hypergradient \(ids 6, 7, 8, 9, 10, 11 "
        r"\.\.\.\), max_dropped=5: try a smaller inner_lr or outer lr, or clip_norm",
    ):
        trainer.fit(9)
    assert store_of(tmp_path).load()[0] == "step-00000002"


def test_dropped_tasks_are_counted_and_left_out():
    executor = Recording()
    trainer = make_trainer(
        sampler=Spoiled(curves(), broken=(2, 4, 5, 6, 7, 11)),
        executor=executor,
        max_dropped=5,
        tasks_per_lease=1,
    )
    result = trainer.fit(3)
    assert (result.num_tasks, result.num_dropped) == (6, 6)
    dropped = [[i for r in report.results for i in r.dropped] for report in executor.reports]
    assert dropped == [[2], [4, 5, 6, 7], [11]]
    assert executor.reports[1].step.hypergradient_norm == 0
    assert all(leaf.isfinite().all() for leaf in trainer.outer.values())


def test_the_best_checkpoint_is_that_of_the_best_validation(tmp_path):
    trainer = make_trainer(
        run_dir=tmp_path,
        val_sampler=curves("val"),
        val_every=2,
        val_tasks=4,
        keep_checkpoints=9,
        outer_optimizer=OuterOptimizer("sgd", lr=0.3),
        eval_inner_steps=3,
    )
    result = trainer.fit(9)
    scores: dict[str, Any] = {}
    store = store_of(tmp_path)
    start, *validated = store.names()
    assert (start, store.load(start)[1].score) == ("step-00000000", None)
    for name in validated:
        loaded = store.load(name)[1]
        scores[name] = loaded.score
        again = evaluate(
            trainer.problem,
            curves("val"),
            trainer.algorithm,
            loaded.state.outer,
            4,
            inner_steps=3,
            compute=Compute(seed=3),
        )
        assert loaded.score == again.score == -again.metrics["query_loss"].mean
    assert [int(name[5:]) for name in scores] == [2, 4, 6, 8, 9]
    assert result.best == max(scores, key=scores.__getitem__) == trainer.restore("best")
    assert f"step-{trainer.version:08d}" == result.best


@pytest.mark.parametrize(
    ("broken", "scored"), [((13,), True), (range(8, 14), True), (range(14), False)]
)
def test_validation_tasks_that_diverge_do_not_end_the_run(tmp_path, capsys, broken, scored):
    sampler = Spoiled(curves("val"), broken=())
    trainer = make_trainer(
        run_dir=tmp_path,
        val_sampler=sampler,
        val_every=2,
        val_tasks=14,
        quiet=False,
    )
    sampler.broken = broken  # those at the front have passed the checks
    result = trainer.fit(3)
    plain = make_trainer()
    plain.fit(3)
    assert exact_state(trainer) == exact_state(plain)
    assert (result.best is not None) == scored
    name = "validation_dropped" if scored else "validation_failed"
    found = [event for event in read_events(Folder(tmp_path)) if event["event"] == name]
    assert [event["step"] for event in found] == [2, 3]
    said = "tasks where it is not finite" if scored else "validation without a score"
    assert capsys.readouterr().err.count(said) == 2


def test_without_validation_there_is_no_best(tmp_path):
    trainer = make_trainer(run_dir=tmp_path)
    assert trainer.fit(2).best is None
    with pytest.raises(CheckpointError, match="got 'best': none was validated"):
        trainer.restore("best")


def test_checkpoints_come_at_their_steps_and_the_newest_stay(tmp_path):
    make_trainer(run_dir=tmp_path, checkpoint_every=2, keep_checkpoints=2).fit(7)
    assert store_of(tmp_path).names() == [
        "step-00000006",
        "step-00000007",
    ]


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    make_trainer(run_dir=tmp_path, checkpoint_every=2).fit(5)
    newest = tmp_path / "checkpoints" / "step-00000005"
    (newest / "tensors.safetensors").write_bytes(b"")
    trainer = make_trainer(run_dir=tmp_path)
    assert trainer.restore() == "step-00000004"
    assert list(trainer.skipped) == ["step-00000005"]
    trainer.fit(6)
    assert_undisturbed(trainer, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, r"seed must be 3 as in checkpoint .*step-00000002, got 4: start a new run"),
        ({"tasks_per_lease": 2}, r"tasks_per_lease must be 4 as in checkpoint .*, got 2"),
        ({"chunk_size": 3}, r"chunk_size must be 4 as in checkpoint .*, got 3"),
        ({"vectorize": False}, r"chunk_size must be 4 as in checkpoint .*, got 1"),
        ({"outer_optimizer": SGD}, r"outer_optimizer.name must be adam as in .*, got sgd: start"),
        (
            {"outer_optimizer": OuterOptimizer("adam", lr=0.02)},
            r"outer_optimizer.lr must be 0.01 as in .*, got 0.02: start",
        ),
        (
            {"problem": regression(metadist.models.MLP(hidden=(9,)))},
            r"is of another model: 'features.0.weight' must be float32 of shape \(9, 1\) as in "
            r"the problem, got float32 of shape \(8, 1\); give the problem and algorithm it was",
        ),
        (
            {"algorithm": ITD(learn_lr="per_tensor")},
            r"is of another model: 'algorithm.inner_lr.features.0.weight' must be float32 of "
            r"shape \(\) as in the problem, got absent",
        ),
    ],
)
def test_what_must_not_change_within_a_run_is_refused(tmp_path, changes, message):
    make_trainer(run_dir=tmp_path).fit(2)
    before = contents(tmp_path)
    trainer = make_trainer(run_dir=tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        trainer.restore()
    assert trainer.version == 0 and contents(tmp_path) == before


def test_what_may_change_within_a_run_is_accepted(tmp_path):
    make_trainer(run_dir=tmp_path).fit(2)
    trainer = make_trainer(run_dir=tmp_path, checkpoint_every=1, val_sampler=curves("val"))
    trainer.restore()
    assert trainer.fit(3).best == "step-00000003"


REFUSED = [
    ({"checkpoint_every": 0}, "checkpoint_every must be >= 1 or None, got 0"),
    ({"checkpoint_every_s": 0.0}, "checkpoint_every_s must be > 0 and finite or None, got 0.0"),
    ({"keep_every": 0}, "keep_every must be >= 1 or None, got 0"),
    ({"keep_checkpoints": 0}, "keep_checkpoints must be >= 1, got 0"),
    ({"log_every": 0}, "log_every must be >= 1, got 0"),
    ({"max_dropped": 0}, "max_dropped must be >= 1, got 0"),
    ({"val_every": 5}, "val_every must be None without a val_sampler, got 5"),
    ({"val_sampler": curves("val"), "val_every": 0}, "val_every must be >= 1 or None, got 0"),
    ({"val_sampler": curves("val"), "val_tasks": 1}, "val_tasks must be >= 2, got 1"),
    ({"eval_inner_steps": 0}, "inner_steps must be >= 1, got 0"),
    ({"meta_batch_size": 0}, "meta_batch_size must be >= 1, got 0"),
    ({"tasks_per_lease": 0}, "tasks_per_lease must be >= 1, got 0"),
    (
        {"tasks_per_lease": 3},
        r"meta_batch_size must be a multiple of tasks_per_lease \(3\), got 4",
    ),
    ({"num_threads": 0}, "num_threads must be >= 1 or None, got 0"),
    ({"sampler": object()}, r"it must have a method sample\(index\) -> Task, got object"),
    (
        {"sampler": Images},
        r"it must be an object, got the class Images: make one, Images\(\.\.\.\)",
    ),
    (
        {"algorithm": ITD},
        r"algorithm must be an object, got the class ITD: make one, ITD\(\.\.\.\)",
    ),
    ({"problem": object()}, "problem must have the methods init_outer, .* got object without"),
    (
        {"problem": metadist.models.MLP()},
        r"got MLP without .*: give it to a problem, such as FewShotPro",
    ),
    (
        {"algorithm": object()},
        "algorithm must have the methods init, estimate, adapt, got object without init, estimate",
    ),
    (
        {"val_sampler": Images()},
        r"inner_loss must be computable on task 0 of val_sampler, whose tensors have shapes",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_errors_name_field_rule_and_value_and_nothing_is_left(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(run_dir=tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


def test_a_number_of_steps_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        make_trainer(run_dir=tmp_path / "run").fit(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "left",
    [
        {"lock.json": ""},
        {"lock.json": "", ".config.yaml.17.part": "par"},
        {"config.yaml": "a: 1\n"},
        {"config.yaml": "other", "events.jsonl": "", "tensorboard/events": ""},
        {"config.yaml": "a: 1\n", "checkpoints/step-00000000/tensors.safetensors": "half"},
    ],
    ids=lambda left: " ".join(left),
)
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(
    tmp_path, left, monkeypatch
):
    monkeypatch.setattr(lock, "SILENT_S", 0.1)
    for name, text in left.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    trainer = make_trainer(run_dir=tmp_path, config="a: 1\n")
    trainer.fit(2)
    assert store_of(tmp_path).load()[0] == "step-00000002"
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


@pytest.mark.parametrize(
    "left",
    [
        {"notes.txt": "mine"},
        {"config.yaml": "mine"},
        {"config.yaml": "a: 1\n", "notes.txt": ""},
        {"checkpoints/step-00000000/manifest.json": "damaged"},
        {"result.json": ""},
    ],
    ids=lambda left: " ".join(left),
)
def test_anything_else_is_kept_from_a_new_run(tmp_path, left):
    for name, text in left.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"run_dir must be a new or empty folder, got '.*', which holds files: choose "
        r"another, or continue that run \(metadist resume, --if_exists continue, Trainer.restore\)",
    ):
        make_trainer(run_dir=tmp_path, config="a: 1\n").fit(2)
    assert contents(tmp_path) == before


def test_going_back_moves_the_abandoned_branch_aside_and_names_it(tmp_path, capsys):
    def trainer(**options: Any) -> Trainer:
        return make_trainer(
            run_dir=tmp_path, checkpoint_every=2, keep_checkpoints=9, tasks_per_lease=1, **options
        )

    old = trainer()
    old.fit(8)
    new = trainer(meta_batch_size=8, quiet=False)
    new.restore("step-00000004")
    with pytest.raises(KeyboardInterrupt):
        new.fit(8, interrupt_at(5))
    store = store_of(tmp_path)
    moved = ["abandoned-1/step-00000008", "abandoned-1/step-00000006"]
    assert f"of a branch that is abandoned: {', '.join(moved)}" in capsys.readouterr().err
    events = read_events(Folder(tmp_path))
    assert [e["checkpoints"] for e in events if e["event"] == "branch_abandoned"] == [moved]
    assert store.load()[0] == "step-00000005", "and not the newest of the old branch"
    aside = CheckpointStore(str(tmp_path / "checkpoints" / "abandoned-1"))
    assert exact(aside.load()[1].state.outer) == exact(old.outer)

    again = trainer(meta_batch_size=8)
    again.restore()
    again.fit(8)
    assert aside.names() == ["step-00000006", "step-00000008"], "nothing is abandoned twice"
    assert exact(store.load("step-00000008")[1].state.outer) == exact(again.outer)
    assert exact(again.outer) != exact(old.outer)


@pytest.mark.parametrize("val_every", [None, 2, 3])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_validation_that_was_interrupted_is_made_up_for(tmp_path, val_every, step, monkeypatch):
    def trainer(name: str) -> Trainer:
        return make_trainer(
            run_dir=tmp_path / name,
            val_sampler=curves("val"),
            val_every=val_every,
            val_tasks=2,
            keep_checkpoints=9,
            checkpoint_every=1,
        )

    whole = trainer("whole").fit(4)
    broken = trainer("broken")
    test = broken.test

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if broken.version == step:
            raise KeyboardInterrupt
        return test(*arguments, **options)

    monkeypatch.setattr(broken, "test", interrupted)
    with suppress(KeyboardInterrupt):
        broken.fit(4)
    resumed = trainer("broken")
    resumed.restore()
    assert resumed.fit(4).best == whole.best
    scores = []
    for name in ("whole", "broken"):
        store = store_of(tmp_path / name)
        scores.append({each: store.load(each)[1].score for each in store.names()})
    assert scores[0] == scores[1]


def test_checkpoints_by_time_and_those_that_stay_for_good(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def on_step(report: StepReport) -> bool:
        nonlocal now
        now += 1.0
        return True

    make_trainer(
        run_dir=tmp_path,
        checkpoint_every=None,
        checkpoint_every_s=2.5,
        keep_checkpoints=1,
        keep_every=4,
    ).fit(13, on_step)
    written = [e["step"] for e in read_events(Folder(tmp_path)) if e["event"].endswith("written")]
    assert written == [0, 3, 4, 7, 8, 11, 12, 13]
    assert store_of(tmp_path).names() == [f"step-{step:08d}" for step in (4, 8, 12, 13)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("gone", ["folder", "full disk"])
def test_training_continues_without_curves(tmp_path, gone, capsys, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path, checkpoint_every=2, log_every=1, quiet=False)

    def on_step(report: StepReport) -> bool:
        if report.step.version == 2 and gone == "folder":
            # Not removed file by file: its writer may make another one meanwhile.
            (tmp_path / "tensorboard").rename(tmp_path / "elsewhere")
            (tmp_path / "tensorboard").write_text("in the way")
        return True

    if gone == "full disk":

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(SummaryWriter, "add_scalar", full)
        monkeypatch.setattr("metadist.run.events._append", full)
    assert trainer.fit(8, on_step).num_steps == 8
    assert capsys.readouterr().err.count("TensorBoard events are missing from here") == 1
    assert_undisturbed(trainer, 8)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_run_folder_below_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"run_dir must be a folder that can be written to, got "):
        make_trainer(run_dir=tmp_path / "file" / below)
    assert list(contents(tmp_path)) == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder closed to everybody")
@pytest.mark.parametrize("folder", ["/proc/run", "/proc/a/b/c"])
def test_a_run_folder_that_cannot_be_written_to_is_refused(folder):
    with pytest.raises(
        ValueError, match=rf"run_dir must be a folder that can be written to, got '{folder}': .*; "
    ):
        make_trainer(run_dir=folder)


def test_restoring_needs_a_run_folder():
    with pytest.raises(ValueError, match="restore needs a run_dir, got None"):
        make_trainer().restore()
    assert make_trainer().skipped == {}


@pytest.mark.parametrize(
    ("meta_batch_size", "expected"),
    [
        *((1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 2), (12, 3), (16, 4)),
        *((18, 3), (20, 5), (25, 5), (31, 1), (32, 8)),
    ],
)
def test_a_meta_batch_is_cut_into_at_least_four_equal_leases(meta_batch_size, expected):
    assert default_tasks_per_lease(meta_batch_size) == expected
    assert meta_batch_size % expected == 0


@pytest.mark.parametrize(
    ("meta_batch_size", "chunk", "expected"),
    [(25, 1000, 25), (25, 24, 5), (25, 4, 5), (16, 12, 8), (31, 31, 31), (31, 30, 1), (2, 1, 1)],
)
def test_where_one_process_computes_a_lease_takes_what_goes_together(
    meta_batch_size, chunk, expected
):
    assert default_tasks_per_lease(meta_batch_size, chunk) == expected


class Sharing(Recording):
    shares_leases = True


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (25, 25)),
        ({"executor": Sharing()}, (5, 5)),
        ({"chunk_size": 7}, (5, 5)),
        ({"tasks_per_lease": 25, "chunk_size": 7}, (25, 7)),
        ({"vectorize": False}, (5, 1)),
        ({"problem": regression(metadist.models.MLP(hidden=(500, 500)))}, (5, 1)),
    ],
)
def test_leases_and_chunks_follow_from_the_size_of_a_task(options, expected):
    trainer = make_trainer(meta_batch_size=25, **options)
    settings = trainer.settings()
    assert (settings["tasks_per_lease"], settings["chunk_size"]) == expected


class OnGPUs(Recording):
    """Several who would have a GPU each."""

    shares_leases = True

    def __init__(self, num_workers):
        super().__init__()
        self.num_workers = num_workers

    def num_on_gpus(self, compute):
        return self.num_workers


@pytest.mark.parametrize(
    ("num_workers", "expected"), [(1, 24), (2, 12), (5, 4), (7, 3), (24, 1), (99, 1)]
)
def test_each_of_those_on_a_gpu_gets_a_lease_of_a_step(num_workers, expected, capsys):
    trainer = make_trainer(meta_batch_size=24, executor=OnGPUs(num_workers), quiet=False)
    assert trainer.workload.tasks_per_lease == expected
    trainer.fit(1)
    said = f"tasks_per_lease={expected}, for {num_workers} on GPUs who share the 24 tasks of a step"
    assert said in " ".join(capsys.readouterr().err.split())
    given = make_trainer(meta_batch_size=24, executor=OnGPUs(num_workers), tasks_per_lease=6)
    assert given.workload.tasks_per_lease == 6


def test_whoever_asks_for_a_gpu_is_taken_to_have_one():
    executor = LocalExecutor()
    assert executor.num_on_gpus(Compute(device="cuda")) == 1
    assert executor.num_on_gpus(Compute(device="cpu")) == 0
    assert executor.num_on_gpus(Compute(device="auto")) == int(torch.cuda.is_available())


@pytest.mark.parametrize(
    "first", [{}, {"tasks_per_lease": 2}, {"tasks_per_lease": 4, "chunk_size": 3}]
)
def test_a_resumed_run_cuts_leases_and_chunks_as_before(first, tmp_path):
    whole = make_trainer(meta_batch_size=8, **first)
    whole.fit(4)
    make_trainer(meta_batch_size=8, run_dir=tmp_path, **first).fit(2)
    for executor in (None, Sharing()):
        trainer = make_trainer(meta_batch_size=8, run_dir=tmp_path, executor=executor)
        trainer.restore()
        trainer.fit(3 if executor is None else 4)
    assert exact_state(trainer) == exact_state(whole)
    assert trainer.workload.tasks_per_lease == whole.workload.tasks_per_lease


class Failing(Exception):
    """Of a user's sampler."""


class Faulty:
    """Fails at a task of step 3."""

    def sample(self, index):
        if index == 9:
            raise Failing("no file for task 9")
        return curves().sample(index)


def test_an_exception_of_the_users_code_comes_through_as_it_is(tmp_path):
    trainer = make_trainer(sampler=Faulty(), run_dir=tmp_path, checkpoint_every=1)
    with pytest.raises(Failing, match="no file for task 9"):
        trainer.fit(5)
    assert trainer.has_started
    assert store_of(tmp_path).load()[0] == "step-00000002"


class Stopped(BaseException):
    """Not even an Exception."""


WAYS_OUT = [SystemExit(0), Stopped(), MemoryError(), KeyboardInterrupt()]


@dataclass(frozen=True)
class Validation:
    """Tasks of which one raises an error of `WAYS_OUT`."""

    way: int

    def sample(self, index):
        if index == 7:
            raise WAYS_OUT[self.way]
        return curves("val").sample(index)


@pytest.mark.parametrize("way", range(len(WAYS_OUT)))
@pytest.mark.parametrize("place", ["on_step", "validation"])
def test_every_way_out_leaves_a_checkpoint_of_the_last_step(tmp_path, way, place):
    def on_step(report):
        if place == "on_step" and report.step.version == 3:
            raise WAYS_OUT[way]
        return True

    options = {"val_sampler": Validation(way), "val_every": 3, "val_tasks": 9}
    trainer = make_trainer(run_dir=tmp_path, **(options if place == "validation" else {}))
    with pytest.raises(type(WAYS_OUT[way])):
        trainer.fit(5, on_step)
    resumed = make_trainer(run_dir=tmp_path)
    assert (trainer.version, resumed.restore()) == (3, "step-00000003")
    resumed.fit(5)
    assert_undisturbed(resumed, 5)


def test_what_a_trainer_says_of_itself_runs():
    """The example in its docstring, with names for what it leaves out."""
    text = inspect.cleandoc(Trainer.__doc__ or "")
    (example,) = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)[:1]
    names = {
        "Trainer": lambda *arguments: Trainer(*arguments, quiet=True, meta_batch_size=4),
        "ITD": ITD,
        "evaluate": evaluate,
        "problem": regression(),
        "sampler": curves(),
        "test_sampler": curves("test"),
    }
    exec(textwrap.dedent(example).replace("1000", "2").replace("0.4", "0.05"), names)
    assert names["trainer"].version == 2  # type: ignore[attr-defined]
