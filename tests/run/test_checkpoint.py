"""Checkpoints: exact, never half of one, damage found, and the right ones kept."""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metadist.optimizer import OuterOptimizer
from metadist.outer import BLOCK, OuterState, OuterVariable, StepRules
from metadist.run.checkpoint import Checkpoint, CheckpointError, CheckpointStore, check_same_model
from metadist.run.checkpoint_files import MANIFEST, STATE, TENSORS
from tests.helpers import exact, fresh
from tests.problems import computed_lease

FILES = (TENSORS, STATE, MANIFEST)
examples = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    """A folder that does not exist yet, on a disk or in memory."""
    if request.param == "file":
        yield str(tmp_path / "run" / "checkpoints")
        return
    name = uuid.uuid4().hex
    yield f"memory://{name}/checkpoints"
    fs = fsspec.filesystem("memory")
    if fs.exists(f"/{name}"):
        fs.rm(f"/{name}", recursive=True)


def checkpoint(step: int = 1, score: float | None = None, **info: Any) -> Checkpoint:
    outer = {"w": fresh((3, 2), step), "b": fresh((2,), step + 1)}
    optimizer = {"exp_avg": fresh((8,), step + 2), "step": torch.tensor(float(step))}
    return Checkpoint(OuterState(outer, optimizer, step, 4 * step, (4 * step + 2,)), info, score)


def everything(item: Checkpoint) -> Any:
    state = item.state
    kept = {**state.recursion, **{str(index): leaf for index, leaf in state.states.items()}}
    numbers = (state.version, state.applied_below, state.applied, state.num_shards)
    return (
        exact(state.outer),
        exact({**state.optimizer, **kept}),
        numbers,
        item.info,
        item.score,
    )


def file_of(store: CheckpointStore, name: str, file: str) -> str:
    return store.folder.path(f"{name}/{file}")


def read(store: CheckpointStore, name: str, file: str) -> bytes:
    return bytes(store.folder.fs.cat_file(file_of(store, name, file)))


def write(store: CheckpointStore, name: str, file: str, data: bytes) -> None:
    store.folder.fs.makedirs(store.folder.path(name), exist_ok=True)
    store.folder.fs.pipe_file(file_of(store, name, file), data)


def signed(manifest: dict[str, Any]) -> bytes:
    """A manifest with the digest that belongs to it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**rest, "sha256": digest}).encode()


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]


@st.composite
def trees(draw: Any) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=5), max_size=4, unique=True))
    tree = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        leaf = (10 * fresh(shape, draw(st.integers(0, 99)))).to(dtype)
        if leaf.is_floating_point() and leaf.numel() and draw(st.booleans()):
            leaf.view(-1)[0] = draw(st.sampled_from([torch.nan, torch.inf, -0.0]))
        # Not contiguous, as views of a flat vector or transposed weights may be.
        tree[name] = leaf.mT if len(shape) >= 2 and draw(st.booleans()) else leaf
    return tree


@examples
@given(
    outer=trees(),
    optimizer=trees(),
    version=st.integers(0, 10**9),
    applied=st.lists(st.integers(0, 10**12), max_size=3),
    score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    info=st.dictionaries(st.text(max_size=4), st.none() | st.integers() | st.text(max_size=4)),
)
def test_what_is_loaded_is_what_was_saved_to_the_bit(
    tmp_path, outer, optimizer, version, applied, score, info
):
    state = OuterState(outer, optimizer, version, min(applied, default=0), tuple(applied))
    saved = Checkpoint(state, info, score)
    store = CheckpointStore(str(tmp_path / uuid.uuid4().hex))
    name = store.save(saved)
    assert store.load()[0] == name
    assert everything(store.load(name)[1]) == everything(saved)


@pytest.mark.parametrize(
    "optimizer",
    [
        OuterOptimizer("sgd", 0.1),
        OuterOptimizer("sgd", 0.1, {"momentum": 0.9, "nesterov": True}),
        OuterOptimizer("adam", 0.1, {"betas": (0.8, 0.9)}),
        OuterOptimizer("adam", 0.1, {"amsgrad": True}),
        OuterOptimizer("adamw", 0.1, {"weight_decay": 0.1}),
        OuterOptimizer("rmsprop", 0.1, {"momentum": 0.5, "centered": True}),
        OuterOptimizer("adagrad", 0.1),
    ],
    ids=str,
)
def test_every_optimiser_goes_on_from_a_file_as_if_it_had_not_stopped(place, optimizer):
    def step(variable: OuterVariable, number: int) -> None:
        variable.apply([computed_lease(number, variable.version, fresh((8,), number), 1)])

    variable = OuterVariable({"w": fresh((3, 2)), "b": fresh((2,))}, optimizer)
    for number in range(3):
        step(variable, number)
    store = CheckpointStore(place)
    store.save(Checkpoint(variable.state()))
    loaded = OuterVariable.from_state(store.load()[1].state, optimizer)
    for number in range(3, 6):
        step(variable, number)
        step(loaded, number)
    assert exact(loaded.state().outer) == exact(variable.state().outer)
    assert exact(loaded.state().optimizer) == exact(variable.state().optimizer)
    assert loaded.state()[2:] == variable.state()[2:] == (6, 6, (), {}, {}, 1)


def test_a_folder_that_does_not_exist_holds_nothing_and_is_not_made_by_looking(place):
    store = CheckpointStore(place)
    assert store.names() == [] and store.best() is None
    with pytest.raises(CheckpointError, match=r"no good checkpoint in .*: it holds none$"):
        store.load()
    with pytest.raises(CheckpointError, match=r"checkpoint must be one of none in .*, got 'best'"):
        store.load("best")
    assert not store.folder.fs.exists(store.folder.root)


def test_other_things_in_the_folder_are_no_checkpoints(place):
    store = CheckpointStore(place)
    store.save(checkpoint(7))
    for name in ("notes", "step-7", "step-00000008.part", "xstep-00000009"):
        write(store, name, "file", b"hello")
    assert store.names() == ["step-00000007"]


def damages() -> dict[str, Any]:
    """By name: what spoils the files {name: bytes} of a checkpoint (None deletes one)."""

    def change(file: str, function: Any) -> Any:
        return lambda files: {file: function(files[file])}

    def manifest(function: Any) -> Any:
        return change(MANIFEST, lambda data: signed(function(json.loads(data))))

    def relisted(file: str, **values: Any) -> Any:
        def function(tree: dict[str, Any]) -> dict[str, Any]:
            return {**tree, "files": {**tree["files"], file: {**tree["files"][file], **values}}}

        return manifest(function)

    table: dict[str, Any] = {"everything deleted": lambda files: dict.fromkeys(files)}
    for file in FILES:
        table |= {
            f"{file} deleted": change(file, lambda data: None),
            f"{file} empty": change(file, lambda data: b""),
            f"{file} cut by one": change(file, lambda data: data[:-2]),
            f"{file} cut in half": change(file, lambda data: data[: len(data) // 2]),
            f"{file} longer": change(file, lambda data: data + b"0"),
            f"{file} first byte": change(file, lambda data: bytes([data[0] ^ 1]) + data[1:]),
            f"{file} zeros": change(file, lambda data: bytes(len(data))),
        }
    middle = change(TENSORS, lambda data: data[:-8] + bytes([data[-8] ^ 128]) + data[-7:])
    for number, text in enumerate(("null", "[]", "{}", '"step"', "3", "\xff\xfe", "{" * 50)):
        table[f"manifest garbage {number}"] = change(MANIFEST, lambda _, t=text: t.encode())
    return table | {
        "a bit of a tensor": middle,
        "another score": change(MANIFEST, lambda data: data.replace(b"0.5", b"0.9")),
        "another format": manifest(lambda tree: {**tree, "format": 4}),
        "lists other files": manifest(lambda tree: {**tree, "files": {"weights.bin": {}}}),
        "lists no files": manifest(lambda tree: {**tree, "files": {}}),
        "lists files as a list": manifest(lambda tree: {**tree, "files": list(FILES)}),
        "lists one file only": manifest(
            lambda tree: {**tree, "files": {STATE: tree["files"][STATE]}}
        ),
        "another size": relisted(TENSORS, size_bytes=1),
        "another digest": relisted(STATE, sha256="0" * 64),
        "score of text": manifest(lambda tree: {**tree, "score": "good"}),
        "no score": manifest(lambda tree: {k: v for k, v in tree.items() if k != "score"}),
    }


DAMAGES = damages()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped_for_the_last_good_one(place, damage):
    store = CheckpointStore(place)
    good = checkpoint(1, 0.25)
    store.save(good)
    name = store.save(checkpoint(2, 0.5))
    files = {file: read(store, name, file) for file in FILES}
    for file, data in DAMAGES[damage](files).items():
        if data is None:
            store.folder.fs.rm(file_of(store, name, file))
        else:
            write(store, name, file, data)

    found, loaded = store.load()
    assert (found, everything(loaded)) == ("step-00000001", everything(good))
    if store.skipped:  # in memory a folder is gone with its last file
        assert list(store.skipped) == [name]
        assert name in store.skipped[name]
        with pytest.raises(
            CheckpointError, match=rf"checkpoint .*{name} (is damaged: |must be of)"
        ):
            store.load(name)
    else:
        assert damage == "everything deleted" and name not in store.names()
    # It is written anew when training comes to that step again.
    again = checkpoint(2, 0.5)
    assert store.save(again) == name
    assert everything(store.load()[1]) == everything(again)
    assert store.skipped == {}


def test_messages_say_what_is_wrong(place):
    store = CheckpointStore(place)
    name = store.save(checkpoint())
    manifest = json.loads(read(store, name, MANIFEST))
    data = read(store, name, STATE)
    write(store, name, STATE, data + b" ")
    size = len(data)
    with pytest.raises(
        CheckpointError, match=f"json must have at most {size} bytes, got {size + 1}"
    ):
        store.load(name)
    write(store, name, STATE, b" " + data[1:])
    with pytest.raises(CheckpointError) as caught:
        store.load(name)
    listed = (len(data), hashlib.sha256(data).hexdigest())
    assert f"is damaged: state.json must have (bytes, SHA-256) {listed}, got (" in str(caught.value)
    write(store, name, MANIFEST, signed({**manifest, "format": 7}))
    with pytest.raises(CheckpointError, match=r"must be of format 3, got 7: load it with the vers"):
        store.load(name)
    with pytest.raises(
        CheckpointError, match=rf"(?s)no good checkpoint in .*\n  checkpoint .*{name}"
    ):
        store.load()
    with pytest.raises(CheckpointError, match=r"must be one of \['step-00000001'\] in .* got 'x'"):
        store.load("x")


def rewrite_outer(store, name, names, **fields):
    """Give the state the names of x as format 2 has them, with a manifest that says so."""
    data = json.dumps({**json.loads(read(store, name, STATE)), "outer": names}).encode()
    manifest = json.loads(read(store, name, MANIFEST)) | fields
    manifest["files"][STATE] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write(store, name, STATE, data)
    write(store, name, MANIFEST, signed(manifest))


def test_a_state_that_does_not_fit_its_tensors_is_of_another_format(place):
    store = CheckpointStore(place)
    name = store.save(checkpoint())
    rewrite_outer(store, name, ["v"])
    with pytest.raises(CheckpointError, match=r"is of another format: KeyError\('outer.v'\)"):
        store.load(name)


@pytest.fixture(scope="module")
def written():
    """A good checkpoint and its files."""
    store = CheckpointStore(f"memory://{uuid.uuid4().hex}")
    name = store.save(checkpoint(5, 0.5, seed=3))
    return {file: read(store, name, file) for file in FILES}


@settings(examples, max_examples=150)
@given(data=st.data())
def test_no_edit_of_bytes_is_loaded_as_something_else(written, data):
    file = data.draw(st.sampled_from(FILES))
    old = written[file]
    first = data.draw(st.integers(0, len(old)))
    last = data.draw(st.integers(first, min(len(old), first + 4)))
    new = old[:first] + data.draw(st.binary(max_size=4)) + old[last:]
    store = CheckpointStore(f"memory://fuzz-{uuid.uuid4().hex}")
    try:
        for other in FILES:
            write(store, "step-00000005", other, new if other == file else written[other])
        try:
            loaded = store.load("step-00000005")[1]
        except CheckpointError:
            assert new != old
            assert store.best() is None or file != MANIFEST
        else:  # white space of the manifest
            assert everything(loaded) == everything(checkpoint(5, 0.5, seed=3))
            assert file == MANIFEST or new == old
    finally:
        store.folder.remove("step-00000005")


def test_the_manifest_is_written_last(place, monkeypatch):
    order: list[str] = []
    store = CheckpointStore(place)
    write_file = store.folder.write

    def note(name: str, data: bytes) -> None:
        order.append(name)
        write_file(name, data)

    monkeypatch.setattr(store.folder, "write", note)
    store.save(checkpoint())
    assert [path.rpartition("/")[2] for path in order] == [TENSORS, STATE, MANIFEST]


def kept(store: CheckpointStore) -> list[int]:
    return [int(name.removeprefix("step-")) for name in store.names()]


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "scores", "expected"),
    [
        (1, True, [None, None, None], [3]),
        (2, True, [None, None, None, None], [3, 4]),
        (2, True, [0.1, 0.9, 0.3, 0.4, 0.5], [2, 4, 5]),
        (2, False, [0.1, 0.9, 0.3, 0.4, 0.5], [4, 5]),
        (1, True, [0.9, 0.9, 0.1], [2, 3]),
        (1, True, [0.1, float("nan"), 0.05], [1, 3]),
        (1, True, [float("nan"), None, float("nan")], [3]),
        (1, True, [-3.5, -1.5, -2.5], [2, 3]),
        (3, True, [0.1, 0.2], [1, 2]),
    ],
)
def test_the_newest_and_the_best_stay(place, keep_last, keep_best, scores, expected):
    store = CheckpointStore(place, keep_last, keep_best)
    for number, score in enumerate(scores, 1):
        store.save(checkpoint(number, score))
    assert kept(store) == expected
    good = [s for s in scores if s is not None and s == s]
    if good:
        if keep_best:
            assert store.load("best")[1].score == max(good)
    else:
        with pytest.raises(CheckpointError, match="got 'best': none was validated"):
            store.load("best")


def test_the_one_just_saved_stays_even_if_later_steps_exist(place):
    store = CheckpointStore(place, keep_last=2, keep_best=False)
    for number in (30, 40):
        store.save(checkpoint(number))
        write(store, f"step-{number:08d}", STATE, b"")  # damaged, but their manifests are fine
    store.save(checkpoint(20))
    assert kept(store) == [20, 30, 40]
    assert store.load()[0] == "step-00000020"


def test_of_several_damaged_ones_each_is_named_and_none_is_taken_for_the_best(place):
    store = CheckpointStore(place, keep_last=5)
    for number in range(1, 5):
        store.save(checkpoint(number, float(number)))
    for number in (3, 4):
        write(store, f"step-{number:08d}", MANIFEST, b"{")
    assert store.load()[0] == store.best() == "step-00000002"
    assert list(store.skipped) == ["step-00000004", "step-00000003"]
    store.load("step-00000001")
    assert store.skipped == {}


def test_a_good_checkpoint_of_the_same_step_is_left_as_it_is(place):
    store = CheckpointStore(place)
    first = checkpoint(1, 0.5, seed=1)
    assert store.save(first) == store.save(checkpoint(1, 0.7, seed=2)) == "step-00000001"
    assert everything(store.load()[1]) == everything(first)


def test_a_score_is_added_to_a_checkpoint_that_lacks_it(place):
    store = CheckpointStore(place)
    store.save(checkpoint(1))
    store.save(checkpoint(2, 0.1))
    assert store.save(checkpoint(1, 0.7)) == store.best() == "step-00000001"
    assert everything(store.load("best")[1]) == everything(checkpoint(1, 0.7))
    assert store.set_aside == []


def test_a_checkpoint_of_another_state_at_the_same_step_is_moved_aside(place):
    store = CheckpointStore(place)
    first = checkpoint(1, 0.5)
    changed = [
        first.state._replace(applied=()),
        first.state._replace(outer={**first.state.outer, "b": fresh((2,), 9)}),
        first.state._replace(optimizer={}),
    ]
    store.save(first)
    for state in changed:
        store.save(Checkpoint(state))
        assert everything(store.load()[1]) == everything(Checkpoint(state))
    assert store.set_aside == [f"abandoned-{number}/step-00000001" for number in (1, 2, 3)]
    aside = CheckpointStore(f"{place}/abandoned-1")
    assert everything(aside.load()[1]) == everything(first)
    assert store.names() == ["step-00000001"]


def test_later_checkpoints_are_abandoned_together_but_for_damaged_ones(place):
    store = CheckpointStore(place, keep_last=9)
    for number in range(1, 6):
        store.save(checkpoint(number))
    write(store, "step-00000004", MANIFEST, b"{")
    store.abandon(2)
    assert store.set_aside == ["abandoned-1/step-00000005", "abandoned-1/step-00000003"]
    assert store.names() == ["step-00000001", "step-00000002", "step-00000004"]
    store.abandon(2)
    assert len(store.set_aside) == 2
    store.remove_newer(1)
    assert store.names() == ["step-00000001", "step-00000004"]


def test_a_folder_is_bare_until_a_checkpoint_was_complete(place):
    store = CheckpointStore(place)
    assert store.is_bare()
    write(store, "step-00000000", TENSORS, b"half of it")
    assert store.is_bare()
    store.save(checkpoint(0))
    assert not store.is_bare()
    write(store, "step-00000000", MANIFEST, b"damaged")
    assert not store.is_bare()


def test_multiples_of_a_step_stay_for_good(place):
    store = CheckpointStore(place, keep_last=1, keep_every=3)
    for number in range(9):
        store.save(checkpoint(number))
    assert store.names() == [f"step-{number:08d}" for number in (3, 6, 8)]


def test_parts_of_two_steps_are_no_checkpoint(place):
    store = CheckpointStore(place)
    for version in (1, 2):
        store.save(Checkpoint(long_state(2, steps=version)))
    first, second = store.names()
    part = store.folder.read(f"{first}/tensors-1.safetensors", 1 << 30)
    write(store, second, "tensors-1.safetensors", part)
    manifest = json.loads(store.folder.read(f"{second}/{MANIFEST}", 1 << 16))
    del manifest["sha256"]
    digest = hashlib.sha256(part).hexdigest()
    manifest["files"]["tensors-1.safetensors"] = {"size_bytes": len(part), "sha256": digest}
    store._write_manifest(second, manifest)
    with pytest.raises(CheckpointError, match=r"tensors-1.safetensors is of step 1"):
        store.load(second)


def test_at_least_one_is_kept():
    with pytest.raises(ValueError, match="keep_last must be >= 1, got 0"):
        CheckpointStore("memory://x", keep_last=0)


MODEL = {"w": fresh((3, 2)), "b": fresh((2,))}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"w": MODEL["w"]}, "'b' must be float32 of shape (2,) as in the problem, got absent"),
        (
            {**MODEL, "c": fresh((1,))},
            "'c' must be absent as in the problem, got float32 of shape (1,)",
        ),
        (
            {**MODEL, "w": fresh((2, 3))},
            "'w' must be float32 of shape (3, 2) as in the problem, got float32 of shape (2, 3)",
        ),
        (
            {**MODEL, "b": MODEL["b"].double()},
            "'b' must be float32 of shape (2,) as in the problem, got float64 of shape (2,)",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(found, message):
    with pytest.raises(CheckpointError) as caught:
        check_same_model(found, MODEL, "here/step-1")
    assert str(caught.value) == (
        f"checkpoint here/step-1 is of another model: {message}; give the problem and algorithm "
        "it was trained with"
    )


def test_the_same_model_is_accepted():
    check_same_model({name: leaf + 1 for name, leaf in MODEL.items()}, MODEL, "here")


LONG = 3 * BLOCK + 11
ADAM = OuterOptimizer("adam", 0.1, clip_norm=1.0)


def long_state(num_shards: int, steps: int = 2) -> OuterState:
    """Of a two-point method, with leaves before, in and across the slices of shards."""
    shapes = {"a": (5,), "b": (BLOCK - 5,), "none": (0, 3), "c": (2, BLOCK), "d": (), "e": (10,)}
    outer = {name: fresh(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    variable = OuterVariable(outer, ADAM, StepRules(recursive_weight=lambda version: 0.5))
    for version in range(steps):
        total = fresh((LONG * (2 if version else 1),), 10 + version)
        variable.apply([computed_lease(version, version, total, 1, states={version: fresh((3,))})])
    return variable.state()._replace(num_shards=num_shards)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_each_shard_has_a_file_and_any_number_of_shards_is_loaded_to_the_bit(place, num_shards):
    store = CheckpointStore(place)
    saved = Checkpoint(long_state(num_shards), {"seed": 1}, 0.5)
    name = store.save(saved)
    files = json.loads(read(store, name, MANIFEST))["files"]
    parts = [TENSORS, *(f"tensors-{number}.safetensors" for number in range(1, num_shards))]
    assert list(files) == [*parts, STATE]
    sizes = [files[part]["size_bytes"] for part in parts]
    # x, two moments, w and the previous x.
    assert max(sizes) < 4 * 5 * BLOCK * math.ceil(4 / num_shards) + 4096
    assert sum(sizes) < 4 * 5 * LONG + 4096 * num_shards
    loaded = store.load()[1]
    assert everything(loaded) == everything(saved)
    whole = Checkpoint(long_state(1), {"seed": 1}, 0.5)
    assert everything(loaded)[:2] == everything(whole)[:2]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_leaf_in_one_shard_can_be_read_by_name_without_metadist(place, num_shards):
    store = CheckpointStore(place)
    state = long_state(num_shards)
    name = store.save(Checkpoint(state))
    found = safetensors.torch.load(read(store, name, TENSORS))
    for leaf in ("a", "b", "none"):
        assert torch.equal(found[f"outer.{leaf}"], state.outer[leaf])


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("how", ["deleted", "cut", "changed", "swapped"])
def test_a_damaged_part_is_found(place, how, number):
    store = CheckpointStore(place)
    store.save(Checkpoint(long_state(3, steps=1)))
    name = store.save(Checkpoint(long_state(3)))
    parts = [TENSORS, "tensors-1.safetensors", "tensors-2.safetensors"]
    data = read(store, name, parts[number])
    if how == "deleted":
        store.folder.remove(f"{name}/{parts[number]}")
    else:
        bad = {
            "cut": data[:-1],
            "changed": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            "swapped": read(store, name, parts[number - 1]),
        }[how]
        write(store, name, parts[number], bad)
    assert store.load()[0] == "step-00000001"
    assert parts[number] in store.skipped[name]
    assert everything(Checkpoint(long_state(3))) == everything(
        store.load(store.save(Checkpoint(long_state(3))))[1]
    )


def test_a_checkpoint_of_format_2_is_loaded(place):
    store = CheckpointStore(place)
    saved = checkpoint(2, 0.5, seed=1)
    name = store.save(saved)
    rewrite_outer(store, name, list(saved.state.outer), format=2)
    assert everything(store.load()[1]) == everything(saved)


def test_a_part_is_made_when_the_one_before_it_is_written(monkeypatch):
    store = CheckpointStore(f"memory://{uuid.uuid4().hex}")
    order: list[str] = []
    make, write_file = safetensors.torch.save, store.folder.write

    def note_making(tensors: dict[str, torch.Tensor], about: dict[str, str]) -> bytes:
        order.append("made")
        return make(tensors, about)

    def note_writing(name: str, data: bytes) -> None:
        order.append("written")
        write_file(name, data)

    monkeypatch.setattr(safetensors.torch, "save", note_making)
    monkeypatch.setattr(store.folder, "write", note_writing)
    store.save(Checkpoint(long_state(3)))
    assert order == ["made", "written"] * 3 + ["written"] * 2


def test_large_kept_states_have_a_file_each_which_is_mapped_and_verified(place, monkeypatch):
    monkeypatch.setattr("metadist.run.checkpoint_files.LARGE_STATES_BYTES", 100)
    store = CheckpointStore(place)
    first = checkpoint(1)
    states = {index: fresh((10 + index,), index) for index in (0, 2, 5)}
    saved = Checkpoint(first.state._replace(states=states), {"seed": 1})
    name = store.save(saved)
    files = json.loads(read(store, name, MANIFEST))["files"]
    assert list(files) == [TENSORS, *(f"states-{n}.safetensors" for n in (1, 2, 3)), STATE]
    loaded = store.load()[1]
    assert everything(loaded) == everything(saved)
    loaded.state.states[2].zero_()
    assert everything(store.load()[1]) == everything(saved), "the file is not written to"
    assert store.save(saved) == name and store.is_whole(name)
    data = read(store, name, "states-2.safetensors")
    write(store, name, "states-2.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"is damaged: states-2.safetensors must have"):
        store.load(name)
    store.folder.remove(f"{name}/states-2.safetensors")
    with pytest.raises(CheckpointError, match=r"is damaged: states-2.safetensors cannot be read"):
        store.load(name)
