"""Storage that fails: whatever happens, what is loaded later is a good checkpoint."""

from __future__ import annotations

import json
import os
import signal
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metadist import CheckpointError, CheckpointStore
from metadist.run.checkpoint_files import MANIFEST, STATE, TENSORS
from metadist.run.storage import Folder, write_json
from tests.helpers import finish, start
from tests.run.storage_faults import Faults, s3_server
from tests.run.test_checkpoint import checkpoint, everything, examples, signed

SAVED = {step: checkpoint(step, 1.0 / step) for step in range(1, 6)}


@pytest.fixture(params=["file", "memory", "s3"])
def place(request, tmp_path, monkeypatch):
    """A folder that does not exist yet: on a disk, in memory, or on a server."""
    if request.param == "file":
        monkeypatch.setattr(os, "fsync", lambda number: None)  # thousands of them; none is needed
        yield str(tmp_path / "run")
    elif request.param == "s3":
        yield request.getfixturevalue("s3") + "/run"
    else:
        name = uuid.uuid4().hex
        yield f"memory://{name}/run"
        Folder("memory://").remove(name)


WITH_SLOW_S3 = pytest.mark.parametrize(
    "place", ["file", "memory", pytest.param("s3", marks=pytest.mark.slow)], indirect=True
)


class Prepared:
    """A store with the good checkpoints 1 and 2, and a 3 that may be damaged."""

    def __init__(self, place: str, damaged: bool) -> None:
        self.store = CheckpointStore(place, keep_last=2)
        for step in (1, 2, 3):
            self.store.save(SAVED[step])
        if damaged:
            self.store.folder.write(f"step-00000003/{TENSORS}", b"")
        self.newest = 2 if damaged else 3
        self._files = self._read()

    def _read(self) -> dict[str, bytes]:
        folder = self.store.folder
        paths = folder.fs.find(folder.root) if folder.names() else []
        return {str(path): bytes(folder.fs.cat_file(path)) for path in paths}

    def again(self) -> CheckpointStore:
        """The store as it was in the beginning."""
        folder, found = self.store.folder, self._read()
        for path in found.keys() - self._files.keys():
            folder.fs.rm(path)
        for path, data in self._files.items():
            if found.get(path) != data:
                folder.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                folder.fs.pipe_file(path, data)
        return self.store

    def good(self) -> list[int]:
        """The steps of all that can be loaded, each of which is what was saved."""
        found = []
        store = CheckpointStore(self.store.uri)
        for name in store.names():
            try:
                loaded = store.load(name)[1]
            except CheckpointError:
                continue
            assert everything(loaded) == everything(SAVED[loaded.state.version])
            assert name == f"step-{loaded.state.version:08d}"
            found.append(loaded.state.version)
        assert found and store.load()[1].state.version == found[-1]
        return found


FAULTS: dict[str, dict[str, Any]] = {
    "the machine stops": {"error": "read or write error", "dies": True, "half": True},
    "one error": {"error": "read or write error", "half": True},
    "no space": {"error": "no space", "dies": True},
    "one time-out": {"error": "time-out"},
    "one error of a client": {"error": "error of a client"},
}


@WITH_SLOW_S3
@pytest.mark.parametrize("step", [4, 3], ids=["a new step", "a damaged step"])
@pytest.mark.parametrize("fault", FAULTS)
def test_saving_may_fail_at_every_operation(place, fault, step):
    prepared = Prepared(place, damaged=step == 3)
    for at in range(1000):
        store = prepared.again()
        with Faults(at, **FAULTS[fault]).on(store.folder) as faults:
            try:
                store.save(SAVED[step])
                failed = False
            except (OSError, CheckpointError):
                failed = True
        good = prepared.good()
        # What was there, or something newer.
        assert max(good) in ((step,) if not failed else (prepared.newest, step)), at
        # The next run is not hindered by what was left.
        store.save(SAVED[step])
        assert max(prepared.good()) == step
        if not faults.struck:
            break
    assert at >= 15 and not failed


@WITH_SLOW_S3
@pytest.mark.parametrize("step", [4, 3], ids=["a new step", "a damaged step"])
def test_storage_may_lose_half_of_what_it_is_given_and_say_nothing(place, step):
    prepared = Prepared(place, damaged=step == 3)
    for at in range(1000):
        store = prepared.again()
        faults = Faults(at, "no space", lies=True)
        with faults.on(store.folder), suppress(CheckpointError):  # when it reads it back
            store.save(SAVED[step])
        assert max(prepared.good()) in (prepared.newest, step)
        if not faults.struck:
            break
    assert at >= 15 and max(prepared.good()) == step


@pytest.mark.parametrize("fault", FAULTS)
def test_loading_may_fail_at_every_operation(place, fault):
    prepared = Prepared(place, damaged=False)
    outcomes: set[int | None] = set()
    for at in range(1000):
        with Faults(at, **FAULTS[fault]).on(prepared.store.folder) as faults:
            try:
                name, loaded = prepared.store.load()
            except (OSError, CheckpointError):
                outcomes.add(None)
            else:
                assert everything(loaded) == everything(SAVED[loaded.state.version])
                assert name == f"step-{loaded.state.version:08d}"
                outcomes.add(loaded.state.version)
                if loaded.state.version != 3:
                    assert "step-00000003" in prepared.store.skipped
        if not faults.struck:
            break
    assert at >= 7 and 3 in outcomes and None in outcomes


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_is_the_old_or_the_new_one(tmp_path, fault):
    folder = Folder(tmp_path / "run" / "deeper")
    for at in range(100):
        folder.remove("config.yaml")
        folder.write("config.yaml", b"old")
        with Faults(at, **FAULTS[fault]).on(folder) as faults:
            try:
                folder.write("config.yaml", b"new and longer")
                expected = {b"new and longer"}
            except OSError:
                expected = {b"old", b"new and longer"}
        assert folder.read("config.yaml", 99) in expected
        if not faults.struck:
            break
    assert at >= 5 and folder.names() == ["config.yaml"]


class Stale:
    """A file system that lists a folder as it was when that was first asked for."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._seen: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def ls(self, path: str, detail: bool) -> Any:
        if path not in self._seen:
            self._seen[path] = self._fs.ls(path, detail=detail)
        return self._seen[path]


def test_an_old_listing_gives_an_older_checkpoint_and_loses_none(place):
    prepared = Prepared(place, damaged=False)
    late = CheckpointStore(place, keep_last=1, keep_best=False)
    late.folder.fs = Stale(late.folder.fs)
    assert late.load()[0] == "step-00000003"
    other = CheckpointStore(place, keep_last=1, keep_best=False)
    other.save(SAVED[4])
    assert prepared.good() == [4]
    # It knows of 3 only, which is gone.
    with pytest.raises(CheckpointError, match=r"step-00000003 is damaged: manifest.json cannot be"):
        late.load()
    # What it does not see it neither overwrites nor removes.
    assert late.save(SAVED[4]) == "step-00000004"
    late.save(SAVED[5])
    assert prepared.good() == [4, 5]


def test_another_process_is_seen(place):
    """Listings that a client keeps are not believed."""
    first, second = CheckpointStore(place), CheckpointStore(place)
    assert first.names() == []
    second.save(SAVED[1])
    assert first.load()[0] == "step-00000001"
    second.save(SAVED[2])
    assert first.load()[0] == "step-00000002"


actions = st.lists(
    st.tuples(st.just("save"), st.integers(1, 5))
    | st.tuples(st.sampled_from([TENSORS, STATE, MANIFEST]), st.integers(1, 5))
    | st.tuples(st.just("fail"), st.integers(1, 5), st.integers(0, 40)),
    min_size=1,
    max_size=12,
)


@examples
@given(actions=actions, keep_last=st.integers(1, 3), keep_best=st.booleans())
def test_the_only_good_one_is_never_lost(actions, keep_last, keep_best):
    place = f"memory://{uuid.uuid4().hex}"
    store = CheckpointStore(place, keep_last, keep_best)
    good: set[int] = set()
    try:
        for what, step, *at in actions:
            name = f"step-{step:08d}"
            before = set(good)
            if what == "save":
                store.save(SAVED[step])
                good.add(step)
            elif what == "fail":
                faults = Faults(at[0], "no space", dies=True, half=True)
                with faults.on(store.folder), suppress(OSError, CheckpointError):
                    store.save(SAVED[step])
            elif name in store.names():
                store.folder.write(f"{name}/{what}", b"{}")
                before.discard(step)
            good = set()
            for found in store.names():
                try:
                    loaded = store.load(found)[1]
                except CheckpointError:
                    continue
                assert everything(loaded) == everything(SAVED[loaded.state.version])
                good.add(loaded.state.version)
            if what == "save":
                assert step in good
            if before:
                assert good
                assert store.load()[1].state.version == max(good)
    finally:
        Folder("memory://").remove(store.folder.root)


def test_what_an_interrupted_removal_has_left_is_removed(place):
    store = CheckpointStore(place, keep_last=2, keep_best=False)
    for step in (1, 2):
        store.save(SAVED[step])
    store.folder.remove(f"step-00000001/{MANIFEST}")
    store.save(SAVED[3])
    assert store.names() == ["step-00000002", "step-00000003"]


def test_checkpoints_are_in_order_beyond_eight_digits(place):
    store = CheckpointStore(place, keep_last=2)
    for step in (99_999_999, 100_000_000, 100_000_001):
        store.save(checkpoint(step))
    assert store.names() == ["step-100000000", "step-100000001"]
    assert store.load()[1].state.version == 100_000_001


KILLED = """
import os, random, signal, sys, time
import torch
from metadist import Checkpoint, CheckpointStore
from metadist.outer import OuterState

torch.set_num_threads(1)
random.seed(int(sys.argv[2]))
store = CheckpointStore(sys.argv[1], keep_last=1, keep_best=False)
last = 0
for number in range(25):
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(last + 1, 10**6):
            outer = {"w": torch.full((20_000,), float(step))}
            store.save(Checkpoint(OuterState(outer, {}, step, step, ())))
            os.write(theirs, b".")
    while number == 0 and not os.read(ours, 1):
        pass
    time.sleep(random.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(theirs)
    told = (number == 0) + len(os.read(ours, 10**6))
    os.close(ours)
    step = store.load()[1].state.version
    assert step in (last + told, last + told + 1), (last, told, step)
    assert set(store.load()[1].state.outer["w"].tolist()) == {float(step)}
    last = step
print(last)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_a_process_is_killed_at_any_moment_of_saving(tmp_path, seed):
    code, out, err = finish(start(["-c", KILLED, tmp_path / "run", str(seed)], tmp_path))
    assert code == 0, err
    assert int(out) >= 25 / 2


LIMITED = """
import resource, signal, sys
import torch
from metadist import Checkpoint, CheckpointStore
from metadist.outer import OuterState

store = CheckpointStore(sys.argv[1])
for step in (1, 2, 3):
    if step == 3:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))
    outer = {"w": torch.full((20_000,), float(step))}
    store.save(Checkpoint(OuterState(outer, {}, step, step, ())))
    print(step, flush=True)
"""


def test_a_disk_that_takes_no_more_leaves_what_was_there(tmp_path):
    code, out, err = finish(start(["-c", LIMITED, tmp_path / "run"], tmp_path))
    assert (code, out.split()) == (1, ["1", "2"])
    assert "OSError: [Errno 27] File too large" in err
    store = CheckpointStore(str(tmp_path / "run"))
    assert store.load()[0] == "step-00000002"
    assert store.names() == ["step-00000001", "step-00000002"]  # and nothing that takes space


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_goes_away_or_hangs_is_an_error_in_time(monkeypatch, what):
    options = {"connect_timeout": 1, "read_timeout": 1, "retries": {"max_attempts": 1}}
    with s3_server() as (address, process):
        fs = fsspec.filesystem(
            "s3",
            key="somebody",
            secret="something",
            endpoint_url=address,
            config_kwargs=options,
            skip_instance_cache=True,
        )
        monkeypatch.setattr(type(fs), "retries", 1)
        monkeypatch.setattr(fsspec.core, "url_to_fs", lambda uri: (fs, uri.removeprefix("s3://")))
        fs.mkdir("bucket")
        store = CheckpointStore("s3://bucket/run", keep_last=1)
        store.save(SAVED[1])
        os.kill(process.pid, what)
        with pytest.raises(OSError, match=r"cannot be|[Cc]onnect|timed? ?out"):
            store.save(SAVED[2])
        with pytest.raises(OSError, match=r"cannot be|[Cc]onnect|timed? ?out"):
            store.load()
        if what == signal.SIGSTOP:
            os.kill(process.pid, signal.SIGCONT)
            assert store.load()[0] == "step-00000001"
            store.save(SAVED[2])
            assert everything(store.load()[1]) == everything(SAVED[2])


def test_a_checkpoint_larger_than_a_part_of_an_upload(s3):
    state = SAVED[1].state
    large = SAVED[1].__class__(state._replace(outer={"w": torch.arange(30_000_000.0)}))
    store = CheckpointStore(s3)
    store.save(large)
    assert torch.equal(store.load()[1].state.outer["w"], large.state.outer["w"])


def outside(folder: Path) -> tuple[Path, dict[str, bytes]]:
    """A checkpoint that does not belong to the store in `folder`, and its files."""
    CheckpointStore(str(folder.parent / "elsewhere")).save(SAVED[1])
    step = folder.parent / "elsewhere" / "step-00000001"
    return step, {path.name: path.read_bytes() for path in step.iterdir()}


def test_links_lead_nowhere(tmp_path):
    store = CheckpointStore(str(tmp_path / "run"), keep_last=1, keep_best=False)
    step, files = outside(tmp_path / "run")
    store.save(SAVED[2])
    (tmp_path / "run" / step.name).symlink_to(step)
    assert store.names() == ["step-00000002"]
    store.save(SAVED[3])
    store.save(SAVED[4])
    assert {path.name: path.read_bytes() for path in step.iterdir()} == files
    for file in (TENSORS, STATE, MANIFEST):
        path = tmp_path / "run" / "step-00000004" / file
        data = path.read_bytes()
        path.unlink()
        target = tmp_path / "secret"
        target.write_bytes(data)
        path.symlink_to(target)
        with pytest.raises(CheckpointError, match=f"{file} must be a plain file"):
            store.load("step-00000004")
        path.unlink()
        path.write_bytes(data)
    os.remove(path)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"manifest.json must be a plain file"):
        store.load("step-00000004")


@pytest.mark.parametrize(
    "name", ["../elsewhere/step-00000001", "/etc", "..", "step-00000002/../../elsewhere", ""]
)
def test_a_name_is_no_path(tmp_path, name):
    store = CheckpointStore(str(tmp_path / "run"))
    outside(tmp_path / "run")
    store.save(SAVED[2])
    with pytest.raises(CheckpointError, match=r"checkpoint must be one of \['step-00000002'\] in"):
        store.load(name)


def test_names_in_a_manifest_are_not_looked_for(tmp_path):
    store = CheckpointStore(str(tmp_path / "run"))
    store.save(SAVED[1])
    path = tmp_path / "run" / "step-00000001" / MANIFEST
    tree = json.loads(path.read_bytes())
    tree["files"]["../../secret"] = {"size_bytes": 1, "sha256": "0"}
    path.write_bytes(signed(tree))
    (tmp_path / "secret").mkdir()
    assert everything(store.load()[1]) == everything(SAVED[1])


def test_a_file_is_not_read_if_it_is_longer_than_its_manifest_says(tmp_path):
    store = CheckpointStore(str(tmp_path / "run"))
    name = store.save(SAVED[1])
    for file, limit in ((TENSORS, None), (MANIFEST, 1 << 16)):
        path = tmp_path / "run" / name / file
        size = path.stat().st_size
        os.truncate(path, 1 << 42)  # of which nothing is on the disk
        with pytest.raises(
            CheckpointError, match=f"{file} must have at most {limit or size} bytes, got {1 << 42}"
        ):
            store.load(name)
        os.truncate(path, size)
    store.load(name)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("nonsense://bucket/run", "a folder must be a local path or a URI that fsspec can open"),
        ("ftp://somebody:secret@host/run", "a URI must not hold a password, .* environment"),
    ],
)
def test_messages_about_a_uri(uri, message):
    with pytest.raises(ValueError, match=message) as caught:
        CheckpointStore(uri)
    assert "secret" not in str(caught.value)


def test_json_at_a_path_or_a_uri(place, tmp_path, monkeypatch):
    write_json(f"{place}/deeper/a.json", {"a": 1})
    assert Folder(f"{place}/deeper").read("a.json", 99) == b'{\n "a": 1\n}\n'
    monkeypatch.chdir(tmp_path)
    write_json("b.json", [2])
    assert Path("b.json").read_text() == "[\n 2\n]\n"
