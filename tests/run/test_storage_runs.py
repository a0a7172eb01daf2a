"""Run folders elsewhere: the same training, in memory and on an S3 server of this machine."""

from __future__ import annotations

import gc
import json
import logging
import os
import uuid
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metadist import CheckpointStore, StepReport
from metadist.run.storage import Folder
from tests import helpers
from tests.helpers import CURVES, Recording, contents, finish, make_trainer, start, store_of, words
from tests.run.storage_faults import Faults
from tests.run.test_checkpoint import everything

FILES = ["checkpoints", "config.yaml", "events.jsonl", "result.json", "tensorboard"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(params=["memory", "s3"])
def place(request):
    """A folder that does not exist yet, not on a disk."""
    if request.param == "s3":
        yield request.getfixturevalue("s3") + "/runs/mine"
        return
    name = uuid.uuid4().hex
    yield f"memory://{name}/runs/mine"
    Folder("memory://").remove(name)


def downloaded(uri: str, to: Path) -> Path:
    """A local copy of a folder."""
    folder = Folder(uri)
    for path in folder.fs.find(folder.root):
        target = to / str(path).removeprefix(f"{folder.root}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(folder.fs.cat_file(path))
    return to


def scalars(folder: Path | str) -> dict[str, dict[int, float]]:
    found = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    return {
        tag: {event.step: event.value for event in found.Scalars(tag)}
        for tag in found.Tags()["scalars"]
        if tag != "tasks/per_second"
    }


FLAGS = words("--checkpoint_every 2 --log_every 1 --val_split val --val_every 2 --val_tasks 3")


def test_every_command_works_on_a_run_folder_elsewhere(cli, place, here):
    test = words("--test_split test --test_tasks 5")
    out = cli.good("train", *CURVES, *FLAGS, *test, "--run_dir", place, "--num_steps", 4)
    cli.good("train", *CURVES, *FLAGS, *test, "--run_dir", "local", "--num_steps", 4)
    assert f"run folder: {place}\n" in out
    assert Folder(place).names() == FILES
    assert [path.name for path in here.iterdir()] == ["local"]
    copy = downloaded(place, here / "copy")

    mine, other = CheckpointStore(f"{place}/checkpoints"), CheckpointStore("local/checkpoints")
    assert mine.names() == other.names()
    for name in mine.names():
        assert everything(mine.load(name)[1]) == everything(other.load(name)[1])
    for file in ("config.yaml", "result.json"):
        pair = [yaml.safe_load((folder / file).read_text()) for folder in (copy, Path("local"))]
        for tree in pair:
            tree.pop("run_dir", None), tree.pop("seconds", None)
        assert pair[0] == pair[1]
    assert scalars(copy / "tensorboard") == scalars("local/tensorboard")
    assert "loss/test" in scalars(copy / "tensorboard")

    for run in (place, "local"):
        printed: list[str] = []
        for command in ("inspect", "evaluate --num_tasks 5", "resume", "resume --num_steps 6"):
            text = cli.good(*words(command), "--run_dir", run)
            printed.append(text)
        assert "nothing to do: 4 outer steps are taken" in printed[2]
    assert everything(mine.load()[1]) == everything(other.load()[1])
    assert mine.load()[0] == "step-00000006"
    again = downloaded(place, here / "again")
    assert scalars(again / "tensorboard") == scalars("local/tensorboard")
    assert set(scalars(again / "tensorboard")["outer/lr"]) == {1, 2, 3, 4, 5, 6}
    events = [json.loads(line) for line in (again / "events.jsonl").read_text().splitlines()]
    began = [event["step"] for event in events if event["event"] == "run_started"]
    assert began == [0, 4]
    # What is there already is not written to.
    code, _, err = cli("train", *CURVES, "--run_dir", place, "--num_steps", 1)
    assert (code, "run_dir must be a new or empty folder, got" in err) == (2, True)
    assert json.loads(Folder(place).read("result.json", 99_999))["num_steps"] == 6


def test_tensorboard_reads_the_run_folder_where_it_is(s3):
    make_trainer(run_dir=f"{s3}/run", log_every=1).fit(3)
    assert set(scalars(f"{s3}/run/tensorboard")["outer/lr"]) == {1, 2, 3}


def test_training_in_parts_gives_the_bytes_of_training_in_one_go(place, tmp_path):
    make_trainer(run_dir=place).fit(2)
    resumed = make_trainer(run_dir=place)
    assert resumed.restore() == "step-00000002"
    resumed.fit(4)
    make_trainer(run_dir=tmp_path / "whole").fit(4)
    whole = store_of(tmp_path / "whole")
    found = CheckpointStore(f"{place}/checkpoints").load()[1]
    assert everything(found) == everything(whole.load()[1])


def test_events_are_there_with_every_checkpoint(place, tmp_path):
    seen: list[set[int]] = []

    def look(report: StepReport) -> None:
        if report.step.version == 5:
            copy = downloaded(f"{place}/tensorboard", tmp_path / "copy")
            seen.append(set(scalars(copy)["outer/lr"]))

    make_trainer(executor=Recording(look), run_dir=place, checkpoint_every=2, log_every=1).fit(6)
    assert seen == [{1, 2, 3, 4}]


def test_events_that_cannot_be_copied_are_told_of_and_copied_later(place, caplog, tmp_path):
    trainer = make_trainer(run_dir=place)
    assert trainer._folder is not None
    with Faults(0, "time-out", dies=True).on(trainer._folder.folder):
        (tmp_path / "x").touch()
        assert trainer.run_dir is not None
        (trainer.run_dir / "notes").write_text("first")
        with caplog.at_level(logging.ERROR, "metadist.run.storage"):
            trainer._upload()
    assert "cannot copy notes to " in caplog.text
    assert Folder(place).names() == []
    trainer._upload()
    assert Folder(place).read("notes", 99) == b"first"


def test_the_local_copy_goes_with_the_trainer(place):
    trainer = make_trainer(run_dir=place)
    trainer.fit(1)
    folder = trainer.run_dir
    assert folder is not None and folder.is_dir()
    del trainer
    gc.collect()
    assert not folder.exists()


def test_a_bucket_that_is_not_there_is_refused_and_not_made(cli, s3):
    code, _, err = cli("train", *CURVES, "--run_dir", s3 + "-missing/run", "--num_steps", 1)
    assert code == 2
    assert "run_dir must be a folder that can be written to, got 's3://bucket-" in err
    assert "is not there or cannot be looked at; choose another" in err
    fs = Folder(s3).fs
    fs.invalidate_cache()
    assert not fs.exists(s3 + "-missing")
    assert Folder(s3).names() == []


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_run_that_is_not_there_is_refused(cli, place, command):
    code, _, err = cli(command, "--run_dir", place)
    assert code == 2
    assert f"run_dir must be a folder with a config.yaml, got '{place}': give the run_dir" in err


def test_a_server_that_cannot_be_reached_is_told_of(cli, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fs = type(Folder(s3).fs)
    fs.clear_instance_cache()
    monkeypatch.setattr(fs, "retries", 1)
    for command in ("train", "resume", "evaluate"):
        flags = CURVES if command == "train" else []
        code, out, err = cli(command, *flags, "--run_dir", f"{s3}/run")
        assert (code, "Traceback" in out + err) == (2, False)
        assert f"metadist {command}: error: " in err and "cannot be" in err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, and its config."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    assert helpers.command("train", *CURVES, "--run_dir", folder, "--num_steps", "2") == 0
    return folder, (folder / "config.yaml").read_text()


MALFORMED: dict[str, str | bytes] = {
    "empty": "",
    "a list": "[1, 2]",
    "a number": "7",
    "text": "hello",
    "no YAML": "a: [",
    "tabs": "a:\n\t- b",
    "control characters": "a: \x00",
    "no UTF-8": b"\xff\xfe\xfa",
    "two documents": "a: 1\n---\nb: 2",
    "an object of Python": "!!python/object/apply:os.system ['touch hacked']",
    "an object of Python inside": "sampler: !!python/object/apply:os.system ['touch hacked']",
    "a name of Python": "seed: !!python/name:os.system",
    "deep": "[" * 10_000,
    "deep mappings": "{a: " * 10_000,
    "holds itself": "sampler: &a\n  init_args: *a",
    "holds itself in a list": "sampler: &a [*a]",
    "huge by aliases": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n + 1}: &a{n + 1} {{p: *a{n}, q: *a{n}}}" for n in range(60)),
    "huge lists by aliases": "a0: &a0 [1]\n"
    + "\n".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]" for n in range(60)),
    "long": "a: " + "x" * (1 << 21),
    "unknown key": "surprise: 1",
    "another config": "config: /etc/passwd",
}


@pytest.mark.parametrize(
    ("key", "default"), [("seed", "0"), ("log_every", "10"), ("outer_optimizer.lr", "0.001")]
)
def test_null_is_no_value(cli, run, tmp_path, key, default):
    tree = {**yaml.safe_load(run[1]), "run_dir": str(tmp_path / "new")}
    *path, last = key.split(".")
    part = tree
    for name in path:
        part = part[name]
    part[last] = None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    code, out, err = cli("train", "--config", tmp_path / "config.yaml")
    assert code == 2, out + err
    assert f"{key} must be a value, got null: leave it out for {default}" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", MALFORMED)
def test_a_config_that_is_malformed_is_refused(cli, run, here, name):
    folder, text = run
    bad = MALFORMED[name]
    if name in ("unknown key", "another config"):
        bad = f"{text}{bad!s}\n"
    (folder / "config.yaml").write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    before = contents(folder)
    for command in ("resume", "evaluate"):
        code, out, err = cli(command, "--run_dir", folder)
        assert code == 2, out + err
        assert err.startswith(f"metadist {command}: error: config.yaml of run '{folder}' ")
        assert "Traceback" not in out + err and len(err) < 5_000
    assert contents(folder) == before
    assert not list(here.iterdir())


KEYS = ("sampler", "problem", "algorithm", "executor", "outer_optimizer", "num_steps", "seed",
        "meta_batch_size", "val_sampler", "test_tasks", "quiet", "eval_inner_steps")  # fmt: skip
leaves = st.none() | st.text(max_size=5) | st.sampled_from([{}, [], "os.system", "builtins.dict"])
wrong = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["class_path", "init_args", "model", "a b"]), inner)
    ),
    max_leaves=5,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(key=st.sampled_from(KEYS), value=wrong)
@example(key="seed", value=None)
def test_a_config_with_anything_in_any_place(cli, run, key, value):
    folder, text = run
    tree = yaml.safe_load(text)
    tree[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    before = contents(folder)
    code, out, err = cli("evaluate", "--run_dir", folder, "--num_tasks", 2)
    assert code in (0, 2), (code, err)
    assert "Traceback" not in out + err
    assert code == 0 or err.startswith("metadist evaluate: error: ")
    assert contents(folder) == before


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_config_with_any_edit(cli, run, data):
    folder, text = run
    first = data.draw(st.integers(0, len(text)))
    last = data.draw(st.integers(first, min(len(text), first + 20)))
    inserted = data.draw(st.text(max_size=6))
    raw = (text[:first] + inserted + text[last:]).encode(errors="surrogatepass")
    (folder / "config.yaml").write_bytes(raw)
    code, out, err = cli("evaluate", "--run_dir", folder, "--num_tasks", 2)
    assert "Traceback" not in out + err, err
    assert code in (0, 2), (code, err)


def test_inspect_runs_nothing_of_a_config(cli, run, here):
    folder, _ = run
    (here / "evil.py").write_text("open('hacked', 'w').close()\nclass Sampler:\n    pass")
    (folder / "config.yaml").write_text("sampler: evil.Sampler")
    assert "good" in cli.good("inspect", "--run_dir", folder)
    assert [path.name for path in here.iterdir()] == ["evil.py"]


@pytest.mark.slow
def test_no_secret_of_the_environment_is_kept_or_told(here):
    names = ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")
    secrets = {name: uuid.uuid4().hex for name in names}
    ray = words("--executor ray --executor.workers.num_workers 1")
    arguments = ["-m", "metadist", "train", *CURVES, *ray, *FLAGS, *words("--num_steps 2")]
    variables = {**secrets, "RAY_AUTH_MODE": "token"}
    outcome = finish(start([*arguments, "--run_dir", here / "run"], here, **variables), 180)
    assert outcome.code == 0, outcome.err
    files = [path for path in (here / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "events.jsonl"} <= {path.name for path in files}
    for secret in secrets.values():
        assert secret not in outcome.out + outcome.err
        for path in files:
            assert secret.encode() not in path.read_bytes(), path
    assert os.environ.get("RAY_AUTH_TOKEN") is None
