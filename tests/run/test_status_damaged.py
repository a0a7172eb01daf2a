"""`metadist status` on run folders that are damaged or forged: no traceback, little memory."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from metadist.cli import main
from metadist.run.reading import _checksum, find_scalars
from metadist.run.status import run_status
from metadist.run.storage import Folder
from tests.helpers import Recording, latest_scalars, make_trainer

BEGAN = {"time": "2026-11-28T06:00:00+00:00", "event": "run_started", "step": 0}
LIMIT_BYTES = 100 << 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(executor=Recording(), run_dir=folder, checkpoint_every=5, log_every=1).fit(12)
    (folder / "result.json").write_text(
        '{"num_steps": 12, "num_tasks": 9, "num_dropped": 0, "seconds": 1}'
    )
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy to damage, with few checkpoints, as these are not what is damaged."""
    for path in whole.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(whole)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path


def look(run: Path, capsys: Any) -> tuple[int, str]:
    """(the exit code, what was printed)."""
    code = main(["status", str(run)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err and err == "", err
    assert code in (0, 1, 3)
    assert re.search(r"^state +\w+", out, re.MULTILINE)
    assert all(char.isprintable() for char in out.replace("\n", ""))
    return code, out


def zero(data: bytearray, rng: random.Random) -> bytes | bytearray:
    start = rng.randrange(len(data)) // 512 * 512
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    return data


def flip(data: bytearray, rng: random.Random) -> bytes | bytearray:
    for _ in range(rng.choice([1, 3, 20])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def cut(data: bytearray, rng: random.Random) -> bytes | bytearray:
    return data[: rng.randrange(len(data))]


def insert(data: bytearray, rng: random.Random) -> bytes | bytearray:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice([1, 8, 700])) + data[at:]


@pytest.mark.parametrize("damage", [zero, flip, cut, insert])
@pytest.mark.parametrize(
    "kind", ["tensorboard/*", "events.jsonl", "result.json", "checkpoints/*/*"]
)
def test_damage_of_any_kind_is_no_traceback(
    run, capsys, kind, damage: Callable[[bytearray, random.Random], bytes | bytearray]
):
    rng = random.Random(f"{kind} {damage.__name__}")
    before = {path: path.read_bytes() for path in run.glob(kind)}
    for _ in range(12):
        path = rng.choice(sorted(before))
        path.write_bytes(damage(bytearray(before[path]), rng))
        look(run, capsys)
        path.write_bytes(before[path])
    assert look(run, capsys)[0] == 0


def test_damage_is_said_and_has_an_exit_code(run, capsys):
    (path,) = (run / "tensorboard").iterdir()
    data = bytearray(path.read_bytes())
    newest = latest_scalars(Folder(run / "tensorboard"))
    start = len(data) // 2
    data[start : start + 512] = bytes(512)
    path.write_bytes(data)
    code, out = look(run, capsys)
    # Rich breaks lines anywhere.
    assert code == 3 and f"{path.name} is damaged".replace(" ", "") in "".join(out.split())
    # What is behind the damage is still found.
    assert latest_scalars(Folder(run / "tensorboard")) == newest
    path.unlink()
    assert look(run, capsys)[0] == 0
    events = run / "events.jsonl"
    events.write_bytes(events.read_bytes() + bytes(512) + b"\n")
    code, out = look(run, capsys)
    assert code == 3 and "events.jsonl has 1 lines that are no events" in out


def test_a_wrong_value_is_not_shown(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("loss/train", 1.5, 1)
    writer.add_scalar("loss/train", 2.5, 2)
    writer.close()
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<f", 2.5), struct.pack("<f", 9.5)))
    found, wrong = find_scalars(Folder(tmp_path))
    assert found["loss/train"][:2] == (1.5, 1)
    assert wrong == [f"{path} has a damaged record"]


LINES: list[bytes] = [
    *(
        json.dumps(BEGAN | more).encode()
        for more in (
            {"step": -1},
            {"step": "3"},
            {"step": 1e400},
            {"step": True},
            {"step": 10**30},
            {"step": None},
            {"until_step": "x"},
            {"until_step": [1]},
            {"until_step": 1e400},
            {"until_step": -5},
            {"event": ["run_failed"]},
            {"event": "\x1b[2J"},
            {"time": 3},
            {"time": "0001-01-01T00:00:00+00:00"},
            {"time": "9999-12-31T23:59:59-12:00"},
            {"executor": {"a": 1}},
            {"event": "checkpoint_written", "checkpoint": ["a"], "score": "high"},
            {"event": "checkpoint_written", "checkpoint": "a", "score": 10**400},
            {"event": "worker_lost", "num_lost": "many"},
            {"event": "worker_lost", "num_lost": float("nan")},
            {"event": "task_dropped", "tasks": [[[1]], {"a": 2}]},
            {"event": "task_dropped", "tasks": "abc"},
            {"event": "lease_reissued", "leases": 1e308},
            {"event": "run_failed", "error": {"a": "b"}},
            {"event": "run_failed", "error": "\u202e[/b]\x07\ud800"},
            {"pid": 0, "host": 3},
            {"x": "y" * 10_000_000},
        )
    ),
    b"[]",
    b"null",
    b"1" * 5000,
    b'"\xff\xfe"',
    b"\xff" * 1000,
    b'{"time":"2026-11-28T06:00:00+00:00","event":"run_started","step":0,"x":'
    + b"[" * 30_000
    + b"]" * 30_000
    + b"}",
]


@pytest.mark.parametrize("number", range(len(LINES)))
def test_events_of_wrong_types(run, capsys, number):
    events = run / "events.jsonl"
    good = events.read_bytes()
    for data in (LINES[number] + b"\n", good + LINES[number] + b"\n", LINES[number] + b"\n" + good):
        events.write_bytes(data)
        look(run, capsys)


@pytest.mark.parametrize(
    "result",
    [
        b"{}",
        b"[1]",
        b"\xff",
        b'{"seconds": "long", "num_tasks": [1]}',
        b'{"seconds": 1e400, "num_steps": "x"}',
        b'{"seconds": null, "num_steps": null}',
        b"[" * 100_000,
    ],
)
def test_results_of_wrong_types(run, capsys, result):
    (run / "result.json").write_bytes(result)
    look(run, capsys)
    (run / "events.jsonl").unlink()
    look(run, capsys)


def record(data: bytes) -> bytes:
    size = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", _checksum(part)) for part in (size, data)]
    return size + checksums[0] + data + checksums[1]


def huge(run: Path, kind: str) -> None:
    """Make the run's files huge in a way of this kind."""
    (board,) = (run / "tensorboard").iterdir()
    events = run / "events.jsonl"
    line = json.dumps(BEGAN).encode() + b"\n"
    if kind == "zeros":
        board.write_bytes(bytes(64 << 20))
    elif kind == "sparse":
        for path in (board, events, run / "result.json"):
            os.truncate(path, 4 << 30)
    elif kind == "sparse checkpoint":
        os.truncate(next((run / "checkpoints").glob("*12/tensors.safetensors")), 4 << 30)
        os.truncate(next((run / "checkpoints").glob("*12/manifest.json")), 4 << 30)
    elif kind == "empty records":
        board.write_bytes(record(b"") * (3 << 20))
    elif kind == "nearly headers":
        board.write_bytes(b"\1\0\0\0\0\0" * (8 << 20))
    elif kind == "one line":
        events.write_bytes(b"x" * (64 << 20))
    elif kind == "many events":
        events.write_bytes(line * 500_000)
    elif kind == "many lists":
        short = line.rstrip()[:-1] + b', "tasks": [' + b"[]," * 20_000 + b"1]}\n"
        events.write_bytes(short * 80)


@pytest.mark.parametrize(
    "kind",
    [
        *("zeros", "sparse", "sparse checkpoint", "empty records", "nearly headers"),
        *("one line", "many events", "many lists"),
    ],
)
def test_huge_files_take_little_memory(run, capsys, kind):
    huge(run, kind)
    code, _ = look(run, capsys)  # imports count for nobody
    if kind in ("zeros", "sparse", "sparse checkpoint", "one line", "nearly headers"):
        assert code == 3  # what is hidden by it is missing, and that is said
    is_slow = kind in ("empty records", "nearly headers")
    if not is_slow:  # tracing is slow; these differ from others in their number of steps alone
        tracemalloc.start()
    try:
        run_status(run)
        assert is_slow or tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()
    if kind == "many events":
        assert run_status(run).is_partial
