"""Forged and garbled input: refused with the error that is announced, and nothing has changed."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import struct
import uuid
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metadist import CheckpointError, CheckpointStore, OuterOptimizer
from metadist.outer import OuterState, OuterVariable, StepRules
from metadist.run.checkpoint_files import MANIFEST, STATE, TENSORS
from tests.helpers import exact, make_trainer, store_of
from tests.problems import computed_lease
from tests.run.test_checkpoint import checkpoint, everything, signed

NAME = "step-00000005"
GOOD = checkpoint(5, 0.5, seed=3)
many = settings(max_examples=200, deadline=None)


def files_of(item: Any) -> dict[str, bytes]:
    store = CheckpointStore(f"memory://{uuid.uuid4().hex}")
    name = store.save(item)
    files = {file: store.folder.read(f"{name}/{file}", 1 << 30) for file in FILES}
    store.folder.remove(name)
    return files


FILES = (TENSORS, STATE, MANIFEST)
WRITTEN = files_of(GOOD)


def reading(files: dict[str, bytes]) -> Any:
    """What is loaded of these files; None if they are refused."""
    store = CheckpointStore(f"memory://{uuid.uuid4().hex}")
    for file, data in files.items():
        store.folder.write(f"{NAME}/{file}", data)
    try:
        best = store.best()
        assert best in (None, NAME)
        assert store.names() == [NAME]
        return store.load(NAME)[1]
    except CheckpointError:
        with pytest.raises(CheckpointError, match=f"no good checkpoint in (?s:.*)/{NAME} "):
            store.load()
        return None
    finally:
        store.folder.remove(NAME)


def forged(tensors: bytes, state: bytes, **changes: Any) -> dict[str, bytes]:
    """A checkpoint whose manifest fits, by somebody who knows how."""
    files = {
        file: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for file, data in ((TENSORS, tensors), (STATE, state))
    }
    manifest = {"format": 2, "score": None, "files": files, **changes}
    return {TENSORS: tensors, STATE: state, MANIFEST: signed(manifest)}


numbers = st.integers() | st.floats() | st.sampled_from([10**400, -1, 2**63, 1e308, math.nan])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=4)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@many
@given(data=st.data())
def test_a_manifest_with_anything_in_any_place(data):
    manifest = json.loads(WRITTEN[MANIFEST])
    where = data.draw(st.sampled_from(["format", "score", "files", "file", "size", "sha256", ""]))
    value = data.draw(trees)
    if where == "":
        manifest = value
    elif where == "file":
        manifest["files"][TENSORS] = value
    elif where == "size":
        manifest["files"][STATE]["size_bytes"] = value
    else:
        manifest[where] = value
    try:
        raw = signed(manifest) if isinstance(manifest, dict) else json.dumps(manifest).encode()
    except ValueError:  # more digits than Python writes
        return
    loaded = reading({**WRITTEN, MANIFEST: raw})
    if loaded is not None:
        assert everything(loaded)[:-1] == everything(GOOD)[:-1]
        assert loaded.score is None or isinstance(loaded.score, float)


KEYS = ("outer", "optimizer", "recursion", "states", "version", "applied_below", "applied", "info")


@many
@given(key=st.sampled_from([*KEYS, ""]), value=trees | st.just(["w", "b"]) | st.just([{}]))
@example(key="applied_below", value=-1)
@example(key="applied", value=[-1])
@example(key="version", value=6)
@example(key="version", value="5")
@example(key="version", value=math.inf)
@example(key="info", value=[])
def test_a_state_with_anything_in_any_place(key, value):
    state = json.loads(WRITTEN[STATE])
    state = {**state, key: value} if key else value
    try:
        raw = json.dumps(state).encode()
    except ValueError:
        return
    loaded = reading(forged(WRITTEN[TENSORS], raw))
    if loaded is not None:
        found = loaded.state
        assert (found.version, isinstance(loaded.info, dict)) == (5, True)
        assert min([found.applied_below, *found.applied]) >= 0


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, "\ud800"])
@pytest.mark.parametrize("file", [MANIFEST, STATE])
def test_json_that_is_too_deep_or_too_long(file, text):
    raw = text.encode(errors="surrogatepass")
    files = {**WRITTEN, MANIFEST: raw} if file == MANIFEST else forged(WRITTEN[TENSORS], raw)
    assert reading(files) is None


def safetensors_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor(shape: Any = (2,), dtype: Any = "F32", offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"outer.w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = [
    safetensors_file({}, length=2**64 - 1),
    safetensors_file({}, length=2**40),
    safetensors_file(tensor([2**62]), bytes(8)),
    safetensors_file(tensor([2**40, 2**40]), bytes(8)),
    safetensors_file(tensor([2**62], offsets=[0, 2**64 - 1]), bytes(8)),
    safetensors_file(tensor([10**12], offsets=[0, 4 * 10**12]), bytes(8)),
    safetensors_file(tensor([2**62, 0], offsets=[0, 0])),
    safetensors_file(tensor(offsets=[8, 0]), bytes(8)),
    safetensors_file(tensor(offsets=[4, 12]), bytes(12)),
    safetensors_file(tensor([-2]), bytes(8)),
    safetensors_file(tensor(dtype="F3"), bytes(8)),
    safetensors_file(tensor(dtype="F8_E8M0", shape=[8]), bytes(8)),
    safetensors_file(tensor(dtype="F4", shape=[16]), bytes(8)),
    safetensors_file(tensor("xx"), bytes(8)),
    safetensors_file({"outer.w": tensor()["outer.w"], "b": tensor()["outer.w"]}, bytes(8)),
    safetensors_file(b"[" * 50_000),
    safetensors_file(b"\xff\xff"),
    b"",
    b"\x80\x04\x95",
]


@pytest.fixture
def little_memory():
    """A process that may take one GB more than it has."""
    with open("/proc/self/statm") as stream:
        taken = int(stream.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("number", range(len(HEADERS)))
@pytest.mark.usefixtures("little_memory")
def test_a_forged_header_is_refused_and_takes_no_memory(number):
    state = json.loads(WRITTEN[STATE])
    state |= {"outer": ["w"], "optimizer": [], "recursion": [], "states": []}
    loaded = reading(forged(HEADERS[number], json.dumps(state).encode()))
    if loaded is not None:  # numbers of another type are for `check_same_model` to refuse
        assert set(loaded.state.outer) == {"w"} and loaded.state.outer["w"].numel() <= 16


@many
@given(data=st.data())
def test_any_edit_of_the_tensors_is_read_or_refused(data):
    raw = bytearray(WRITTEN[TENSORS])
    for _ in range(data.draw(st.integers(1, 4))):
        first = data.draw(st.integers(0, min(len(raw), 400)))
        last = data.draw(st.integers(first, min(len(raw), first + 8)))
        raw[first:last] = data.draw(st.binary(max_size=8))
    reading(forged(bytes(raw), WRITTEN[STATE]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s._replace(optimizer={**s.optimizer, "exp_avg": torch.zeros(3)}),
            r"optimizer of a state must have the shapes .*'exp_avg': \(\d+,\).* got .*\(3,\)",
        ),
        (
            lambda s: s._replace(optimizer={"momentum_buffer": s.optimizer["exp_avg"]}),
            r"optimizer of a state must have the shapes .*exp_avg.*, or be empty, got .*momentum",
        ),
        (
            lambda s: s._replace(recursion={"w": torch.zeros(2)}),
            r"recursion of a state must have the shapes .*previous.*, got \{'w': \(2,\)\}",
        ),
    ],
)
def test_a_state_of_another_optimiser_is_refused_before_anything_starts(tmp_path, change, message):
    make_trainer(run_dir=tmp_path).fit(2)
    store = store_of(tmp_path)
    name, found = store.load()
    store.folder.remove(name)
    store.save(type(found)(change(found.state), found.info, found.score))
    trainer = make_trainer(run_dir=tmp_path)
    before = exact(trainer.outer)
    with pytest.raises(CheckpointError, match=rf"step-00000002 is of another format: {message}"):
        trainer.restore()
    assert (trainer.version, exact(trainer.outer)) == (0, before)


def variable(two_point: bool = False) -> OuterVariable:
    """A variable after two steps that keeps the state of two tasks."""
    rules = StepRules(recursive_weight=lambda version: 0.5) if two_point else StepRules()
    found = OuterVariable(
        {"w": torch.ones(3), "b": torch.ones(2)}, OuterOptimizer("adam", 0.1, clip_norm=1.0), rules
    )
    for step in range(2):
        length = 10 if two_point and step else 5
        states = {0: torch.ones(4), 1: torch.ones(2)}
        found.apply([computed_lease(step, step, torch.ones(length), 2, states=states)])
    return found


def all_of(found: OuterVariable) -> Any:
    state = found.state()
    return (
        exact(state.outer),
        exact(state.optimizer),
        state.version,
        state.applied_below,
        state.applied,
        exact(dict(state.recursion)),
        [(index, exact({"": leaf})) for index, leaf in state.states.items()],
    )


odd_numbers = st.sampled_from([-1, -(10**9), math.nan, math.inf, 0.5, None, "1", 10**30])
bad = {
    "lease_id": st.sampled_from([-1, math.nan, 2.5, None, "2"]),
    "version": st.sampled_from([-1, 3, math.nan, None, "1", 1.0]),
    "num_tasks": st.sampled_from([-1, math.nan, math.inf, 1.5, None, "1"]),
    "weight": st.sampled_from([-1.0, math.nan, math.inf, -math.inf]),
    "total": st.sampled_from(
        [
            *(torch.zeros(shape) for shape in [(), (0,), (4,), (5, 1), (1, 5), (6,), (15,)]),
            torch.zeros(5, dtype=torch.int64),
            torch.zeros(5, dtype=torch.complex64),
            torch.full((5,), math.nan),
            torch.tensor([0, 0, math.inf, 0, 0]),
            torch.full((10,), -math.inf),
        ]
    ),
    "states": st.sampled_from(
        [
            {0: torch.zeros(3)},
            {0: torch.zeros(4), 1: torch.zeros(2, 1)},
            {0: torch.zeros(4, dtype=torch.float64)},
            {-1: torch.zeros(4)},
            {"0": torch.zeros(4)},
            {7: torch.zeros(4, 1)},
            {7: torch.tensor(0.0)},
        ]
    ),
}


@many
@given(data=st.data(), two_point=st.booleans(), position=st.integers(0, 2))
def test_a_malformed_update_is_refused_without_side_effects(data, two_point, position):
    found = variable(two_point)
    before = all_of(found)
    field = data.draw(st.sampled_from(list(bad)))
    length = 10 if two_point else 5
    items = [computed_lease(2 + n, 2, torch.ones(length), 1) for n in range(2)]
    # Repeated leases are left out whatever is in them, so this one must be new.
    wrong = computed_lease(5, 2, torch.ones(length), 1)
    value = data.draw(bad[field])
    if field in wrong._fields:
        wrong = wrong._replace(**{field: value})
    else:
        wrong = wrong._replace(result=wrong.result._replace(**{field: value}))
    if field == "total" and wrong.total.shape == (length,) and bool(wrong.total.isfinite().all()):
        assert not wrong.total.is_floating_point()
    items.insert(position, wrong)
    with pytest.raises(ValueError, match=r"contributions? "):
        found.apply(items)
    assert all_of(found) == before
    # It goes on as if that had never come.
    untouched = variable(two_point)
    assert found.apply(items[:position] + items[position + 1 :]) == untouched.apply(
        items[:position] + items[position + 1 :]
    )
    assert all_of(found) == all_of(untouched)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 6), max_size=8))
def test_repeated_ids_count_once(ids):
    found = variable()
    result = found.apply([computed_lease(n, 2, torch.full((5,), float(n)), 1) for n in ids])
    fresh = sorted({n for n in ids if n >= 2})
    assert result.applied == tuple(fresh)
    assert len(result.repeated) == len(ids) - len(fresh)
    once = variable()
    once.apply([computed_lease(n, 2, torch.full((5,), float(n)), 1) for n in fresh])
    assert all_of(found) == all_of(once)


def test_huge_but_finite_numbers_are_no_error():
    found = variable()
    found.apply([computed_lease(2, 2, torch.full((5,), 1e30), 1)])
    assert found.version == 3 and bool(found.flat.isfinite().all())


@settings(max_examples=100, deadline=None)
@given(
    optimizer=st.dictionaries(
        st.sampled_from(["exp_avg", "exp_avg_sq", "step", "sum"]),
        st.sampled_from([(), (5,), (4,), (5, 1), (0,)]).map(torch.zeros),
    ),
    version=st.integers(-2, 3),
    applied=st.lists(st.integers(-2, 5), max_size=2),
)
def test_a_state_that_does_not_belong_together_is_refused(optimizer, version, applied):
    outer = {"w": torch.ones(5)}
    fits = {name: tuple(leaf.shape) for name, leaf in optimizer.items()} in (
        {},
        {"step": (), "exp_avg": (5,), "exp_avg_sq": (5,)},
    )
    state = OuterState(outer, optimizer, version, 0, tuple(applied))
    if fits and min([version, *applied]) >= 0:
        found = OuterVariable.from_state(state, OuterOptimizer("adam"))
        found.apply([computed_lease(9, version, torch.ones(5), 1)])
        return
    with pytest.raises(ValueError, match="of a state must"):
        OuterVariable.from_state(state, OuterOptimizer("adam"))
