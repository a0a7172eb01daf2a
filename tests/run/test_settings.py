"""What a checkpoint says of settings, and what a later version makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

import pytest
import torch

from metadist import CheckpointError, OuterOptimizer, Trainer, __version__
from metadist.algorithms import AID, ITD
from metadist.run.settings import as_text, difference, recorded
from metadist.tasks import FixedTasks
from tests.helpers import make_trainer, store_of
from tests.problems import Quadratic, quadratic_task


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Method:
    steps: int
    names: tuple[str, ...] = ("a", "b")
    inner: Inner = Inner()
    options: dict[str, Any] = field(default_factory=dict)


def later(name: str, default: Any, base: type = Method, **values: Any) -> Any:
    """The same setting in a version with one more field."""
    kind = make_dataclass(
        "Method", [(name, Any, field(default=default))], bases=(base,), frozen=True
    )
    return kind(**values)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (Method(3), None),
        (later("damping", 0.0, steps=3), None),
        (later("damping", 0.0, steps=3, damping=0.1), ("m.damping", 0.0, 0.1)),
        (Method(4), ("m.steps", 3, 4)),
        (Method(3, ("a",)), ("m.names", ["a", "b"], ["a"])),
        (Method(3, inner=Inner(0.25)), ("m.inner.rate", 0.5, 0.25)),
        (Method(3, options={"x": 1}), ("m.options", {}, {"x": 1})),
    ],
)
def test_values_are_compared_with_defaults_filled_in(now, expected):
    assert difference(recorded(Method(3), "m"), now, "m") == expected


def test_a_setting_that_is_gone_and_another_class_are_differences():
    stored = recorded(later("damping", 0.0, steps=3), "m")
    assert difference(stored, Method(3), "m") == ("m.damping", 0.0, "no such setting")
    found = difference(recorded(ITD(inner_steps=2), "m"), AID(), "m")
    assert found is not None and found[2] == repr(AID())


def test_checkpoints_of_versions_that_kept_texts_are_understood():
    text = "ITD(inner_steps=2, inner_lr=0.1)"
    assert difference(text, ITD(inner_steps=2, inner_lr=0.1), "algorithm") is None
    changed = difference(text, ITD(inner_steps=2, inner_lr=0.2), "algorithm")
    assert changed == ("algorithm.inner_lr", 0.1, 0.2)
    old = {"name": "sgd", "lr": 0.1}  # a dict of the fields of then
    assert difference(old, OuterOptimizer("sgd", lr=0.1), "outer_optimizer") is None
    texts: list[Any] = ["ITD(", "f(", "1", 7, None, [], {"fields": 3}, "ITD(inner_steps=exit())"]
    for forged in texts:
        assert difference(forged, ITD(), "algorithm") is not None


class Solver:
    """With Python's own repr."""


BROKEN: Any = Solver()


@pytest.mark.parametrize("value", [BROKEN, [BROKEN], {"a": BROKEN}, Inner(BROKEN), lambda: 0])
def test_what_cannot_be_compared_is_refused_by_name(value):
    with pytest.raises(
        ValueError, match=r"^x.* must have a repr of its own with a run_dir.* at 0x"
    ):
        recorded(value, "x")


def test_tensors_count_by_their_values_and_functions_by_their_names():
    a, b = torch.zeros(5000), torch.zeros(5000)
    b[2500] = 1.0
    assert repr(a) == repr(b.clone().zero_()) and recorded(a, "x") != recorded(b, "x")
    assert recorded(as_text, "x") == "metadist.run.settings.as_text"
    assert recorded(float("inf"), "x") == "inf"
    assert as_text(recorded(Method(3), "x")) == (
        "Method(steps=3, names=['a', 'b'], inner='Inner(rate=0.5)', options={})"
    )


@dataclass(frozen=True)
class Odd(ITD):
    solver: Any = None


def test_an_argument_that_could_not_be_resumed_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"algorithm.solver must have a repr of its own"):
        make_trainer(algorithm=Odd(solver=Solver()), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    make_trainer(algorithm=Odd(solver=Solver())).fit(1)  # nothing is kept, nothing compared


def test_a_checkpoint_names_the_version_that_wrote_it(tmp_path, monkeypatch):
    make_trainer(run_dir=tmp_path).fit(2)
    info = store_of(tmp_path).load()[1].info
    assert info["metadist"] == __version__
    monkeypatch.setattr("metadist.trainer.__version__", "9.9")
    with pytest.raises(
        CheckpointError,
        match=rf"algorithm.inner_steps must be .* as in checkpoint .*, which metadist "
        rf"{__version__} wrote, got 7: start a new run to change it",
    ):
        make_trainer(run_dir=tmp_path, algorithm=ITD(inner_steps=7, inner_lr=0.1)).restore()


def test_a_piecewise_rate_and_clipping_by_value_are_the_same_after_a_resume(tmp_path):
    options: dict[str, Any] = {
        "schedule_factors": {2: 0.5},
        "clip_value": 0.1,
    }

    def trainer(run_dir: str | None, **changes: Any) -> Trainer:
        return Trainer(
            Quadratic(2, 4),
            FixedTasks([quadratic_task(0)]),
            ITD(inner_steps=2),
            outer_optimizer=OuterOptimizer(
                "sgd", 0.1, schedule="piecewise", **{**options, **changes}
            ),
            run_dir=run_dir,
            quiet=True,
        )

    whole = trainer(None)
    whole.fit(4)
    trainer(str(tmp_path)).fit(2)
    again = trainer(str(tmp_path))
    again.restore()
    again.fit(4)
    assert torch.equal(again.outer["x"], whole.outer["x"])
    with pytest.raises(CheckpointError, match="schedule_factors"):
        trainer(str(tmp_path), schedule_factors={3: 0.5}).restore()
