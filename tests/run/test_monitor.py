"""What a run tells while it goes on is what happened."""

from __future__ import annotations

import functools
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from metadist import LocalExecutor, OuterOptimizer, StepReport
from metadist.algorithms import ITD
from metadist.loggers import LoggedRun, TensorBoardLogger
from metadist.outer import LeaseResult, StepResult
from metadist.run.monitor import MAX_IMAGES, Monitor
from metadist.run.names import scalar_name
from metadist.run.progress import TerminalProgress
from metadist.task import Batch, Task
from tests.helpers import Images, Recording, Spoiled, curves, images_of_conv4, make_trainer

WARMING = OuterOptimizer("sgd", lr=0.1, warmup_steps=4)


def events(folder: Path) -> EventAccumulator:
    """All events of a run."""
    return EventAccumulator(
        str(folder), {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    ).Reload()


def opened(folder: Path) -> Monitor:
    run = LoggedRun(folder, str(folder), 0, {"seed": 1})
    return Monitor([TensorBoardLogger()], run)


def scalars(found: EventAccumulator) -> dict[str, dict[int, float]]:
    return {
        tag: {event.step: event.value for event in found.Scalars(tag)}
        for tag in found.Tags()["scalars"]
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(reports, events) of a classification in 5 steps, validated twice."""
    executor = Recording()
    folder = tmp_path_factory.mktemp("run") / "mine"
    trainer = make_trainer(
        **images_of_conv4(),
        val_sampler=Images(),
        val_every=2,
        val_tasks=3,
        outer_optimizer=WARMING,
        executor=executor,
        run_dir=folder,
        log_every=2,
    )
    trainer.fit(5)
    return trainer, executor.reports, events(folder / "tensorboard")


def approximately(values: dict[int, float]):
    return pytest.approx(values, rel=1e-6)  # events hold float32


def test_losses_and_accuracies_are_means_over_the_tasks_of_a_reporting_step(run):
    _, reports, found = run
    values = scalars(found)
    for name in (
        *("query_loss", "query_loss_before", "query_accuracy", "query_accuracy_before"),
        "support_loss",
    ):
        expected = {}
        for report in (reports[0], reports[1], reports[3]):
            total = sum(result.metrics[name] for result in report.results)
            expected[report.step.version] = total / 4
        assert values[scalar_name("train", name)] == approximately(expected)
    assert 0 < values["accuracy/train"][1] <= 1


def test_the_main_curves_stand_side_by_side(run):
    _, _, found = run
    (event,) = found.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    shown = {}
    for chart in category.chart:
        (pattern,) = chart.multiline.tag
        # As TensorBoard looks for them: from the beginning of a tag, not necessarily to its end.
        shown[chart.title] = {tag for tag in found.Tags()["scalars"] if re.match(pattern, tag)}
    assert shown == {
        "accuracy": {"accuracy/train", "accuracy/val"},
        "loss": {"loss/train", "loss/val"},
        "norm of the hypergradient": {"outer/hypergradient_norm"},
        "share of time in which workers wait": set(),  # of runs with workers
        "tasks per second": {"tasks/per_second"},
    }


def test_norm_and_rate_of_every_step_are_written(run):
    _, reports, found = run
    values = scalars(found)
    steps = [report.step for report in reports]
    assert values["outer/hypergradient_norm"] == approximately(
        {step.version: step.hypergradient_norm for step in steps}
    )
    assert values["outer/lr"] == approximately(
        dict(zip(range(1, 6), [0.025, 0.05, 0.075, 0.1, 0.1], strict=True))
    )


def test_validation_is_written_with_its_interval(run):
    trainer, _, found = run
    values = scalars(found)
    assert set(values["accuracy/val"]) == {2, 4, 5}
    last = trainer.test(Images(), 3).metrics["query_accuracy"]
    assert values["accuracy/val"][5] == pytest.approx(last.mean, rel=1e-6)
    assert values["width/accuracy/val"][5] == pytest.approx(last.half_width, rel=1e-6)


def test_sample_tasks_are_shown_as_pictures(run):
    _, _, found = run
    assert sorted(found.Tags()["images"]) == ["adaptation/query", "task/query", "task/support"]
    for name in ("task/support", "task/query"):
        (image,) = found.Images(name)
        # 6 pictures of 16 x 16 in 4 columns and 2 rows, a line of 1 pixel around each.
        assert (image.width, image.height, image.step) == (4 * 17 + 1, 2 * 17 + 1, 0)
        picture = Image.open(io.BytesIO(image.encoded_image_string))
        assert picture.size == (69, 35) and len(np.unique(np.asarray(picture))) > 50


def test_settings_are_kept_as_text_and_as_hyperparameters(run):
    trainer, _, found = run
    (text,) = found.Tensors("settings/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    for name, value in trainer.settings().items():
        assert f"| {name} | {value} |" in table
    assert trainer.settings()["batch norm"] == "transductive"
    assert trainer.settings()["outer lr"] == 0.1
    data = {
        tag: HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)
        for tag in found.PluginTagToContent("hparams")
    }
    start = data["_hparams_/session_start_info"].session_start_info
    assert start.hparams["algorithm"].string_value == repr(trainer.algorithm)
    assert start.hparams["meta_batch_size"].number_value == 4
    metrics = data["_hparams_/experiment"].experiment.metric_infos
    assert {info.name.tag for info in metrics} >= {"accuracy/test", "accuracy/val"}


def result(lease_id: int, num_tasks: int, metrics: dict[str, float], **changes: Any):
    found = LeaseResult(lease_id, 0, num_tasks, metrics=metrics, sampling_s=0.5, compute_s=1.5)
    return found._replace(**changes)


def report(version: int, results: list[LeaseResult], **changes):
    """A step by two workers that took 4 seconds, one of which waited for 3 of them."""
    step = StepResult(version, tuple(range(len(results))), (), (0, 2)[: len(results)], 1.5, 0.1)
    named = [item._replace(worker=f"worker-{n}") for n, item in enumerate(results)]
    fields: dict[str, Any] = {
        "step": step,
        "results": tuple(named),
        "seconds": 4.0,
        "waiting_s": 3.0,
        "num_workers": 2,
        "lost_workers": 0,
        "reissued": (),
    }
    return StepReport(**fields | changes)


LOSS = {"query_loss": 8.0}


@pytest.fixture
def cluster(tmp_path):
    """Events of three steps of two workers; the second step reports no losses."""
    monitor = opened(tmp_path)
    first = report(1, [result(0, 4, LOSS), result(1, 2, {"query_loss": 1.0})])
    assert first.metrics == {"query_loss": 1.5}
    monitor.step(first)
    second = report(2, [result(2, 4, {}), result(3, 4, {})])
    assert second.metrics == {}
    monitor.step(second)
    dropping = [result(4, 3, LOSS)._replace(dropped=(7, 9)), result(5, 4, LOSS)]
    monitor.step(report(3, dropping, lost_workers=1, reissued=(4, 5), num_workers=1))
    monitor.close()
    return events(tmp_path / "tensorboard")


def test_speeds_are_of_the_steps_since_they_were_last_written(cluster):
    values = scalars(cluster)
    assert values["tasks/per_second"] == approximately({1: 6 / 4, 3: 15 / 8})
    assert values["workers/tasks_per_second/worker-0"] == approximately({1: 4 / 4, 3: 7 / 8})
    assert values["workers/tasks_per_second/worker-1"] == approximately({1: 2 / 4, 3: 8 / 8})
    assert values["workers/waiting_share"] == approximately({1: 3 / (4 * 2), 3: 6 / 8})
    assert values["workers/number"] == {1: 2, 3: 1}


def test_staleness_is_written_as_a_mean_and_a_histogram(cluster):
    assert scalars(cluster)["workers/staleness_mean"] == approximately({1: 1.0, 3: 1.0})
    first, second = (event.histogram_value for event in cluster.Histograms("workers/staleness"))
    assert (first.num, first.min, first.max, first.sum) == (2, 0, 2, 2)
    assert (second.num, second.min, second.max, second.sum) == (4, 0, 2, 4)


def test_losses_of_workers_and_tasks_are_written_where_they_occur(cluster):
    values = scalars(cluster)
    assert values["tasks/dropped"] == {3: 2}
    assert values["workers/lost"] == {3: 1}
    assert values["workers/reissued_leases"] == {3: 2}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([], {}),
        ([result(0, 3, {})], {}),
        ([result(0, 3, {"a": 6.0}), result(1, 1, {"a": 2.0})], {"a": 2.0}),
        ([result(0, 3, {"a": 6.0}), result(1, 5, {})], {"a": 2.0}),  # of those that report
        ([result(0, 0, {"a": 0.0})], {}),  # all dropped
    ],
)
def test_means_are_over_the_tasks_that_reported(results, expected):
    assert report(1, results).metrics == expected


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 3, 8, 8), (10, 10)),
        ((200, 1, 8, 8), (10 * 9 + 1, 7 * 9 + 1)),  # the first 64 of them
        ((5, 1, 8, 6), (3 * 7 + 1, 2 * 9 + 1)),
    ],
)
def test_pictures_of_any_number_and_size_are_tiled(tmp_path, shape, size):
    monitor = opened(tmp_path)
    batch = Batch.of(torch.rand(shape), torch.zeros(len(torch.rand(shape))))
    monitor.task(Task(batch, batch, 0))
    monitor.close()
    (image,) = events(tmp_path / "tensorboard").Images("task/support")
    assert (image.width, image.height) == size
    assert MAX_IMAGES == 64


def test_tasks_that_are_no_pictures_are_not_shown(tmp_path):
    monitor = opened(tmp_path)
    monitor.task(curves().sample(0))
    monitor.task(Task(Batch.of(torch.rand(4, 5, 8, 8)), Batch.of(torch.rand(4, 8)), 0))
    monitor.close()
    assert events(tmp_path / "tensorboard").Tags()["images"] == []


def test_after_an_interruption_each_step_is_there_once_and_none_is_missing(tmp_path):
    def trainer(executor):
        return make_trainer(
            executor=executor,
            run_dir=tmp_path,
            val_sampler=curves("val"),
            val_every=2,
            val_tasks=2,
            checkpoint_every=2,
            log_every=1,
        )

    first = Recording()
    stopped = trainer(first)
    stopped.fit(5)
    # What a machine that died at step 5 leaves: a checkpoint of step 4 and events beyond.
    last = tmp_path / "checkpoints" / "step-00000005"
    (last / "manifest.json").unlink()
    second = Recording()
    resumed = trainer(second)
    assert resumed.restore() == "step-00000004"
    resumed.fit(7)
    values = scalars(events(tmp_path / "tensorboard"))
    reports = first.reports[:4] + second.reports
    assert [report.step.version for report in reports] == list(range(1, 8))
    assert values["outer/hypergradient_norm"] == approximately(
        {report.step.version: report.step.hypergradient_norm for report in reports}
    )
    assert list(values["loss/train"]) == list(range(1, 8))
    assert list(values["loss/val"]) == [2, 4, 6, 7]


# Progress


def lines(progress: TerminalProgress, capsys) -> list[str]:
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_where_there_is_no_terminal_progress_is_plain_lines(capsys):
    progress = TerminalProgress(5, lines_every=2)
    accuracy = {"query_loss": 0.51234, "query_accuracy": 0.75, "query_accuracy_before": 0.2}
    for version in range(1, 6):
        progress.step(report(version, [result(0, 1, accuracy if version == 3 else {})]))
    progress.say("saved [bold]as it is[/bold]")
    assert lines(progress, capsys) == [
        "step 2/5 workers 2 0.2 tasks/s",
        "step 4/5 loss 0.512 accuracy before 0.200 after 0.750 workers 2 0.2 tasks/s",
        "step 5/5 loss 0.512 accuracy before 0.200 after 0.750 workers 2 0.2 tasks/s",
        "saved [bold]as it is[/bold]",
    ]


def test_quiet_is_quiet(capsys):
    progress = TerminalProgress(1, 1, quiet=True)
    progress.step(report(1, [result(0, 1, LOSS)]))
    progress.say("hello")
    assert lines(progress, capsys) == []


def test_a_trainer_tells_of_its_steps_on_the_error_stream(capsys):
    make_trainer(quiet=False, log_every=2).fit(4)
    out, err = capsys.readouterr()
    assert out == ""
    steps = r"(step [24]/4 loss \d\.\d{3} workers 1 [\d.]+ tasks/s\n){2}"
    assert re.fullmatch(r".*, by ITD: \d+ numbers in x.*\n4 tasks a step on cpu: .*\n" + steps, err)


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    screen = io.StringIO()
    terminal = functools.partial(Console, file=screen, force_terminal=True, width=90)
    monkeypatch.setattr("metadist.run.progress.Console", lambda **options: terminal())
    progress = TerminalProgress(4, lines_every=1)
    for version in range(1, 5):
        progress.step(report(version, [result(0, 1, LOSS)]))
    progress.say("validated")
    progress.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "━" in text and "validated" in text
    assert "step 4/4" in text and "loss 8.000" in text
    assert "tasks/s" not in text


def test_dropped_tasks_are_not_in_the_means(tmp_path):
    executor = Recording()
    make_trainer(
        sampler=Spoiled(curves(), broken=(3,)),
        executor=executor,
        run_dir=tmp_path,
        algorithm=ITD(inner_steps=2, inner_lr=0.05),
    ).fit(1)
    values = scalars(events(tmp_path / "tensorboard"))
    assert values["tasks/dropped"] == {1: 1}
    total = sum(result.metrics.get("query_loss", 0) for result in executor.reports[0].results)
    assert values["loss/train"] == approximately({1: total / 3})


def test_the_executor_of_a_run_is_among_its_settings():
    settings = make_trainer(executor=LocalExecutor()).settings()
    assert (settings["executor"], settings["policy"], settings["device"]) == ("local", "bsp", "cpu")


def test_a_test_is_recorded_beside_the_training(run):
    trainer, _, _ = run
    result = trainer.test(Images(), 3)
    trainer.record("test", result)
    found = events(trainer.run_dir / "tensorboard")
    values = scalars(found)
    assert values["accuracy/test"] == approximately({5: result.metrics["query_accuracy"].mean})
    assert set(values["outer/lr"]) == {1, 2, 3, 4, 5}


def test_a_test_of_an_earlier_checkpoint_leaves_the_later_curves(tmp_path):
    trainer = make_trainer(run_dir=tmp_path, checkpoint_every=2, log_every=1)
    trainer.fit(4)
    trainer.restore("step-00000002")
    trainer.record("test", trainer.test(curves("test"), 2))
    values = scalars(events(tmp_path / "tensorboard"))
    assert set(values["loss/train"]) == {1, 2, 3, 4}
    assert set(values["loss/test"]) == {2}
